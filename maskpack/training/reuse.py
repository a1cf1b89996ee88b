"""Weights that a source does not need: found by a mask, and values learned in their place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..backbone.load import Backbone
from ..backbone.parameters import named_parameters
from ..data.base import Data
from ..errors import TrainingError
from ..mask import MaskSet, Op, PackedMask, mask_id
from ..methods.base import FINISHED, Method, State, build_method
from .borrow import borrowed
from .config import TrainConfig
from .learn import learn_scores
from .loop import TrainResult, train_mask
from .scored import attach, extract_masks

Start = Literal["source-start", "source-end", "random"]
STARTS: tuple[Start, ...] = get_args(Start)


@dataclass(frozen=True, eq=False)
class Reuse(Method):
    """Scores are values; the mask is given, and they are computed with where it does not keep the weight.

    No plug-in: it cannot be named, because it needs masks.

    Attributes:
        keep: a mask for each parameter, bool, in the order of their names.
    """

    id: ClassVar[str] = "reuse"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    op: ClassVar[Op] = "replace"

    keep: tuple[Tensor, ...]

    def init_scores(self, weight: Tensor) -> Tensor:
        return weight.detach().to(torch.float32, copy=True)

    def shared(self, scores: Sequence[Tensor], progress: float) -> Sequence[Tensor]:
        """Return the masks."""
        return self.keep

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        assert state.shared is not None
        return state.shared

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        # selected, not added: a kept weight has its bits, and its value has no gradient
        return torch.where(self.binarize(scores, state), weight, self.values(weight, scores))

    def values(self, weight: Tensor, scores: Tensor) -> Tensor:
        return scores.to(weight.dtype)


def current_values(backbone: Backbone, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of weights by name, on the CPU."""
    parameters = named_parameters(backbone.model)
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


def find_reuse(backbone: Backbone, source: Data, config: TrainConfig, **options: Any) -> MaskSet:
    """Learn a mask of a source network on the source, with its own head; op "replace", False where it can be reused.

    Args:
        options: `output`, `resume` and `report` as in `train_mask`.

    Raises:
        TrainingError: if the mask keeps every weight.
    """
    if build_method(config.method, dict(config.method_options)).learns:
        settings = replace(config, head_kind="own", bn="freeze")
        masks = train_mask(backbone, source, settings, longer=False, **options).parts.masks
    else:
        with borrowed(backbone):
            learn_scores(backbone, config)
            masks = extract_masks(backbone.model)
    if masks.kept == masks.total:
        raise TrainingError(
            f"the mask keeps all {masks.total} weights, so that none is left for the target; train it longer, with a "
            f"higher rate, or with method options that remove more"
        )
    return MaskSet({name: PackedMask(mask.bits, mask.shape, "replace") for name, mask in masks.items()})


def start_values(
    start: Start, before: Mapping[str, Tensor], after: Mapping[str, Tensor], seed: int
) -> Mapping[str, Tensor]:
    """Return the values that weights start the target from, by name.

    Args:
        before, after: the weights before and after the source was learned.
        seed: of what is drawn.
    """
    if start == "source-start":
        return before
    if start == "source-end":
        return after
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in sorted(before.items()):
        deviation = weight.double().std(correction=0)
        found[name] = (torch.randn(weight.shape, generator=generator) * deviation).to(weight.dtype)
    return found


def train_reused(
    backbone: Backbone, masks: MaskSet, values: Mapping[str, Tensor], target: Data, config: TrainConfig, **options: Any
) -> TrainResult:
    """Train values in the place of the weights that masks do not keep on the target, with a new optimiser.

    Args:
        values: to start from, of the shapes of the masks, by parameter name.
        config: with the rate of weights; `head_kind` "own" keeps the source's head, "linear" trains another.
        options: `output`, `resume` and `report` as in `train_mask`.
    """

    def learn(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        device = next(backbone.model.parameters()).device
        keep = tuple(mask.tensor().to(device) for mask in masks.values())
        scores = attach(backbone.model, Reuse(keep), list(masks), scale=False)
        with torch.no_grad():
            for name, own in scores.items():
                own.copy_(values[name])
        return scores

    # in the record, and what a checkpoint of another mask differs in
    config = replace(config, method=Reuse.id, method_options={"mask_id": mask_id({"default": masks})})
    return train_mask(backbone, target, config, learn=learn, longer=False, **options)
