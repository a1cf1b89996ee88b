"""Bytes of an adapter beside its masks, by part, and its accuracy, for each choice of `--store`.

    MASKPACK_DATA=… python -m benchmarks.stored                       some minutes of one core, resumable
    python -m benchmarks.stored --write docs/results/codecs.md      the table of what is recorded

A run is trained once; then the values that each way stores are put into the network, it is measured on test rows, and
written as `maskpack train` writes it.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from maskpack import inspect_adapter, load_backbone, save_adapter
from maskpack.training import TrainConfig, load_data
from maskpack.training.config import Store
from maskpack.training.features import worth
from maskpack.training.learn import borrowed
from maskpack.training.own_loop import learned_parts
from maskpack.training.run_folder import RunFolder
from maskpack.training.stored import shortened
from maskpack.training.trainer import ObjectiveRun, result_of

from .measured import trial, trials
from .recipe import lite0
from .report import NOTHING, command, percent, table, write_between
from .tasks import data_of, minilm, resnet

NAME = "stored"
MARK = "python -m benchmarks.stored --write docs/results/codecs.md"
RUNS: dict[str, tuple[Callable[[], Mapping[str, Any]], str, dict[str, Any]]] = {
    "EfficientNet-Lite0, EuroSAT": (partial(lite0, 64), "eurosat", {}),
    "EfficientNet-Lite0, EuroSAT, statistics adapted": (partial(lite0, 64), "eurosat", {"bn": "adapt"}),
    "ResNet-20, sketches": (partial(resnet, 20), "sketch", {}),
    "MiniLM, TREC": (minilm, "trec6", {}),
}
STEPS = 200


def measure(name: str) -> list[dict[str, Any]]:
    """Train a run, and return a row for each way of storing what it learned."""
    make, data_name, settings = RUNS[name]
    backbone, data = load_backbone(**make()), load_data(str(data_of(data_name)))
    config = TrainConfig(steps=STEPS, batch_size=32, **settings)
    rows = []
    with borrowed(backbone, norms=True):
        run = ObjectiveRun(backbone, data, config)
        at = run.train(RunFolder({}))
        model = backbone.model
        changing = [*run.tensors().values(), *(p for n, p in model.named_parameters() if n in run.before)]
        learned = [tensor.detach().clone() for tensor in changing]
        for store in get_args(Store):
            with torch.no_grad():
                for tensor, own in zip(changing, learned, strict=True):
                    tensor.copy_(own)
            run.config = run.objective.config = replace(run.config, store=store)
            run.settle()
            metrics = {**at.metrics, **run.held_out("test")}
            parts = replace(shortened(learned_parts(model), model, run.before), head=run.objective.head())
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "adapter.safetensors"
                more = {"scores": 0, "rates": {}, **worth(metrics, [mask.shape for mask in parts.masks.values()])}
                result = result_of(run, data, run.config, parts, run.base, metrics, more)
                save_adapter(path, parts, result.base, result.about)
                rows.append(
                    {"store": store, "accuracy": metrics["test_accuracy"], "parts": inspect_adapter(path)["bytes"]}
                )
    return rows


def page(path: Path) -> None:
    rows = []
    for one in trials(NAME):
        for row in one["result"]:
            parts = dict(row["parts"])
            index = sum(parts.pop(key) for key in ("container", "index", "digests of the base"))
            norms = sum(
                size for key, size in parts.items() if key.split("/")[1] in ("norms", "statistics", "parameters")
            )
            masks, head = parts["default/payloads"], parts["default/head"]
            numbers = [f"{size:,}" for size in (index, norms, head, masks)]
            rows.append([one["run"], f"`{row['store']}`", percent([row["accuracy"]]), *numbers])
    columns = ("run", "`--store`", "test accuracy", "index", "norms and statistics", "head", "masks")
    write_between(path, MARK, table(columns, rows, 2) if rows else NOTHING)


if __name__ == "__main__":
    command(__doc__, {name: partial(trial, NAME, {"run": name}, partial(measure, name)) for name in RUNS}, page)
