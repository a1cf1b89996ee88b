"""Trainings whose adapters benchmarks/corpus keeps: backbones, data and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from maskpack import load_backbone
from maskpack.backbone.load import Backbone
from maskpack.training import load_data
from maskpack.training.data.base import Data

from .tasks import DATA, minilm, resnet


@dataclass(frozen=True)
class Task:
    """One model with one data set: `settings` are those of TrainConfig, `labels` the share of the training rows."""

    backbone: Callable[[], Mapping[str, Any]]
    data: str
    settings: dict[str, Any]
    labels: float = 1.0

    def load(self) -> Backbone:
        return load_backbone(**self.backbone())

    def examples(self, seed: int) -> Data:
        """Read the data; the seed chooses which training rows are used."""
        return load_data(str(DATA / self.data), labels_fraction=self.labels, seed=seed)


SGD = {"scale": True, "train": (), "bn": "adapt", "optimizer": "sgd", "head_lr": 0.1, "warmup": 0.2}
TASKS = {
    "sketch": Task(partial(resnet, 20), "data/pacs/sketch", {**SGD, "lr": 50.0, "epochs": 25, "augment": "flip"}),
    "photo": Task(partial(resnet, 32), "data/pacs/photo", {**SGD, "lr": 10.0, "epochs": 25, "augment": "flip"}),
    # 10,000 of 60,000 images; digits are not mirrored
    "mnist": Task(partial(resnet, 20), "data/mnist", {**SGD, "lr": 20.0, "epochs": 6, "augment": "none"}, 1 / 6),
    "banking77": Task(
        partial(minilm, tokens=None),
        "data/banking77",
        {"top": 1.0, "train": (), "lr": 0.02, "head_lr": 0.01, "epochs": 4, "label_smoothing": 0.05},
    ),
}
