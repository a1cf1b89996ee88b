"""Histograms over time: of the gates of each task, and of the weights that it computes with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from .figure import SMALL, Matrix, label, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
