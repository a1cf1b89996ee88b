"""What learns in a backbone: scores of selected weights, and parameters themselves."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..backbone.classifier import modes_kept
from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone
from ..backbone.model import Fingerprint, inside, named_buffers, named_parameters, swap_module, unwrap
from ..backbone.select import match_parameters, select_parameters
from ..errors import ConfigError
from .config import ALL, TrainConfig, parse_rule
from .methods.base import build_method
from .methods.topk import greatest
from .scores import attach, detach_scores, owner, scored_weights
from .stored import beside_masks

Learn = Callable[[Backbone, TrainConfig], Mapping[str, nn.Parameter]]
WORDS = frozenset(("norms", "biases", "none"))  # that stand for parameters that learn themselves
CONVOLUTIONS = nn.modules.conv._ConvNd
MOST = 0.9  # of the weights: a module that holds more is no stage, its children are


def base_of(backbone: Backbone) -> Fingerprint:
    """Return the fingerprint of a backbone as it is now."""
    return fingerprint(backbone.model, id=backbone.id, revision=backbone.revision, head=backbone.outside)


def body_parameters(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Return the parameters of the body by name."""
    return {name: one for name, one in backbone.model.named_parameters() if not inside(name, backbone.outside)}


def trained_themselves(
    model: nn.Module, train: Iterable[str], masked: Collection[str], head: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the parameters that learn themselves beside scores, by name; to be asked before scores are attached.

    `train` is as of `learning_names`; its words leave masked parameters out, and a glob for one is a ConfigError.
    """
    globs = [one for one in train if one not in WORDS]
    both = [name for name in match_parameters(model, globs, head) if name in masked]
    if both:
        raise ConfigError(
            f"train would train {len(both)} parameters that are masked, first {both[0]!r}; a mask needs frozen "
            f"weights: leave them out of train, or out of the mask"
        )
    parameters = named_parameters(model)
    return {name: parameters[name] for name in learning_names(model, train, head) if name not in masked}


def learning_names(model: nn.Module, train: Iterable[str], head: Sequence[str] = ()) -> list[str]:
    """Return the names of the body's parameters that `train` means, sorted: globs, and words.

    "norms" are scales and shifts of all normalisation layers, "biases" those of all layers; a model may have none.
    """
    words = set(train)
    found = set(match_parameters(model, sorted(words - WORDS), head))
    norms = [n for n, module in unwrap(model).named_modules() if "norm" in type(module).__name__.lower()]
    for name in match_parameters(model, ["*"], head):
        place, _, leaf = name.rpartition(".")
        if ("norms" in words and place in norms) or ("biases" in words and leaf.endswith("bias")):
            found.add(name)
    return sorted(found)


@contextmanager
def borrowed(backbone: Backbone, norms: bool = False) -> Iterator[None]:
    """Restore on exit: scores detached, and head, buffers, `requires_grad`, device, layout and modes as before.

    With `norms` the parameters of normalisation layers too, which `settle` writes.
    """
    model = backbone.model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = beside_masks(model) if norms else {n: b.detach().clone() for n, b in named_buffers(model).items()}
    device, contiguous = next(model.parameters()).device, all(one.is_contiguous() for one in convolutions(model))
    head = model.get_submodule(backbone.head) if backbone.head is not None else None
    try:
        with modes_kept(model):
            yield
    finally:
        detach_scores(model)
        if backbone.head is not None and head is not None:
            swap_module(model, backbone.head, head)
        model.to(device)
        with torch.no_grad():
            tensors = {**named_parameters(model), **named_buffers(model)}
            for name, tensor in before.items():
                tensors[name].copy_(tensor)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
            p.grad = None
        if contiguous:
            lay_out(model, torch.contiguous_format)


def convolutions(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of two-dimensional convolutions, and scores of theirs."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return [parameter for layer in layers for parameter in layer.parameters() if parameter.dim() == 4]


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Change the layout of the weights of two-dimensional convolutions.

    With `torch.channels_last` a step of EfficientNet-Lite0 takes half the time on a CPU. Outputs differ in last bits.
    """
    for weight in convolutions(model):
        weight.data = weight.data.contiguous(memory_format=memory_format)


def resolved(config: TrainConfig, backbone: Backbone) -> TrainConfig:
    """Return settings with the defaults that follow from a backbone."""
    decided = config.top is not None and config.bn is not None
    return config if decided else config.resolved(*masked_sizes(config, backbone), backbone.task)


def masked_sizes(config: TrainConfig, backbone: Backbone) -> tuple[int, int]:
    """Return the number of weights that the settings select for a mask, and the number of these in convolutions."""
    parameters = named_parameters(backbone.model)
    names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    sizes = {name: parameters[name].numel() for name in names}
    convolutional = (n for n in names if isinstance(owner(backbone.model, n)[0], CONVOLUTIONS))
    return sum(sizes.values()), sum(sizes[name] for name in convolutional)


def learn_scores(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
    """Attach scores to the weights that the settings select, beside `config.beside`; return the scores by name."""
    config, model = resolved(config, backbone), backbone.model
    names = select_parameters(model, config.include, config.exclude, backbone.outside)
    weights = {name: weight for name, weight in model.named_parameters() if name in names}
    learning = {} if config.selective == ALL else learning_weights(config.selective, weights, config.seed)
    share = None if config.top == 1 else config.top
    method = build_method(config.method, dict(config.method_options))
    beside = trained_themselves(model, config.beside, names, backbone.outside)
    scores = attach(model, method, names, config.scale, share, beside=beside)
    scored = scored_weights(model)
    for name, learns in learning.items():
        if scores[name].shape != learns.shape or not scored[name].binary().all():
            raise ConfigError(
                f"selective {config.selective!r} leaves the other scores as they begin, and those of the method "
                f"{config.method!r} do not begin with every weight kept; take the method threshold, gumbel or flip"
            )
        # no optimiser here moves a score whose gradient is zero
        only = partial(torch.where, learns.to(scores[name].device), other=0.0)
        scores[name].register_hook(only)  # type: ignore[no-untyped-call]
    return scores


def learning_weights(rule: str, weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return the weights whose scores learn, bool of each weight's shape, by name (Self-Masking Networks, appendix).

    "first": the weights of the first stages, in the order in which the model has them; "random": each with this
    probability; "largest": the share of every parameter that has the greatest absolute values.
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
        sizes = {name: weight.detach().cpu().abs() for name, weight in weights.items()}
        return {name: greatest(s.flatten(), round(number * s.numel())).reshape(s.shape) for name, s in sizes.items()}
    return {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}


def model_stages(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names of parameters by stage, in their order.

    Stages are the model's modules of the highest level, as `layer1`, … of a ResNet. A module with more than nine tenths
    of all weights (`sizes`) is taken apart, as `blocks` of a vision transformer.
    """
    stages = _children(list(sizes), "")
    while True:
        totals = {stage: sum(sizes[name] for name in members) for stage, members in stages.items()}
        great = max(totals, key=lambda stage: totals[stage])
        if totals[great] <= MOST * sum(sizes.values()) or stages[great] == [great]:
            return stages
        stages = {
            name: own
            for stage, members in stages.items()
            for name, own in (_children(members, f"{stage}.") if stage == great else {stage: members}).items()
        }


def _children(names: Sequence[str], prefix: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(prefix + name.removeprefix(prefix).partition(".")[0], []).append(name)
    return found
