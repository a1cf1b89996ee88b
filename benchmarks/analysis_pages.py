"""What `benchmarks.analysis` measured, as tables and pictures of a page; what is not finished is left out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from maskpack.lab import (
    barrier_figure,
    checkpoint_figure,
    criticality_figure,
    save_figure,
    shuffle_figure,
    similarity_figure,
)

from .pages import write_between

MARK = "python -m benchmarks.analysis --write docs/results.md"
STAGES = ("conv1", "layer1", "layer2", "layer3", "linear")


def write_pages(measured: Path, page: Path) -> None:
    """Write tables and pictures of what is finished between the page's markers."""
    parts = {
        "Lines between networks": lines(measured / "basins", page.parent),
        "Features, parameters and mistakes": features(measured / "features", page.parent),
        "Criticality": critical(measured / "critical", page.parent),
        "Criticality of masks": masks(measured / "masks", page.parent),
        "A masked and a fine-tuned MiniLM": texts(measured / "texts", page.parent),
        "Shuffled blocks": shuffle(measured / "shuffle/shuffle.json", page.parent),
        "Which checkpoint": checkpoints(measured / "checkpoints/checkpoints.json", page.parent),
    }
    found = [f"**{title}**\n\n{text}" for title, text in parts.items() if text]
    write_between(page, MARK, "\n".join(found) or "Nothing is finished yet.\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a Markdown table whose first columns are words."""
    marks = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows)) + "\n"


def points(values: Sequence[float], digits: int = 1) -> str:
    """Return shares in per cent, mean and sample deviation."""
    spread = f" ± {100 * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.{digits}f}{spread}"


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def by_kinds(pairs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        found.setdefault(pair["kinds"], []).append(pair)
    return found


def heights(pairs: Sequence[Mapping[str, Any]], label: str) -> list[list[str]]:
    """Return a row for pairs of the same kinds: accuracies of their ends with the seeds' deviation, and barriers."""
    rows = []
    for kinds, own in by_kinds(pairs).items():
        ends: dict[str, dict[str, float]] = {}
        for pair in own:
            for name, at in ((pair["first"], 0), (pair["second"], -1)):
                ends.setdefault(name.rpartition(" ")[0], {})[name] = pair["points"][at]["accuracy"]
        tallest = max(pair["barrier"] for pair in own)
        losses = f"{mean(pair['loss_barrier'] for pair in own):.3f}"
        heights = [points([pair["barrier"] for pair in own]), f"{100 * tallest:.1f}", losses]
        rows.append(
            [label, kinds, str(len(own)), "; ".join(points(list(one.values())) for one in ends.values()), *heights]
        )
    return rows


HEADS = ["target", "pairs", "how many", "accuracy at the ends", "barrier", "highest", "barrier of the loss"]


def lines(folder: Path, docs: Path) -> str:
    """A table of barriers, and a picture for each target."""
    rows, pictures = [], []
    for target in ("sketch", "mnist"):
        pairs = [read(path) for path in sorted((folder / target).glob("*.json"))]
        if pairs:
            rows += heights(pairs, target)
            save_figure(barrier_figure(pairs), docs / f"analysis-barrier-{target}.svg")
            pictures.append(f"\n![Accuracy on lines between networks, {target}](analysis-barrier-{target}.svg)\n")
    return table(HEADS, rows, 2) + "".join(pictures) if rows else ""


def texts(folder: Path, docs: Path) -> str:
    """The same of MiniLM."""
    pairs = [read(path) for path in sorted(folder.glob("*.json"))]
    if not pairs:
        return ""
    save_figure(barrier_figure(pairs), docs / "analysis-barrier-banking77.svg")
    picture = "\n![Accuracy on lines between masked and fine-tuned MiniLM](analysis-barrier-banking77.svg)\n"
    return table(HEADS, heights(pairs, "Banking77"), 2) + picture


def features(folder: Path, docs: Path) -> str:
    """A row for pairs of the same kinds: CKA of some blocks, distance, common mistakes."""
    rows, pictures, columns = [], [], ["first", "middle", "last"]
    for target in ("sketch", "mnist"):
        files = {name: folder / f"{target}-{name}.json" for name in ("cka", "distance", "mistakes")}
        if not all(path.exists() for path in files.values()):
            continue
        cka, distance, mistakes = (read(path) for path in files.values())
        layers = cka["layers"]
        places = [0, len(layers) // 2, len(layers) - 1]
        columns = [layers[at] for at in places]
        far, wrong = by_kinds(distance["pairs"]), by_kinds(mistakes["pairs"])
        for kinds, own in by_kinds(cka["pairs"]).items():
            alike = [f"{mean(pair['cka'][at] or 0.0 for pair in own):.2f}" for at in places]
            apart = f"{mean(pair['parameters']['relative'] for pair in far[kinds]):.2f}"
            same = [f"{mean(pair[key] or 0.0 for pair in wrong[kinds]):.2f}" for key in ("overlap", "kappa")]
            rows.append([target, kinds, *alike, apart, *same])
        save_figure(similarity_figure(layers, cka["pairs"]), docs / f"analysis-cka-{target}.svg")
        pictures.append(f"\n![Linear CKA by block, {target}](analysis-cka-{target}.svg)\n")
    heads = [
        "target",
        "pairs",
        *(f"CKA {name}" for name in columns),
        "distance / backbone",
        "overlap of errors",
        "kappa",
    ]
    return table(heads, rows, 2) + "".join(pictures) if rows else ""


def critical(folder: Path, docs: Path) -> str:
    """Mean drops by stage, a picture of the first seed with its path, and the formal measure."""
    rows, pictures = [], []
    for target in ("sketch", "mnist"):
        for kind in ("pretrained", "random"):
            found = [read(path)["rows"] for path in sorted(folder.glob(f"{target}-{kind} *.json"))]
            if found:
                rows.append([target, kind, str(len(found)), *stages(found, "drop", 100, 1)])
                if target == "sketch":
                    save_figure(criticality_figure(found[0]), docs / f"analysis-criticality-{kind}.svg")
                    pictures.append(f"\n![Criticality of modules, {kind} start](analysis-criticality-{kind}.svg)\n")
    if not rows:
        return ""
    text = "Accuracy lost, mean over the modules of a stage and the seeds:\n\n"
    text += table(["target", "start", "seeds", *STAGES], rows, 2) + "".join(pictures)
    noisy = {path.stem.removeprefix("noise-"): read(path) for path in sorted(folder.glob("noise-*.json"))}
    if noisy:
        lines = []
        for name, one in noisy.items():
            total = "-" if one["criticality"] is None else f"{one['criticality']:.4g}"
            lines.append([name, *stages([one["rows"]], "criticality", 1, 2), total])
        text += (
            "\nFormal measure, mean over the modules of a stage (-: at no point is any noise borne), and their sum:\n\n"
        )
        text += table(["network", *STAGES, "sum"], lines)
    return text


def stages(found: Sequence[Sequence[Mapping[str, Any]]], key: str, factor: float, digits: int) -> list[str]:
    """Return the mean of a number by stage of a ResNet."""
    cells = []
    for stage in STAGES:
        values = [row[key] for rows in found for row in rows if row["module"].split(".")[0] == stage]
        known = [factor * value for value in values if value is not None]
        cells.append(f"{mean(known):.{digits}f}" if known else "-")
    return cells


def masks(folder: Path, docs: Path) -> str:
    """What masks of halves cost and save, and a picture of what rewinding costs."""
    found = [read(path)["rows"] for path in sorted(folder.glob("halves-*.json"))]
    if not found:
        return ""
    rows = []
    for name in found[0]:
        own = [one[name] for one in found]
        sizes = [f"{mean(row[key] for row in own):,.0f}" for key in ("weights", "bytes")]
        rows.append([name, points([row["accuracy"] for row in own]), *sizes])
    each = [read(path)["rows"] for path in sorted(folder.glob("test-*.json"))]
    drops = {row["module"]: [other["drop"] for rows in each for other in rows if other["module"] == row["module"]]
             for row in each[0]}  # fmt: skip
    ranked = sorted(
        ({"module": name, "drop": mean(values)} for name, values in drops.items()), key=lambda r: -r["drop"]
    )
    save_figure(criticality_figure(ranked), docs / "analysis-criticality-mask.svg")
    picture = "\n![Accuracy lost when the mask of a module is all ones](analysis-criticality-mask.svg)\n"
    return table(["masked", "accuracy", "masked weights", "bytes of the masks"], rows) + picture


def shuffle(path: Path, docs: Path) -> str:
    """Accuracies of both starts by the side of the blocks."""
    if not path.exists():
        return ""
    found = read(path)
    own = {(row["block"], row["start"]): points(row["accuracies"]) for row in found["rows"]}
    rows = []
    for one in found["gains"]:
        accuracies = [own[one["block"], start] for start in ("pretrained", "random")]
        rows.append([str(one["block"]), *accuracies, f"{100 * one['gain']:+.1f}"])
    save_figure(shuffle_figure(found["rows"]), docs / "analysis-shuffle.svg")
    picture = "\n![Accuracy over the side of shuffled blocks](analysis-shuffle.svg)\n"
    return table(["side of the blocks", "pretrained start", "random start", "gain"], rows) + picture


def checkpoints(path: Path, docs: Path) -> str:
    """Accuracies on the target by checkpoint."""
    if not path.exists():
        return ""
    found = read(path)["rows"]
    rows = [[row["checkpoint"], f"{100 * row['pretraining']:.1f}", points(row["accuracies"])] for row in found]
    save_figure(checkpoint_figure(found), docs / "analysis-checkpoints.svg")
    picture = "\n![Accuracy on sketches by checkpoint](analysis-checkpoints.svg)\n"
    return table(["checkpoint", "accuracy on CIFAR-10", "accuracy on sketches"], rows) + picture
