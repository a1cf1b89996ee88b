"""What the comparisons measured, as tables and curves of a page; what is not finished is left out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from maskpack.lab import save_figure
from maskpack.lab.comparison import markdown

from .pages import write_between

MARK = "python -m benchmarks.comparisons --write docs/results.md"
PACS = ("cartoon", "photo", "art_painting", "sketch")


def write_pages(measured: Path, page: Path) -> None:
    """Write the tables of what is finished between the page's markers, and the curves beside the page."""
    for name, text in {
        "few labels": few_labels(measured, page.parent),
        "cascades": cascades(measured),
        "tables": tables(measured),
        "ablations": ablations(measured),
        "densities": densities(measured, page.parent),
    }.items():
        write_between(page, f"{MARK}: {name}", text)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a comparison; none if it is not finished."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def cell(row: Mapping[str, Any]) -> str:
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def few_labels(measured: Path, folder: Path) -> str:
    """A table of all data sets, and a picture for each."""
    from maskpack.lab import label_figure

    lines, pictures = [], []
    for name in (*PACS, "mnist"):
        rows = rows_of(measured / name / "few-labels.json")
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for method in methods:
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: -row["labels_fraction"])
            lines.append(f"| {name} | {method} | " + " | ".join(cell(row) for row in own) + " |")
        if rows:
            curves = {
                method: [(r["labels_fraction"], r["accuracy"], r["deviation"]) for r in rows if r["method"] == method]
                for method in methods
            }
            save_figure(label_figure(curves), folder / f"few-labels-{name}.svg")
            pictures.append(f"\n![Accuracy over the share of the labels, {name}](few-labels-{name}.svg)")
    if not lines:
        return "Nothing is finished yet.\n"
    return (
        "\n".join(
            ["| data | baseline | 100 % | 10 % | 4 % | 1 % |", "| --- | --- |" + " ---: |" * 4, *lines, *pictures]
        )
        + "\n"
    )


def tables(measured: Path) -> str:
    """The tables at all labels, of every backbone and data set."""
    texts = []
    for title, folders in (
        ("ResNet-20", (*PACS, "mnist")),
        ("ResNet-32", [f"resnet32-{name}" for name in PACS]),
        ("all-MiniLM-L6-v2", ["banking77"]),
    ):
        for folder in folders:
            rows = rows_of(measured / folder / "table.json")
            if rows:
                texts.append(f"**{title}, {folder.removeprefix('resnet32-')}**\n\n{markdown(rows)}")
    return "\n".join(texts) or "Nothing is finished yet.\n"


def cascades(measured: Path) -> str:
    """The rows of the cascade tables, means over the seeds."""
    found = [json.loads(path.read_text())["rows"] for path in sorted(measured.glob("cascade-*/table.json"))]
    if not found:
        return "Nothing is finished yet.\n"
    lines = ["| embedding | dimensions | k-NN | probe | passes | steps | bytes |", "| --- |" + " ---: |" * 6]
    for several in zip(*found, strict=True):
        first = several[0]
        name = first["embedding"] + (", whitened" if first["whitened"] else "")
        values = [mean_of(several, key) for key in ("knn", "probe")]
        numbers = [f"{mean(row[key] for row in several):,.0f}" for key in ("dimensions", "passes", "steps", "bytes")]
        lines.append(f"| {name} | {numbers[0]} | {' | '.join(values)} | {' | '.join(numbers[1:])} |")
    return "\n".join(lines) + f"\n\nMeans ± sample deviations over {len(found)} seeds.\n"


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [100 * row[key] for row in rows]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def ablations(measured: Path) -> str:
    """One line for each change of the self-supervised mask, and what it is compared with."""
    from .comparisons import ABLATIONS, FIRST

    plain = [row for row in rows_of(measured / FIRST / "few-labels.json") if row["labels_fraction"] == 1]
    lines = [f"| {row['method']}, as above | {100 * row['accuracies'][0]:.1f} |" for row in plain]
    for name, (words, _, _) in ABLATIONS.items():
        for row in rows_of(measured / f"ablation-{name}" / "results.json"):
            lines.append(f"| {row['method']}: {words} | {cell(row)} |")
    return "\n".join(["| row | accuracy |", "| --- | ---: |", *lines]) + "\n" if lines else "Nothing is finished yet.\n"


def layer_densities(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return densities by parameter of the masks trained on all labels, and without labels, in a comparison."""
    from maskpack import inspect_adapter
    from maskpack.adapter.card import parameter_densities

    found = {"mask": sorted(folder.glob("mask/seed-*-labels-1/mask.safetensors"))}
    found["self-supervised"] = sorted(folder.glob("self-supervised/seed-*/mask.safetensors"))
    return {
        row: [dict(parameter_densities(inspect_adapter(path)["sets"]["default"])) for path in paths]
        for row, paths in found.items()
    }


def densities(measured: Path, folder: Path) -> str:
    """A picture of densities by layer, and a table of them."""
    from maskpack.lab import density_figure

    lines = []
    for path in sorted(measured.glob("*/densities.json")):
        groups = json.loads(path.read_text())
        if path.parent.name == PACS[0]:
            save_figure(density_figure(groups), folder / "density-objectives.svg")
        for row, masks in groups.items():
            means = {name: mean(one[name] for one in masks) for name in masks[0]}
            least = min(means, key=lambda name: means[name])
            lines.append(f"| {path.parent.name} | {row} | {mean(means.values()):.4f} | {means[least]:.3f} | {least} |")
    picture = f"\n![Density by layer on {PACS[0]}](density-objectives.svg)"
    head = ["| data | row | mean of the layers | least | of the layer |", "| --- | --- | ---: | ---: | --- |"]
    return "\n".join([*head, *lines, picture]) + "\n" if lines else "Nothing is finished yet.\n"
