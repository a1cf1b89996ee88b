"""Theorems 1 and 2 of Self-Masking Networks as curves: settings that are one and the same, and single changes of them.

    MASKPACK_DATA=… python -m benchmarks.theorems                     some minutes of one core, resumable
    python -m benchmarks.theorems --write docs/results/methods.md    table and picture of what is recorded

Scores that start at S, learn at the rate L and are kept above M give the same masks as those at S + c, L, M + c, and
those at a S, a L, a M. Powers of two are exact in floats, 2.5 and 100 are not.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from maskpack import load_backbone
from maskpack.lab import save_figure
from maskpack.lab.figure import COLOURS, LEGEND, new_figure, plain_axes
from maskpack.training import load_data, train_mask

from .measured import trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import IMAGES, data_of, resnet

NAME = "theorems"
MARK = "python -m benchmarks.theorems --write docs/results/methods.md"
STEPS = 150
# rate, start and threshold; whether they are equivalent to the first
RUNS: dict[tuple[float, float, float], bool] = {
    (50.0, 1.0, 0.0): True,
    (100.0, 2.0, 0.0): True,
    (50.0, 1.5, 0.5): True,
    (100.0, 2.5, 0.5): True,
    (100.0, 1.0, 0.0): False,
    (50.0, 2.5, 0.0): False,
    (50.0, 1.0, 0.5): False,
}


def measure(rate: float, start: float, threshold: float) -> dict[str, Any]:
    """Return the training loss of every tenth step, and the density at the end."""
    events: list[Mapping[str, Any]] = []
    options = {"init": start, "threshold": threshold}
    config = replace(IMAGES, steps=STEPS, lr=rate, method_options=options, objective_options={})
    data = replace(load_data(str(data_of("cartoon"))), test=None)
    result = train_mask(load_backbone(**resnet(20)), data, config, report=events.append)
    losses = [[event["step"], event["loss"]] for event in events if event["event"] == "step"]
    return {"losses": losses, "density": result.metrics["density"]}


def run(rate: float, start: float, threshold: float) -> None:
    """Run what is not recorded."""
    trial(NAME, {"rate": rate, "start": start, "threshold": threshold}, partial(measure, rate, start, threshold))


def in_words(one: Mapping[str, Any]) -> str:
    return f"rate {one['rate']:g}, start {one['start']:g}, threshold {one['threshold']:g}"


def page(path: Path) -> None:
    """Write a table and a picture of what is recorded between the page's markers."""
    found = trials(NAME)
    if not found:
        return write_between(path, MARK, NOTHING)
    first, rows = found[0]["result"], []
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    for i, one in enumerate(found):
        same = RUNS[one["rate"], one["start"], one["threshold"]]
        steps, losses = zip(*one["result"]["losses"], strict=True)
        # equal curves lie on each other: the first is the widest
        style = {"linewidth": max(1.0, 7.0 - 2 * i), "alpha": 0.6} if same else {"linestyle": "--", "linewidth": 1.2}
        axes.plot(steps, losses, color=COLOURS[i % len(COLOURS)], label=in_words(one), **style)
        away = max(abs(a[1] - b[1]) for a, b in zip(one["result"]["losses"], first["losses"], strict=True))
        rows.append([in_words(one), "yes" if same else "no", f"{away:.2g}", f"{one['result']['density']:.4f}"])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.legend(**LEGEND)
    plain_axes(axes, grid="y")
    save_figure(figure, path.parent / f"{NAME}.svg")
    columns = ("scores", "equivalent", "greatest distance of the loss", "density at the end")
    picture = f"\n![Training loss over steps, by rate, start and threshold]({NAME}.svg)\n"
    return write_between(path, MARK, table(columns, rows, 2) + picture)


if __name__ == "__main__":
    command(__doc__, {"-".join(f"{number:g}" for number in one): partial(run, *one) for one in RUNS}, page)
