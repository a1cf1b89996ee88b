"""Weights that a source does not need: found by a mask, and values learned in their place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Unpack, get_args

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..backbone.load import Backbone, export_state
from ..backbone.model import named_parameters
from ..backbone.select import select_parameters
from ..errors import ConfigError, TrainingError
from ..mask import MaskSet, Op, PackedMask, mask_id
from ..registry import Range
from .config import WEIGHT_LR, Start, TrainConfig
from .data.base import Data
from .learn import body_parameters, borrowed, learn_scores
from .methods.base import FINISHED, Method, State, build_method
from .own_loop import extract_masks
from .progress import shown
from .run_folder import RunOptions, check_parts, is_main_process, locked, part_options
from .scores import attach, scored_weights
from .trainer import TrainResult, as_backbone, train_dense, train_mask

STARTS: tuple[Start, ...] = get_args(Start)
SOURCE_FILE, RUNS = "source.safetensors", "training"  # in the output folder
SOURCE, MASK, TARGET, BASELINE = "source", "mask", "target", "baseline"  # runs


@dataclass(frozen=True, eq=False)
class Reuse(Method):
    """Scores are values; the mask is given, and they are computed with where it does not keep the weight.

    No plug-in: it cannot be named, because it needs masks.
    """

    id: ClassVar[str] = "reuse"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    op: ClassVar[Op] = "replace"

    keep: tuple[Tensor, ...]  # a mask for each parameter, in the order of their names

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


@dataclass(frozen=True, slots=True, eq=False)
class TransferResult(TrainResult):
    """The result of a transfer, ready for `save_adapter(path, result.parts, result.base, result.about)`.

    Its masks have op "replace": True where the source needs the weight, with values for the others.
    """

    backbone: Backbone  # the source network, in place of the one that was given: what the adapter goes onto
    baseline: Parts | None  # of plain fine-tuning, which keeps none of these weights, if it was asked for


@shown
def train_transfer(
    backbone: Backbone,
    source: Data,
    target: Data,
    config: TrainConfig | None = None,
    *,
    start: Start = "source-start",
    weight_lr: float | None = None,
    source_trained: bool = False,
    baseline: bool = False,
    **options: Unpack[RunOptions],
) -> TransferResult:
    """Carry a network from a source domain to a target domain: Differentiable Weight Masks for Domain Transfer.

    The body and a linear head learn the source. A mask is learned on the source alone, with this head, by the method of
    the settings. The weights that it does not keep start anew and learn the target, all others stay to the bit. Where
    the classes of both have the same names the head stays as well, else the target gets a head of its own.

    Args:
        backbone: with a head; it is changed, and is the source network afterwards.
        config: of all runs, with a mask method that says which weights to keep; `lr` is the rate of its scores. `bn` is
            that of the target's run: "freeze", the default here, leaves the source its statistics.
        start: of the weights that learn the target: their values before the source, after it, or drawn anew from a
            normal distribution with the standard deviation that the tensor had before the source.
        weight_lr: peak rate of weights, on source and target; None: 0.001 for Adam, 0.05 for SGD.
        source_trained: the backbone knows the source already, with its head; it stays as it is.
        baseline: fine-tune all these weights on the target as well, from their values after the source.
        options: as in `train_mask`. `output` gets `source.safetensors`, the source network (not if it was trained
            already), and in `training` a folder for each run. On resume what is finished is read back, and `start` and
            `baseline` may differ from the earlier call.

    Raises:
        ConfigError: if settings and backbone do not fit: see `check_transfer`.
        TrainingError: if the mask keeps every weight. StateError: if there is nothing to resume. Others: as
            `train_mask`.

    Example:
        source, target = load_data("digits:0-1"), load_data("digits:8-9")
        result = train_transfer(backbone, source, target, TrainConfig(steps=10, bn="freeze", method="topk"))
        save_adapter("./moved", result.parts, result.base, result.about)
    """
    config = TrainConfig(bn="freeze") if config is None else config
    backbone = as_backbone(backbone, config, source, target)
    check_transfer(backbone, source, config, start, source_trained, weight_lr)
    weights = of_weights(config, weight_lr)
    output = options.get("output")
    folder = None if output is None else Path(output)
    runs = None if folder is None else folder / RUNS
    check_parts(runs, options.get("resume", False))
    run = partial(part_options, options, runs)
    with locked(folder):
        names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
        before = current_values(backbone, names)
        if not source_trained:
            backbone = train_source(backbone, source, weights, **run(SOURCE))
            if folder is not None and is_main_process():
                export_state(folder / SOURCE_FILE, backbone.model)
        masks = find_reuse(backbone, source, config, **run(MASK))
        weights = replace(weights, head_kind="own" if source.class_names == target.class_names else "linear")
        after = current_values(backbone, names)
        values = start_values(start, before, after, config.seed)
        result = train_reused(backbone, masks, values, target, weights, **run(f"{TARGET}-{start}"))
        plain = None
        if baseline:
            none = {name: torch.zeros(mask.shape, dtype=torch.bool) for name, mask in masks.items()}
            all_free = MaskSet.from_tensors(none, op="replace")
            plain = train_reused(backbone, all_free, after, target, weights, **run(BASELINE)).parts
    facts = {
        "method": {"id": config.method, **config.method_options},
        "lr": config.lr,
        "start": start,
        "source": {"id": source.id, "digest": source.digest, "class_names": list(source.class_names)},
        "source_trained": source_trained,
    }
    about = replace(result.about, training={**(result.about.training or {}), "transfer": facts})
    return TransferResult(result.parts, result.base, about, result.metrics, backbone, plain)


def check_transfer(
    backbone: Backbone,
    source: Data,
    config: TrainConfig,
    start: str,
    source_trained: bool,
    weight_lr: float | None = None,
) -> None:
    """Raise ConfigError if the backbone has no head, or the settings do not tell what to keep, or contradict."""
    if start not in STARTS or (source_trained and start == "source-start"):
        known = STARTS[1:] if source_trained else STARTS
        why = " where the source was trained before" if source_trained else ""
        raise ConfigError(f"start must be one of {', '.join(known)}{why}, got {start!r}")
    of_weights(config, weight_lr)
    for name in ("objective", "head_kind", "scale", "train", "bytes_budget", "rate"):
        given, usual = getattr(config, name), getattr(TrainConfig(), name)
        if given != usual:
            raise ConfigError(
                f"{name} is {usual!r} in a transfer, got {given!r}: it is supervised, with the head of the source, all "
                f"that the source needs stays as it is, and values are most of what is stored; leave it out"
            )
    if backbone.head is None:
        raise ConfigError(
            f"{backbone.id} is an encoder without a head inside, which the source network needs; take a backbone with "
            f"one, or train a mask for the target"
        )
    if source_trained:
        advice = "give its weights, or train on the source first"
        backbone.head_for(len(source.class_names), "a backbone that was trained on the source has its head", advice)
    with borrowed(backbone):
        learn_scores(backbone, config)
        mask = next(iter(scored_weights(backbone.model).values())).mask()
    if mask.op == "flip" or mask.signs is not None:
        raise ConfigError(
            f"the method {config.method!r} changes signs, so its mask does not tell which weights the source needs; "
            f"take another, as naive, edit or gumbel"
        )


def of_weights(config: TrainConfig, weight_lr: float | None) -> TrainConfig:
    """Return settings whose `lr`, which is the scores', is the peak rate of weights; None: `WEIGHT_LR`."""
    if weight_lr is not None:
        Range(above=0).check("weight_lr", float(weight_lr))
    return replace(config, lr=WEIGHT_LR[config.optimizer] if weight_lr is None else weight_lr)


def train_source(backbone: Backbone, source: Data, config: TrainConfig, **options: Unpack[RunOptions]) -> Backbone:
    """Train the body and a linear head on the source, BatchNorm statistics too; return it under another name.

    The backbone is changed. `config` has the rate of weights; what it says of masks does not matter.
    """
    usual, device = TrainConfig(), next(backbone.model.parameters()).device
    # one source network serves several masks
    names = ("method", "method_options", "include", "exclude", "top", "selective")
    masks = {name: getattr(usual, name) for name in names}
    settings = replace(config, **masks, head_kind="linear", bn="adapt")
    train_dense(backbone, source, settings, lambda own, _: body_parameters(own), **options)
    backbone.model.to(device).eval()
    return replace(backbone, id=f"{SOURCE}:{backbone.id}", revision=None)


def current_values(backbone: Backbone, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of weights by name, on the CPU."""
    parameters = named_parameters(backbone.model)
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


def find_reuse(backbone: Backbone, source: Data, config: TrainConfig, **options: Unpack[RunOptions]) -> MaskSet:
    """Learn a mask of a source network on the source, with its own head; op "replace", False where it can be reused."""
    if build_method(config.method, dict(config.method_options)).learns:
        settings = replace(
            config, head_kind="own", bn="freeze", train=(), top=1.0 if config.top is None else config.top
        )
        # what the mask is worth on the source is not asked
        rows = replace(source, validation=None, test=None)
        masks = train_mask(backbone, rows, settings, longer=False, **options).parts.masks
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
    """Return the values that weights start the target from, by name, of those before and after the source."""
    if start != "random":
        return before if start == "source-start" else after
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in sorted(before.items()):
        deviation = weight.double().std(correction=0)
        found[name] = (torch.randn(weight.shape, generator=generator) * deviation).to(weight.dtype)
    return found


def train_reused(
    backbone: Backbone,
    masks: MaskSet,
    values: Mapping[str, Tensor],
    target: Data,
    config: TrainConfig,
    **options: Unpack[RunOptions],
) -> TrainResult:
    """Train values in the place of the weights that masks do not keep on the target, from `values` on.

    `config` has the rate of weights; its `head_kind` "own" keeps the source's head, "linear" trains another.
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
    options_of_mask = {"mask_id": mask_id({"default": masks})}
    config = replace(config, method=Reuse.id, method_options=options_of_mask, top=1.0, train=())
    return train_mask(backbone, target, config, learn=learn, longer=False, **options)
