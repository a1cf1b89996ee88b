"""Accuracy over bytes: masks beside everything small, each with a rate search of its own.

    MASKPACK_DATA=… python -m benchmarks.frontier                      every task; hours of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.frontier resnet20-cartoon     one task
    python -m benchmarks.frontier --write docs/results/frontier.md     table and pictures of what is recorded

Bytes are all that is stored beside backbone and head. What is trained is rounded to few bits afterwards, each size a
point of its own. Rates, and frozen or adapted BatchNorm statistics, are chosen on a fifth of the training rows; masks
on larger networks than ResNet-20 have the default ones, which saves hours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from maskpack.lab import save_figure
from maskpack.lab.figure import new_figure, plain_axes
from maskpack.training.config import TrainConfig

from .comparisons import TEXT_RATES, compared, mask_rate, rows_of
from .recipe import lite0
from .report import NOTHING, command, percent, table, write_between
from .tasks import data_of, minilm, resnet

NAME = "frontier"
MARK = "python -m benchmarks.frontier --write docs/results/frontier.md"
STEPS, BATCH = 200, 32
TASKS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "resnet20-cartoon": (partial(resnet, 20), "cartoon"),
    "resnet20-eurosat": (partial(resnet, 20), "eurosat"),
    "lite0-64-sign_digits": (partial(lite0, 64), "sign_digits"),
    "minilm-trec6": (minilm, "trec6"),
}
BUDGETS = (5_000, 10_000, 20_000, 40_000, 80_000)
OTHERS = ("norms", "bitfit", "ia3", "vera", "lora-xs", *(f"lora:{rank}" for rank in (1, 2, 4, 8)))
# mask settings by their name in the table
MASKS: dict[str, dict[str, Any]] = {
    "mask, largest 2 % + norms": {"top": 0.02},
    "mask, largest 10 % + norms": {"top": 0.1},
    "mask, largest 30 % + norms": {"top": 0.3},
    "mask, all + norms": {"top": 1.0},
    "mask, largest 10 %": {"top": 0.1, "train": ()},
    "mask, all": {"top": 1.0, "train": ()},
    "flips, largest 5 % + norms": {"method": "flip", "top": 0.05},
    "mask, all + norms, 10 kB": {"top": 1.0, "bytes_budget": 10_000},
    "mask, all + norms, 40 kB": {"top": 1.0, "bytes_budget": 40_000},
}
LORA_RATES = {f"lora:{rank}": TEXT_RATES["lora:8"] for rank in (1, 2, 4, 8)}  # of texts


@dataclass(frozen=True)
class Point:
    """One way at one size: its name, bytes beside backbone and head, and test accuracies by seed."""

    name: str
    size: float
    accuracies: Sequence[float]
    mask: bool

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return sum(self.accuracies) / len(self.accuracies)


def run(task: str) -> None:
    """Run what is not recorded of a task."""
    make, data = TASKS[task]
    text = make is minilm
    config = TrainConfig(steps=STEPS, batch_size=BATCH, precision="bf16" if text else "no")
    given = (make(), data_of(data))
    usual = {} if task.startswith("resnet20") else {"mask": (mask_rate(task, config),)}
    compared(NAME, task, *given, ("probe",), {}, config)
    for name, changes in MASKS.items():
        compared(NAME, f"{task}: {name}", *given, ("mask",), usual, replace(config, **changes))
    compared(NAME, task, *given, OTHERS, LORA_RATES if text else {}, config)


def points(task: str) -> list[Point]:
    """Return what is recorded of a task, by size; nothing while ways are missing."""
    found = [(row["method"], row, False) for row in rows_of(NAME, task, ("probe", *OTHERS))]
    for name in MASKS:
        found += [(name, row, True) for row in rows_of(NAME, f"{task}: {name}", ("mask",))]
    if not {"probe", *OTHERS, *MASKS} <= {name for name, _, _ in found}:
        return []
    made = [
        Point(name, row["bytes"] - row["sizes"].get("head", 0), row["accuracies"], mask) for name, row, mask in found
    ]
    return sorted(made, key=lambda one: one.size)


def best(found: Sequence[Point]) -> list[Point]:
    """Return the points of the frontier: each is more accurate than all smaller ones."""
    kept: list[Point] = []
    for one in found:
        if not kept or one.accuracy > kept[-1].accuracy:
            kept.append(one)
    return kept


def write_pages(page: Path) -> None:
    """Write the tables of the trials between the page's markers, and a picture for each task beside the page."""
    found = {task: own for task in TASKS if (own := points(task))}
    texts = [budgets(found)] if found else [NOTHING]
    for task, own in found.items():
        save_figure(picture(own), page.parent / f"frontier-{task}.svg")
        lines = [
            [one.name, f"{one.size:,.0f}", percent(one.accuracies), "yes" if one in best(own) else ""] for one in own
        ]
        texts.append(
            f"\n**{task}**\n\n![Accuracy over bytes, {task}](frontier-{task}.svg)\n\n"
            + table(("way", "bytes", "accuracy", "none smaller is as good"), lines, 1)
        )
    write_between(page, MARK, "".join(texts))


def budgets(found: dict[str, list[Point]]) -> str:
    """Return the best mask and the best other way within each budget."""
    lines = []
    for task, own in found.items():
        for budget in BUDGETS:
            cells: list[object] = [task, f"{budget // 1000} kB"]
            for mask in (True, False):
                within = [one for one in own if one.size <= budget and one.mask == mask]
                top = max(within, key=lambda one: one.accuracy, default=None)
                cells += ["-", "-"] if top is None else [percent(top.accuracies), top.name]
            lines.append(cells)
    return table(("task", "budget", "best mask", "which", "best other way", "which"), lines, 2)


def picture(found: Sequence[Point]) -> Any:
    """Draw accuracy over bytes; dominated points are grey, those far below the probe are left out."""
    figure = new_figure(6.4, 3.6)
    axes, front = figure.add_subplot(), best(found)
    low, high = 100 * front[0].accuracy - 3, 100 * front[-1].accuracy + 1
    for one in sorted(found, key=lambda one: one in front):  # grey ones below
        colour = ("#0072b2" if one.mask else "#d55e00") if one in front else "#b8bcc2"
        axes.plot(max(one.size, 100), 100 * one.accuracy, "o" if one.mask else "s", color=colour, markersize=5)
    height = high
    for one in reversed(front):  # names stand left of their points, from the top, a line apart
        height = min(height - (high - low) / 24, 100 * one.accuracy)
        axes.annotate(
            one.name,
            (max(one.size, 100), 100 * one.accuracy),
            (max(one.size, 100) / 1.5, height),
            size=6,
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#b8bcc2", "linewidth": 0.6},
        )
    axes.set_xscale("log")
    axes.set_xlim(10)
    axes.set_ylim(low, high)
    axes.set_xlabel(
        "bytes beside backbone and head (round: masks, square: others, grey: a smaller one is as good)", size=7
    )
    axes.set_ylabel("test accuracy (%)", size=8)
    plain_axes(axes, grid="both")
    return figure


def main() -> None:
    command(__doc__, {task: partial(run, task) for task in TASKS}, write_pages)


if __name__ == "__main__":
    main()
