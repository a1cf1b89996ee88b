"""maskpack plot: pictures of masks, scores and results."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maskpack.errors import ConfigError, DataError, StateError

from .console import app, emit
from .lab import PANEL, lab, named
from .options import PackedBase, Token, verb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskpack import Adapter, MaskSet

plot = typer.Typer(help="Draw pictures: PNG or SVG, by the ending of --output.", no_args_is_help=True)
app.add_typer(plot, name="plot", rich_help_panel=PANEL)
lab.add_typer(plot, name="plot")
app.add_typer(lab, name="lab", rich_help_panel=PANEL)
Refs = Annotated[list[str], typer.Argument(help="Adapters, each as REF or NAME=REF.")]
Results = Annotated[Path, typer.Argument(help="JSON file with a list of rows under the key `rows`.")]
Picture = Annotated[Path, typer.Option(help="The picture to write: .png or .svg.")]
Curves = dict[str, list[tuple[float, float, float | None]]]


@verb(plot, "maskpack plot density labels=./a labels=./b none=./c --output density.svg")
def density(refs: Refs, output: Picture, token: Token = None) -> None:
    """Density per layer; adapters of the same NAME are one series, with mean and deviation."""
    _check(output)
    from maskpack import inspect_adapter
    from maskpack.adapter.card import parameter_densities
    from maskpack.lab import density_figure

    groups: dict[str, list[dict[str, float]]] = {}
    for name, adapter, one in _sets(refs, token, lambda ref: ""):
        described = inspect_adapter(adapter)["sets"][one]
        groups.setdefault(name or "adapters", []).append(dict(parameter_densities(described)))
    _finish(density_figure(groups), output)


@verb(plot, "maskpack plot scores ./mask --output scores.png")
def scores(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or of the adapter that it wrote.")],
    output: Picture,
) -> None:
    """Histogram of the scores in a run's last checkpoint: of all, and layer by layer."""
    _check(output)
    from maskpack.lab import score_figure
    from maskpack.training.checkpoint import FILE, load_checkpoint
    from maskpack.training.methods.base import build_method
    from maskpack.training.scores import scores_among

    places = [run / FILE, run / "training" / FILE]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise StateError(f"there is no {FILE} in {run} or in {run / 'training'}; give the folder of a training run")
    tensors, facts = load_checkpoint(found)
    config = facts["run"]["config"]
    method = build_method(config["method"], config["method_options"])
    _finish(score_figure(scores_among(tensors), getattr(method, "threshold", None)), output)


@verb(plot, "maskpack plot overlap ./a ./b ./c --output overlap.svg")
def overlap(refs: Refs, output: Picture, base: PackedBase, token: Token = None) -> None:
    """How much masks agree, pair by pair: as a share of the weights, and beyond chance."""
    _check(output)
    from maskpack.lab import overlap_figure

    _finish(overlap_figure(_masks(refs, base, token)), output)


@verb(plot, "maskpack plot features ./many/flowers ./many/digits --output features.svg")
def features(refs: Refs, output: Picture, base: PackedBase, token: Token = None) -> None:
    """How many of several tasks use each weight, layer by layer: what is shared, and what is a task's own."""
    _check(output)
    from maskpack.lab import feature_figure
    from maskpack.lab.plots.masks import users

    _finish(feature_figure(users(_masks(refs, base, token))), output)


@verb(plot, "maskpack plot gates ./many --output gates.svg")
def gates(
    run: Annotated[Path, typer.Argument(help="Folder of `maskpack multitask --mode gated`, or histograms.json in it.")],
    output: Picture,
) -> None:
    """Histograms of the gates and the effective weights of each task over time."""
    _check(output)
    from maskpack.lab import gate_figure

    file = run if run.suffix == ".json" else run / "training" / "jointly" / "histograms.json"
    history = _content(file, "the histograms.json of a gated run; give its output folder")
    _finish(gate_figure(history), output)


@verb(plot, "maskpack plot bytes results.json --output bytes.svg", name="bytes")
def accuracy_bytes(results: Results, output: Picture) -> None:
    """Accuracy against bytes, from rows with `method`, `bytes`, `accuracy` and perhaps `deviation`.

    Of a method with several `labels_fraction` the greatest is drawn.
    """
    _check(output)
    from maskpack.lab import bytes_figure

    _finish(bytes_figure(_curves(results, "bytes", most_labels=True)), output)


@verb(plot, "maskpack plot labels results.json --output labels.svg")
def labels(results: Results, output: Picture) -> None:
    """Few-label curves, from rows with `method`, `labels_fraction`, `accuracy` and perhaps `deviation`."""
    _check(output)
    from maskpack.lab import label_figure

    _finish(label_figure(_curves(results, "labels_fraction")), output)


@verb(plot, "maskpack plot clusters clusters.json --output clusters.png")
def clusters(
    file: Annotated[Path, typer.Argument(help="JSON file with `points`, pairs of numbers, and `expert`.")],
    output: Picture,
) -> None:
    """Which expert a cascade's router gives each sample to."""
    _check(output)
    from maskpack.lab import cluster_figure

    _finish(cluster_figure(*_members(file, "points", "expert")), output)


@verb(plot, "maskpack plot confusion eval.json --output confusion.svg")
def confusion(
    file: Annotated[Path, typer.Argument(help="JSON file with `confusion`, rows of counts, and `class_names`.")],
    output: Picture,
) -> None:
    """Which classes are taken for which; `maskpack eval --json` prints the file."""
    _check(output)
    from maskpack.lab import confusion_figure

    _finish(confusion_figure(*_members(file, "confusion", "class_names")), output)


def _check(output: Path) -> None:
    """Refuse a wrong ending before any work is done."""
    from maskpack.lab.plots.figure import image_suffix

    image_suffix(output)


def _finish(figure: "Figure", output: Path) -> None:
    from maskpack.lab import save_figure

    save_figure(figure, output)
    emit({"file": str(output), "bytes": output.stat().st_size}, f"✓ {output}")


def _sets(refs: list[str], token: str | None, unnamed: Callable[[str], str]) -> "Iterator[tuple[str, Adapter, str]]":
    """Give (name, adapter, mask set) of every mask set of adapters given as REF or NAME=REF."""
    from maskpack import load_adapter

    for given in refs:
        name, ref = named(given, unnamed(given))
        adapter = load_adapter(ref, token=token)
        for one in adapter.sets:
            yield name if len(adapter.sets) == 1 else f"{name} {one}".strip(), adapter, one


def _masks(refs: list[str], base: PackedBase, token: str | None) -> "dict[str, MaskSet]":
    """Return the mask sets of adapters by name, decoded."""
    model: Any = None
    masks: dict[str, MaskSet] = {}
    for name, adapter, one in _sets(refs, token, lambda ref: Path(ref).name.removesuffix(".safetensors")):
        if name in masks:
            raise ConfigError(f"two masks would be called {name!r}; name the adapters, as in first=REF second=REF")
        model = base.model_of(adapter) if model is None else model
        masks[name] = adapter.parts(one, model).masks
    return masks


# --- JSON files that pictures are drawn from -------------------------------------------------------------------------


def _content(file: Path, expected: str) -> Any:
    """Return what is in a JSON file.

    Raises:
        DataError: if it cannot be read; the message says what was expected.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file} as JSON: {error}; expected {expected}") from None


def _members(file: Path, *keys: str) -> list[Any]:
    """Return these members, all of them lists, of the JSON object in a file."""
    found = _content(file, f"an object with {' and '.join(keys)}")
    if isinstance(found, dict) and "confusion" in keys and "confusion" not in found:
        match found.get("features"):  # of `maskpack eval --json` with k-NN or a probe
            case [{"confusion": counts}]:
                found["confusion"] = counts
            case [_, _, *_]:
                raise DataError(f"{file} has several measures; print it with --knn or --probe alone, of one share")
    for key in keys:
        if not isinstance(found, dict) or not isinstance(found.get(key), list):
            has = ", ".join(sorted(found)[:10]) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise DataError(f"{file} has no list {key!r}, it has: {has}; expected an object with {' and '.join(keys)}")
    return [found[key] for key in keys]


def _curves(file: Path, key: str, most_labels: bool = False) -> Curves:
    """Return (key, accuracy, deviation) of the rows, or of each method's rows with most labels, by method."""
    curves: Curves = {}
    most: dict[str, Any] = {}
    [rows] = _members(file, "rows")
    for number, row in enumerate(rows, 1):
        found: dict[str, Any] = row if isinstance(row, dict) else {}
        point: list[Any] = [found.get(key), found.get("accuracy"), found.get("deviation")]
        share = found.get("labels_fraction", 1) if most_labels else 1
        are_numbers = all(isinstance(one, int | float) for one in (*point[:2], point[2] or 0, share))
        if not are_numbers or not isinstance(found.get("method"), str):
            raise DataError(
                f"row {number} of {file} is {row!r:.200}; expected an object with a text under 'method' and numbers "
                f"under {key!r}, 'accuracy' and perhaps 'deviation'"
            )
        method = found["method"]
        if method not in curves or share > most[method]:
            most[method], curves[method] = share, []
        if share == most[method]:
            curves[method].append((point[0], point[1], point[2]))
    return curves
