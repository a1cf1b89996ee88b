"""Accuracies of the first table of docs/results.md: masks and a linear probe on real models and data, over seeds.

    MASKPACK_DATA=… python -m benchmarks.results sketch banking77
    MASKPACK_DATA=… python -m benchmarks.results mnist photo --seeds 0

Recorded trials are not repeated; a training that was interrupted goes on from its checkpoint.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from maskpack import load_backbone, save_adapter
from maskpack.backbone.load import Backbone
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.checkpoint import FILE
from maskpack.training.data.base import Data
from maskpack.training.features import measure_features

from .measured import trial
from .tasks import DATA, RUNS, SEEDS, minilm, resnet


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


def run(name: str, seed: int) -> dict[str, float]:
    """Train a mask; return its metrics and sizes."""
    task, folder = TASKS[name], RUNS / "results" / f"{name}-{seed}"
    result = train_mask(
        task.load(),
        task.examples(seed),
        TrainConfig(seed=seed, **task.settings),
        output=folder,
        resume=(folder / FILE).exists(),
        report=lambda event: print(json.dumps(event), flush=True) if event["event"] != "step" else None,
    )
    adapter = save_adapter(folder / "adapter", result.parts, result.base, result.about)
    return {**result.metrics, "weights": result.parts.masks.total, "file_bytes": adapter.size}


def probe(name: str) -> dict[str, float]:
    """Return the test accuracy of a linear probe on the frozen backbone."""
    (measured,) = measure_features(TASKS[name].load(), TASKS[name].examples(0), ["probe"])
    return {"test_accuracy": measured["accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.tasks:
        runs = [trial("results", {"task": name, "seed": s}, partial(run, name, s)) for s in arguments.seeds]
        for what in ("test_accuracy", "density", "file_bytes"):
            values = [one[what] for one in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name} {what}: mean {statistics.mean(values):.4f}, deviation {spread:.4f}, {values}")
        frozen = trial("results", {"task": name, "probe": True}, partial(probe, name))
        print(f"{name} linear probe of the frozen backbone: {frozen['test_accuracy']:.4f}")


if __name__ == "__main__":
    main()
