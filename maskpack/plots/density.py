"""Density per layer, of one adapter or as mean and deviation of several."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .figure import in_order, label, look, name_rows, new_figure, plain_axes, row_height, up_to_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def density_figure(groups: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
    """Draw a row for each masked parameter: a dot at its density.

    Of a group of several adapters the dot is their mean, with a line of one sample deviation to both sides.

    Args:
        groups: name of a series -> adapters, each density (0 to 1) by parameter name. A parameter that an adapter
            does not mask is left out of the mean.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    names = in_order({name for adapters in groups.values() for one in adapters for name in one})
    if not names:
        raise ConfigError("there is no masked parameter to draw; give adapters that have masks")
    figure = new_figure(8, 1.2 + row_height(len(names)) * len(names))
    axes = figure.add_subplot()
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
    name_rows(axes, names)
    plain_axes(axes, grid="both")
    axes.set_xlim(up_to_one(*axes.get_xlim()))
    axes.set_xlabel("density (share of weights kept)")
    if len(groups) > 1 or any(len(adapters) > 1 for adapters in groups.values()):
        figure.legend(loc="outside upper center", ncols=min(3, len(groups)), frameon=False, fontsize="small")
    return figure
