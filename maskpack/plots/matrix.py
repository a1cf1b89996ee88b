"""A matrix of numbers as a picture, for those that compare things pair by pair."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .figure import POINTS, SMALL, Matrix, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def draw_matrix(
    axes: "Axes",
    shades: Matrix,
    names: Sequence[str],
    inches: float,
    ends: tuple[float, float],
    texts: Sequence[Sequence[str]] | None,
    power: float = 1.0,
) -> "AxesImage":
    """Draw squares that are darker the larger their value is, with names at both sides.

    Args:
        shades: (n, n).
        inches: side of a square.
        ends: the values of the lightest and the darkest shade.
        texts: what stands in the squares.
        power: below 1 it tells small values apart at the cost of large ones.
    """
    from matplotlib.colors import PowerNorm

    image = axes.imshow(shades, cmap="Blues", interpolation="nearest", norm=PowerNorm(power, *ends))
    size = min(SMALL, 0.8 * inches * POINTS)
    shown = [label(name, 32) for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), shown, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    middle = ends[0] + 0.55 ** (1 / power) * (ends[1] - ends[0])
    for (i, j), shade in np.ndenumerate(shades):
        if texts is not None:
            colour = "white" if shade > middle else "black"
            axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=size, color=colour)
    return image
