"""What a pretrained start is worth where images are shuffled block by block."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .curves import draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def shuffle_figure(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Draw accuracies (0 to 1) over the side of the blocks, a series for each start.

    Args:
        rows: {"start", "block", "accuracy", "deviation"}.

    Raises:
        ConfigError: if there are none, or a number is impossible.
    """
    starts = dict.fromkeys(row["start"] for row in rows)
    curves = {
        f"{start} start": [(row["block"], row["accuracy"], row["deviation"]) for row in rows if row["start"] == start]
        for start in starts
    }
    figure, axes = draw_curves(curves, "block side")
    blocks = sorted({row["block"] for row in rows})
    axes.set_xticks(blocks, [str(block) for block in blocks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("side of the blocks that are shuffled (pixels; on the right the whole image)")
    return figure
