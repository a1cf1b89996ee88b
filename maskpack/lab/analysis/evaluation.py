"""Accuracy and loss of states of one model, kept as JSON files."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...backbone.classifier import Batch, predictions
from ...backbone.fingerprint import model_digest
from ...backbone.load import Backbone
from ...backbone.remembered import cache_folder
from ...errors import ConfigError, DataError
from ...training.batchnorm import BATCH_NORMS, recalibrate
from ...training.data.base import Data, Examples, loader, readable
from ...training.features import digest_of, inputs_content
from ..store import measured
from .network import State, put_state

VERSION = 1  # of the keys and of the files
CALIBRATION = 1024  # training rows that BatchNorm statistics are taken from
IN_MEMORY = 1_000_000_000  # bytes of preprocessed inputs that are kept
MEASURED = frozenset(("accuracy", "loss", "examples"))
Progress = Callable[[int, int], None]  # (done, in all)
T = TypeVar("T")


def counted(items: Collection[T], report: Progress | None) -> Iterator[T]:
    """Yield items, and report after each how many are done."""
    for done, item in enumerate(items, 1):
        yield item
        if report is not None:
            report(done, len(items))


def evaluations_folder() -> Path:
    """Return where evaluations are kept if no folder is given: beside the features."""
    return cache_folder() / "evaluations"


def some(examples: Examples, count: int | None, seed: int = 0) -> Examples:
    """Return so many of the examples, drawn by `seed`, in the order of the data; all if there are not more."""
    if count is not None and count < 1:
        raise ConfigError(f"the number of examples must be at least 1, got {count}")
    if count is None or count >= len(examples):
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
    indices = [examples.indices[one] for one in sorted(order.tolist())]
    return replace(examples, indices=indices, unreadable=set())


class Batches:
    """Preprocessed batches of examples, in order: read once if they fit into `IN_MEMORY`, else whenever walked."""

    def __init__(self, backbone: Backbone, examples: Examples, batch_size: int):
        self.backbone, self.examples, self.batch_size = backbone, examples, batch_size
        self.kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.kept is not None:
            yield from self.kept
            return
        given = self.backbone
        batches = loader(self.examples, given.preprocess, given.tokenizer, batch_size=self.batch_size)
        size, kept = 0, list[Batch]()
        for inputs, labels in readable(batches):
            size += sum(one.nbytes for one in (inputs.values() if isinstance(inputs, dict) else [inputs]))
            kept = [*kept, (inputs, labels)] if size <= IN_MEMORY else []
            yield inputs, labels
        self.kept = kept if size <= IN_MEMORY else None


class Evaluations:
    """Measures states of a module on the rows of a split; what was measured before is read back.

    Where the module has BatchNorm, its statistics are those of the state's own weights, over `CALIBRATION` training
    rows.

    Args:
        module: from inputs to logits, as `read_networks` or `train_dense` gives. A state stays in it.
        backbone: its preprocessing and tokenizer.
        data: with a training split if there is BatchNorm.
        split: "test" or "train". limit: at most so many of its rows, drawn by seed 0.
        folder: for the JSON file of each evaluation; None: nothing is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        backbone: Backbone,
        data: Data,
        *,
        split: str = "test",
        limit: int | None = None,
        batch_size: int = 64,
        folder: Path | None = None,
    ):
        if split not in ("test", "train"):
            raise ConfigError(f"split must be test or train, got {split!r}")
        self.module, self.backbone, self.folder = module, backbone, folder
        self.examples = some(_split(data, split), limit)
        self.batches = Batches(backbone, self.examples, batch_size)
        norms = any(isinstance(one, BATCH_NORMS) and one.running_mean is not None for one in module.modules())
        calibration = some(_split(data, "train"), CALIBRATION) if norms else None
        self.calibration = None if calibration is None else Batches(backbone, calibration, batch_size)

    def put(self, state: State) -> None:
        """Make the module this state, with BatchNorm statistics of its own."""
        put_state(self.module, state)
        if self.calibration is not None:
            recalibrate(self.module, self.calibration)

    def content(self, state: State) -> list[Any] | None:
        """Return what an evaluation of a state follows from; None if a part of it has no digest, or nothing is kept."""
        if self.folder is None:
            return None
        put_state(self.module, state)
        rows = [self.examples] if self.calibration is None else [self.examples, self.calibration.examples]
        inputs = [inputs_content(self.backbone, one) for one in rows]
        digest = model_digest(self.module)
        return None if digest is None or None in inputs else [VERSION, digest, *inputs]

    def of(self, state: State, *, rows: bool = False) -> dict[str, Any]:
        """Return {"accuracy", "loss": mean cross-entropy, "examples"} of a state; with `rows` also "right", for each
        example whether it gets its class.
        """
        content = self.content(state)
        if self.folder is None or content is None:
            return self._measure(state, rows)
        path = self.folder / f"{digest_of([*content, rows])}.json"
        return measured(path, MEASURED, lambda: self._measure(state, rows))

    def _measure(self, state: State, rows: bool) -> dict[str, Any]:
        self.put(state)
        logits, y = predictions(self.module, self.batches)
        if int(y.max()) >= logits.shape[1]:
            classes = f"the network has {logits.shape[1]} classes, and the data have a class {int(y.max())} (from 0)"
            raise DataError(f"{classes}; give the data that it was trained for")
        right = logits.argmax(1) == y
        loss = float(nn.functional.cross_entropy(logits.double(), y))
        loss = loss if loss < 1e30 else 1e30  # of a network that gives no numbers; JSON has no infinity
        found = {"accuracy": float(right.double().mean()), "loss": loss, "examples": len(y)}
        return {**found, "right": right.int().tolist()} if rows else found


def _split(data: Data, name: str) -> Examples:
    found = data.test if name == "test" else data.train
    if found is None or not data.class_names:
        lacking = "labels" if found is not None else f"{name} split"
        raise DataError(f"the data {data.id!r} have no {lacking}; give rows with labels to measure on, and to train on")
    return found
