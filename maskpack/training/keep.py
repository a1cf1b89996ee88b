"""When a run writes its checkpoint, and how it goes on from there."""

import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..data.base import Data, Examples
from ..errors import ConfigError, StateError, StoppedError
from .checkpoint import (
    FILE,
    OBJECTIVE,
    REMEDY,
    check_like,
    check_same_run,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from .log import RunLog
from .sealed import damaged
from .signals import on_signal

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
