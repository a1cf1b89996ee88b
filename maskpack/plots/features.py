"""Which features tasks use: how many tasks use each weight, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..mask import MaskSet, packed_bits
from .figure import in_order, name_rows, new_figure, plain_axes, row_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def users(masks: Mapping[str, MaskSet]) -> dict[str, list[int]]:
    """Return for each parameter how many of its weights are used by 0, 1, …, all tasks.

    A mask is read as the set of features that its task uses; a parameter that a task does not mask is used whole.

    Args:
        masks: by task, of one backbone.

    Raises:
        ConfigError: if there is no mask, or two masks of a parameter have different shapes.
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
    """Draw a bar for each parameter: the shares of its weights that no task, one task, …, all tasks use.

    Args:
        counts: what `users` gives.
    """
    names = list(counts)
    tasks = len(counts[names[0]]) - 1
    figure = new_figure(8, 1.4 + row_height(len(names)) * len(names))
    from matplotlib import colormaps

    axes = figure.add_subplot()
    shares = np.array([np.array(own) / max(sum(own), 1) for own in counts.values()])
    left = np.zeros(len(names))
    for number in range(tasks + 1):
        words = {0: "no task", 1: "one task", tasks: f"all {tasks} tasks" if tasks > 1 else "one task"}
        colour = "#f4f4f4" if number == 0 else colormaps["Blues"](0.25 + 0.7 * number / tasks)
        text = words.get(number, f"{number} tasks")
        axes.barh(range(len(names)), shares[:, number], left=left, height=0.8, color=colour, label=text)
        left += shares[:, number]
    name_rows(axes, names)
    plain_axes(axes)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the weights that are used by …")
    figure.legend(loc="outside upper center", ncols=min(6, tasks + 1), frameon=False, fontsize="small")
    return figure
