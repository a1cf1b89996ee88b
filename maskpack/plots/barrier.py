"""Accuracy on the straight lines between networks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .figure import COLOURS, label, new_figure, plain_axes, up_to_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def barrier_figure(pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw a line for each pair of networks; pairs of the same kinds have one colour.

    Args:
        pairs: {"kinds", "points": [{"t", "accuracy"}]}.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not pairs:
        raise ConfigError("there is no pair of networks to draw; give what a barrier analysis measured")
    kinds = list(dict.fromkeys(pair["kinds"] for pair in pairs))
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for pair in pairs:
        at = kinds.index(pair["kinds"])
        named: dict[str, Any] = (
            {} if axes.get_legend_handles_labels()[1].count(label(kinds[at])) else {"label": label(kinds[at])}
        )
        axes.plot(
            [point["t"] for point in pair["points"]],
            [point["accuracy"] for point in pair["points"]],
            color=COLOURS[at % len(COLOURS)],
            linestyle=("-", "--", ":")[at // len(COLOURS) % 3],
            linewidth=1.4,
            alpha=0.8,
            **named,
        )
    axes.set_ylim(up_to_one(*axes.get_ylim()))
    axes.set_xlabel("t, from the first network (0) to the second (1)")
    axes.set_ylabel("accuracy")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure
