"""What checkpoints of a pretraining run are worth as a start."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .figure import label, look, new_figure, plain_axes, up_to_one

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def checkpoint_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw the accuracy on the target over the checkpoints, and that of pretraining where it is known.

    Args:
        rows: {"checkpoint", "pretraining": accuracy or None, "accuracy", "deviation"}, in the order of the run.

    Raises:
        ConfigError: if there is nothing to draw.
    """
    if not rows:
        raise ConfigError("there is no checkpoint to draw; give what an analysis of checkpoints measured")
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    places = range(len(rows))
    spread = [row["deviation"] or 0.0 for row in rows]
    style: dict[str, Any] = {"markersize": 5, "linewidth": 1.4}
    axes.errorbar(places, [row["accuracy"] for row in rows], yerr=spread if any(spread) else None, capsize=2,
                  label="target", **style, **look(0))  # fmt: skip
    known = [at for at in places if rows[at]["pretraining"] is not None]
    if known:
        axes.plot(known, [rows[at]["pretraining"] for at in known], label="pretraining", **style, **look(1))
    axes.set_ylim(up_to_one(*axes.get_ylim()))
    axes.set_xticks(places, [label(row["checkpoint"], 24) for row in rows], rotation=90 if len(rows) > 6 else 0)
    axes.set_xlabel("checkpoint that training started from")
    axes.set_ylabel("accuracy")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure
