"""Accuracy against the bytes that have to be stored for it."""

from typing import TYPE_CHECKING

from .curves import Curves, draw_curves

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
