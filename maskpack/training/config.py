"""The settings of a training run: the one configuration class."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..preprocess import AUGMENTS, Augment
from ..registry import check_above_zero

ALL = "all"  # of the scores learn
GATE_START = 2.0  # of every logit: a gate of 0.88, whose slope is 0.42 of the greatest; chosen in docs/methods.md
WEIGHT_LR = {"sgd": 0.05, "adam": 1e-3}  # the usual peak rates of weights, by optimiser
Mode = Literal["sequential", "gated", "shared", "separate"]
Start = Literal["source-start", "source-end", "random"]

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adam"),
    "schedule": ("cosine", "constant"),
    "precision": ("no", "bf16", "fp16"),
    "bn": ("adapt", "freeze"),
    "head_kind": ("linear", "masked", "text", "own"),
    "augment": AUGMENTS,
}


@dataclass(frozen=True)
class TrainConfig:
    """How a mask is trained.

    Attributes:
        method, method_options: how scores become a mask (`maskpack list methods`).
        objective, objective_options: what the scores are trained on (`maskpack list objectives`); "self-supervised" is
            the one without labels for the backbone's task.
        include, exclude: globs of the parameters to mask; default: every convolution and linear weight of the body.
        selective: which scores learn, as of `selective.learning_weights`; the others keep their weights.
        train: globs of parameters that learn themselves, as norms and biases, at the rate of heads; stored whole.
        bytes_budget: most bytes that the masks' payloads may take, in the profile "default". rate: the same in bits a
            weight. None: no limit.
        scale: divide the kept weights by sqrt(density), per parameter.
        head_kind: "linear" is trained and stored whole; "masked" is random, with scores of its own, and stored as seed
            and mask; "text" is made of a CLIP-like backbone's text embeddings and frozen; "own" is the model's, frozen.
        head_template: of a text head: text in which `{label}` stands for the name of a class.
        bn: "adapt" lets BatchNorm statistics follow the new data and stores them; "freeze" leaves them.
        epochs: passes over the training rows. steps: optimiser steps in place of epochs, or None.
        batch_size: examples per forward pass and process. accumulate: forward passes per optimiser step.
        optimizer: "sgd" (momentum 0.9) or "adam", for scores and head.
        lr, head_lr: peak learning rates of scores and trained head; None: 50 and 0.1 for SGD, 0.02 and 0.01 for Adam.
        schedule: "cosine" to zero, or "constant". warmup: share of the steps in which the rate rises from zero.
        clip: largest gradient norm per step over all trained tensors, or None.
        label_smoothing: share of the target probability spread over all classes.
        precision: mixed precision of the forward pass. Scores are float32 always.
        augment: of training images: "none", "crop", "flip", "crop-flip".
        workers: processes that read the data; 0 reads in the training process.
        seed: of everything random.
    """

    method: str = "threshold"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "supervised"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    selective: str = ALL
    train: tuple[str, ...] = ()
    bytes_budget: int | None = None
    rate: float | None = None
    scale: bool = False
    head_kind: Literal["linear", "masked", "text", "own"] = "linear"
    head_template: str = "This is a photo of a {label}"
    bn: Literal["adapt", "freeze"] = "adapt"
    epochs: int = 10
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    optimizer: Literal["sgd", "adam"] = "adam"
    lr: float | None = None
    head_lr: float | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    clip: float | None = None
    label_smoothing: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    augment: Augment = "crop-flip"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        parse_rule(self.selective)
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        positive = ("lr", "head_lr", "clip", "bytes_budget", "rate")
        check_above_zero(self, *(name for name in positive if getattr(self, name) is not None))
        if self.bytes_budget is not None and self.rate is not None:
            raise ConfigError(
                f"bytes_budget {self.bytes_budget} and rate {self.rate} both limit the size of the masks; give one"
            )
        for name in ("warmup", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if "{label}" not in self.head_template:
            raise ConfigError(f"head_template must have {{label}} in it for the class, got {self.head_template!r}")
        if self.workers < 0:
            raise ConfigError(f"workers must be 0 or more, got {self.workers}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 4294967295, got {self.seed}")

    @property
    def score_lr(self) -> float:
        """Peak learning rate of the scores."""
        return self.lr if self.lr is not None else {"sgd": 50.0, "adam": 0.02}[self.optimizer]

    @property
    def linear_lr(self) -> float:
        """Peak learning rate of a trained head."""
        return self.head_lr if self.head_lr is not None else {"sgd": 0.1, "adam": 0.01}[self.optimizer]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, defaults resolved."""
        return {
            **asdict(self),
            "method_options": dict(self.method_options),
            "objective_options": dict(self.objective_options),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "train": list(self.train),
            "lr": self.score_lr,
            "head_lr": self.linear_lr,
        }


@dataclass(frozen=True)
class JointConfig:
    """How weights learn together with gates, beside `TrainConfig`, whose `lr` is for scores.

    Attributes:
        weight_lr: peak learning rate of the weights; None: 0.05 for SGD, 0.001 for Adam.
        gate_factor: gates learn at this times the rate of the weights; None: 4 times the number of tasks.
        gate_start: of every logit; the smaller, the sooner gates close.
        r1, r2: strength of the two regularisers, sum exp(-|l|) and sum exp(-l^2) over a task's logits.
    """

    weight_lr: float | None = None
    gate_factor: float | None = None
    gate_start: float = GATE_START
    r1: float = 0.0
    r2: float = 0.0

    def __post_init__(self) -> None:
        check_above_zero(self, *(n for n in ("weight_lr", "gate_factor", "gate_start") if getattr(self, n) is not None))
        for name in ("r1", "r2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def to_json(self, optimizer: str, tasks: int) -> dict[str, Any]:
        """Return the settings as JSON values, defaults resolved."""
        lr = WEIGHT_LR[optimizer] if self.weight_lr is None else self.weight_lr
        factor = 4.0 * tasks if self.gate_factor is None else self.gate_factor
        return {**asdict(self), "weight_lr": lr, "gate_factor": factor}


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


def read_config(path: str | Path) -> dict[str, Any]:
    """Read settings from a TOML file whose keys are the names of the command line's options.

    Raises:
        ConfigError: if the file is missing or is not TOML.
    """
    try:
        with Path(path).open("rb") as stream:
            return {key.replace("-", "_"): value for key, value in tomllib.load(stream).items()}
    except OSError as error:
        raise ConfigError(f"cannot read the settings in {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the settings in {path} are not TOML: {error}") from error


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Make a TrainConfig from plain values, as read from TOML or a checkpoint.

    Raises:
        ConfigError: if a name is unknown or a value has the wrong type.
    """
    known = {field.name: field for field in fields(TrainConfig)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ConfigError(f"unknown settings: {', '.join(unknown)}; known: {', '.join(known)}")
    settings: dict[str, Any] = {}
    for name, value in values.items():
        default = getattr(TrainConfig(), name)
        if isinstance(default, tuple):
            value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        if not isinstance(value, _accepted(name, default)) or (
            isinstance(value, bool) and not isinstance(default, bool)
        ):
            raise ConfigError(f"{name} cannot be {value!r}, a {type(value).__name__}")
        settings[name] = value
    return TrainConfig(**settings)


def _accepted(name: str, default: Any) -> tuple[type, ...]:
    """The types that a setting may have."""
    if default is None:
        return (int, type(None)) if name in ("steps", "bytes_budget") else (int, float, type(None))
    return (int, float) if isinstance(default, float) else (type(default),)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, then a half cosine to zero, or constant."""
    warm = round(config.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
