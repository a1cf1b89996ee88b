"""Which networks make the same mistakes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from .figure import new_figure
from .matrix import draw_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
