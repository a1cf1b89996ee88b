"""Draw the diagrams of README.md and docs/concepts.md: `python .ci/pictures.py` writes docs/assets/*.svg."""

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
INK, GREY, BLUE, ORANGE, GREEN = "#222", "#8a8a8a", "#0072b2", "#d55e00", "#009e73"  # told apart by everyone
LIGHT = {BLUE: "#dcecf6", ORANGE: "#fae3d5", GREEN: "#d8f0e8", GREY: "#eeeeee"}


def text(x: float, y: float, words: str, size: int = 14, colour: str = INK, anchor: str = "middle") -> str:
    weight = ' font-weight="bold"' if size > 14 else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, lines: Sequence[str]) -> str:
    """Return a box with a title and lines below it, in the middle."""
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    words = [text(x + width / 2, top + 18 * at, line, 15 if at == 0 else 13) for at, line in enumerate(lines)]
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
    return frame + f'fill="{LIGHT[colour]}" stroke="{colour}" stroke-width="1.5"/>' + "".join(words)


def arrow(x1: float, y1: float, x2: float, y2: float, words: str = "", below: bool = False) -> str:
    line = f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" marker-end="url(#tip)"/>'
    return line + (text((x1 + x2) / 2, (y1 + y2) / 2 + (20 if below else -8), words, 13, BLUE) if words else "")


def matrix(x: float, y: float, values: Sequence[Sequence[float | None]], colour: str, title: str) -> str:
    """Return a matrix of cells: the larger the number, the darker; None is an empty cell."""
    cells, side = [], 22
    for row, numbers in enumerate(values):
        for column, value in enumerate(numbers):
            fill = f'fill="{colour}" fill-opacity="{abs(value):.2f}"' if value is not None else 'fill="#fff"'
            place = f'x="{x + side * column:g}" y="{y + side * row:g}"'
            cells.append(f'<rect {place} width="{side}" height="{side}" {fill} stroke="#999" stroke-width=".6"/>')
    return "".join(cells) + text(x + side * len(values[0]) / 2, y - 10, title)


def way() -> tuple[int, int, str]:
    """An adapter's way: from the base to the task and back."""
    return (
        800,
        250,
        "".join(
            [
                box(20, 30, 170, 80, GREY, ["frozen base", "ResNet, ViT, BERT, LLM", "never changes"]),
                box(315, 30, 170, 80, ORANGE, ["adapter", "masks, head, statistics", "a few kB"]),
                box(610, 30, 170, 80, BLUE, ["Hub or folder", "verified to the bit", "signed if you want"]),
                box(315, 160, 170, 80, GREEN, ["task model", "the base's layers", "and the base's speed"]),
                arrow(190, 70, 311, 70, "train"),
                arrow(485, 56, 606, 56, "push"),
                arrow(610, 86, 489, 86, "pull", below=True),
                arrow(400, 110, 400, 156),
                text(410, 139, "load_mask", 13, BLUE, "start"),
                arrow(315, 200, 105, 114),
                text(100, 185, "unload_mask:", 13, BLUE),
                text(100, 203, "the base, to the bit", 13, BLUE),
            ]
        ),
    )


def mask() -> tuple[int, int, str]:
    """A weight, its mask, and what the layer computes with."""
    draw = random.Random(3)
    weights = [[draw.uniform(0.15, 1) for _ in range(7)] for _ in range(6)]
    bits = [[draw.random() < 0.75 for _ in range(7)] for _ in range(6)]
    kept = [[w if b else None for w, b in zip(*rows, strict=True)] for rows in zip(weights, bits, strict=True)]
    return (
        720,
        190,
        "".join(
            [
                matrix(30, 40, weights, BLUE, "frozen weight"),
                text(220, 110, "×", 22),
                matrix(255, 40, [[1.0 if b else None for b in row] for row in bits], GREY, "mask: one bit a weight"),
                text(445, 110, "=", 22),
                matrix(480, 40, kept, GREEN, "what the layer uses"),
            ]
        ),
    )


def values() -> tuple[int, int, str]:
    """What becomes of the weights that a mask removes."""
    draw = random.Random(5)
    weights = [[draw.uniform(0.25, 1) for _ in range(4)] for _ in range(4)]
    gone = [[draw.random() < 0.35 for _ in range(4)] for _ in range(4)]
    parts = []
    for at, (name, below) in enumerate(
        [("zero", "removed"), ("sign", "turned round"), ("scale", "kept ones grow"), ("values", "stored values")]
    ):
        x = 30 + 190 * at
        rows = [
            [
                None if g and name in ("zero", "scale") else 1 if name == "scale" else w
                for w, g in zip(*rows, strict=True)
            ]
            for rows in zip(weights, gone, strict=True)
        ]
        parts.append(matrix(x, 40, rows, BLUE, name))
        for row, flags in enumerate(gone):
            for column, flag in enumerate(flags):
                if flag and name in ("sign", "values"):
                    place = f'x="{x + 22 * column:g}" y="{40 + 22 * row:g}"'
                    parts.append(
                        f'<rect {place} width="22" height="22" fill="{ORANGE}" fill-opacity=".85" stroke="#999"/>'
                    )
                    if name == "sign":
                        parts.append(text(x + 22 * column + 11, 40 + 22 * row + 16, "−", 16, "#fff"))
        parts.append(text(x + 44, 150, below, 13, GREY))
    return 730, 165, "".join(parts)


# docs/results/codecs.md, "What is stored beside masks": bytes of index, norms and statistics, head, masks
STORED = {"ResNet-20, sketches": (901, 1243, 462, 20895), "EfficientNet-Lite0, EuroSAT": (1532, 23449, 9660, 17821)}


def stored() -> tuple[int, int, str]:
    """The bytes of two adapters, part by part."""
    parts, most = [], max(map(sum, STORED.values()))
    colours = {"index": GREY, "norms and statistics": ORANGE, "head": GREEN, "masks": BLUE}
    for at, (name, sizes) in enumerate(STORED.items()):
        y, x = 45 + 75 * at, 20.0
        parts.append(text(x, y - 10, f"{name}: {sum(sizes):,} bytes", 14, anchor="start"))
        for size, colour in zip(sizes, colours.values(), strict=True):
            width = 700 * size / most
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" fill="{colour}"/>')
            if width > 60:
                parts.append(text(x + width / 2, y + 19, f"{size:,}", 13, "#fff"))
            x += width
    for at, (name, colour) in enumerate(colours.items()):
        x = 20 + (0, 90, 270, 350)[at]
        parts.append(f'<rect x="{x}" y="178" width="14" height="14" fill="{colour}"/>')
        parts.append(text(x + 20, 190, name, 13, anchor="start"))
    return 740, 205, "".join(parts)


def bank() -> tuple[int, int, str]:
    """One model, many resident masks, one switch at a time."""
    names = ["flowers", "sketches", "digits"]
    rows = [box(20, 20 + 62 * at, 170, 48, ORANGE, [name, "one bit a weight"]) for at, name in enumerate(names)]
    return (
        800,
        220,
        "".join(
            [
                *rows,
                *(arrow(190, 44 + 62 * at, 331, 106, "") for at in range(3)),
                text(300, 46, "bank.use(name)", 13, BLUE),
                box(335, 66, 170, 80, GREEN, ["one model", "one copy in memory", "switched in place"]),
                arrow(505, 106, 606, 106, "disable()"),
                box(610, 66, 170, 80, GREY, ["the base again", "to the bit"]),
            ]
        ),
    )


PICTURES: Sequence[Callable[[], tuple[int, int, str]]] = (way, mask, values, stored, bank)


def main(folder: Path) -> None:
    for draw in PICTURES:
        width, height, body = draw()
        tip = '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        tip += f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        )
        head += f'font-family="Helvetica, Arial, sans-serif" role="img"><title>{(draw.__doc__ or "").strip()}</title>'
        paper = f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>'
        (folder / f"{draw.__name__}.svg").write_text(head + tip + paper + body + "</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS)
