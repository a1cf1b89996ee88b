"""Logs of a run: one JSON object a line, and TensorBoard curves."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import StateError, require

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
