"""Named series of measured accuracies over a quantity, with their deviations."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..errors import ConfigError
from .figure import label, look, new_figure, plain_axes, up_to_one

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name -> (quantity, mean accuracy, deviation or None) of each point
Curves: TypeAlias = Mapping[str, Sequence[tuple[float, float, float | None]]]


def draw_curves(curves: Curves, quantity: str) -> "tuple[Figure, Axes]":
    """Draw a line through the points of each series, in the order of the quantity.

    The quantity's axis is logarithmic where that is a decade or more.

    Raises:
        ConfigError: if there are no points, a quantity is not above 0, or an accuracy is not from 0 to 1.
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
    figure = new_figure(7.5, max(4.2, 0.6 + 0.21 * len(curves)))
    from matplotlib.ticker import LogLocator

    axes = figure.add_subplot()
    for index, (name, one) in enumerate(curves.items()):
        ordered = sorted(one, key=lambda point: point[0])
        quantities, means = [point[0] for point in ordered], [point[1] for point in ordered]
        errors = [point[2] or 0.0 for point in ordered] if any(point[2] for point in ordered) else None
        axes.errorbar(
            quantities, means, yerr=errors, label=label(name), markersize=5, linewidth=1.4, capsize=2, **look(index)
        )
    most, least = (end(point[1] for point in points) for end in (max, min))
    if most >= 10 * least:
        axes.set_xscale("log")
        if most < 100 * least:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_ylim(up_to_one(*axes.get_ylim()))
    axes.set_ylabel("accuracy" + (" (mean ± deviation)" if any(point[3] for point in points) else ""))
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure, axes
