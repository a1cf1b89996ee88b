"""The contract of a row of a comparison.

A row is a class in a file of this folder with `id`, `reference`, `argument`, `needs_labels`, `seeded` and `rates`. Its
`fit` is run in a process of its own, with a backbone that nobody else uses. Splits, seeds, the choice of learning rates
and all that is measured exist once, in `evaluate.trial` and `evaluate.compare`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...adapter.content import About, Cascade, Parts
from ...adapter.describe import describe
from ...adapter.read import Adapter
from ...adapter.write import save_adapter
from ...backbone.classifier import Classifier, Inputs, embeddings, example_count, to_device
from ...backbone.load import Backbone
from ...backbone.model import Fingerprint
from ...errors import ConfigError
from ...registry import Registry
from ...training.batchnorm import batchnorm_statistics
from ...training.checkpoint import FILE
from ...training.config import TrainConfig
from ...training.data.base import Data
from ...training.features import embed
from ...training.learn import Learn
from ...training.run_folder import Report
from ...training.trainer import TrainResult, train_dense, train_mask

Predict = Callable[[Inputs], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """What a row is fitted to.

    Attributes:
        backbone: to be used up.
        data: its training split are the rows whose labels may be used; there is no other split.
        unlabelled: all training rows, without class names.
        config: with the seed and the learning rate of the trial.
        folder: of this trial, for checkpoints; what lies there is to be continued.
        report: gets the events of training.
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

    def embed(self) -> tuple[Tensor, Tensor]:
        """Return features, (N, D), and labels, (N,), of the training split, by the backbone as it is now."""
        assert self.data.train is not None
        # not cached: the time is measured
        return embed(self.backbone, self.data.train, batch_size=self.config.batch_size, cache=False)

    def features(self, inputs: Inputs) -> Tensor:
        """Return features of a batch by the backbone as it is now, (B, D) float32 on the CPU."""
        count = example_count(inputs)
        return embeddings(self.backbone, [(inputs, torch.zeros(count, dtype=torch.long))])[0]


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What came of it.

    Attributes:
        predict: from a batch of preprocessed inputs to scores of the classes, (B, classes) float32 on the CPU.
        trained: numbers that training changed, heads included; a score is one.
        sizes: bytes to store beside the backbone, by what they are; those of the head under "head".
        steps: optimiser steps.
        controls: what the row is to be compared with, made from the same training, by name.
    """

    predict: Predict
    trained: int
    sizes: Mapping[str, int]
    steps: int = 0
    controls: Mapping[str, "Fitted"] = field(default_factory=dict)


class Row(ABC):
    """A way to solve the task.

    Args:
        argument: what stands behind the colon of the row's name, as "8" in "lora:8"; None without one.

    Attributes:
        argument: what may stand behind a colon, as in "rank"; None: nothing.
        needs_labels: whether training does; without, it is done once for all shares of the labels.
        seeded: whether the seed matters where all labels are used.
        rates: learning rates to choose from, by optimiser; empty: it has none.
    """

    id: ClassVar[str]
    reference: ClassVar[str]
    argument: ClassVar[str | None] = None
    needs_labels: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = {}

    def __init__(self, given: str | None = None):
        if given is not None and self.argument is None:
            raise ConfigError(f"the row {self.id!r} takes nothing behind a colon, got {given!r}")
        self.given = given

    def number(self, default: int, least: int) -> int:
        """Return the argument as a number.

        Raises:
            ConfigError: if it is none, or less than `least`.
        """
        if self.given is None:
            return default
        if not (self.given.isascii() and self.given.isdigit()) or int(self.given) < least:
            raise ConfigError(
                f"the row {self.id!r} takes a {self.argument} of at least {least} behind the colon, as in "
                f"{self.id}:{default}; got {self.given!r}"
            )
        return int(self.given)

    def check(self, backbone: Backbone, config: TrainConfig) -> None:  # noqa: B027
        """See that the row is possible; raises errors of ours."""

    @abstractmethod
    def fit(self, trial: Trial) -> Fitted:
        """Solve the task of a trial."""


ROWS: Registry[Row] = Registry("row", "maskpack.lab.baselines")


def find_row(name: str) -> Row:
    """Return the row called "id" or "id:argument".

    Raises:
        UnknownNameError: if there is none. ConfigError: if it does not take this argument.
    """
    own, mark, given = name.partition(":")
    return ROWS[own](given if mark else None)


def settings_of(trial: Trial, objective: str) -> TrainConfig:
    """Return the trial's settings with this objective; its options are those of the objective that they are for."""
    options: Mapping[str, Any] = trial.config.objective_options if objective != "supervised" else {}
    return replace(trial.config, objective=objective, objective_options=options)


def fit_dense(trial: Trial, learn: Learn) -> Fitted:
    """Train what `learn` returns, and a head.

    What was learned is rounded to 2 bytes a number, as it would be stored, before it is measured; statistics and head
    keep 4, as they do beside a mask.
    """
    folder = trial.folder / "training"
    steps = train_dense(
        trial.backbone,
        trial.data,
        settings_of(trial, "supervised"),
        learn,
        output=folder,
        resume=(folder / FILE).exists(),
        report=trial.report,
    )
    for parameter in steps.scores.values():
        parameter.data.copy_(parameter.data.half())
    classifier = steps.objective.module
    assert isinstance(classifier, Classifier)
    learned = sum(one.numel() for one in steps.scores.values())
    head = sum(one.numel() for one in classifier.linear.parameters())
    adapted = batchnorm_statistics(trial.backbone.model) if trial.config.bn == "adapt" else {}
    statistics = sum(one.numel() for one in adapted.values())
    sizes = {"weights": 2 * learned, "statistics": 4 * statistics, "head": 4 * head}
    return Fitted(classified(classifier), learned + head, sizes, steps.steps)


def classified(classifier: Classifier) -> Predict:
    """Return what a classifier gives for a batch, on its own device."""
    device = classifier.linear.weight.device

    def predict(inputs: Inputs) -> Tensor:
        logits: Tensor = classifier(to_device(inputs, device))
        return logits.float().cpu()

    return predict


RATES = {"adam": (0.003, 0.01, 0.03), "sgd": (3.0, 10.0, 30.0)}  # of scores without labels, by optimiser


def train(trial: Trial, config: TrainConfig, labelled: bool) -> tuple[TrainResult, Adapter]:
    """Train a mask, with labels or without, and write it as an adapter."""
    folder = trial.folder / "training"
    result = train_mask(
        trial.backbone,
        trial.data if labelled else trial.unlabelled,
        config,
        output=folder,
        resume=(folder / FILE).exists(),
        longer=False,
        report=trial.report,
    )
    return result, write(trial, result.parts, result.base, result.about)


def write(
    trial: Trial, parts: Parts | Mapping[str, Parts], base: Fingerprint, about: About, cascade: Cascade | None = None
) -> Adapter:
    """Write an adapter of the profile "default" into the folder of a trial."""
    path = trial.folder / "mask.safetensors"
    return save_adapter(path, parts, base, about, cascade=cascade, weights=trial.backbone.model)


def learned(parts: Parts) -> int:
    """Return how many numbers of a mask set learned: a score of every weight, and parameters themselves."""
    return parts.masks.total + sum(one.numel() for one in parts.parameters.values())


def stored(adapter: Adapter) -> dict[str, int]:
    """Return the bytes of an adapter file by what they are; together they are the file."""
    about = describe(adapter)
    sets = about["sets"].values()
    sizes = {"masks": sum(one["payload_bytes"] + one["table_bytes"] for one in sets), "head": 0, "statistics": 0}
    for one in sets:
        for role, size in one["dense_bytes"].items():
            sizes[role] = sizes.get(role, 0) + size
    for role, size in (about["cascade"]["bytes"] if about["cascade"] else {}).items():
        sizes[role] = sizes.get(role, 0) + size
    return {**sizes, "index": about["size"] - sum(sizes.values())}
