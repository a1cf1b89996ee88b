"""Which of the scores learn: all, those of the first stages, or a share of them; the others stay as they begin."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..methods.topk import greatest

ALL = "all"
MOST = 0.9  # of the weights: a module that holds more is no stage, its children are


def parse_rule(rule: str) -> tuple[str, float]:
    """Return the kind of a rule and its number.

    Args:
        rule: "all", "first:STAGES", "random:SHARE" or "largest:SHARE".

    Raises:
        ConfigError: if it is none of these, or its number is impossible.
    """
    kind, _, text = rule.partition(":")
    try:
        number = float(text) if text else math.nan
    except ValueError:
        number = math.nan
    whole = kind == "first" and number >= 1 and number.is_integer()
    share = kind in ("random", "largest") and 0 < number <= 1
    if rule != ALL and not whole and not share:
        raise ConfigError(
            f"selective must be all, first:STAGES with a whole number, random:SHARE or largest:SHARE with a share "
            f"above 0 and at most 1; got {rule!r}"
        )
    return kind, number


def learning_weights(rule: str, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return which weights' scores learn, bool of each weight's shape, by name (Self-Masking Networks, appendix).

    Args:
        rule: as of `parse_rule`. "first": the weights of the first stages; "random": each with this probability, drawn
            from the seed; "largest": the share of every parameter that has the greatest absolute values.
        weights: in the order in which the model has them.

    Raises:
        ConfigError: if there are fewer stages.
    """
    kind, number = parse_rule(rule)
    if kind == "first":
        stages = model_stages({name: weight.numel() for name, weight in weights.items()})
        if number > len(stages):
            raise ConfigError(
                f"selective {rule!r} asks for {number:g} stages, the masked weights have {len(stages)}: "
                f"{', '.join(stages)}"
            )
        first = {name for members in list(stages.values())[: int(number)] for name in members}
        return {name: torch.full(weight.shape, name in first) for name, weight in weights.items()}
    if kind == "random":
        drawn = torch.Generator().manual_seed(seed)
        return {name: torch.rand(weight.shape, generator=drawn) < number for name, weight in weights.items()}
    if kind == "largest":
        return {name: _largest(weight.detach().cpu(), number) for name, weight in weights.items()}
    return {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}


def model_stages(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names of parameters by stage, in their order.

    Stages are the model's modules of the highest level, as `layer1`, … of a ResNet. A module with more than nine tenths
    of all weights is taken apart, as `blocks` of a vision transformer.

    Args:
        sizes: number of weights by dotted name, in the order in which the model has them.
    """
    stages = _children(list(sizes), "")
    while True:
        great = [s for s, names in stages.items() if sum(sizes[n] for n in names) > MOST * sum(sizes.values())]
        inner = _children(stages[great[0]], f"{great[0]}.") if great else {}
        if not great or stages[great[0]] == great:
            return stages
        at = list(stages).index(great[0])
        parts = list(stages.items())
        stages = dict([*parts[:at], *inner.items(), *parts[at + 1 :]])


def _children(names: Sequence[str], prefix: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(prefix + name.removeprefix(prefix).partition(".")[0], []).append(name)
    return found


def _largest(weight: Tensor, share: float) -> Tensor:
    return greatest(weight.abs().flatten(), round(share * weight.numel())).reshape(weight.shape)
