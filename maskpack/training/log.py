"""Logs of a run: one JSON object a line, and TensorBoard curves."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import StateError, require

Report = Callable[[Mapping[str, Any]], None]


def tagged(report: Report | None, part: str) -> Report | None:
    """Return a report whose events have also "part", the name of the run that they are of."""
    return None if report is None else lambda event: report({**event, "part": part})


def is_main_process() -> bool:
    """Tell whether this process writes and prints, of those that Accelerate started."""
    accelerate = require("accelerate", "train", "training")
    # the first state of a process decides on its device, and does not look at this variable
    return bool(accelerate.PartialState(accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")).is_main_process)


class RunLog:
    """Writes events to `log.jsonl` and their numbers to TensorBoard, and passes them on.

    Args:
        folder: where to write; None only passes events on.
        report: called with every event.
        resume: keep what is there, up to the step of the first new event.
    """

    def __init__(self, folder: Path | None, report: Report | None, resume: bool):
        self.report = report
        self.file = self.board = None
        if folder is not None:
            require("tensorboard", "train", "writing TensorBoard logs")
            writer = require("torch.utils.tensorboard", "train", "writing TensorBoard logs").SummaryWriter
            try:
                self.file = (folder / "log.jsonl").open("a" if resume else "w", encoding="utf-8")
                self.board = writer(str(folder / "tensorboard"))
            except OSError as error:
                raise StateError(
                    f"cannot write the logs in {folder}: {error.strerror or error}; make room, or choose a folder that "
                    f"you may write to"
                ) from error

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.file is not None and self.board is not None:
            with suppress(OSError):  # lines were flushed one by one; curves are not worth a run
                self.file.close()
                self.board.close()

    def write(self, event: Mapping[str, Any]) -> None:
        """Record one event: "event" says which kind, "step" when, and the rest are its numbers."""
        if self.report is not None:
            self.report(event)
        if self.file is not None and self.board is not None:
            try:
                self.file.write(json.dumps(event, sort_keys=True) + "\n")
                self.file.flush()
            except OSError as error:
                raise StateError(
                    f"cannot write {self.file.name}: {error.strerror}; make room and resume from the last checkpoint"
                ) from error
            for name, value in event.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event['event']}/{name}", value, event["step"])
