"""Progress of long operations: a bar in a terminal or a notebook, elsewhere a line now and then."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

from ..errors import as_text, escape

P = ParamSpec("P")
R = TypeVar("R")
Say = Callable[[str], object]
SHOWN = (
    *("loss", "train_loss", "density", "mask_bytes", "validation_accuracy", "validation_perplexity"),
    *("bits_per_changed_weight", "validation_r2", "divergence", "agreement"),
    *("prototype_usage", "feature_rank"),
)  # values of an event that are shown, the most important first
BESIDE = 50  # characters that a bar, its counts and times take beside the text
FIRST, LEAST, SHARE = 2.0, 10.0, 0.1  # seconds before the first line, and between two; share of the time so far


class Lines:
    """Progress as lines of text, in ever longer intervals."""

    def __init__(self, say: Say):
        self.say, self.started = say, time.monotonic()
        self.due = self.started + FIRST
        self.begin("")

    def begin(self, what: str) -> None:
        """Begin another activity, which later lines name."""
        self.what, self.done = what, 0
        self.total: int | None = None
        self.since: dict[int | None, tuple[float, int]] = {}  # by total: when it was first heard of, and what was done

    def moved(self, done: int, total: int | None, what: str | None = None) -> None:
        """Note how much is done."""
        if done <= 1 or total not in self.since:
            self.since[total] = time.monotonic(), done
        self.done, self.total = done, total
        self.what = self.what if what is None else what
        self.look()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Say nothing while a bar is there."""
        self.due = math.inf
        try:
            yield
        finally:
            self.due = time.monotonic() + LEAST

    def look(self) -> None:
        """Say a line if one is due."""
        now = time.monotonic()
        if now < self.due:
            return
        passed, left = now - self.started, self.left()
        self.due = now + max(LEAST, SHARE * passed)
        parts = [self.what]
        if self.total:
            parts.append(f"{self.done:,} of {self.total:,}")
        parts.append(f"{passed:.0f} s")
        if left is not None:
            parts.append(f"about {left:.0f} s left")
        self.say(", ".join(parts))

    def left(self) -> float | None:
        """Return the seconds that the rest takes, if it goes on as so far; None if that is not known."""
        since, before = self.since.get(self.total, (0.0, self.done))
        if not self.total or not before < self.done < self.total:
            return None
        return (time.monotonic() - since) / (self.done - before) * (self.total - self.done)


@dataclass(frozen=True)
class Seen:
    """Where progress is seen: a bar in a console of rich, or lines; and where trainings warn and note."""

    console: Any
    lines: Lines
    warn: Say
    note: Say

    @contextmanager
    def bar(self, what: str, percent: bool = True) -> Iterator[Callable[..., None]]:
        """Show how much of something is done; give a function of (done, in all, and perhaps another text)."""
        if self.console is None:
            before = self.lines.what
            self.lines.begin(what)
            yield self.lines.moved
            return self.lines.begin(before)
        from rich import progress

        many = progress.TaskProgressColumn() if percent else progress.TextColumn("{task.fields[count]}")
        columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(), many)
        times = (progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[left]}"))
        counted = Lines(lambda _: None)  # rich's own estimate forgets a training at every evaluation
        room = max(self.console.width - BESIDE, BESIDE // 2)
        with self.lines.silent(), progress.Progress(*columns, *times, console=self.console) as bar:
            task = bar.add_task(what, total=None, count="", left="")

            def moved(done: int, total: int | None, what: str | None = None) -> None:
                count = f"{done:,}" if total is None else f"{done:,}/{total:,}"
                text = None if what is None else escape(what)
                if text is not None and len(text) > room:
                    text = f"{text[: room - 1]}…"
                counted.moved(done, total)
                seconds = counted.left()
                left = "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
                bar.update(task, completed=done, total=total, description=text, count=count, left=left)

            yield moved
        return None

    @contextmanager
    def training(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Show the progress of trainings; give what they report to."""
        from ..adapter.content import FIGURES
        from .data.base import watched

        bar, passes = self.bar("starting", percent=False), "preparing, batches"  # of data, before the first step
        with bar as moved, watched(lambda done, total: moved(done, total, passes)):

            def report(event: Mapping[str, Any]) -> None:
                nonlocal passes
                passes = "evaluating, batches"
                part = f"{event['part']}: " if "part" in event else ""
                words = [f"{key.replace('_', ' ')} {as_text(event, key)}" for key in SHOWN if key in event]
                match event["event"]:
                    case "warning":
                        self.warn(f"{part}{event['warning']}")
                    case "resumed":
                        self.note(f"{part}{event['resumed']}")
                    case "trial":
                        name = next(one for one in FIGURES if one in event)
                        self.note(f"{part}{name} {as_text(event, name)}")
                    case "end":
                        pass
                    case kind:
                        if kind == "epoch" and self.console is not None:
                            self.note(f"{part}epoch {event['epoch']}: {', '.join(words)}")
                        moved(event["step"], event["steps"], " ".join([f"{part}training", *words[:2]]))

            yield report


def seen_by_default() -> Seen | None:
    """Return where a training in Python is seen: a bar in a terminal or a notebook, elsewhere the logger `maskpack`.

    None in processes beside the first one, and where the logger's level is above WARNING. A notebook without ipywidgets
    gets lines.
    """
    logger = logging.getLogger("maskpack")
    if not logger.isEnabledFor(logging.WARNING) or os.environ.get("RANK", "0") != "0":
        return None
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return Seen(None, Lines(logger.info), logger.warning, logger.info)
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    bar = console if not console.is_jupyter or find_spec("ipywidgets") else None
    return Seen(bar, Lines(console.print), lambda text: console.print(f"Warning: {text}"), console.print)


def shown(train: Callable[P, R]) -> Callable[P, R]:
    """Let a training show its progress, if it is not called with `report`."""

    @wraps(train)
    def shows(*inputs: P.args, **options: P.kwargs) -> R:
        seen = None if "report" in options else seen_by_default()
        if seen is None:
            return train(*inputs, **options)
        with seen.training() as report:
            options["report"] = report
            return train(*inputs, **options)

    return shows
