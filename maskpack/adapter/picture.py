"""A picture of the densities of an adapter's masks: one bar for each masked parameter, as a PNG."""

import struct
import zlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

Canvas: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

MAX_SETS = 4
WIDEST = 1120  # pixels for the bars of a set; more parameters than that share a bar
HEIGHT = 240  # pixels from density 0 to 1
LEFT, RIGHT, ABOVE, BELOW = 64, 16, 24, 36
SCALE = 2  # pixels of the screen for one of a digit
BACKGROUND, GRID, AXIS, BAR, EXTREME, CROSSING = range(6)
PALETTE = bytes.fromhex("ffffff dfe3e8 57606a 4c78a8 e07b39 6f95bf")  # white behind it all, so that dark pages show it
# digits of 3 x 5 dots, a row in three bits
GLYPHS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 3, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
    ".": (0, 0, 0, 0, 2),
}


def parameter_densities(one: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (name, density) of each masked parameter of a described set, in the file's order."""
    # the signs of a ternary mask come right before its zeros, under the same name; the zeros tell what is kept
    return list({row["name"]: row["density"] for row in one["payloads"]}.items())


def density_picture(description: Mapping[str, Any]) -> bytes:
    """Return a PNG of the densities of the first sets, one below the other.

    A set is at most 1200 x 300 pixels: a bar from 0 to 1 for each masked parameter, in the file's order, with lines at
    the quarters and the parameters' numbers below, from 1. The lowest and the highest bar have another colour. The same
    description gives the same pixels, and with the same zlib the same bytes.

    Args:
        description: from `describe` or `inspect_adapter`.
    """
    shown = list(description["sets"].values())[:MAX_SETS]
    panels = [_panel(np.array([density for _, density in parameter_densities(one)])) for one in shown]
    width = max(panel.shape[1] for panel in panels)
    whole = np.full((sum(panel.shape[0] for panel in panels), width), BACKGROUND, np.uint8)
    top = 0
    for panel in panels:
        whole[top : top + panel.shape[0], : panel.shape[1]] = panel
        top += panel.shape[0]
    return _png(whole)


def _panel(densities: "np.ndarray[Any, np.dtype[np.float64]]") -> Canvas:
    """Draw the bars of one set."""
    count = len(densities)
    bars = min(count, WIDEST)
    step = min(40, WIDEST // bars)
    gap = step // 4
    bottom = ABOVE + HEIGHT
    canvas = np.full((bottom + BELOW, LEFT + max(bars * step, 120) + RIGHT), BACKGROUND, np.uint8)
    lines = [bottom - HEIGHT * quarter // 4 for quarter in range(1, 5)]
    for y in lines:
        canvas[y, LEFT:-RIGHT] = GRID
    lowest, highest = int(np.argmin(densities)), int(np.argmax(densities))
    for bar in range(bars):
        start, end = bar * count // bars, (bar + 1) * count // bars
        extreme = densities[lowest] < densities[highest] and (start <= lowest < end or start <= highest < end)
        x, height = LEFT + bar * step, round(HEIGHT * float(np.mean(densities[start:end])))
        canvas[bottom - height : bottom, x : x + step - gap] = EXTREME if extreme else BAR
    for y in lines[:-1]:
        canvas[y][canvas[y] == BAR] = CROSSING
    canvas[bottom : bottom + 2, LEFT:-RIGHT] = AXIS
    for quarter, y in enumerate([bottom, *lines]):
        _write(canvas, f"{quarter / 4:.2f}", LEFT - 8, y)
    for number in _numbered(count, bars * step):
        x = LEFT + (number - 1) * bars // count * step + (step - gap) // 2
        canvas[bottom + 2 : bottom + 6, x] = AXIS
        _write(canvas, str(number), x + _width(str(number)) // 2, bottom + 16)
    return canvas


def _numbered(count: int, pixels: int) -> list[int]:
    """Return which parameters get their number below, far enough from each other."""
    apart = next(one for one in (1, 5, 10, 20, 50, *(100 * 2**k for k in range(40))) if one * pixels >= 40 * count)
    return [number for number in range(1, count + 1) if number == 1 or number % apart == 0]


def _width(text: str) -> int:
    return 4 * SCALE * len(text) - SCALE


def _write(canvas: Canvas, text: str, right: int, middle: int) -> None:
    """Write digits so that they end left of `right`, around the line `middle`."""
    x, y = right - _width(text), middle - 5 * SCALE // 2
    for letter in text:
        for row, bits in enumerate(GLYPHS[letter]):
            for column in range(3):
                if bits >> (2 - column) & 1:
                    top, left = y + row * SCALE, x + column * SCALE
                    canvas[top : top + SCALE, left : left + SCALE] = AXIS
        x += 4 * SCALE


def _png(canvas: Canvas) -> bytes:
    """Return a canvas of palette indices as a PNG file."""
    rows, columns = canvas.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits a pixel, with a palette
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), canvas], axis=1)  # every line begins with its filter: none
    chunks = ((b"IHDR", header), (b"PLTE", PALETTE), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
