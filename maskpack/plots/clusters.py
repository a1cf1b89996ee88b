"""Cluster map: which expert of a cascade the router gives each sample to."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .figure import look, new_figure, numbers, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VECTORS = 2000  # points; more than these are stored as an image inside of an SVG


def cluster_figure(points: Sequence[Sequence[float]], expert: Sequence[int]) -> "Figure":
    """Draw samples where the first two principal components of their embeddings put them, coloured by expert.

    Args:
        points: (N, 2).
        expert: (N,), from 0.

    Raises:
        ConfigError: if there are no samples, not as many experts as points, or something is no such number.
    """
    if not len(points) or len(points) != len(expert):
        raise ConfigError(f"a cluster map needs an expert for each point; got {len(points)} and {len(expert)} experts")
    places = numbers(points, 2, "the points of a cluster map")
    experts = numbers([[one] for one in expert], 1, "the experts of a cluster map")[:, 0]
    if (experts < 0).any() or (experts % 1).any():
        raise ConfigError("the experts of a cluster map must be integers from 0, and they are not; correct them")
    figure = new_figure(6.5, 5)
    axes = figure.add_subplot()
    for number in sorted({int(one) for one in experts}):
        x, y = places[experts == number].T
        name = f"{number} ({len(x):,})"
        axes.scatter(x, y, s=10, linewidths=0, rasterized=len(places) > VECTORS, label=name, **look(number))
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_aspect("equal", adjustable="datalim")
    plain_axes(axes)
    figure.legend(title="expert (samples)", loc="outside right upper", frameon=False, fontsize="small", markerscale=2)
    return figure
