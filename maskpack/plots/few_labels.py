"""Few-label curves: accuracy over the share of the labels that were used."""

from typing import TYPE_CHECKING

from ..errors import ConfigError
from .curves import Curves, draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
