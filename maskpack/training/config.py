"""The settings of training. The options of the command line and their documentation are made from these classes."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import ConfigError
from ..preprocess import Augment
from ..registry import Count, NonNegative, Number, Options, PartShare, Positive, Range, Share, check_fields

SMALL = 1_000_000  # most weights of a network with other defaults; chosen in docs/results/defaults.md, as these are
TOP = 0.1  # of the weights of a parameter have scores in a larger network, unless most weights are of convolutions
SMALL_RATE, RATE = 0.1, 0.05  # of the scores, with adam
DISTANCE = 2.0  # that scores can move at least
LANGUAGE_TOP = 0.02  # the same for language models; chosen in docs/language-models.md, as the next
LANGUAGE_STEPS = 15  # the distance of their scores is the root of the number of steps over this
ALL = "all"  # of the scores learn
GATE_START = 2.0  # of every logit: a gate of 0.88, whose slope is 0.42 of the greatest; chosen in docs/methods.md
WEIGHT_LR = {"sgd": 0.05, "adam": 1e-3}  # the usual peak rates of weights, by optimiser
# settings that differ from the defaults, by the name of the recipe
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # Self-Masking Networks (https://arxiv.org/abs/2409.07577), section 4.1: masks of ResNets with labels
    "source": {
        "top": 1.0,
        "train": ("none",),
        "scale": True,
        "bn": "adapt",
        "head_kind": "masked",
        "epochs": 150,
        "optimizer": "sgd",
        "lr": 50.0,
        "warmup": 40 / 150,
    },
    "text-generation": {"epochs": 1, "batch_size": 8, "train_lr": 3e-3},  # `maskpack train --task` takes it
}
Bytes = Annotated[int, "bytes", Range(above=0)]  # the command line reads 200kB and 1.5MB as well
Mode = Literal["sequential", "gated", "shared", "separate"]
Statistics = Literal["adapt", "freeze"]
Start = Literal["source-start", "source-end", "random"]
Store = Literal["coded", "float16", "float32"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training of a mask.

    Mask:
        method: how scores become a mask: `maskpack list methods`.
        method_options: options of the method.
        objective: what the scores are trained on: `maskpack list objectives`.
        objective_options: options of the objective.
        include: globs of the parameters to mask. Default: every convolution and linear weight of the body.
        exclude: globs of parameters that get no mask.
        top: share of each masked parameter's weights that have scores, those with the greatest absolute values; the
            others are kept, and take no memory; 0: none, so that norms and head learn alone. Default: 0.1, or 0.02 of
            language models, with labels, over a million masked weights, most of them not of convolutions, and a method
            that allows it; else 1.
        selective: which scores learn: all, first:STAGES, random:SHARE or largest:SHARE.
        train: what learns itself beside the scores: norms, biases, none, or globs of parameters of the body. Default:
            norms with labels, else none.
        scale: divide kept weights by sqrt(density), per parameter.
        bytes_budget: most bytes of the masks, as in 200kB, in the profiles default and max. Default: no limit.
        rate: the same in bits per weight.
        bn: BatchNorm statistics: adapt to the new data, and store them, or freeze. Default: freeze with labels and
            over a million masked weights, else adapt.

    Head:
        head_kind: linear: trained and stored whole. masked: random, with scores of its own, stored as seed and mask.
            text: text embeddings of a CLIP-like backbone, frozen. own: the model's, frozen.
        head_start: first values of a linear head. plain: random, or class centroids behind a text encoder. probe: the
            linear probe of the raw backbone.
        head_template: text in which {label} stands for the name of a class, for a text head.

    Training:
        epochs: passes over the training rows.
        steps: optimiser steps, in place of epochs.
        batch_size: examples per forward pass and process.
        accumulate: forward passes per optimiser step.
        optimizer: optimiser of scores and head; sgd has momentum 0.9.
        lr: peak learning rate of the scores. Default: 0.05 for adam, or 0.1 with labels and up to a million masked
            weights, or more where distance needs it; 50 for sgd.
        distance: sum of the learning rates of all steps, which is how far a score can move under adam; it begins 1
            above the threshold. Default: 2, or more where lr's default is; of language models sqrt(steps / 15).
        head_lr: peak learning rate of a linear head. Default: 0.01 for adam, 0.1 for sgd.
        train_lr: peak learning rate of `train`. Default: that of a linear head.
        schedule: learning rate after the warmup: cosine falls to zero.
        warmup: share of the steps in which the learning rate rises from zero.
        clip: largest gradient norm per step, over all that is trained. Default: no limit.
        label_smoothing: share of the target probability that is spread over all classes.
        precision: mixed precision of the forward pass; scores are float32 always.
        augment: changes of training images.
        workers: processes that read the data; 0 reads in the training process.
        store: how norms, statistics and head are stored; accuracies are those of what is stored. coded: norms as steps
            of 2 % from the base's, the head in 129 values a row. float16, float32: as numbers of that kind.
        seed: seed of everything random.

    Example:
        config = TrainConfig(steps=20, method="topk", method_options={"share": 0.5}, train=["norms"])
    """

    method: str = "threshold"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "supervised"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    top: Share | None = None
    selective: str = ALL
    train: tuple[str, ...] | None = None
    bytes_budget: Bytes | None = None
    rate: Positive | None = None
    scale: bool = False
    head_kind: Literal["linear", "masked", "text", "own"] = "linear"
    head_start: Literal["plain", "probe"] = "plain"
    head_template: str = "This is a photo of a {label}"
    bn: Statistics | None = None
    epochs: Count = 10
    steps: Count | None = None
    batch_size: Count = 64
    accumulate: Count = 1
    optimizer: Literal["sgd", "adam"] = "adam"
    lr: Positive | None = None
    distance: Positive | None = None
    head_lr: Positive | None = None
    train_lr: Positive | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: PartShare = 0.1
    clip: Positive | None = None
    label_smoothing: PartShare = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    augment: Augment = "crop-flip"
    workers: Number = 0
    store: Store = "coded"
    seed: Annotated[int, Range(least=0, below=2**32)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        parse_rule(self.selective)
        if self.bytes_budget is not None and self.rate is not None:
            raise ConfigError(
                f"bytes_budget {self.bytes_budget} and rate {self.rate} both limit the size of the masks; give one"
            )
        if self.top is not None and self.top < 1 and (self.selective != ALL or self.scale):
            raise ConfigError(
                f"top {self.top} gives scores to some weights only; leave out selective and scale, which are for "
                f"scores of all weights"
            )
        if "{label}" not in self.head_template:
            raise ConfigError(f"head_template must have {{label}} in it for the class, got {self.head_template!r}")

    @property
    def labels(self) -> bool:
        """True if the scores are trained on labels."""
        if self.objective == "supervised":
            return True
        from .objectives.base import OBJECTIVES  # imports torch, which the command line's help does without

        return self.objective in OBJECTIVES and OBJECTIVES[self.objective].needs_labels

    def resolved(self, weights: int, convolutional: int, task: str | None = None) -> "TrainConfig":
        """Return the settings with the defaults that follow from a backbone.

        Args:
            weights: number of its masked weights. convolutional: how many of them are of convolutions. task: its task.
        """
        from .methods.base import METHODS  # imports torch, which the command line's help does without

        small = weights <= SMALL
        some = self.labels and not small and 2 * convolutional < weights and self.selective == ALL and not self.scale
        top = self.top
        if top is None:
            some = some and METHODS[self.method].rising and METHODS[self.method].partial
            usual = LANGUAGE_TOP if task == "text-generation" else TOP
            top = usual if some else 1.0
        bn: Statistics = "adapt" if small or not self.labels else "freeze"
        return replace(self, top=top, bn=bn if self.bn is None else self.bn)

    @property
    def beside(self) -> tuple[str, ...]:
        """The parameters that learn themselves beside the scores, as in `train`."""
        return (("norms",) if self.labels else ()) if self.train is None else self.train

    def score_lr(self, steps: int, weights: int, task: str | None = None) -> float:
        """Return the peak learning rate of the scores in a run of so many steps, with so many masked weights.

        The signs of gradients of a language model are mostly chance, so that what they add up to grows as the root of
        the number of steps; as much is what a weight has to have against it.
        """
        if self.lr is not None:
            return self.lr
        if self.optimizer == "sgd":
            return 50.0
        whole = sum(learning_rate(self, step, steps) for step in range(steps))
        if self.distance is not None:
            return self.distance / whole
        if task == "text-generation":
            return math.sqrt(steps / LANGUAGE_STEPS) / whole
        least = DISTANCE / whole
        return max(least, SMALL_RATE if weights <= SMALL and self.labels else RATE)

    @property
    def linear_lr(self) -> float:
        """Peak learning rate of a trained head."""
        return self.head_lr if self.head_lr is not None else {"sgd": 0.1, "adam": 0.01}[self.optimizer]

    @property
    def beside_lr(self) -> float:
        """Peak learning rate of what learns itself beside the scores."""
        return self.train_lr if self.train_lr is not None else self.linear_lr

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, defaults resolved but those that follow from steps or backbone."""
        return {
            **asdict(self),
            "method_options": dict(self.method_options),
            "objective_options": dict(self.objective_options),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "train": list(self.beside),
            "head_lr": self.linear_lr,
            "train_lr": self.beside_lr,
        }


@dataclass(frozen=True)
class JointConfig(Options):
    """Settings of weights that learn together, with gates, beside those of `TrainConfig`, whose `lr` is for scores.

    Many tasks:
        weight_lr: peak learning rate of the weights, not for sequential. Default: 0.001 for adam, 0.05 for sgd.
        gate_factor: for gated: gates learn at this times the rate of the weights. Default: 4 times the number of tasks.
        gate_start: for gated: first value of every logit; the smaller, the sooner gates close.
        r1: for gated: strength of the regulariser sum exp(-|l|) over a task's logits.
        r2: for gated: strength of the regulariser sum exp(-l^2) over a task's logits.
    """

    weight_lr: Positive | None = None
    gate_factor: Positive | None = None
    gate_start: Positive = GATE_START
    r1: NonNegative = 0.0
    r2: NonNegative = 0.0

    def to_json(self, optimizer: str, tasks: int) -> dict[str, Any]:
        """Return the settings as JSON values, defaults resolved."""
        lr = WEIGHT_LR[optimizer] if self.weight_lr is None else self.weight_lr
        factor = 4.0 * tasks if self.gate_factor is None else self.gate_factor
        return {**asdict(self), "weight_lr": lr, "gate_factor": factor}


def parse_rule(rule: str) -> tuple[str, float]:
    """Return the kind of a rule for the scores that learn, and its number.

    Args:
        rule: "all", "first:STAGES", "random:SHARE" or "largest:SHARE".
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


def read_config(path: str | Path) -> dict[str, Any]:
    """Read settings from a TOML file whose keys are the names of the command line's options."""
    try:
        with Path(path).open("rb") as stream:
            return {key.replace("-", "_"): value for key, value in tomllib.load(stream).items()}
    except OSError as error:
        raise ConfigError(f"cannot read the settings in {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the settings in {path} are not TOML: {error}") from error


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Make a TrainConfig from plain values, as read from TOML or a checkpoint; an unknown name is a ConfigError."""
    known = [one.name for one in fields(TrainConfig)]
    if unknown := sorted(values.keys() - set(known)):
        raise ConfigError(f"unknown settings: {', '.join(unknown)}; known: {', '.join(known)}")
    globs = {name: values[name] for name in ("include", "exclude", "train") if isinstance(values.get(name), str | list)}
    whole = {name: (one,) if isinstance(one, str) else tuple(one) for name, one in globs.items()}
    return TrainConfig(**{**values, **whole})


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, then a half cosine to zero, or constant."""
    warm = round(config.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
