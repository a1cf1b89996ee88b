"""Pictures of masks: density, overlap and use by layer, and scores."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from bitarray.util import count_xor
from torch import Tensor

from ...errors import ConfigError
from ...mask import MaskSet, packed_bits
from .figure import (
    COLOURS,
    SHADES,
    Matrix,
    add_scale,
    draw_pairs,
    draw_rows,
    height_of,
    in_order,
    label,
    look,
    name_rows,
    new_figure,
    plain_axes,
    up_to_one,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 80
SHOWN = 0.998  # share of all scores between the ends; what lies beyond counts to the outermost bins


def density_figure(groups: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
    """Draw a row for each masked parameter: a dot at its density, with one sample deviation for several adapters.

    Args:
        groups: name of a series -> adapters, each density (0 to 1) by parameter name. A parameter that an adapter
            does not mask is left out of the mean.
    """
    names = in_order({name for adapters in groups.values() for one in adapters for name in one})
    if not names:
        raise ConfigError("there is no masked parameter to draw; give adapters that have masks")
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
    axes.set_xlim(up_to_one(*axes.get_xlim()))
    axes.set_xlabel("density (share of weights kept)")
    if len(groups) > 1 or any(len(adapters) > 1 for adapters in groups.values()):
        figure.legend(loc="outside upper center", ncols=min(3, len(groups)), frameon=False, fontsize="small")
    return figure


def agreement(masks: Mapping[str, MaskSet]) -> tuple[Matrix, Matrix]:
    """Compare masks pair by pair; signs of ternary masks are not looked at.

    Returns:
        Two symmetric (n, n) matrices in the order of `masks`. The first is the share of weights on which two masks
        agree: both keep the weight, or neither does. The second takes out what chance explains: (agreement - expected)
        / (1 - expected), where two masks of densities d₁ and d₂ in a parameter, drawn independently, are expected to
        agree on d₁d₂ + (1 - d₁)(1 - d₂) of its weights (the kappa of Cohen, 1960, with the chance of each parameter).
        It is 1 for equal masks, 0 for unrelated ones, and NaN where chance explains all.
    """
    if len(masks) < 2:
        raise ConfigError(f"an overlap needs at least two masks, got {len(masks)}")
    (first, shapes), *others = ((name, one.shapes) for name, one in masks.items())
    for name, found in others:
        differing = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
        if differing:
            raise ConfigError(
                f"{first} and {name} mask other parameters: {len(differing)} differ, first {differing[0]!r} "
                f"({shapes.get(differing[0], 'absent')} and {found.get(differing[0], 'absent')}); compare masks of one "
                "backbone with the same selection"
            )
    total = sum(math.prod(shape) for shape in shapes.values())
    if not total:
        raise ConfigError(f"the masks of {first} have no weights to compare")
    count = len(masks)
    agreed, expected = np.full((count, count), float(total)), np.zeros((count, count))
    for parameter in shapes:
        bits = [one[parameter].bits for one in masks.values()]
        density = np.array([one.count() / max(len(one), 1) for one in bits])
        expected += len(bits[0]) * (np.outer(density, density) + np.outer(1 - density, 1 - density))
        for i, j in combinations(range(count), 2):
            differ = count_xor(bits[i], bits[j])
            agreed[i, j] -= differ
            agreed[j, i] -= differ
    room = total - expected
    beyond = np.divide(agreed - expected, room, out=np.full_like(room, np.nan), where=room > 1e-9 * total)
    return agreed / total, beyond


def overlap_figure(masks: Mapping[str, MaskSet]) -> "Figure":
    """Draw the two matrices of `agreement` beside each other."""
    shares, beyond = agreement(masks)
    panels = {
        "agreement\n(share of the weights)": (shares, min(float(shares.min()), 0.99)),
        "agreement beyond chance\n(0: unrelated, 1: equal)": (beyond, min(float(np.nan_to_num(beyond).min()), 0.0)),
    }
    return draw_pairs(list(masks), panels, digits=3)


def users(masks: Mapping[str, MaskSet]) -> dict[str, list[int]]:
    """Return for each parameter how many of its weights are used by 0, 1, …, all tasks.

    A mask is read as the set of features that its task uses; a parameter that a task does not mask is used whole.
    """
    names = in_order({name for one in masks.values() for name in one})
    if not names:
        raise ConfigError("there is no masked parameter to draw; give adapters that have masks")
    found = {}
    for name in names:
        own = [one[name] for one in masks.values() if name in one]
        if len({one.shape for one in own}) > 1:
            raise ConfigError(
                f"the masks of {name!r} have different shapes, {own[0].shape} and others; give masks of one backbone"
            )
        used = np.full(len(own[0].bits), len(masks) - len(own))
        for one in own:
            used += np.unpackbits(packed_bits(one.bits), count=len(one.bits), bitorder="little")
        found[name] = np.bincount(used, minlength=len(masks) + 1).tolist()
    return found


def feature_figure(counts: Mapping[str, Sequence[int]]) -> "Figure":
    """Draw for each parameter the shares of its weights that no task, one task, …, all tasks use: see `users`."""
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
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the weights that are used by …")
    figure.legend(loc="outside upper center", ncols=min(6, tasks + 1), frameon=False, fontsize="small")
    return figure


def score_figure(scores: Mapping[str, Tensor], threshold: float | None = None) -> "Figure":
    """Draw the histogram of all scores, and below it a row for each parameter, dark where many of its scores are.

    Args:
        scores: by parameter name, of any shape.
        threshold: where to draw the line above which a weight is kept; None for methods without one.
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
    above.set_yscale("log")
    above.set_ylabel("weights")
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
        above.legend(frameon=False, fontsize="small")
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
