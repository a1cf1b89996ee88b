"""Which modules of a network are critical: what is lost when one goes back to its start."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from .figure import COLOURS, name_rows, new_figure, plain_axes, row_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def criticality_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw a bar for each module: the accuracy that is lost; and beside it, if there is one, its direct path.

    Args:
        rows: {"module", "drop", "path": [{"a", "accuracy"}]}, drawn from the top in this order; drops in shares of 1.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not rows:
        raise ConfigError("there is no module to draw; give rows of a criticality analysis")
    names = [row["module"] for row in rows]
    path = [[point["accuracy"] for point in row.get("path", ())] for row in rows]
    drawn = len(path[0]) > 2
    figure = new_figure(8, 1.2 + row_height(len(rows)) * len(rows))
    axes, *other = (
        figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if drawn else np.array([figure.add_subplot()])
    )
    axes.barh(range(len(rows)), [100 * row["drop"] for row in rows], height=0.7, color=COLOURS[0])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("accuracy lost when rewound (points)")
    plain_axes(axes, grid="x")
    if drawn:
        image = other[0].imshow(np.array(path), aspect="auto", cmap="Blues", interpolation="nearest")
        places = range(0, len(path[0]), math.ceil(len(path[0]) / 8))
        other[0].set_xticks(places, [f"{rows[0]['path'][at]['a']:.2g}" for at in places])
        other[0].tick_params(left=False, labelsize=8)
        other[0].spines[:].set_visible(False)
        other[0].set_xlabel("a, from start (0) to trained (1)")
        figure.colorbar(image, ax=other[0], label="accuracy")
    name_rows(axes, names)
    return figure
