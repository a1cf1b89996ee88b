"""One trial of a comparison: fitted and measured in a process of its own."""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, ClassVar, TextIO

import torch
from torch import nn

from ..backbone.classifier import Classifier
from ..backbone.load import Backbone, load_backbone
from ..errors import ConfigError, DataError, MaskpackError, StateError
from ..training.config import TrainConfig, config_from
from ..training.data.base import HELD, LABELS_SEED, Data, Examples, few_labels, hold_out, load_data, loader, readable
from ..training.run_folder import read_json, write_json
from ..training.trainer import process_memory
from .baselines.base import Fitted, Predict, Trial, classified, find_baseline

# not run here, so that no thread is there when the process forks; one that is not installed is needed by no trial
IMPORTED = ("accelerate", "datasets", "torchvision.transforms.v2", "torch.utils.tensorboard", "sklearn.mixture", "PIL")
GRACE = 1.5  # seconds that a job has to end by itself
POLL = 0.1
SPENT = "spent.json"  # what training took so far, for a trial that is interrupted or has other labels
TIMED = 2.0  # seconds of timing, and at least
ROUNDS = 5  # passes
MEASURED = frozenset(("accuracy", "trained", "steps", "sizes", "bytes", "labels", "seconds", "peak_memory", "controls"))


@dataclass(frozen=True)
class Job:
    """A trial that a process is asked for.

    `settings` are of TrainConfig, with seed and rate; `share` is of the labels. With `validate` it is measured on a
    validation split of these, and not on the test split. `backbone` and `data` are arguments of the functions that load
    them.
    """

    baseline: str
    share: float
    validate: bool
    settings: Mapping[str, Any]
    backbone: Mapping[str, Any]
    data: Mapping[str, Any]
    folder: str


class Worker(AbstractContextManager["Worker"]):
    """A process that forks one process for each job. It starts when it is first needed.

    It ends with all that it started when the context ends, and also when this process is killed.
    """

    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "maskpack.lab.trial")

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):  # a training that is asked to stop keeps its last step
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.communicate(timeout=GRACE)
                    break

    def run(self, job: Path) -> Iterator[dict[str, Any]]:
        """Yield the events of a job, which is a JSON file.

        They are those of training, {"event": "result", "result"} or {"event": "error", "kind", "message"}, and
        {"event": "exit", "code"}.
        """
        if self._process is None or self._process.poll() is not None:
            # in a group of its own: the interrupt key reaches this process alone, which then ends the others
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", process_group=0
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # its end is seen below
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            yield event
            if event["event"] == "exit":
                return
        yield {"event": "exit", "code": self._process.wait()}


def serve() -> None:
    """Run the jobs that stdin names."""
    events, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no event
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(Path(line.rstrip("\n")), events)
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            # nothing comes in while a job runs but the end of who waits for it, by whatever signal
            if select.select([sys.stdin], [], [], POLL)[0]:
                os.killpg(0, signal.SIGKILL)
        _write(events, {"event": "exit", "code": os.waitstatus_to_exitcode(ended[1])})


def _run(path: Path, events: TextIO) -> None:
    """Run a job and end this process."""
    code = 1
    try:
        result = run(Job(**json.loads(path.read_text(encoding="utf-8"))), lambda event: _write(events, event))
        _write(events, {"event": "result", "result": result})
        code = 0
    except (MaskpackError, OSError) as error:  # the latter is a full disk, say
        kind = type(error) if isinstance(error, MaskpackError) else StateError
        _write(events, {"event": "error", "kind": kind.__name__, "message": str(error)})
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _write(events: TextIO, event: Mapping[str, Any]) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except BrokenPipeError:  # nobody waits for the result any more
        os._exit(1)


def check_each_once(**lists: Sequence[Any]) -> None:
    """Raise ConfigError if one of these lists is empty, or has a member twice."""
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} must be at least one, each once; got {', '.join(map(str, values)) or 'none'}")


def splits(data: Data, share: float, seed: int, validate: bool) -> tuple[Data, Data, Examples]:
    """Return (rows whose labels are known, rows without labels, rows to measure on).

    Rows that are measured on are in neither of the others.
    """
    train, test = (data.labelled(split, "a comparison") for split in ("train", "test"))
    known = few_labels(train, share, LABELS_SEED + seed)
    if validate:
        known, held = hold_out(known, HELD, seed)
        if held is None:
            raise DataError(f"{len(known)} rows with labels are too few to choose a learning rate on; give one (--lr)")
        test, without = held, set(held.indices)
        train = replace(train, indices=[row for row in train.indices if row not in without])
    only = replace(data, validation=None, test=None)
    return replace(only, train=known), replace(only, train=train, class_names=()), test


def run(job: Job, report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Fit and measure what a job asks for; return the result, JSON values."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    backbone, config = load_backbone(**job.backbone), config_from(job.settings)
    known, unlabelled, test = splits(load_data(**job.data), job.share, config.seed, job.validate)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # seconds and memory as of the last epoch, of processes that were interrupted or had other labels
    before: dict[str, Any] = {"seconds": 0.0}
    if (folder / SPENT).exists():
        before = read_json(folder / SPENT, frozenset(("seconds",)), "delete it and run again")
    resident, started = process_memory()[0], time.monotonic()

    def spent() -> dict[str, Any]:
        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        peak = max(0, process_memory()[1] - resident) + on_device
        seconds = before["seconds"] + time.monotonic() - started
        return {"seconds": seconds, "peak_memory": max(peak, before.get("peak_memory", 0))}

    def passed_on(event: Mapping[str, Any]) -> None:
        if event["event"] == "epoch":
            write_json(folder / SPENT, spent())
        report(event)

    def measured(one: Fitted) -> dict[str, Any]:
        accuracy, rows = measure(one.predict, backbone, test, config.batch_size)
        sizes = dict(one.sizes)
        about = {"accuracy": accuracy, "examples": rows, "trained": one.trained, "steps": one.steps, "note": one.note}
        return {**about, "sizes": sizes, "bytes": sum(sizes.values())}

    fitted = find_baseline(job.baseline).fit(Trial(backbone, known, unlabelled, config, folder, passed_on))
    total = spent()
    result = {
        **measured(fitted),
        "labels": len(known.train or ()),
        **total,
        "controls": {} if job.validate else {name: measured(one) for name, one in fitted.controls.items()},
    }
    if not job.validate:
        result["overhead"] = overhead(fitted, load_backbone(**job.backbone), test, len(known.class_names), config)
    return result


@torch.no_grad()
def measure(predict: Predict, backbone: Backbone, examples: Examples, batch_size: int) -> tuple[float, int]:
    """Return the share of examples that get their class, and how many could be read."""
    right = count = 0
    for inputs, y in readable(loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)):
        right += int((predict(inputs).argmax(1) == y).sum())
        count += len(y)
    if not count:
        raise DataError("no row to measure on could be read")
    return right / count, count


@torch.no_grad()
def overhead(fitted: Fitted, backbone: Backbone, examples: Examples, classes: int, config: TrainConfig) -> float:
    """Return the time of a batch relative to that of the bare backbone with a linear head; medians, by turns."""
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=config.batch_size)
    inputs, _ = next(readable(batches))
    linear = nn.Linear(backbone.features, classes).to(next(backbone.model.parameters()).dtype)
    bare = classified(Classifier(backbone.model, linear, backbone.embedding).eval())
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


def measured(path: Path, keys: frozenset[str], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result in a file; if there is none, measure it first."""
    if not path.exists():
        write_json(path, measure())
    return read_json(path, keys, "delete it, and it is measured again")


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that all trials of a folder have in common; seed and rate are each trial's own."""
    return {name: value for name, value in config.to_json().items() if name not in ("seed", "lr", "workers")}


if __name__ == "__main__":
    serve()
