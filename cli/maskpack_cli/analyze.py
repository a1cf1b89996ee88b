"""maskpack analyze: what trained networks have of their backbone, and of one another."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import starts
from .adapters import RandomWeights, RequireSignature, Weights
from .console import Json, Quiet, Token, command, emit, examples, note, progress_bar, quiet_libraries, say, table
from .use import base_of, on_gpu

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskpack import Adapter
    from maskpack.backbone.load import Backbone
    from maskpack.lab.analysis.evaluation import Evaluations
    from maskpack.lab.analysis.network import Network

NETWORK = "adapter, or safetensors file of fine-tuned weights with their head"
Ref = Annotated[str, typer.Argument(metavar="NETWORK", help=f"An {NETWORK}.")]
Refs = Annotated[
    list[str],
    typer.Argument(metavar="NETWORK", help=f"Each REF or NAME=REF of an {NETWORK}; those of one NAME are of a kind."),
]
Per = Annotated[Literal["module", "block"], typer.Option(help="A row for each module, or for each block.")]
OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("backbone", str | None, None, "What training started from, as in `maskpack train`. (default: an adapter's base)"),
    ("data", str, inspect.Parameter.empty, "Hub data set, folder (parquet, csv, images), or digits:0-9."),
    ("head", str | None, None, "Module that gives the logits, where it is not found."),
    ("image_size", int | None, None, "Pixels. (default: the backbone's; an adapter's own)"),
    ("input_column", str | None, None, "Column of images or texts, where it is not found."),
    ("label_column", str | None, None, "Column of labels, where it is not found."),
    ("split", str, "test", "Rows to measure on: test or train."),
    ("limit", int | None, None, "At most so many of them, drawn by a seed. (default: all)"),
    ("batch_size", int, 64, "Examples per forward pass."),
    ("output", Path | None, None, "Folder for evaluations. (default: in the cache)"),
    ("plot", Path | None, None, "Picture to write: .png or .svg."),
)


def _shared(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of all, in the place of its `**given`."""
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    kinds: dict[str, Any] = {name: Annotated[kind, typer.Option(help=help)] for name, kind, _, help in OPTIONS}
    defaults = {name: default for name, _, default, _ in OPTIONS}
    kinds |= {"weights": Weights, "random_weights": RandomWeights, "token": Token, "as_json": Json, "quiet": Quiet}
    kinds["require_signature"], defaults["require_signature"] = RequireSignature, None
    defaults |= {"weights": None, "random_weights": None, "token": None, "as_json": False, "quiet": False}
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [inspect.Parameter(name, keyword, default=defaults[name], annotation=kind) for name, kind in kinds.items()]
    own = [one.replace(kind=keyword) for one in own]
    function.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return function


@_shared
def criticality(
    ref: Ref,
    per: Per = "module",
    points: Annotated[int, typer.Option(min=1, help="Steps of the direct path from start to trained.")] = 1,
    noise: Annotated[
        int, typer.Option(min=0, help="Draws of noise, for noise radii and the formal measure; 0: neither.")
    ] = 0,
    **given: Any,
) -> None:
    """Rewind one module at a time to where it started: fine-tuned weights to the backbone's, a mask to all ones."""
    evaluations, (network,), _ = _opened([ref], **given)
    from maskpack.lab import criticality_figure
    from maskpack.lab.analysis.criticality import Noise
    from maskpack.lab.analysis.criticality import criticality as measured
    from maskpack.lab.analysis.network import grouped

    groups = grouped(evaluations.module, per, network.initial)
    looked = Noise(draws=noise) if noise else None
    with progress_bar("rewinding", given["quiet"] or given["as_json"]) as moved:
        result = measured(
            evaluations, network.state, network.initial, groups, points=points, noise=looked, report=moved
        )
    _finish({"network": network.name, "per": per, **result}, given, lambda: criticality_figure(result["rows"]))
    if not given["as_json"]:
        columns = [
            "module",
            "parameters",
            "distance",
            "accuracy",
            "drop",
            *(["radius", "criticality"] if noise else []),
        ]
        titles = ["rewound" if name == "accuracy" else name for name in columns]
        table(titles, [[row[name] for name in columns] for row in result["rows"]])


@_shared
def barrier(
    refs: Refs,
    points: Annotated[int, typer.Option(min=3, help="Networks on a line, its ends included.")] = 11,
    **given: Any,
) -> None:
    """Measure what is lost on the straight line between every two networks; BatchNorm statistics are taken anew."""
    evaluations, networks, _ = _opened(refs, **given)
    from maskpack.lab import barrier_figure
    from maskpack.lab.analysis.pairs import barriers

    with progress_bar("interpolating", given["quiet"] or given["as_json"]) as moved:
        result = barriers(evaluations, networks, points, moved)
    _finish(result, given, lambda: barrier_figure(result["pairs"]))
    if not given["as_json"]:
        rows = []
        for pair in result["pairs"]:
            line = [point["accuracy"] for point in pair["points"]]
            heights = [pair["barrier"], pair["loss_barrier"]]
            rows.append([pair["first"], pair["second"], line[0], line[-1], min(line), *heights])
        table(["first", "second", "accuracy", "and", "lowest", "barrier", "of the loss"], rows)
        for kind, deviation in result["deviations"].items():
            say(f"  deviation of the accuracies of {kind}: {deviation:.4f}")


@_shared
def similarity(refs: Refs, per: Per = "block", **given: Any) -> None:
    """Compare every two networks: linear CKA layer by layer, distance of parameters, of masks also in bits."""
    evaluations, networks, base = _opened(refs, **given)
    from maskpack.lab import similarity_figure
    from maskpack.lab.analysis.network import grouped
    from maskpack.lab.analysis.pairs import distances
    from maskpack.lab.analysis.similarity import LEAST, similarities

    groups = grouped(evaluations.module, per)
    with progress_bar("comparing", given["quiet"] or given["as_json"]) as moved:
        result = similarities(evaluations, networks, groups, moved)
    result["distances"] = distances(networks, groups, base)
    if result["examples"] < LEAST:
        note(
            f"Note: CKA of {result['examples']} examples; of fewer than {LEAST} it comes out too high.", given["quiet"]
        )
    _finish(result, given, lambda: similarity_figure(result["layers"], result["pairs"]))
    if not given["as_json"]:
        shown = [f"{pair['first']}, {pair['second']}" for pair in result["pairs"]]
        lines = [[name, *(pair["cka"][at] for pair in result["pairs"])] for at, name in enumerate(result["layers"])]
        table(["CKA", *shown], lines)
        say("")
        rows = []
        for row in result["distances"]:
            masks, own = row.get("masks", {}), row["parameters"]
            apart = [own["distance"], own["relative"], masks.get("hamming"), masks.get("weighted")]
            rows.append([f"{row['first']}, {row['second']}", *apart])
        table(["networks", "distance", "by the backbone's norm", "mask bits that differ", "weighted"], rows)


@_shared
def mistakes(refs: Refs, **given: Any) -> None:
    """Compare what every two networks get wrong: overlap of errors, and Cohen's kappa."""
    evaluations, networks, _ = _opened(refs, **given)
    from maskpack.lab import mistakes_figure
    from maskpack.lab.analysis.pairs import mistakes as measured

    with progress_bar("measuring", given["quiet"] or given["as_json"]) as moved:
        result = measured(evaluations, networks, moved)
    _finish(result, given, lambda: mistakes_figure([one.name for one in networks], result["pairs"]))
    if not given["as_json"]:
        table(["network", "accuracy"], [[one["network"], one["accuracy"]] for one in result["networks"]])
        say("")
        columns = ["first", "second", "both", "only_first", "only_second", "overlap", "kappa"]
        table([name.replace("_", " ") for name in columns], [[row[one] for one in columns] for row in result["pairs"]])


def _opened(refs: Sequence[str], **given: Any) -> "tuple[Evaluations, list[Network], dict[str, Any]]":
    """Return what measures the networks that the options name, these, and the tensors of the backbone."""
    quiet_libraries(given["quiet"])
    from maskpack import load_adapter
    from maskpack.lab.analysis.evaluation import Evaluations, evaluations_folder
    from maskpack.lab.analysis.network import is_adapter, read_networks, state_of
    from maskpack.lab.plots.figure import image_suffix
    from maskpack.training import load_data

    if given["plot"] is not None:
        image_suffix(given["plot"])
    named: list[tuple[str, Any]] = []
    for one in refs:
        name, mark, ref = one.partition("=")
        if not mark or "/" in name:
            name, ref = Path(one).name.removesuffix(".safetensors"), one
        options: Any = {key: given[key] for key in ("token", "require_signature")}
        named.append((name, load_adapter(ref, **options) if is_adapter(ref) else ref))
    classes = next(
        (ref.about.class_names for _, ref in named if not isinstance(ref, str) and ref.about.class_names), None
    )
    note(f"Loading the backbone and {given['data']} …", given["quiet"])
    backbone = on_gpu(_backbone(next((ref for _, ref in named if not isinstance(ref, str)), None), **given))
    columns = {name: given[name] for name in ("input_column", "label_column")}
    data = load_data(given["data"], class_names=classes, **columns)
    base = state_of(backbone.model)
    used, classifier, networks = read_networks(backbone, named)
    settings = {name: given[name] for name in ("split", "limit", "batch_size")}
    evaluations = Evaluations(classifier, used, data, **settings, folder=given["output"] or evaluations_folder())
    return evaluations, networks, {name: one for name, one in base.items() if name.rpartition(".")[0] != used.head}


def _backbone(adapter: "Adapter | None", **given: Any) -> "Backbone":
    """The backbone that the options name, else the base of an adapter."""
    from maskpack import load_backbone
    from maskpack.errors import ConfigError

    if adapter is not None:
        if given["head"] is not None or given["image_size"] is not None:
            raise ConfigError("--head and --image-size are for weights alone; an adapter has its own: leave them out")
        return base_of(adapter, given["backbone"], given["weights"], given["random_weights"])
    if given["backbone"] is None:
        raise ConfigError("weights do not tell what they started from; give it with --backbone")
    options = {name: given[name] for name in ("weights", "random_weights", "head", "image_size")}
    return load_backbone(given["backbone"], **options)


def _finish(result: Mapping[str, Any], given: Mapping[str, Any], draw: "Callable[[], Figure]") -> None:
    """Draw the picture if there is to be one, and print the result, or what of it is no table."""
    from maskpack.lab import save_figure

    if given["plot"] is not None:
        save_figure(draw(), given["plot"])
        note(f"The picture is in {given['plot']}", given["quiet"])
    emit(result, given["as_json"])
    if not given["as_json"]:
        say("")


def register(app: typer.Typer) -> None:
    """Add this file's verb and its kinds of analysis."""
    kinds = typer.Typer(help="Analyse what trained networks have of their backbone.", no_args_is_help=True)
    shared = "--backbone timm/resnet18.a1_in1k --data ./flowers"
    for name, function, example in (
        ("criticality", criticality, f"maskpack analyze criticality ./mask {shared} --points 4 --plot criticality.svg"),
        ("barrier", barrier, f"maskpack analyze barrier mask=./a mask=./b tuned=c.safetensors {shared}"),
        ("similarity", similarity, f"maskpack analyze similarity ./a ./b c.safetensors {shared} --limit 1024"),
        ("mistakes", mistakes, f"maskpack analyze mistakes ./a ./b {shared} --json"),
    ):
        kinds.command(name, epilog=examples(example))(command(function))
    starts.register(kinds)
    app.add_typer(kinds, name="analyze")
