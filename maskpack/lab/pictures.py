"""Pictures: functions from plain data to a matplotlib figure; nothing here reads files or models."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..algebra import Overlap, common_shapes, overlaps
from ..errors import ConfigError
from ..mask import MaskSet, PackedMask, packed_bits
from .figure import (
    COLOURS,
    LEGEND,
    SHADES,
    SMALL,
    Curve,
    Matrix,
    add_scale,
    draw_curves,
    draw_matrix,
    draw_rows,
    height_of,
    in_order,
    label,
    look,
    name_rows,
    new_figure,
    numbers,
    plain_axes,
    up_to_one,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 80
SHOWN = 0.998  # share of all scores between the ends; what lies beyond counts to the outermost bins
NUMBERED = 30  # classes of a confusion; of more, the squares are small and without numbers
SIDE, SMALL_SIDE = 0.4, 0.155  # inches of a square
MOST = 200  # classes: 30 inches
PAIRED = 20  # names of a matrix of pairs; of more, the squares are small and without numbers
PAIRED_SIDE = 0.55  # inches of a square with a number of several digits
VECTORS = 2000  # points; more than these are stored as an image inside of an SVG
Rows = Sequence[Mapping[str, Any]]


def _check_some(values: object, what: str, give: str) -> None:
    """Refuse to draw nothing."""
    if not values:
        raise ConfigError(f"there is no {what} to draw; give {give}")


# --- masks and scores ------------------------------------------------------------------------------------------------


def density_figure(groups: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
    """Draw a row for each masked parameter: a dot at its density, with one sample deviation for several adapters.

    Args:
        groups: name of a series -> adapters, each density (0 to 1) by parameter name. A parameter that an adapter
            does not mask is left out of the mean.

    Example:
        density_figure({"mask": [{"conv1.weight": 0.9, "conv2.weight": 0.8}]})
    """
    names = in_order({name for adapters in groups.values() for one in adapters for name in one})
    _check_some(names, "masked parameter", "adapters that have masks")
    figure, axes = draw_rows(names, grid="both")
    for index, (group, adapters) in enumerate(groups.items()):
        found = [[one[name] for one in adapters if name in one] for name in names]
        rows = [at for at, values in enumerate(found) if values]
        shift = 0.5 * ((index + 0.5) / len(groups) - 0.5)  # within the row, so that series do not hide each other
        several = len(adapters) > 1
        axes.errorbar(
            [statistics.fmean(found[at]) for at in rows],
            [at + shift for at in rows],
            xerr=[statistics.stdev(found[at]) if len(found[at]) > 1 else 0.0 for at in rows] if several else None,
            label=label(group) + (f" ({len(adapters)}: mean ± deviation)" if several else ""),
            linestyle="none",
            markersize=4,
            **look(index),
        )
    axes.set(xlim=up_to_one(*axes.get_xlim()), xlabel="density (share of weights kept)")
    if len(groups) > 1 or any(len(adapters) > 1 for adapters in groups.values()):
        figure.legend(loc="outside upper center", ncols=min(3, len(groups)), **LEGEND)
    return figure


def score_figure(scores: Mapping[str, Tensor], threshold: float | None = None) -> "Figure":
    """Draw the histogram of all scores, and below it a row for each parameter, dark where many of its scores are.

    Args:
        scores: by parameter name, of any shape.
        threshold: where to draw the line above which a weight is kept; None for methods without one.

    Example:
        score_figure({"conv1.weight": torch.randn(8, 3, 3, 3)}, threshold=0.0)
    """
    names = in_order(name for name, values in scores.items() if values.numel())
    if not names:
        raise ConfigError("there are no scores to draw; give the run of a method that trains scores")
    flat = {name: scores[name].detach().float().flatten().cpu() for name in names}
    bad = next((name for name, values in flat.items() if not values.isfinite().all()), None)
    if bad is not None:
        raise ConfigError(f"the scores of {bad!r} are not all finite; the run diverged, take an earlier one")
    low, high = _ends(torch.cat(list(flat.values())), threshold)
    counts = torch.stack([torch.histc(v.clamp(low, high), BINS, low, high) for v in flat.values()])
    rows = height_of(len(names))
    figure = new_figure(8, 3.4 + rows)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, rows))
    edges = torch.linspace(low, high, BINS + 1).tolist()
    above.stairs(counts.sum(0).tolist(), edges, fill=True, color=COLOURS[0])
    above.set(yscale="log", ylabel="weights")
    shares = (counts / counts.sum(1, keepdim=True)).double().numpy()
    extent = (low, high, len(names) - 0.5, -0.5)
    image = below.imshow(shares, extent=extent, norm="log", vmin=1e-4, vmax=1, **SHADES)
    name_rows(below, names)
    below.set_xlabel("score (values beyond the ends count to the outermost bins)")
    add_scale(figure, image, below, "share of the layer's scores", shrink=min(1.0, 2.5 / rows), aspect=12)
    for axes in (above, below):
        plain_axes(axes)
        if threshold is not None:
            axes.axvline(threshold, color=COLOURS[1], linewidth=1.2, label=f"threshold {threshold:g}")
    if threshold is not None:
        above.legend(**LEGEND)
    return figure


def _ends(values: Tensor, threshold: float | None) -> tuple[float, float]:
    """Return the ends of the axis: between them are the threshold and nearly all values."""
    beyond = int((1 - SHOWN) / 2 * len(values))
    # `torch.quantile` takes at most 16 million values
    low, high = (float(values.kthvalue(rank).values) for rank in (1 + beyond, len(values) - beyond))
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def agreement(masks: Mapping[str, MaskSet]) -> tuple[Matrix, Matrix]:
    """Compare masks pair by pair; signs of ternary masks are not looked at.

    Returns:
        Two symmetric (n, n) matrices in the order of `masks`. The first is the share of weights on which two masks
        agree: both keep the weight, or neither does. The second takes out what chance explains: (agreement - expected)
        / (1 - expected), where two masks of densities d₁ and d₂ in a parameter, drawn independently, are expected to
        agree on d₁d₂ + (1 - d₁)(1 - d₂) of its weights (the kappa of Cohen, 1960, with the chance of each parameter).
        It is 1 for equal masks, 0 for unrelated ones, and NaN where chance explains all.

    Example:
        shares, beyond_chance = agreement({"first": first, "second": second})
    """
    if len(masks) < 2:
        raise ConfigError(f"an overlap needs at least two masks, got {len(masks)}")
    (first, shapes), *others = ((name, one.shapes) for name, one in masks.items())
    for name, found in others:
        differing = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
        if differing:
            raise ConfigError(
                f"{first} and {name} mask other parameters: {len(differing)} differ, first {differing[0]!r}; compare "
                f"masks of one backbone with the same selection"
            )
    bits = [MaskSet({name: PackedMask(own.bits, own.shape) for name, own in one.items()}) for one in masks.values()]
    shares, beyond = np.eye(len(bits)), np.eye(len(bits))
    for i, j in combinations_with_replacement(range(len(bits)), 2):
        common = sum((one for _, one in overlaps(bits[i], bits[j])), Overlap())
        if not common.weights:
            raise ConfigError(f"the masks of {first} have no weights to compare")
        shares[i, j] = shares[j, i] = 1 - common.share
        beyond[i, j] = beyond[j, i] = np.nan if common.kappa is None else common.kappa
    return shares, beyond


def overlap_figure(masks: Mapping[str, MaskSet]) -> "Figure":
    """Draw the two matrices of `agreement` beside each other.

    Example:
        overlap_figure({"first": first, "second": second, "third": third})
    """
    shares, beyond = agreement(masks)
    panels = {
        "agreement\n(share of the weights)": (shares, min(float(shares.min()), 0.99)),
        "agreement beyond chance\n(0: unrelated, 1: equal)": (beyond, min(float(np.nan_to_num(beyond).min()), 0.0)),
    }
    return _pairs(list(masks), panels, digits=3)


def _pairs(names: Sequence[str], panels: Mapping[str, tuple[Matrix, float]], digits: int) -> "Figure":
    """Draw matrices of values up to 1 beside each other, by title with the value of the lightest shade; NaN is "-"."""
    numbered = len(names) <= PAIRED
    side = PAIRED_SIDE if numbered else PAIRED_SIDE / 2
    figure = new_figure(len(panels) * (side * len(names) + 2.2), side * len(names) + 2.6)
    for axes, (title, (values, low)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        texts = [["-" if np.isnan(value) else f"{value:.{digits}f}" for value in row] for row in values]
        image = draw_matrix(axes, values, names, side, (low, 1.0), texts if numbered else None)
        axes.set_title(title, fontsize="medium")
        if not numbered:
            figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def users(masks: Mapping[str, MaskSet]) -> dict[str, list[int]]:
    """Return for each parameter how many of its weights are used by 0, 1, …, all tasks.

    A mask is read as the set of features that its task uses; a parameter that a task does not mask is used whole.
    """
    names = in_order(common_shapes(list(masks.values()), "keep"))
    _check_some(names, "masked parameter", "adapters that have masks")
    found = {}
    for name in names:
        own = [one[name] for one in masks.values() if name in one]
        used = np.full(len(own[0].bits), len(masks) - len(own))
        for one in own:
            used += np.unpackbits(packed_bits(one.bits), count=len(one.bits), bitorder="little")
        found[name] = np.bincount(used, minlength=len(masks) + 1).tolist()
    return found


def feature_figure(counts: Mapping[str, Sequence[int]]) -> "Figure":
    """Draw for each parameter the shares of its weights that no task, one task, …, all tasks use: see `users`.

    Example:
        feature_figure({"conv1.weight": [20, 30, 50]})  # of three tasks none, one and two use so many weights
    """
    names = list(counts)
    tasks = len(counts[names[0]]) - 1
    figure, axes = draw_rows(names)
    from matplotlib import colormaps

    shares = np.array([np.array(own) / max(sum(own), 1) for own in counts.values()])
    left = np.zeros(len(names))
    words = {0: "no task", tasks: f"all {tasks} tasks", 1: "one task"}
    for number in range(tasks + 1):
        colour = "#f4f4f4" if number == 0 else colormaps["Blues"](0.25 + 0.7 * number / tasks)
        text = words.get(number, f"{number} tasks")
        axes.barh(range(len(names)), shares[:, number], left=left, height=0.8, color=colour, label=text)
        left += shares[:, number]
    axes.set(xlim=(0, 1), xlabel="share of the weights that are used by …")
    figure.legend(loc="outside upper center", ncols=min(6, tasks + 1), **LEGEND)
    return figure


def gate_figure(history: Mapping[str, Any]) -> "Figure":
    """Draw a row for each task: its gates on the left, its effective weights on the right; columns are times.

    Each column is a histogram of all parameters together, dark where many values are.

    Args:
        history: what is in `histograms.json` of a gated run.

    Example:
        row = {"step": 10, "gates": {"task": {"fc": [3, 5]}}, "weights": {"task": {"fc": [4, 4]}}}
        gate_figure({"weight_end": 0.5, "rows": [row]})
    """
    kinds = {"gates": "gate", "weights": "effective weight"}
    try:
        end, rows = float(history["weight_end"]), list(history["rows"])
        tasks, steps = list(rows[0]["gates"]), [int(row["step"]) for row in rows]
        shares = {(kind, task): over_time(rows, kind, task) for kind in kinds for task in tasks}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ConfigError("there are no histograms of gates to draw; give the histograms.json of a gated run") from None
    figure = new_figure(9, 0.8 + 1.6 * len(tasks))
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharex=True)
    for at, task in enumerate(tasks):
        for axes, (kind, words) in zip(grid[at], kinds.items(), strict=True):
            low, high = (0.0, 1.0) if kind == "gates" else (-end, end)
            extent = (-0.5, len(steps) - 0.5, low, high)
            values = shares[kind, task].T
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


# --- accuracies ------------------------------------------------------------------------------------------------------


def bytes_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw accuracies (0 to 1) over bytes, a series for each method; up and to the left is better.

    Example:
        bytes_figure({"mask": [(5_000, 0.81, 0.01), (20_000, 0.84, 0.01)], "probe": [(900, 0.67, None)]})
    """
    figure, axes = _over(curves, "bytes", "bytes stored beside the backbone")
    axes.xaxis.set_major_formatter(_bytes)
    axes.xaxis.set_minor_formatter("")
    return figure


def _bytes(value: float, _: object = None) -> str:
    """Return a number of bytes in the unit that needs the fewest digits, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:g} {unit}"
        value /= 1000
    return f"{value:g} GB"


def label_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw accuracies (0 to 1) over shares of the labels (above 0, to 1), a series for each method.

    Example:
        label_figure({"mask": [(0.01, 0.52, 0.03), (1.0, 0.84, 0.01)], "probe": [(0.01, 0.5, None)]})
    """
    figure, axes = _over(curves, "share of labels", "share of the training labels")
    shares = sorted({point[0] for one in curves.values() for point in one})
    if shares[-1] > 1:
        raise ConfigError(f"a share of labels is {shares[-1]}; expected 0 to 1")
    _ticks(axes, shares, [f"{100 * share:.3g} %" for share in shares])
    return figure


def shuffle_figure(rows: Rows) -> "Figure":
    """Draw accuracies (0 to 1) over the side of the blocks, a series for each start; `rows` as of `feature_reuse`.

    Example:
        row = {"start": "random", "block": 8, "accuracy": 0.81, "deviation": None}
        shuffle_figure([row, {**row, "block": 1, "accuracy": 0.4}])
    """
    starts: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in rows:
        starts.setdefault(f"{row['start']} start", []).append((row["block"], row["accuracy"], row["deviation"]))
    words = "side of the blocks that are shuffled (pixels; on the right the whole image)"
    figure, axes = _over(starts, "block side", words)
    blocks = sorted({row["block"] for row in rows})
    _ticks(axes, blocks, [str(block) for block in blocks])
    return figure


def _ticks(axes: "Axes", places: Sequence[float], texts: Sequence[str]) -> None:
    axes.set_xticks(places, texts)
    axes.set_xticks([], minor=True)


def _over(curves: Mapping[str, Curve], quantity: str, words: str) -> "tuple[Figure, Axes]":
    """Draw a line through the points of each series, in the order of the quantity.

    The quantity's axis is logarithmic where that is a decade or more.
    """
    points = [(name, *point) for name, one in curves.items() for point in one]
    _check_some(points, "point", f"accuracies by {quantity}")
    for name, x, accuracy, deviation in points:
        if not (0 < x < math.inf and 0 <= accuracy <= 1 and 0 <= (deviation or 0) < math.inf):
            raise ConfigError(
                f"{name!r} has the accuracy {accuracy} and deviation {deviation} at the {quantity} {x}; expected an "
                f"accuracy from 0 to 1, a deviation of 0 or more or None, and {quantity} above 0"
            )
    series = enumerate(curves.items())
    figure, axes = draw_curves(
        [(name, sorted(one, key=lambda point: point[0]), look(at)) for at, (name, one) in series]
    )
    from matplotlib.ticker import LogLocator

    most, least = (end(point[1] for point in points) for end in (max, min))
    if most >= 10 * least:
        axes.set_xscale("log")
        if most < 100 * least:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if any(point[3] for point in points):
        axes.set_ylabel("accuracy (mean ± deviation)")
    axes.set_xlabel(words)
    return figure, axes


def checkpoint_figure(rows: Rows) -> "Figure":
    """Draw accuracies on the target and of pretraining over the checkpoints; `rows` as of `from_checkpoints`.

    Example:
        checkpoint_figure([{"checkpoint": "epoch-1", "accuracy": 0.7, "deviation": None, "pretraining": 0.5}])
    """
    _check_some(rows, "checkpoint", "what an analysis of checkpoints measured")
    before = [(at, row["pretraining"], None) for at, row in enumerate(rows) if row["pretraining"] is not None]
    target = [(at, row["accuracy"], row["deviation"]) for at, row in enumerate(rows)]
    curves: list[tuple[str, Curve]] = [("target", target), *([("pretraining", before)] if before else [])]
    figure, axes = draw_curves([(name, points, look(at)) for at, (name, points) in enumerate(curves)])
    names = [label(row["checkpoint"], 24) for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=90 if len(rows) > 6 else 0)
    axes.set_xlabel("checkpoint that training started from")
    return figure


def confusion_figure(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> "Figure":
    """Draw counts of examples, (classes, classes), by true class (row) and predicted class (column).

    A square's shade tells its share of the row, so that rare classes are seen as well as frequent ones.

    Example:
        confusion_figure([[48, 2], [5, 45]], ["daisy", "rose"])
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
    axes.set(xlabel="predicted class", ylabel="true class")
    right, total = found.trace(), found.sum()
    axes.set_title(f"{right:,.0f} of {total:,.0f} right: {100 * right / max(total, 1):.2f} %", fontsize="medium")
    add_scale(figure, image, axes, "share of the true class", shrink=min(1.0, 3 / (side * classes)), aspect=12)
    return figure


def cluster_figure(points: Sequence[Sequence[float]], expert: Sequence[int]) -> "Figure":
    """Draw samples at the first two principal components of their embeddings, (N, 2), coloured by expert, (N,).

    Example:
        cluster_figure([[0.1, 2.0], [1.5, -0.3], [1.7, 0.2]], [0, 1, 1])
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
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set_aspect("equal", adjustable="datalim")
    plain_axes(axes)
    figure.legend(title="expert (samples)", loc="outside right upper", markerscale=2, **LEGEND)
    return figure


# --- analyses --------------------------------------------------------------------------------------------------------


def criticality_figure(rows: Rows) -> "Figure":
    """Draw a bar for each module: the accuracy that is lost; and beside it, if there is one, its direct path.

    `rows` are as of `criticality`, drawn from the top in this order.

    Example:
        criticality_figure([{"module": "conv1", "drop": 0.4}, {"module": "conv2", "drop": 0.1}])
    """
    _check_some(rows, "module", "rows of a criticality analysis")
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
        beside.tick_params(left=False, labelsize=SMALL)
        beside.spines[:].set_visible(False)
        beside.set_xlabel("a, from start (0) to trained (1)")
        figure.colorbar(image, ax=beside, label="accuracy")
    name_rows(axes, [row["module"] for row in rows])
    return figure


def mistakes_figure(names: Sequence[str], pairs: Rows) -> "Figure":
    """Draw overlap of errors and Cohen's kappa as two matrices; `pairs` as of `mistakes`.

    Example:
        mistakes_figure(["a", "b"], [{"first": "a", "second": "b", "overlap": 0.4, "kappa": 0.3}])
    """
    _check_some(pairs, "pair of networks", "what an analysis of mistakes measured")
    titles = {
        "overlap": "overlap of errors\n(wrong in both / in any)",
        "kappa": "kappa of being right\n(0: chance, 1: equal)",
    }
    panels = {}
    for key, title in titles.items():
        values = np.eye(len(names))
        for pair in pairs:
            first, second = names.index(pair["first"]), names.index(pair["second"])
            values[first, second] = values[second, first] = np.nan if pair[key] is None else pair[key]
        panels[title] = values, min(0.0, float(np.nanmin(values)))
    return _pairs(names, panels, digits=2)


def barrier_figure(pairs: Rows) -> "Figure":
    """Draw a line for each pair of networks; pairs of the same kinds have one colour. `pairs` as of `barriers`.

    Example:
        ends = [{"t": 0.0, "accuracy": 0.84}, {"t": 1.0, "accuracy": 0.83}]
        barrier_figure([{"kinds": "mask - mask", "points": [ends[0], {"t": 0.5, "accuracy": 0.61}, ends[1]]}])
    """
    _check_some(pairs, "pair of networks", "what a barrier analysis measured")
    curves: list[tuple[str, Curve, Mapping[str, Any]]] = []
    kinds: list[str] = []
    for pair in pairs:
        name = "" if pair["kinds"] in kinds else pair["kinds"]
        kinds += [name] if name else []
        at = kinds.index(pair["kinds"])
        style = {"color": COLOURS[at % len(COLOURS)], "linestyle": ("-", "--", ":")[at // len(COLOURS) % 3]}
        points = [(point["t"], point["accuracy"], None) for point in pair["points"]]
        curves.append((name, points, {**style, "alpha": 0.8}))
    figure, axes = draw_curves(curves)
    axes.set_xlabel("t, from the first network (0) to the second (1)")
    return figure


def similarity_figure(layers: Sequence[str], pairs: Rows) -> "Figure":
    """Draw linear CKA over the layers: for pairs of the same kinds the mean, and the range of the pairs.

    Args:
        layers, pairs: as of `similarities`.

    Example:
        similarity_figure(["conv1", "conv2"], [{"kinds": "mask - full", "cka": [0.99, 0.81]}])
    """
    _check_some(layers and pairs, "layer or no pair of networks", "what a similarity analysis measured")
    found: dict[str, dict[int, list[float]]] = {}
    for pair in pairs:
        for at, value in enumerate(pair["cka"]):
            if value is not None:
                found.setdefault(pair["kinds"], {}).setdefault(at, []).append(value)
    curves = [(kinds, sorted(values.items()), look(index)) for index, (kinds, values) in enumerate(found.items())]
    figure, axes = draw_curves(
        [(kinds, [(at, statistics.mean(one), None) for at, one in points], style) for kinds, points, style in curves]
    )
    for _, points, style in curves:
        low, high = ([end(one) for _, one in points] for end in (min, max))
        axes.fill_between([at for at, _ in points], low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(ylim=(-0.03, 1.03), ylabel="linear CKA")
    axes.set_xticks(range(len(layers)), [label(name, 24) for name in layers], rotation=90)
    return figure
