"""What `benchmarks.methods` measured, as tables and curves of a page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskpack.lab import bytes_figure, save_figure

from .comparison_pages import cell
from .methods import LINES
from .pages import write_between

MARK = "python -m benchmarks.methods --write docs/results.md"
TITLES = {"sketch": "ResNet-20 on sketch", "minilm": "MiniLM on Banking77"}


def write_pages(measured: Path, page: Path) -> None:
    """Write tables and curves of what is finished between the page's markers."""
    for name, text in {
        "methods": "\n".join(methods(measured, group) for group in TITLES),
        "selective": selective(measured, page.parent),
        "bytes": budgets(measured, page.parent),
    }.items():
        write_between(page, f"{MARK}: {name}", text)


def found(measured: Path, group: str) -> dict[str, dict[str, Any]]:
    """Return the lines of a group that are finished, by name."""
    paths = {name: measured / f"{group}-{name}" / "line.json" for name in LINES[group]}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def masks(row: Mapping[str, Any]) -> float:
    """Return the bytes of an adapter or of LoRA matrices without the head: what the task is stored in."""
    return float(row["bytes"] - row["sizes"].get("head", 0))


def density(row: Mapping[str, Any]) -> str:
    every = row["densities"]
    return f"{sum(every) / len(every):.3f}" if every else "-"


def methods(measured: Path, group: str) -> str:
    """A table of the methods on one task."""
    rows = found(measured, group)
    if not rows:
        return f"**{TITLES[group]}**: nothing is finished yet.\n"
    lines = [f"**{TITLES[group]}**", "", "| method | accuracy | density | bytes without the head | rate |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        words, rate = LINES[group][name].words, "-" if row["rate"] is None else f"{row['rate']:g}"
        lines.append(f"| {words} | {cell(row)} | {density(row)} | {masks(row):,.0f} | {rate} |")
    return "\n".join(lines) + "\n"


def selective(measured: Path, folder: Path) -> str:
    """A table of the rules that say which scores learn."""
    rows = found(measured, "selective")
    if not rows:
        return "Nothing is finished yet.\n"
    lines = ["| scores that learn | accuracy | density | bytes of masks |", "| --- | ---: | ---: | ---: |"]
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for name, row in rows.items():
        size = row["sizes"]["masks"]
        lines.append(f"| {LINES['selective'][name].words} | {cell(row)} | {density(row)} | {size:,.0f} |")
        curves.setdefault(name.split("-")[0], []).append((size, row["accuracy"], row["deviation"]))
    save_figure(bytes_figure(curves), folder / "selective.svg")
    return "\n".join([*lines, "", "![Accuracy over the bytes of the masks, by rule](selective.svg)"]) + "\n"


def budgets(measured: Path, folder: Path) -> str:
    """A table and a curve of accuracy over bytes: masks within budgets, LoRA's ranks."""
    rows = found(measured, "bytes")
    if not rows:
        return "Nothing is finished yet.\n"
    lines = ["| row | accuracy | bytes without the head | density |", "| --- | ---: | ---: | ---: |"]
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    for name, row in rows.items():
        kind = "LoRA" if name.startswith("lora") else "mask"
        words = f"{kind}, {LINES['bytes'][name].words}"
        lines.append(f"| {words} | {cell(row)} | {masks(row):,.0f} | {density(row)} |")
        curves.setdefault(kind, []).append((masks(row), row["accuracy"], row["deviation"]))
    save_figure(bytes_figure(curves), folder / "bytes-budget.svg")
    return "\n".join([*lines, "", "![Accuracy over bytes, masks and LoRA](bytes-budget.svg)"]) + "\n"
