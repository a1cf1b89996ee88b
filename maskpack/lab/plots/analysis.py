"""Pictures of analyses."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError
from .figure import (
    COLOURS,
    draw_curves,
    draw_matrix,
    label,
    look,
    name_rows,
    new_figure,
    plain_axes,
    row_height,
    up_to_one,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def barrier_figure(pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw a line for each pair of networks; pairs of the same kinds have one colour.

    Args:
        pairs: {"kinds", "points": [{"t", "accuracy"}]}.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not pairs:
        raise ConfigError("there is no pair of networks to draw; give what a barrier analysis measured")
    kinds = list(dict.fromkeys(pair["kinds"] for pair in pairs))
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for pair in pairs:
        at = kinds.index(pair["kinds"])
        named: dict[str, Any] = (
            {} if axes.get_legend_handles_labels()[1].count(label(kinds[at])) else {"label": label(kinds[at])}
        )
        axes.plot(
            [point["t"] for point in pair["points"]],
            [point["accuracy"] for point in pair["points"]],
            color=COLOURS[at % len(COLOURS)],
            linestyle=("-", "--", ":")[at // len(COLOURS) % 3],
            linewidth=1.4,
            alpha=0.8,
            **named,
        )
    axes.set_ylim(up_to_one(*axes.get_ylim()))
    axes.set_xlabel("t, from the first network (0) to the second (1)")
    axes.set_ylabel("accuracy")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def checkpoint_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the accuracy on the target over the checkpoints, and that of pretraining where it is known.

    Args:
        rows: {"checkpoint", "pretraining": accuracy or None, "accuracy", "deviation"}, in the order of the run.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not rows:
        raise ConfigError("there is no checkpoint to draw; give what an analysis of checkpoints measured")
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    places = range(len(rows))
    spread = [row["deviation"] or 0.0 for row in rows]
    style: dict[str, Any] = {"markersize": 5, "linewidth": 1.4}
    axes.errorbar(places, [row["accuracy"] for row in rows], yerr=spread if any(spread) else None, capsize=2,
                  label="target", **style, **look(0))  # fmt: skip
    known = [at for at in places if rows[at]["pretraining"] is not None]
    if known:
        axes.plot(known, [rows[at]["pretraining"] for at in known], label="pretraining", **style, **look(1))
    axes.set_ylim(up_to_one(*axes.get_ylim()))
    axes.set_xticks(places, [label(row["checkpoint"], 24) for row in rows], rotation=90 if len(rows) > 6 else 0)
    axes.set_xlabel("checkpoint that training started from")
    axes.set_ylabel("accuracy")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def criticality_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw a bar for each module: the accuracy that is lost; and beside it, if there is one, its direct path.

    Args:
        rows: {"module", "drop", "path": [{"a", "accuracy"}]}, drawn from the top in this order; drops in shares of 1.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not rows:
        raise ConfigError("there is no module to draw; give rows of a criticality analysis")
    names = [row["module"] for row in rows]
    path = [[point["accuracy"] for point in row.get("path", ())] for row in rows]
    drawn = len(path[0]) > 2
    figure = new_figure(8, 1.2 + row_height(len(rows)) * len(rows))
    axes, *other = (
        figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if drawn else np.array([figure.add_subplot()])
    )
    axes.barh(range(len(rows)), [100 * row["drop"] for row in rows], height=0.7, color=COLOURS[0])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("accuracy lost when rewound (points)")
    plain_axes(axes, grid="x")
    if drawn:
        image = other[0].imshow(np.array(path), aspect="auto", cmap="Blues", interpolation="nearest")
        places = range(0, len(path[0]), math.ceil(len(path[0]) / 8))
        other[0].set_xticks(places, [f"{rows[0]['path'][at]['a']:.2g}" for at in places])
        other[0].tick_params(left=False, labelsize=8)
        other[0].spines[:].set_visible(False)
        other[0].set_xlabel("a, from start (0) to trained (1)")
        figure.colorbar(image, ax=other[0], label="accuracy")
    name_rows(axes, names)
    return figure


SIDE = 0.55  # inches of a square


def mistakes_figure(names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw overlap of errors and Cohen's kappa as two matrices.

    Args:
        names: of the networks. pairs: {"first", "second", "overlap", "kappa"}, a number or None.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not pairs:
        raise ConfigError("there is no pair of networks to draw; give what an analysis of mistakes measured")
    count = len(names)
    figure = new_figure(2 * (SIDE * count + 2.2), SIDE * count + 2.6)
    titles = {
        "overlap": "overlap of errors\n(wrong in both / in any)",
        "kappa": "kappa of being right\n(0: chance, 1: equal)",
    }
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        values = np.eye(count)
        for pair in pairs:
            first, second = names.index(pair["first"]), names.index(pair["second"])
            values[first, second] = values[second, first] = np.nan if pair[key] is None else pair[key]
        texts = [["-" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values]
        draw_matrix(axes, values, names, SIDE, (min(0.0, float(np.nanmin(values))), 1.0), texts)
        axes.set_title(title, fontsize="medium")
    return figure


def shuffle_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw accuracies (0 to 1) over the side of the blocks, a series for each start.

    Args:
        rows: {"start", "block", "accuracy", "deviation"}.

    Raises:
        ConfigError: if there are none, or a number is impossible.
    """
    starts = dict.fromkeys(row["start"] for row in rows)
    curves = {
        f"{start} start": [(row["block"], row["accuracy"], row["deviation"]) for row in rows if row["start"] == start]
        for start in starts
    }
    figure, axes = draw_curves(curves, "block side")
    blocks = sorted({row["block"] for row in rows})
    axes.set_xticks(blocks, [str(block) for block in blocks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("side of the blocks that are shuffled (pixels; on the right the whole image)")
    return figure


def similarity_figure(layers: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw linear CKA over the layers: for pairs of the same kinds the mean, and the range of the pairs.

    Args:
        pairs: {"kinds", "cka": a number or None for each layer}.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not layers or not pairs:
        raise ConfigError(
            "there are no layers or no pairs of networks to draw; give what a similarity analysis measured"
        )
    figure = new_figure(8, 4.2)
    axes = figure.add_subplot()
    for at, kinds in enumerate(dict.fromkeys(pair["kinds"] for pair in pairs)):
        found = [
            [pair["cka"][layer] for pair in pairs if pair["kinds"] == kinds and pair["cka"][layer] is not None]
            for layer in range(len(layers))
        ]
        places = [layer for layer, values in enumerate(found) if values]
        style = look(at)
        axes.plot(
            places, [mean(found[one]) for one in places], label=label(kinds), markersize=5, linewidth=1.4, **style
        )
        low, high = ([end(found[one]) for one in places] for end in (min, max))
        axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(len(layers)), [label(name, 24) for name in layers], rotation=90)
    axes.set_ylabel("linear CKA")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure
