"""Progress bars of training."""

from collections.abc import Callable, Mapping
from typing import Any

from .console import note, notes

SHOWN = (
    *("loss", "train_loss", "density", "mask_bytes", "validation_accuracy", "divergence", "agreement"),
    *("prototype_usage", "feature_rank"),
)


class Progress:
    """A progress bar on stderr that `train_mask` reports to."""

    def __init__(self, off: bool):
        self.off = off

    def __enter__(self) -> Any:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from maskpack.errors import escape

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
        )
        self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=notes, disable=self.off)
        self.bar.start()
        task = self.bar.add_task("training", total=None)

        def report(event: Mapping[str, Any]) -> None:
            words = [f"{k.replace('_', ' ')} {_number(event[k])}" for k in SHOWN if k in event]
            part = f"{event['part']}: " if "part" in event else ""
            if event["event"] == "warning":
                note(f"Warning: {part}{event['warning']}")
                return
            if event["event"] == "resumed":
                note(f"{part}{event['resumed']}")
                return
            if event["event"] == "epoch" and not self.off:
                note(f"{part}epoch {event['epoch']}: {', '.join(words)}")
            shown = part + " ".join(words[:2])
            self.bar.update(task, completed=event["step"], total=event["steps"], description=escape(shown))

        return report

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def of_trials(report: Callable[[Mapping[str, Any]], None], quiet: bool) -> Callable[[Mapping[str, Any]], None]:
    """Return what a run of many trials reports to: the progress bar, and a note of each trial that is finished."""

    def told(event: Mapping[str, Any]) -> None:
        if event["event"] == "trial":
            note(f"{event['part']}: {event['accuracy']:.4f}", quiet)
        elif event["event"] != "end":
            report(event)

    return told


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
