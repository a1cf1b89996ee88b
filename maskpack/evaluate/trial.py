"""One row with one seed: fitted, measured, and written as JSON. For a process of its own."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ..backbone.classifier import Classifier
from ..backbone.load import Backbone, load_backbone
from ..data.base import Data, Examples
from ..data.batches import loader, readable
from ..data.load import LABELS_SEED, few_labels, hold_out, load_data
from ..errors import DataError, StateError
from ..tensorfile import replacing
from ..training.config import config_from
from .accuracy import by_class
from .rows.base import Fitted, Predict, Trial, find_row
from .rows.dense import classified

VALIDATION = 0.2  # of the rows with labels, to choose learning rates on
SPENT = "spent.json"  # what training took so far, for a trial that is interrupted or has other labels
TIMED = 2.0  # seconds of timing, and at least
ROUNDS = 5  # passes
MEASURED = frozenset(("accuracy", "trained", "steps", "sizes", "bytes", "labels", "seconds", "peak_memory", "controls"))


@dataclass(frozen=True, slots=True)
class Job:
    """What a process is asked for.

    Attributes:
        row: name, with its argument. settings: of TrainConfig, with seed and rate. share: of the labels.
        validate: measure on a validation split of these labels, and not on the test split.
        backbone, data: arguments of `load_backbone` and `load_data`.
        folder: of the trial. result: file to write.
    """

    row: str
    share: float
    validate: bool
    settings: Mapping[str, Any]
    backbone: Mapping[str, Any]
    data: Mapping[str, Any]
    folder: str
    result: str

    @property
    def seed(self) -> int:
        """Of the trial."""
        return int(self.settings["seed"])

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        write_json(path, asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path, keys: frozenset[str], remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        StateError: if there is none, or it lacks one of the keys; `remedy` says what to do then.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"cannot read {path} as JSON: {error}; {remedy}") from None
    if not isinstance(value, dict) or not keys <= value.keys():
        has = ", ".join(sorted(value)[:10]) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise StateError(f"{path} must have {', '.join(sorted(keys))}, it has {has or 'nothing'}; {remedy}")
    return value


def splits(data: Data, share: float, seed: int, validate: bool) -> tuple[Data, Data, Examples]:
    """Return (rows whose labels are known, rows without labels, rows to measure on).

    Rows that are measured on are in neither of the others.

    Raises:
        DataError: if the training or the test split is missing, or there is no class.
    """
    if data.train is None or data.test is None or not data.class_names:
        raise DataError(
            f"a comparison needs a training and a test split with labels; {data.id!r} has "
            f"{'no training split' if data.train is None else 'no test split' if data.test is None else 'no labels'}"
        )
    test, train, known = data.test, data.train, few_labels(data.train, share, LABELS_SEED + seed)
    if validate:
        known, held = hold_out(known, VALIDATION, seed)
        if held is None:
            raise DataError(
                f"{len(known)} rows with labels are too few to choose a learning rate on; give one with --lr ROW=RATE"
            )
        test, without = held, set(held.indices)
        train = replace(train, indices=[row for row in train.indices if row not in without])
    only = replace(data, validation=None, test=None)
    return replace(only, train=known), replace(only, train=train, class_names=()), test


class Spent:
    """Seconds and memory of training as of its last epoch, also of processes that were interrupted or had other labels.

    Args:
        path: where they are noted. resident: bytes of the process before training.
    """

    def __init__(self, path: Path, resident: int):
        self.path, self.resident, self.started = path, resident, time.monotonic()
        self.before: dict[str, Any] = {"seconds": 0.0}
        if path.exists():
            self.before = read_json(path, frozenset(("seconds",)), "delete it and run again")

    def now(self) -> dict[str, Any]:
        """Return {"seconds", "peak_memory"} up to now."""
        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peak = max(0, memory()[1] - self.resident) + on_device
        seconds = self.before["seconds"] + time.monotonic() - self.started
        return {"seconds": seconds, "peak_memory": max(peak, self.before.get("peak_memory", 0))}

    def keep(self) -> None:
        """Note what was spent up to now."""
        write_json(self.path, self.now())


def memory() -> tuple[int, int]:
    """Return the process's resident bytes, now and at most; on a system without /proc, at most and at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage: a process that was started from a great one inherits that one's peak there
        kilobytes = dict(line.split(":") for line in status.read_text().splitlines() if line.startswith("Vm"))
        return int(kilobytes["VmRSS"].split()[0]) << 10, int(kilobytes["VmHWM"].split()[0]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def run(job: Job, report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Fit and measure what a job asks for; return the result, JSON values."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone, config = load_backbone(**job.backbone), config_from(job.settings)
    known, unlabelled, test = splits(load_data(**job.data), job.share, job.seed, job.validate)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    spent = Spent(folder / SPENT, memory()[0])

    def passed_on(event: Mapping[str, Any]) -> None:
        if event["event"] == "epoch":
            spent.keep()
        report(event)

    fitted = find_row(job.row).fit(Trial(backbone, known, unlabelled, config, folder, passed_on))
    total = spent.now()

    def measured(one: Fitted) -> dict[str, Any]:
        accuracy, rows = measure(one.predict, backbone, test, config.batch_size, len(known.class_names))
        sizes = dict(one.sizes)
        about = {"accuracy": accuracy, "examples": rows, "trained": one.trained, "steps": one.steps}
        return {**about, "sizes": sizes, "bytes": sum(sizes.values())}

    result = {
        **measured(fitted),
        "labels": len(known.train or ()),
        **total,
        "controls": {name: measured(one) for name, one in fitted.controls.items()},
    }
    if not job.validate:
        result["overhead"] = overhead(fitted, load_backbone(**job.backbone), test, len(known.class_names), config)
    return result


@torch.no_grad()
def measure(
    predict: Predict, backbone: Backbone, examples: Examples, batch_size: int, classes: int
) -> tuple[float, int]:
    """Return the share of examples that get their class, and how many could be read."""
    batches = readable(loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size))
    scores, labels = [], []
    for inputs, y in batches:
        scores.append(predict(inputs))
        labels.append(y)
    if not labels:
        raise DataError("no row to measure on could be read")
    y = torch.cat(labels)
    assert int(y.max()) < classes
    return float(by_class(torch.cat(scores), y)["accuracy"]), len(y)


@torch.no_grad()
def overhead(fitted: Fitted, backbone: Backbone, examples: Examples, classes: int, config: Any) -> float:
    """Return the time of a batch relative to that of the bare backbone with a linear head; medians, by turns."""
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=config.batch_size)
    inputs, _ = next(readable(batches))
    linear = nn.Linear(backbone.features, classes).to(next(backbone.model.parameters()).dtype)
    bare = classified(Classifier(backbone.model, linear, backbone.head, backbone.pooling, backbone.normalize).eval())
    times: dict[Predict, list[float]] = {bare: [], fitted.predict: []}
    for predict in times:
        predict(inputs)
    until = time.perf_counter() + TIMED
    while len(times[bare]) < ROUNDS or time.perf_counter() < until:
        for predict, taken in times.items():
            started = time.perf_counter()
            predict(inputs)
            taken.append(time.perf_counter() - started)
    return median(times[fitted.predict]) / median(times[bare])
