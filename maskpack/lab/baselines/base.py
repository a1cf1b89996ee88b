"""The contract of a baseline.

A baseline is a class in a file of this folder with `id`, `reference`, `argument`, `needs_labels`, `seeded` and `rates`.
Its `fit` runs in a process of its own, with a backbone that nobody else uses. Splits, seeds, the choice of learning
rates and all measurements are in `lab.trial` and `lab.comparison`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from ...backbone.classifier import Classifier, Inputs, embed_batch, to_device
from ...backbone.load import Backbone
from ...errors import ConfigError
from ...registry import Registry
from ...training.config import TrainConfig
from ...training.data.base import Data
from ...training.features import Probe, embed
from ...training.run_folder import Report

Predict = Callable[[Inputs], Tensor]
Rates: TypeAlias = Mapping[str, tuple[float, ...]]  # learning rates to choose from, by optimiser


@dataclass(frozen=True)
class Trial:
    """A task that a baseline solves.

    Attributes:
        backbone: to be used up.
        data: its training split are the rows whose labels may be used; there is no other split.
        unlabelled: all training rows, without class names.
        folder: of this trial, for checkpoints; a training that is there goes on.
    """

    backbone: Backbone
    data: Data
    unlabelled: Data
    config: TrainConfig
    folder: Path
    report: Report

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.data.class_names)

    def settings(self, objective: str) -> TrainConfig:
        """Return the settings with this objective; objective options are for self-supervised training only."""
        options = self.config.objective_options if objective != "supervised" else {}
        return replace(self.config, objective=objective, objective_options=options)

    def embed(self) -> tuple[Tensor, Tensor]:
        """Return features, (N, D), and labels, (N,), of the training split, by the backbone as it is now."""
        assert self.data.train is not None
        # not cached: the time is measured
        return embed(self.backbone, self.data.train, batch_size=self.config.batch_size, cache=False)

    def features(self, inputs: Inputs) -> Tensor:
        """Return features of a batch by the backbone as it is now, (B, D) float32 on the CPU."""
        return embed_batch(self.backbone.model, self.backbone.embedding, inputs)

    def probed(self, probe: Probe) -> Predict:
        """Return a function from a batch to the logits of a probe, on features by the backbone as it is then."""
        return lambda inputs: probe.logits(self.features(inputs))


@dataclass(frozen=True)
class Fitted:
    """A fitted baseline.

    Attributes:
        predict: from a batch of preprocessed inputs to scores of the classes, (B, classes) float32 on the CPU.
        trained: number of trained parameters, heads and scores included. steps: of the optimiser.
        sizes: bytes to store beside the backbone, by role; those of the head under "head".
        controls: by name, other networks of the same training, to compare with. note: to stand beside the name.
    """

    predict: Predict
    trained: int
    sizes: Mapping[str, int]
    steps: int = 0
    controls: Mapping[str, "Fitted"] = field(default_factory=dict)
    note: str = ""


class Baseline(ABC):
    """A way to solve the task. `given` is the argument behind the colon of the name, as "8" in "lora:8", or None.

    Attributes:
        argument: what may stand behind a colon, as "rank"; None: nothing.
        needs_labels: whether training does; without, it is done once for all shares of the labels.
        seeded: whether the seed matters where all labels are used.
        rates: learning rates to choose from, by optimiser; empty: it has none.
    """

    id: ClassVar[str]
    reference: ClassVar[str]
    argument: ClassVar[str | None] = None
    needs_labels: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    rates: ClassVar[Rates] = {}

    def __init__(self, given: str | None = None):
        if given is not None and self.argument is None:
            raise ConfigError(f"the baseline {self.id!r} takes nothing behind a colon, got {given!r}")
        self.given = given

    def number(self, default: int, least: int) -> int:
        """Return the argument as a number, which must be at least `least`."""
        if self.given is None:
            return default
        if not (self.given.isascii() and self.given.isdigit()) or int(self.given) < least:
            raise ConfigError(
                f"the baseline {self.id!r} takes a {self.argument} of at least {least} behind the colon, as in "
                f"{self.id}:{default}; got {self.given!r}"
            )
        return int(self.given)

    def check(self, backbone: Backbone, config: TrainConfig) -> None:  # noqa: B027
        """Check that the baseline is possible for a backbone; raises maskpack errors."""

    @abstractmethod
    def fit(self, trial: Trial) -> Fitted:
        """Solve the task of a trial."""


BASELINES: Registry[Baseline] = Registry("baseline", "maskpack.lab.baselines")


def find_baseline(name: str) -> Baseline:
    """Return the baseline called "id" or "id:argument"."""
    own, mark, given = name.partition(":")
    return BASELINES[own](given if mark else None)


def classified(classifier: Classifier) -> Predict:
    """Return a function from a batch to the logits of a classifier, computed on its own device."""
    device = classifier.linear.weight.device

    def predict(inputs: Inputs) -> Tensor:
        logits: Tensor = classifier(to_device(inputs, device))
        return logits.float().cpu()

    return predict


def parameters(*tensors: Any) -> int:
    """Return the number of entries of tensors, None counting nothing."""
    return sum(one.numel() for one in tensors if one is not None)
