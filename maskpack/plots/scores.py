"""Histogram of trained scores, of all together and layer by layer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from .figure import COLOURS, SMALL, in_order, name_rows, new_figure, plain_axes, row_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 80
SHOWN = 0.998  # share of all scores between the ends; what lies beyond counts to the outermost bins


def score_figure(scores: Mapping[str, Tensor], threshold: float | None = None) -> "Figure":
    """Draw the histogram of all scores, and below it a row for each parameter, dark where many of its scores are.

    Args:
        scores: by parameter name, of any shape.
        threshold: where to draw the line above which a weight is kept; None for methods without one.

    Raises:
        ConfigError: if there are no scores, or some are not finite.
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
    rows = row_height(len(names)) * len(names)
    figure = new_figure(8, 3.4 + rows)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, rows))
    edges = torch.linspace(low, high, BINS + 1).tolist()
    above.stairs(counts.sum(0).tolist(), edges, fill=True, color=COLOURS[0])
    above.set_yscale("log")
    above.set_ylabel("weights")
    shares = (counts / counts.sum(1, keepdim=True)).numpy()
    image = below.imshow(
        shares, aspect="auto", cmap="Blues", norm="log", vmin=1e-4, vmax=1,
        extent=(low, high, len(names) - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    name_rows(below, names)
    below.set_xlabel("score (values beyond the ends count to the outermost bins)")
    bar = figure.colorbar(image, ax=below, shrink=min(1.0, 2.5 / rows), aspect=12)
    bar.set_label("share of the layer's scores", fontsize="small")
    bar.ax.tick_params(labelsize=SMALL)
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
