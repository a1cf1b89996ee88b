"""The folder of a run: its lock, its logs, and when its checkpoint is written and read."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, TextIO

from torch import Tensor

from ..errors import ConfigError, StateError, StoppedError, require
from ..safetensors_io import lock, replacing
from .checkpoint import (
    FILE,
    OBJECTIVE,
    REMEDY,
    check_like,
    check_same_run,
    damaged,
    load_checkpoint,
    on_signal,
    restore,
    save_checkpoint,
)
from .config import TrainConfig
from .data.base import Data, Examples


def is_main_process() -> bool:
    """Tell whether this process writes and prints, of those that Accelerate started."""
    accelerate = require("accelerate", "train", "training")
    # the first state of a process decides on its device, and does not look at this variable
    return bool(accelerate.PartialState(accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")).is_main_process)


def new_accelerator(config: TrainConfig) -> Any:
    """Return the Accelerator of a run.

    Raises:
        ConfigError: if the precision is not possible on this device.
    """
    accelerate = require("accelerate", "train", "training")
    # Accelerate keeps one precision per process; a second run of ours may have another
    accelerate.state.AcceleratorState._reset_state()
    try:
        return accelerate.Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=False),
        )
    except ValueError as error:
        raise ConfigError(f"precision {config.precision!r} is not possible on this device: {error}") from error


NAME = "log.jsonl"

Report = Callable[[Mapping[str, Any]], None]


def tagged(report: Report | None, part: str) -> Report | None:
    """Return a report whose events have also "part", the name of the run that they are of."""
    return None if report is None else lambda event: report({**event, "part": part})


class RunLog:
    """Writes events to `log.jsonl` and their numbers to TensorBoard, and passes them on.

    Args:
        folder: where to write; None only passes events on.
        report: called with every event.
        resume: keep what is there; see `rewind`.
    """

    def __init__(self, folder: Path | None, report: Report | None, resume: bool):
        self.report, self.folder = report, folder
        self.file: TextIO | None = None
        self.board: Any = None
        self.purged: int | None = None  # first step that TensorBoard is to forget
        if folder is not None:
            require("tensorboard", "train", "writing TensorBoard logs")
            with self._writing("make room, or choose a folder that you may write to"):
                self.file = (folder / NAME).open("a" if resume else "w", encoding="utf-8")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # lines were flushed one by one; curves are not worth a run
            for one in (self.file, self.board):
                if one is not None:
                    one.close()

    def size(self) -> int:
        """Return the bytes written to the file so far, also by the runs that this one continues."""
        return 0 if self.file is None else self.file.tell()

    def rewind(self, size: int, step: int) -> None:
        """Forget what was written after `size` bytes and after a step: it happens again."""
        if self.file is not None and size < self.size():
            self.file.truncate(size)
            self.file.seek(0, os.SEEK_END)
        self.purged = step + 1

    def write(self, event: Mapping[str, Any]) -> None:
        """Record one event: "event" says which kind, "step" when, and the rest are its numbers."""
        if self.report is not None:
            self.report(event)
        if self.file is not None:
            with self._writing("make room and resume from the last checkpoint"):
                self.file.write(json.dumps(event, sort_keys=True) + "\n")
                self.file.flush()
                if self.board is None:
                    writer = require("torch.utils.tensorboard", "train", "writing TensorBoard logs").SummaryWriter
                    self.board = writer(f"{self.folder}/tensorboard", purge_step=self.purged)
            for name, value in event.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event['event']}/{name}", value, event["step"])

    @contextmanager
    def _writing(self, remedy: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateError(f"cannot write the logs in {self.folder}: {error.strerror or error}; {remedy}") from error


LOCK = ".lock"  # names its holder; without one that lives it means nothing
_held: set[IO[str]] = set()


@contextmanager
def run_folder(output: str | Path | None, resume: bool) -> Iterator[Path | None]:
    """Give the folder of a run, made if it is not there, and lock it as long as the run lasts; None for None.

    Raises:
        StateError: as `check_untaken`.
    """
    if output is None:
        yield None
        return
    folder = Path(output)
    with locked(folder):
        check_untaken(folder, resume, ours=True)
        try:
            yield folder
        except KeyboardInterrupt as error:
            if (folder / FILE).exists():
                error.add_note(f"Train again with resume (--resume) to go on from the checkpoint in {folder}")
            raise


def check_untaken(folder: Path, resume: bool, ours: bool = False) -> None:
    """Check that a run may begin in a folder, or go on.

    Args:
        ours: this process has locked it.

    Raises:
        StateError: if another process writes into it, or it has a checkpoint and its run is not to be resumed.
    """
    if not ours and (folder / LOCK).exists():
        with locked(folder):
            pass
    if (folder / FILE).exists() and not resume:
        raise StateError(
            f"{folder} holds the checkpoint of an earlier run; continue it with resume, or choose another folder"
        )


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Lock a folder, made if it is not there, against other processes and threads that lock it; None locks nothing.

    The system lets go of the lock when this process ends, however it ends. Folders in it have locks of their own. Of
    processes that train together the main one has the lock.

    Raises:
        StateError: if it is locked; the message names the holder.
    """
    if folder is None or not is_main_process():
        yield
        return
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _opened(path)
    except OSError as error:
        raise StateError(
            f"cannot write into {folder}: {error.strerror or error}; choose a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        _held.discard(file)
        path.unlink(missing_ok=True)  # while it is locked: whoever opened it before sees that it is another file now
        file.close()


def _opened(path: Path) -> IO[str]:
    """The lock's file, locked, with the name of this process in it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if lock(file.fileno()) is False:
                file.seek(0)
                holder = file.read(200).strip()
                raise StateError(
                    f"another run writes into {path.parent}{f' (process {holder})' if holder else ''}; wait for its "
                    f"end, or choose another folder"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                _held.add(file)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _let_go() -> None:
    """In a process that was forked: a copy of the open file would hold the lock longer than the run."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


SECONDS = {"s": 1, "min": 60, "h": 3600}
LENGTH = ("epochs", "steps")  # settings that may be greater when a run goes on


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        steps: optimiser steps to make. step: made so far. epoch: epochs that are over.
        batches: how many were read of each stream in the epoch that is not over, with the number of its pass.
        loss, count: sum and number of the losses in this epoch.
        done: masks and statistics are those that are stored.
        metrics: of the last epoch that was over.
        extended: what is to be said of steps that were added when the run went on.
    """

    steps: int
    step: int = 0
    epoch: int = 0
    batches: dict[str, list[int]] = field(default_factory=dict)
    loss: float = 0.0
    count: int = 0
    done: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    extended: list[str] = field(default_factory=list)

    def event(self, kind: str, **numbers: Any) -> dict[str, Any]:
        """Return an event of this moment."""
        return {"event": kind, "epoch": self.epoch + 1, "step": self.step, "steps": self.steps, **numbers}

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.batches, self.loss, self.count = self.epoch + 1, {}, 0.0, 0


class Kept(Protocol):
    """A run whose state is kept."""

    accelerator: Any
    optimizer: Any

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the run changes, by name."""

    def more(self) -> dict[str, Any]:
        """Return what else there is to its state, as JSON values."""

    def take_back(self, more: Mapping[str, Any], objective: Mapping[str, Tensor]) -> None:
        """Go on from what `more` and the objective's part of `tensors` gave."""


class Keeper:
    """Keeps a run in its folder.

    Args:
        folder: None keeps nothing, and leaves signals alone.
        every: as of `parse_every`; None: at the end of each epoch. At the end of the run in any case.
        facts: what must be equal for the run to go on.
    """

    def __init__(self, run: Kept, folder: Path | None, every: str | None, facts: Mapping[str, Any], log: RunLog):
        self.run, self.folder, self.facts, self.log = run, folder, facts, log
        self.seconds, self.steps = parse_every(every)
        self.every = every
        self.written = time.monotonic()
        self.asked: int | None = None

    def resume(self, steps: int, longer: bool = False) -> Position:
        """Put the run where its checkpoint left off.

        Args:
            steps: that are to be made in all. longer: they may be more than before.

        Raises:
            StateError: if there is no checkpoint, it is damaged, or it is of another run.
        """
        if self.folder is None:
            raise StateError("resume needs the folder of the run in `output`")
        run, path = self.run, self.folder / FILE
        tensors, state, facts = load_checkpoint(path)
        check_same_run(self.folder, self.facts, facts["run"], LENGTH if longer else ())
        at = Position(**{one.name: facts[one.name] for one in fields(Position)})
        if steps < at.steps:
            raise StateError(
                f"the run in {self.folder} has made {at.step} of {at.steps} steps, and {steps} are asked for now; give "
                f"at least as many, or choose another folder"
            )
        check_like(path, "more", facts["more"], run.more())
        restore(path, run.tensors(), run.optimizer, tensors, state)
        try:
            run.take_back(facts["more"], {n: one for n, one in tensors.items() if n.startswith(OBJECTIVE)})
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, REMEDY, f"its budget, objective or unreadable rows do not fit: {error}") from None
        scaler = run.accelerator.scaler
        if scaler is not None and facts["scaler"]:
            check_like(path, "scaler", facts["scaler"], scaler.state_dict())
            scaler.load_state_dict(facts["scaler"])
        self.log.rewind(facts["log"], at.step)
        if steps > at.steps:
            said = f"resumed at step {at.step} of {at.steps} with {steps} steps"
            at.extended, at.steps, at.done = [*at.extended, said], steps, False
            self.log.write(at.event("resumed", resumed=said))
        return at

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 as the wish to stop at the next optimiser step."""

        def ask(number: int) -> None:
            self.asked = number

        with nullcontext() if self.folder is None else on_signal(ask):
            yield

    def after_step(self, at: Position) -> None:
        """Write a checkpoint if one is due.

        Raises:
            StoppedError: after that, if a signal asked for it.
        """
        due = self.steps is not None and at.step % self.steps == 0
        due |= self.seconds is not None and time.monotonic() - self.written >= self.seconds
        self._write(at, due)

    def after_epoch(self, at: Position) -> None:
        """As `after_step`, at the end of an epoch, with its metrics."""
        self._write(at, at.done or self.every is None)

    def _write(self, at: Position, due: bool) -> None:
        stop, accelerator = self.asked is not None, self.run.accelerator
        if accelerator.num_processes > 1:  # all stop at the same step
            if stop:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
        if (due or stop) and self.folder is not None and accelerator.is_main_process:
            facts = {
                **{one.name: getattr(at, one.name) for one in fields(at)},
                "run": self.facts,
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "more": self.run.more(),
                "log": self.log.size(),
            }
            save_checkpoint(self.folder / FILE, self.run.tensors(), self.run.optimizer, facts)
            self.written = time.monotonic()
        if stop:
            accelerator.wait_for_everyone()  # nobody ends the others while one writes
            number = self.asked or signal.SIGTERM
            raise StoppedError(
                f"{signal.Signals(number).name} stopped the training at step {at.step} of {at.steps}; train again with "
                f"resume (--resume) to go on from the checkpoint in {self.folder}",
                number,
            )


def parse_every(text: str | None) -> tuple[float | None, int | None]:
    """Return (seconds, steps) between checkpoints, of which at most one is given.

    Args:
        text: as in "90s", "10min", "2h" or "500steps"; None for neither.

    Raises:
        ConfigError: if it is something else.
    """
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|steps?)", text)
    steps = found is not None and found[2].startswith("step")
    if found is None or not float(found[1]) > 0 or (steps and not found[1].isdecimal()):
        raise ConfigError(
            f"checkpoint_every must be a time above 0 as in 90s, 10min or 2h, or a number of steps as in 500steps; got "
            f"{text!r}"
        )
    return (None, int(found[1])) if steps else (float(found[1]) * SECONDS[found[2]], None)


def unreadable_rows(data: Mapping[str, Data]) -> dict[str, list[int]]:
    """Return which rows could not be read so far, by the names of data and split."""
    return {name: sorted(examples.unreadable) for name, examples in _splits(data)}


def note_unreadable(data: Mapping[str, Data], rows: Mapping[str, list[int]]) -> None:
    """Note what `unreadable_rows` gave.

    Raises:
        ValueError: if there are no such rows.
    """
    for name, examples in _splits(data):
        if not set(rows[name]) <= set(range(len(examples.rows))):
            raise ValueError(f"unreadable rows of {name!r} beyond {len(examples.rows)}")
        examples.unreadable.update(rows[name])


def _splits(data: Mapping[str, Data]) -> Iterator[tuple[str, Examples]]:
    for name, one in data.items():
        for split in ("train", "validation", "test"):
            examples = getattr(one, split)
            if examples is not None:
                yield f"{name}/{split}", examples


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
