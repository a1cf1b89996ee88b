"""Pictures of curves: accuracy by bytes, labels, block size, checkpoint and interpolation; similarity by layer."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from .figure import COLOURS, Curve, draw_curves, label, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bytes_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw accuracies (0 to 1) over bytes, a series for each method; up and to the left is better."""
    figure, axes = _over(curves, "bytes")
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


def label_figure(curves: Mapping[str, Curve]) -> "Figure":
    """Draw accuracies (0 to 1) over shares of the labels (above 0, to 1), a series for each method."""
    figure, axes = _over(curves, "share of labels")
    shares = sorted({point[0] for one in curves.values() for point in one})
    if shares[-1] > 1:
        raise ConfigError(f"a share of labels is {shares[-1]}; expected 0 to 1")
    _ticks(axes, shares, [f"{100 * share:.3g} %" for share in shares])
    axes.set_xlabel("share of the training labels")
    return figure


def shuffle_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw accuracies (0 to 1) over the side of the blocks, a series for each start; `rows` as of `feature_reuse`."""
    starts: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in rows:
        starts.setdefault(f"{row['start']} start", []).append((row["block"], row["accuracy"], row["deviation"]))
    figure, axes = _over(starts, "block side")
    blocks = sorted({row["block"] for row in rows})
    _ticks(axes, blocks, [str(block) for block in blocks])
    axes.set_xlabel("side of the blocks that are shuffled (pixels; on the right the whole image)")
    return figure


def _ticks(axes: "Axes", places: Sequence[float], texts: Sequence[str]) -> None:
    axes.set_xticks(places, texts)
    axes.set_xticks([], minor=True)


def _over(curves: Mapping[str, Curve], quantity: str) -> "tuple[Figure, Axes]":
    """Draw a line through the points of each series, in the order of the quantity.

    The quantity's axis is logarithmic where that is a decade or more.
    """
    points = [(name, *point) for name, one in curves.items() for point in one]
    if not points:
        raise ConfigError(f"there is no point to draw; give accuracies by {quantity}")
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
    return figure, axes


def checkpoint_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw accuracies on the target and of pretraining over the checkpoints; `rows` as of `from_checkpoints`."""
    if not rows:
        raise ConfigError("there is no checkpoint to draw; give what an analysis of checkpoints measured")
    before = [(at, row["pretraining"], None) for at, row in enumerate(rows) if row["pretraining"] is not None]
    target = [(at, row["accuracy"], row["deviation"]) for at, row in enumerate(rows)]
    curves: list[tuple[str, Curve]] = [("target", target), *([("pretraining", before)] if before else [])]
    figure, axes = draw_curves([(name, points, look(at)) for at, (name, points) in enumerate(curves)])
    names = [label(row["checkpoint"], 24) for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=90 if len(rows) > 6 else 0)
    axes.set_xlabel("checkpoint that training started from")
    return figure


def barrier_figure(pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw a line for each pair of networks; pairs of the same kinds have one colour. `pairs` as of `barriers`."""
    if not pairs:
        raise ConfigError("there is no pair of networks to draw; give what a barrier analysis measured")
    kinds = [pair["kinds"] for pair in pairs]
    order, curves = list(dict.fromkeys(kinds)), []
    for index, pair in enumerate(pairs):
        at = order.index(pair["kinds"])
        style = {"color": COLOURS[at % len(COLOURS)], "linestyle": ("-", "--", ":")[at // len(COLOURS) % 3]}
        points = [(point["t"], point["accuracy"], None) for point in pair["points"]]
        curves.append(("" if pair["kinds"] in kinds[:index] else pair["kinds"], points, {**style, "alpha": 0.8}))
    figure, axes = draw_curves(curves)
    axes.set_xlabel("t, from the first network (0) to the second (1)")
    return figure


def similarity_figure(layers: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw linear CKA over the layers: for pairs of the same kinds the mean, and the range of the pairs.

    Args:
        layers, pairs: as of `similarities`.
    """
    if not layers or not pairs:
        raise ConfigError(
            "there are no layers or no pairs of networks to draw; give what a similarity analysis measured"
        )
    found: dict[str, dict[int, list[float]]] = {}
    for kinds in dict.fromkeys(pair["kinds"] for pair in pairs):
        own = [pair["cka"] for pair in pairs if pair["kinds"] == kinds]
        known = {at: [one[at] for one in own if one[at] is not None] for at in range(len(layers))}
        if any(known.values()):
            found[kinds] = {at: one for at, one in known.items() if one}
    figure, axes = draw_curves(
        [
            (kinds, [(at, mean(one), None) for at, one in values.items()], look(index))
            for index, (kinds, values) in enumerate(found.items())
        ]
    )
    for index, values in enumerate(found.values()):
        low, high = ([end(one) for one in values.values()] for end in (min, max))
        axes.fill_between(list(values), low, high, color=look(index)["color"], alpha=0.15, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(len(layers)), [label(name, 24) for name in layers], rotation=90)
    axes.set_ylabel("linear CKA")
    return figure
