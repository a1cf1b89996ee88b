"""maskpack plot: pictures of masks, scores and results."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .adapters import RandomWeights, Weights
from .console import Json, Quiet, Token, command, emit, examples, quiet_libraries
from .plot_files import content, curves_of, members

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskpack import Adapter, MaskSet

Refs = Annotated[list[str], typer.Argument(help="Adapters, each as REF or NAME=REF.")]
Results = Annotated[Path, typer.Argument(help="JSON file with a list of rows under the key `rows`.")]
Base = Annotated[str | None, typer.Option(help="Their base, for masks that were packed with its weights.")]
Output = Annotated[Path, typer.Option(help="The picture to write: .png or .svg.")]


def density(refs: Refs, output: Output, token: Token = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Density per layer; adapters of the same NAME are one series, with mean and deviation."""
    _begin(output, quiet)
    from maskpack import inspect_adapter
    from maskpack.adapter.card import parameter_densities
    from maskpack.lab import density_figure

    groups: dict[str, list[dict[str, float]]] = {}
    for name, adapter, one in _sets(refs, token, lambda ref: ""):
        described = inspect_adapter(adapter)["sets"][one]
        groups.setdefault(name or "adapters", []).append(dict(parameter_densities(described)))
    _finish(density_figure(groups), output, as_json)


def overlap(
    refs: Refs,
    output: Output,
    backbone: Base = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How much masks agree, pair by pair: as a share of the weights, and beyond chance."""
    _begin(output, quiet)
    from maskpack.lab import overlap_figure

    masks = _named_masks(refs, backbone, weights, random_weights, token)
    _finish(overlap_figure(masks), output, as_json)


def features(
    refs: Refs,
    output: Output,
    backbone: Base = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How many of several tasks use each weight, layer by layer: what is shared, and what is a task's own."""
    _begin(output, quiet)
    from maskpack.lab import feature_figure
    from maskpack.lab.plots.masks import users

    masks = _named_masks(refs, backbone, weights, random_weights, token)
    _finish(feature_figure(users(masks)), output, as_json)


def gates(
    run: Annotated[Path, typer.Argument(help="Folder of `maskpack multitask --mode gated`, or histograms.json in it.")],
    output: Output,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Histograms of the gates and the effective weights of each task over time."""
    _begin(output, quiet)
    from maskpack.lab import gate_figure

    file = run if run.suffix == ".json" else run / "training" / "jointly" / "histograms.json"
    history = content(file, "the histograms.json of a gated run; give its output folder")
    _finish(gate_figure(history), output, as_json)


def scores(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or of the adapter that it wrote.")],
    output: Output,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Histogram of the scores in a run's last checkpoint: of all, and layer by layer."""
    _begin(output, quiet)
    from maskpack.errors import StateError
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
    _finish(score_figure(scores_among(tensors), getattr(method, "threshold", None)), output, as_json)


def accuracy_bytes(results: Results, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Accuracy against bytes, from rows with `method`, `bytes`, `accuracy` and perhaps `deviation`.

    Of a method with several `labels_fraction` the greatest is drawn.
    """
    _begin(output, quiet)
    from maskpack.lab import bytes_figure

    _finish(bytes_figure(curves_of(results, "bytes", most_labels=True)), output, as_json)


def labels(results: Results, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Few-label curves, from rows with `method`, `labels_fraction`, `accuracy` and perhaps `deviation`."""
    _begin(output, quiet)
    from maskpack.lab import label_figure

    _finish(label_figure(curves_of(results, "labels_fraction")), output, as_json)


def clusters(
    file: Annotated[Path, typer.Argument(help="JSON file with `points`, pairs of numbers, and `expert`.")],
    output: Output,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which expert a cascade's router gives each sample to."""
    _begin(output, quiet)
    from maskpack.lab import cluster_figure

    _finish(cluster_figure(*members(file, "points", "expert")), output, as_json)


def confusion(
    file: Annotated[Path, typer.Argument(help="JSON file with `confusion`, rows of counts, and `class_names`.")],
    output: Output,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which classes are taken for which; `maskpack eval --json` prints the file."""
    _begin(output, quiet)
    from maskpack.lab import confusion_figure

    _finish(confusion_figure(*members(file, "confusion", "class_names")), output, as_json)


def _begin(output: Path, quiet: bool) -> None:
    """Refuse a wrong ending before any work is done."""
    quiet_libraries(quiet)
    from maskpack.lab.plots.figure import image_suffix

    image_suffix(output)


def _finish(figure: "Figure", output: Path, as_json: bool) -> None:
    from maskpack.lab import save_figure

    save_figure(figure, output)
    emit({"file": str(output), "bytes": output.stat().st_size}, as_json, f"✓ {output}")


def _sets(refs: list[str], token: str | None, unnamed: Callable[[str], str]) -> "Iterator[tuple[str, Adapter, str]]":
    """Give (name, adapter, mask set) of every mask set of adapters given as REF or NAME=REF."""
    from maskpack import load_adapter

    for given in refs:
        name, mark, ref = given.partition("=")
        if not mark or "/" in name:
            name, ref = unnamed(given), given
        adapter = load_adapter(ref, token=token)
        for one in adapter.sets:
            yield name if len(adapter.sets) == 1 else f"{name} {one}".strip(), adapter, one


def _named_masks(
    refs: list[str], backbone: str | None, weights: Path | None, random_weights: str | None, token: str | None
) -> "dict[str, MaskSet]":
    """Return the mask sets of adapters by name, decoded."""
    from maskpack import load_backbone
    from maskpack.errors import ConfigError

    base = None if backbone is None else load_backbone(backbone, weights=weights, random_weights=random_weights).model
    masks = {}
    for name, adapter, one in _sets(refs, token, lambda ref: Path(ref).name.removesuffix(".safetensors")):
        if name in masks:
            raise ConfigError(f"two masks would be called {name!r}; name the adapters, as in first=REF second=REF")
        masks[name] = adapter.parts(one, base).masks
    return masks


def register(app: typer.Typer) -> None:
    """Add this file's verb and its kinds of pictures."""
    kinds = typer.Typer(help="Draw pictures: PNG or SVG, by the ending of --output.", no_args_is_help=True)
    for name, function, example in (
        ("density", density, "maskpack plot density labels=./a labels=./b none=./c --output density.svg"),
        ("scores", scores, "maskpack plot scores ./mask --output scores.png"),
        ("overlap", overlap, "maskpack plot overlap ./a ./b ./c --output overlap.svg"),
        ("features", features, "maskpack plot features ./many/flowers ./many/digits --output features.svg"),
        ("gates", gates, "maskpack plot gates ./many --output gates.svg"),
        ("bytes", accuracy_bytes, "maskpack plot bytes results.json --output bytes.svg"),
        ("labels", labels, "maskpack plot labels results.json --output labels.svg"),
        ("clusters", clusters, "maskpack plot clusters clusters.json --output clusters.png"),
        ("confusion", confusion, "maskpack plot confusion eval.json --output confusion.svg"),
    ):
        kinds.command(name, epilog=examples(example))(command(function))
    app.add_typer(kinds, name="plot")
