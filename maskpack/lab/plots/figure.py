"""What all pictures share: an empty figure, colours, names as labels, and files whose bytes follow from the figure."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, escape, require
from ...safetensors_io import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


Matrix: TypeAlias = NDArray[np.float64]

# Okabe and Ito (2008), told apart with every kind of colour blindness; without yellow, which is faint on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
FAINT = "#e4e7eb"
SMALL = 8.0  # points, of names and numbers
POINTS = 72  # of an inch
MARGIN = 0.08  # inches
LONGEST = 48  # characters of a label
# by suffix, as matplotlib's `savefig` takes it: neither a program nor a date is written
KINDS: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "png", "dpi": 150, "metadata": {"Software": None}},
    ".svg": {"format": "svg", "dpi": 100, "metadata": {"Creator": None, "Date": None}},
}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, drawn without a window and without pyplot's global state."""
    require("matplotlib", "lab", "drawing pictures")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN, compress=True))


def plain_axes(axes: "Axes", *, grid: "Literal['x', 'y', 'both'] | None" = None) -> None:
    """Leave of a frame the two lines that are scales, and give `grid` ("x", "y" or "both") faint lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.set_axisbelow(True)
    if grid is not None:
        axes.grid(axis=grid, color=FAINT)


def up_to_one(low: float, high: float) -> tuple[float, float]:
    """Return the limits of an axis of shares: no deviation shows shares above 1."""
    return low, min(high, 1 + 0.05 * max(0.0, 1 - low))


def look(index: int) -> dict[str, Any]:
    """Return colour and marker of the series with this number; 49 differ."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}


def label(name: str, longest: int = LONGEST) -> str:
    """Return a name as a label: on one line, only its end if it is longer; nothing in it is a formula."""
    shown = escape(name)
    if len(shown) > longest:
        shown = f"…{shown[1 - longest :]}"
    return shown.replace("$", r"\$")


def in_order(names: Iterable[str]) -> list[str]:
    """Sort dotted names with their numbers as numbers, so that layer 2 comes before layer 10."""

    def key(name: str) -> list[tuple[bool, int | str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in parts]

    return sorted(names, key=key)


def row_height(rows: int) -> float:
    """Return the height in inches of a row with a name; less where many of them would make a picture too tall."""
    return min(0.18, 30 / rows)


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Write the names of parameters beside rows of `row_height`, the first on top, as many as there is room for.

    Where all names end in `.weight` it is left out.
    """
    step = math.ceil(1.2 * SMALL / (row_height(len(names)) * POINTS))
    same = {name.rpartition(".")[2] for name in names} == {"weight"}
    rows = range(0, len(names), step)
    axes.set_yticks(rows, [label(names[row].removesuffix(".weight") if same else names[row]) for row in rows])
    axes.set_ylim(len(names) - 0.5, -0.5)


def numbers(values: object, columns: int, what: str) -> Matrix:
    """Return rows of finite numbers as an array (rows, columns).

    Raises:
        ConfigError: if they are anything else.
    """
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0)
    if found.ndim != 2 or found.shape[1] != columns or not np.isfinite(found).all():
        raise ConfigError(f"{what} must be rows of {columns} finite numbers each, and they are not; correct them")
    return found


def image_suffix(path: str | Path) -> str:
    """Return the suffix of a picture's file.

    Raises:
        ConfigError: if it stands for no kind of picture that is drawn.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise ConfigError(f"{path} ends in {suffix!r}, expected .png or .svg; give the picture one of these endings")
    return suffix


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the suffix; the same figure gives the same bytes with the same matplotlib.

    Text in an SVG file stays text. Whatever goes wrong, what `path` had stays.

    Raises:
        ConfigError: if the suffix is another one. StateError: if the file cannot be written.
    """
    import matplotlib

    suffix, content = image_suffix(path), io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "maskpack", "svg.fonttype": "none"}):
        # a name in a script that the font lacks: boxes in a PNG, and in an SVG text that the viewer has a font for
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(content, **KINDS[suffix])
    with replacing(path) as (temporary,):
        temporary.write_bytes(content.getvalue())


def draw_matrix(
    axes: "Axes",
    shades: Matrix,
    names: Sequence[str],
    inches: float,
    ends: tuple[float, float],
    texts: Sequence[Sequence[str]] | None,
    power: float = 1.0,
) -> "AxesImage":
    """Draw squares that are darker the larger their value is, with names at both sides.

    Args:
        shades: (n, n).
        inches: side of a square.
        ends: the values of the lightest and the darkest shade.
        texts: what stands in the squares.
        power: below 1 it tells small values apart at the cost of large ones.
    """
    from matplotlib.colors import PowerNorm

    image = axes.imshow(shades, cmap="Blues", interpolation="nearest", norm=PowerNorm(power, *ends))
    size = min(SMALL, 0.8 * inches * POINTS)
    shown = [label(name, 32) for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), shown, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    middle = ends[0] + 0.55 ** (1 / power) * (ends[1] - ends[0])
    for (i, j), shade in np.ndenumerate(shades):
        if texts is not None:
            colour = "white" if shade > middle else "black"
            axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=size, color=colour)
    return image


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
