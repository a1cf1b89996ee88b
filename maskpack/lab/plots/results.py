"""Pictures of results: accuracy over bytes and labels, confusion, clusters, gates."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from .figure import SMALL, Curves, Matrix, draw_curves, draw_matrix, label, look, new_figure, numbers, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bytes_figure(curves: Curves) -> "Figure":
    """Draw accuracies (0 to 1) over bytes, a series for each method; up and to the left is better.

    Raises:
        ConfigError: if there are no points, or a number is impossible.
    """
    figure, axes = draw_curves(curves, "bytes")
    axes.set_xlabel("bytes stored beside the backbone")
    axes.xaxis.set_major_formatter(_bytes)
    axes.xaxis.set_minor_formatter("")
    return figure


def _bytes(value: float, _: object = None) -> str:
    """Return a number of bytes in the unit that needs the fewest digits, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:g} {unit}"


def label_figure(curves: Curves) -> "Figure":
    """Draw accuracies (0 to 1) over shares of the labels (above 0, to 1), a series for each method.

    Raises:
        ConfigError: if there are no points, or a number is impossible.
    """
    figure, axes = draw_curves(curves, "share of labels")
    shares = sorted({point[0] for one in curves.values() for point in one})
    if shares[-1] > 1:
        raise ConfigError(f"a share of labels is {shares[-1]}; expected 0 to 1")
    axes.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("share of the training labels")
    return figure


NUMBERED = 30  # classes; of more, the squares are small and without numbers
SIDE, SMALL_SIDE = 0.4, 0.155  # inches of a square
MOST = 200  # classes: 30 inches


def confusion_figure(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> "Figure":
    """Draw counts of examples by true class (row) and predicted class (column).

    A square's shade tells its share of the row, so that rare classes are seen as well as frequent ones.

    Args:
        counts: (classes, classes), 0 or more.
        class_names: in the order of rows and columns.

    Raises:
        ConfigError: if the counts are no such matrix, or there are more than 200 classes.
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
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / (side * classes)), aspect=12)
    bar.set_label("share of the true class", fontsize="small")
    bar.ax.tick_params(labelsize=SMALL)
    return figure


VECTORS = 2000  # points; more than these are stored as an image inside of an SVG


def cluster_figure(points: Sequence[Sequence[float]], expert: Sequence[int]) -> "Figure":
    """Draw samples where the first two principal components of their embeddings put them, coloured by expert.

    Args:
        points: (N, 2).
        expert: (N,), from 0.

    Raises:
        ConfigError: if there are no samples, not as many experts as points, or something is no such number.
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


KINDS = {"gates": "gate", "weights": "effective weight"}


def gate_figure(history: Mapping[str, Any]) -> "Figure":
    """Draw a row for each task: its gates on the left, its effective weights on the right; columns are times.

    Each column is a histogram of all parameters together, dark where many values are.

    Args:
        history: what a gated run leaves in `histograms.json`: `bins`, `weight_end`, and `rows` of {"step", "gates":
            {task: {parameter: counts}}, "weights"}.

    Raises:
        ConfigError: if there are no histograms in it.
    """
    try:
        end, rows = float(history["weight_end"]), list(history["rows"])
        tasks, steps = list(rows[0]["gates"]), [int(row["step"]) for row in rows]
        shares = {kind: [over_time(rows, kind, task) for task in tasks] for kind in KINDS}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ConfigError(
            "there are no histograms of gates to draw; give the histograms.json of a gated run, as it was written"
        ) from None
    figure = new_figure(9, 0.8 + 1.6 * len(tasks))
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharex=True)
    for at, task in enumerate(tasks):
        for axes, (kind, words) in zip(grid[at], KINDS.items(), strict=True):
            low, high = (0.0, 1.0) if kind == "gates" else (-end, end)
            image = axes.imshow(
                shares[kind][at].T, aspect="auto", cmap="Blues", norm="log", vmin=1e-3, vmax=1, origin="lower",
                extent=(-0.5, len(steps) - 0.5, low, high), interpolation="nearest",
            )  # fmt: skip
            plain_axes(axes)
            axes.set_ylabel(f"{label(task, 16)}\n{words}", fontsize=SMALL)
            shown = sorted({0, len(steps) // 2, len(steps) - 1})
            axes.set_xticks(shown, [str(steps[one]) for one in shown])
            if at == len(tasks) - 1:
                axes.set_xlabel("step", fontsize=SMALL)
    bar = figure.colorbar(image, ax=grid, shrink=0.6)
    bar.set_label("share of the values", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def over_time(rows: list[Any], kind: str, task: str) -> Matrix:
    """Return the histograms of one task, all parameters together, as shares, (times, bins)."""
    counts: Matrix = np.array([np.sum(list(row[kind][task].values()), axis=0) for row in rows], dtype=np.float64)
    if counts.ndim != 2 or not (counts.sum(1) > 0).all():
        raise ValueError(kind)
    shares: Matrix = counts / counts.sum(1, keepdims=True)
    return shares
