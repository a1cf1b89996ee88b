"""Pictures of results: confusion, common mistakes, criticality, clusters, gates."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from .figure import (
    COLOURS,
    SHADES,
    SMALL,
    Matrix,
    add_scale,
    draw_matrix,
    draw_pairs,
    height_of,
    label,
    look,
    name_rows,
    new_figure,
    numbers,
    plain_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 30  # classes; of more, the squares are small and without numbers
SIDE, SMALL_SIDE = 0.4, 0.155  # inches of a square
MOST = 200  # classes: 30 inches
VECTORS = 2000  # points; more than these are stored as an image inside of an SVG
GATES = {"gates": "gate", "weights": "effective weight"}


def confusion_figure(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> "Figure":
    """Draw counts of examples, (classes, classes), by true class (row) and predicted class (column).

    A square's shade tells its share of the row, so that rare classes are seen as well as frequent ones.
    """
    classes = len(class_names)
    if not 0 < classes <= MOST:
        raise ConfigError(f"a confusion picture has 1 to {MOST} classes, got {classes}")
    if not all(isinstance(name, str) for name in class_names):
        raise ConfigError(f"class names must be texts, got {class_names!r:.200}")
    found = numbers(counts, classes, f"the counts of {classes} classes")
    if len(found) != classes or found.min() < 0:
        raise ConfigError(f"{classes} class names need {classes} rows of counts of 0 or more, got {len(found)} rows")
    shares = found / np.maximum(found.sum(1, keepdims=True), 1)
    numbered = classes <= NUMBERED
    side = SIDE if numbered else SMALL_SIDE
    figure = new_figure(side * classes + 3.2, side * classes + 2.2)
    axes = figure.add_subplot()
    texts = [[f"{count:.0f}" if count else "" for count in row] for row in found]
    image = draw_matrix(axes, shares, class_names, side, (0, 1), texts if numbered else None, 0.5)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    add_scale(figure, image, axes, "share of the true class", shrink=min(1.0, 3 / (side * classes)), aspect=12)
    return figure


def mistakes_figure(names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw overlap of errors and Cohen's kappa as two matrices; `pairs` as of `mistakes`."""
    if not pairs:
        raise ConfigError("there is no pair of networks to draw; give what an analysis of mistakes measured")
    panels = {}
    for key, title in (
        ("overlap", "overlap of errors\n(wrong in both / in any)"),
        ("kappa", "kappa of being right\n(0: chance, 1: equal)"),
    ):
        values = np.eye(len(names))
        for pair in pairs:
            first, second = names.index(pair["first"]), names.index(pair["second"])
            values[first, second] = values[second, first] = np.nan if pair[key] is None else pair[key]
        panels[title] = values, min(0.0, float(np.nanmin(values)))
    return draw_pairs(names, panels, digits=2)


def criticality_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw a bar for each module: the accuracy that is lost; and beside it, if there is one, its direct path.

    Args:
        rows: as of `criticality`, drawn from the top in this order.
    """
    if not rows:
        raise ConfigError("there is no module to draw; give rows of a criticality analysis")
    figure = new_figure(8, 1.2 + height_of(len(rows)))
    path = [[point["accuracy"] for point in row.get("path", ())] for row in rows]
    drawn = len(path[0]) > 2
    grid = figure.subplots(1, 2 if drawn else 1, sharey=True, squeeze=False, width_ratios=(3, 2) if drawn else None)
    axes = grid[0, 0]
    axes.barh(range(len(rows)), [100 * row["drop"] for row in rows], height=0.7, color=COLOURS[0])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("accuracy lost when rewound (points)")
    plain_axes(axes, grid="x")
    if drawn:
        beside = grid[0, 1]
        image = beside.imshow(np.array(path), **SHADES)
        places = range(0, len(path[0]), math.ceil(len(path[0]) / 8))
        beside.set_xticks(places, [f"{rows[0]['path'][at]['a']:.2g}" for at in places])
        beside.tick_params(left=False, labelsize=8)
        beside.spines[:].set_visible(False)
        beside.set_xlabel("a, from start (0) to trained (1)")
        figure.colorbar(image, ax=beside, label="accuracy")
    name_rows(axes, [row["module"] for row in rows])
    return figure


def cluster_figure(points: Sequence[Sequence[float]], expert: Sequence[int]) -> "Figure":
    """Draw samples where the first two principal components of their embeddings put them, coloured by expert.

    Args:
        points: (N, 2). expert: (N,), from 0.
    """
    if not len(points) or len(points) != len(expert):
        raise ConfigError(f"a cluster map needs an expert for each point; got {len(points)} and {len(expert)} experts")
    places = numbers(points, 2, "the points of a cluster map")
    experts = numbers([[one] for one in expert], 1, "the experts of a cluster map")[:, 0]
    if (experts < 0).any() or (experts % 1).any():
        raise ConfigError("the experts of a cluster map must be integers from 0, and they are not; correct them")
    figure = new_figure(6.5, 5)
    axes = figure.add_subplot()
    for number in sorted({int(one) for one in experts}):
        x, y = places[experts == number].T
        name = f"{number} ({len(x):,})"
        axes.scatter(x, y, s=10, linewidths=0, rasterized=len(places) > VECTORS, label=name, **look(number))
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_aspect("equal", adjustable="datalim")
    plain_axes(axes)
    figure.legend(title="expert (samples)", loc="outside right upper", frameon=False, fontsize="small", markerscale=2)
    return figure


def gate_figure(history: Mapping[str, Any]) -> "Figure":
    """Draw a row for each task: its gates on the left, its effective weights on the right; columns are times.

    Each column is a histogram of all parameters together, dark where many values are.

    Args:
        history: what is in `histograms.json` of a gated run.
    """
    try:
        end, rows = float(history["weight_end"]), list(history["rows"])
        tasks, steps = list(rows[0]["gates"]), [int(row["step"]) for row in rows]
        shares = {kind: [over_time(rows, kind, task) for task in tasks] for kind in GATES}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ConfigError(
            "there are no histograms of gates to draw; give the histograms.json of a gated run, as it was written"
        ) from None
    figure = new_figure(9, 0.8 + 1.6 * len(tasks))
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharex=True)
    for at, task in enumerate(tasks):
        for axes, (kind, words) in zip(grid[at], GATES.items(), strict=True):
            low, high = (0.0, 1.0) if kind == "gates" else (-end, end)
            extent = (-0.5, len(steps) - 0.5, low, high)
            values = shares[kind][at].T
            image = axes.imshow(values, extent=extent, origin="lower", norm="log", vmin=1e-3, vmax=1, **SHADES)
            plain_axes(axes)
            axes.set_ylabel(f"{label(task, 16)}\n{words}", fontsize=SMALL)
            shown = sorted({0, len(steps) // 2, len(steps) - 1})
            axes.set_xticks(shown, [str(steps[one]) for one in shown])
            if at == len(tasks) - 1:
                axes.set_xlabel("step", fontsize=SMALL)
    add_scale(figure, image, grid, "share of the values", shrink=0.6)
    return figure


def over_time(rows: list[Any], kind: str, task: str) -> Matrix:
    """Return the histograms of one task, all parameters together, as shares, (times, bins)."""
    counts: Matrix = np.array([np.sum(list(row[kind][task].values()), axis=0) for row in rows], dtype=np.float64)
    if counts.ndim != 2 or not (counts.sum(1) > 0).all():
        raise ValueError(kind)
    shares: Matrix = counts / counts.sum(1, keepdims=True)
    return shares
