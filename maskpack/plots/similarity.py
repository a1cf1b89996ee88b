"""How alike the features of networks are, layer by layer."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .figure import label, look, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def similarity_figure(layers: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw linear CKA over the layers: for pairs of the same kinds the mean, and the range of the pairs.

    Args:
        pairs: {"kinds", "cka": a number or None for each layer}.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not layers or not pairs:
        raise ConfigError(
            "there are no layers or no pairs of networks to draw; give what a similarity analysis measured"
        )
    figure = new_figure(8, 4.2)
    axes = figure.add_subplot()
    for at, kinds in enumerate(dict.fromkeys(pair["kinds"] for pair in pairs)):
        found = [
            [pair["cka"][layer] for pair in pairs if pair["kinds"] == kinds and pair["cka"][layer] is not None]
            for layer in range(len(layers))
        ]
        places = [layer for layer, values in enumerate(found) if values]
        style = look(at)
        axes.plot(
            places, [mean(found[one]) for one in places], label=label(kinds), markersize=5, linewidth=1.4, **style
        )
        low, high = ([end(found[one]) for one in places] for end in (min, max))
        axes.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(len(layers)), [label(name, 24) for name in layers], rotation=90)
    axes.set_ylabel("linear CKA")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure
