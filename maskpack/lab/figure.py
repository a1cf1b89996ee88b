"""Common parts of all pictures: style, rows by layer, matrices, curves, and reproducible files."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, escape, require
from ..safetensors_io import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Matrix: TypeAlias = NDArray[np.float64]
Curve: TypeAlias = Sequence[tuple[float, float, float | None]]  # (x, y, deviation or None) of each point

# Okabe and Ito (2008), told apart with every kind of colour blindness; without yellow, which is faint on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
FAINT = "#e4e7eb"
SMALL = 8.0  # points, of names and numbers
POINTS = 72  # of an inch
MARGIN = 0.08  # inches
LONGEST = 48  # characters of a label
SHADES: Mapping[str, Any] = {"aspect": "auto", "cmap": "Blues", "interpolation": "nearest"}  # of `imshow`
LEGEND: Mapping[str, Any] = {"frameon": False, "fontsize": "small"}
# by suffix, as matplotlib's `savefig` takes it: neither a program nor a date is written
KINDS: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "png", "dpi": 150, "metadata": {"Software": None}},
    ".svg": {"format": "svg", "dpi": 100, "metadata": {"Creator": None, "Date": None}},
}


def image_suffix(path: str | Path) -> str:
    """Return the suffix of a picture's file; it must be .png or .svg."""
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise ConfigError(f"{path} ends in {suffix!r}, expected .png or .svg; give the picture one of these endings")
    return suffix


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the suffix; the same figure gives the same bytes with the same matplotlib.

    Text in an SVG file stays text. Whatever goes wrong, what `path` had stays.

    Example:
        save_figure(density_figure({"mask": [{"conv1.weight": 0.9}]}), "density.svg")
    """
    import matplotlib

    suffix, content = image_suffix(path), io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "maskpack", "svg.fonttype": "none"}):
        # a name in a script that the font lacks: boxes in a PNG, and in an SVG text that the viewer has a font for
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(content, **KINDS[suffix])
    with replacing(path) as (temporary,):
        temporary.write_bytes(content.getvalue())


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, drawn without a window and without pyplot's global state."""
    require("matplotlib", "lab", "drawing pictures")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN, compress=True))


def plain_axes(axes: "Axes", *, grid: "Literal['x', 'y', 'both'] | None" = None) -> None:
    """Remove the top and right lines of a frame, and draw a faint grid along `grid` ("x", "y" or "both")."""
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


def numbers(values: object, columns: int, what: str) -> Matrix:
    """Return rows of finite numbers as an array (rows, columns)."""
    try:
        found = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0)
    if found.ndim != 2 or found.shape[1] != columns or not np.isfinite(found).all():
        raise ConfigError(f"{what} must be rows of {columns} finite numbers each, and they are not; correct them")
    return found


def height_of(rows: int) -> float:
    """Return the height in inches of rows with names; less for each where a picture would become too tall."""
    return min(0.18 * rows, 30)


def name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Write the names of layers beside the rows of axes, the first on top, as many as there is room for.

    Where all names end in `.weight` it is left out.
    """
    step = math.ceil(1.2 * SMALL / (height_of(len(names)) / len(names) * POINTS))
    same = {name.rpartition(".")[2] for name in names} == {"weight"}
    rows = range(0, len(names), step)
    axes.set_yticks(rows, [label(names[row].removesuffix(".weight") if same else names[row]) for row in rows])
    axes.set_ylim(len(names) - 0.5, -0.5)


def draw_rows(names: Sequence[str], grid: "Literal['x', 'both'] | None" = None) -> "tuple[Figure, Axes]":
    """Return a figure with a row for each layer, the first on top; row n is at y = n."""
    figure = new_figure(8, 1.3 + height_of(len(names)))
    axes = figure.add_subplot()
    name_rows(axes, names)
    plain_axes(axes, grid=grid)
    return figure, axes


def add_scale(figure: "Figure", image: "AxesImage", axes: Any, text: str, **options: Any) -> None:
    """Draw the scale of an image's shades beside axes."""
    bar = figure.colorbar(image, ax=axes, **options)
    bar.set_label(text, fontsize="small")
    bar.ax.tick_params(labelsize=SMALL)


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
        shades: (n, n). inches: side of a square. ends: the values of the lightest and the darkest shade.
        texts: in the squares. power: below 1 it tells small values apart at the cost of large ones.
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
    for i, row in enumerate(texts or ()):
        for j, text in enumerate(row):
            colour = "white" if shades[i, j] > middle else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    return image


def draw_curves(curves: Sequence[tuple[str, Curve, Mapping[str, Any]]]) -> "tuple[Figure, Axes]":
    """Draw accuracies as lines: (name, points, options of `errorbar`); one without a name is not in the legend."""
    figure = new_figure(7.5, max(4.2, 0.6 + 0.21 * sum(bool(name) for name, *_ in curves)))
    axes = figure.add_subplot()
    for name, points, options in curves:
        x, y, spread = zip(*points, strict=True)
        errors = [one or 0.0 for one in spread] if any(spread) else None
        style = {"markersize": 5, "linewidth": 1.4, "capsize": 2, **options}
        axes.errorbar(x, y, yerr=errors, label=label(name) or "_", **style)
    axes.set_ylim(up_to_one(*axes.get_ylim()))
    axes.set_ylabel("accuracy")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", **LEGEND)
    return figure, axes
