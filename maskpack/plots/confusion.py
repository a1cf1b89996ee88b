"""Confusion picture: which classes are taken for which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from .figure import SMALL, new_figure, numbers
from .matrix import draw_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 30  # classes; of more, the squares are small and without numbers
SIDE, SMALL_SIDE = 0.4, 0.155  # inches of a square
MOST = 200  # classes: 30 inches


def confusion_figure(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> "Figure":
    """Draw counts of examples by true class (row) and predicted class (column).

    A square's shade tells its share of the row, so that rare classes are seen as well as frequent ones.

    Args:
        counts: (classes, classes), 0 or more.
        class_names: in the order of rows and columns.

    Raises:
        ConfigError: if the counts are no such matrix, or there are more than 200 classes.
    """
    classes = len(class_names)
    if not 0 < classes <= MOST:
        raise ConfigError(f"a confusion picture has 1 to {MOST} classes, got {classes}")
    if not all(isinstance(name, str) for name in class_names):
        raise ConfigError(f"class names must be texts, got {class_names!r:.200}")
    found = numbers(counts, classes, f"the counts of {classes} classes")
    if len(found) != classes or found.min() < 0:
        raise ConfigError(f"{classes} class names need {classes} rows of counts of 0 or more, got {len(found)} rows")
    shares = found / np.maximum(found.sum(1, keepdims=True), 1)
    numbered = classes <= NUMBERED
    side = SIDE if numbered else SMALL_SIDE
    figure = new_figure(side * classes + 3.2, side * classes + 2.2)
    axes = figure.add_subplot()
    texts = [[f"{count:.0f}" if count else "" for count in row] for row in found]
    image = draw_matrix(axes, shares, class_names, side, (0, 1), texts if numbered else None, 0.5)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / (side * classes)), aspect=12)
    bar.set_label("share of the true class", fontsize="small")
    bar.ax.tick_params(labelsize=SMALL)
    return figure
