"""maskpack compare | analyze, which `maskpack lab` lists together with plot."""

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from maskpack.errors import ConfigError
from maskpack.training.config import TrainConfig

from .console import app, emit, note, progress_bar, say, table, training_progress
from .options import Base, Columns, DataRef, Folder, TrainedBackbone, Trust, Without, verb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskpack import Adapter
    from maskpack.backbone.load import Backbone
    from maskpack.lab.analysis.evaluation import Evaluations
    from maskpack.lab.analysis.network import Network

PANEL = "Research"
lab = typer.Typer(help="The verbs for research: compare, analyze, plot.", no_args_is_help=True)
analyze = typer.Typer(help="Analyse what trained networks have of their backbone.", no_args_is_help=True)
SHARED = "--backbone timm/resnet18.a1_in1k --data ./flowers"
# what a comparison decides itself, or has for every baseline
DECIDED = ("seed", "objective", "head_kind", "head_template")


@dataclass(frozen=True, kw_only=True)
class Trials(Folder):
    """Trainings that are compared.

    Research:
        seeds: how many seeds: 0, 1, …
    """

    seeds: Annotated[int, typer.Option(min=1)] = 3


@dataclass(frozen=True, kw_only=True)
class Comparison(Trials):
    """What a mask is compared with.

    Research:
        baseline: ID or ID:ARGUMENT: `maskpack list baselines`. Default: all.
        labels_fraction: share of the labels. Default: 1.
        lr: BASELINE=RATE,RATE,… to choose from; one is taken as it is.
    """

    baseline: tuple[str, ...] = ()
    labels_fraction: tuple[float, ...] = ()
    lr: tuple[str, ...] = ()


def compare(
    backbone: TrainedBackbone,
    data: DataRef,
    columns: Columns,
    settings: Annotated[TrainConfig, Without("lr", *DECIDED)],
    trials: Comparison,
) -> None:
    """Compare a mask with every alternative: same backbone, data, splits and budget; each in a process of its own.

    Learning rates are chosen on a validation split. Called again, it does what is not done yet.
    """
    from maskpack.lab import compare as compared
    from maskpack.lab.comparison import COLUMNS, cells

    rates = {}
    for text in trials.lr:
        name, _, values = text.partition("=")
        try:
            rates[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ConfigError(f"--lr must be BASELINE=RATE or BASELINE=RATE,RATE,…, got {text!r}") from None
    with training_progress() as report:
        result = compared(
            backbone.arguments(),
            {"reference": data, **{name: one for name, one in vars(columns).items() if one is not None}},
            trials.output,
            baselines=trials.baseline,
            seeds=range(trials.seeds),
            fractions=trials.labels_fraction or [1.0],
            rates=rates,
            config=settings,
            report=report,
        )
    emit(result, shown={})
    table(COLUMNS, [cells(one) for one in result["rows"]])
    note(f"The same in {trials.output / 'results.md'}, and all of it in {trials.output / 'results.json'}")


for parent, panel in ((app, PANEL), (lab, None)):
    verb(
        parent,
        f"maskpack compare {SHARED} --baseline full --baseline lora:8 --baseline mask --output ./comparison",
        f"maskpack compare {SHARED} --labels-fraction 1 --labels-fraction 0.1 --seeds 3 --output ./comparison",
        "maskpack compare --config run.toml --lr mask=0.02 --lr full=0.0003 --json",
        panel=panel,
    )(compare)
    parent.add_typer(analyze, name="analyze", rich_help_panel=panel)


# --- analyses of networks --------------------------------------------------------------------------------------------

NETWORK = "adapter, or safetensors file of fine-tuned weights with their head"
NetworkRef = Annotated[str, typer.Argument(metavar="NETWORK", help=f"An {NETWORK}.")]
NetworkRefs = Annotated[
    list[str],
    typer.Argument(metavar="NETWORK", help=f"Each REF or NAME=REF of an {NETWORK}; those of one NAME are of a kind."),
]
Per = Annotated[Literal["module", "block"], typer.Option(help="A row for each module, or for each block.")]


@dataclass(frozen=True, kw_only=True)
class Measured(Columns):
    """What networks are measured on.

    Data:
        data: Hub data set, folder (parquet, csv, images), or digits:0-9.
        split: rows to measure on.
        limit: at most so many of them, drawn by a seed. Default: all.
        batch_size: examples per forward pass.

    Backbone:
        head: for weights alone: module that gives the logits, where it is not found.
        image_size: for weights alone: pixels. Default: the backbone's.

    Results:
        output: folder for evaluations. Default: in the cache.
        plot: picture to write: .png or .svg.
    """

    data: str
    split: Literal["test", "train"] = "test"
    limit: int | None = None
    batch_size: Annotated[int, typer.Option(min=1)] = 64
    head: str | None = None
    image_size: int | None = None
    output: Path | None = None
    plot: Path | None = None


@verb(analyze, f"maskpack analyze criticality ./mask {SHARED} --points 4 --plot criticality.svg")
def criticality(
    ref: NetworkRef,
    base: Base,
    measured: Measured,
    trust: Trust,
    per: Per = "module",
    points: Annotated[int, typer.Option(min=1, help="Steps of the direct path from start to trained.")] = 1,
    noise: Annotated[
        int, typer.Option(min=0, help="Draws of noise, for noise radii and the formal measure; 0: neither.")
    ] = 0,
) -> None:
    """Rewind one module at a time to where it started: fine-tuned weights to the backbone's, a mask to all ones."""
    evaluations, (network,), _ = _opened([ref], base, measured, trust)
    from maskpack.lab import criticality_figure
    from maskpack.lab.analysis.criticality import Noise
    from maskpack.lab.analysis.criticality import criticality as rewound
    from maskpack.lab.analysis.network import grouped

    groups = grouped(evaluations.module, per, network.initial)
    looked = Noise(draws=noise) if noise else None
    with progress_bar("rewinding") as moved:
        result = rewound(evaluations, network.state, network.initial, groups, points=points, noise=looked, report=moved)
    _finish({"network": network.name, "per": per, **result}, measured.plot, lambda: criticality_figure(result["rows"]))
    columns = ["module", "parameters", "distance", "accuracy", "drop", *(["radius", "criticality"] if noise else [])]
    titles = ["rewound" if name == "accuracy" else name for name in columns]
    table(titles, [[row[name] for name in columns] for row in result["rows"]])


@verb(analyze, f"maskpack analyze barrier mask=./a mask=./b tuned=c.safetensors {SHARED}")
def barrier(
    refs: NetworkRefs,
    base: Base,
    measured: Measured,
    trust: Trust,
    points: Annotated[int, typer.Option(min=3, help="Networks on a line, its ends included.")] = 11,
) -> None:
    """Measure what is lost on the straight line between every two networks; BatchNorm statistics are taken anew."""
    evaluations, networks, _ = _opened(refs, base, measured, trust)
    from maskpack.lab import barrier_figure
    from maskpack.lab.analysis.pairs import barriers

    with progress_bar("interpolating") as moved:
        result = barriers(evaluations, networks, points, moved)
    _finish(result, measured.plot, lambda: barrier_figure(result["pairs"]))
    rows = []
    for pair in result["pairs"]:
        line = [point["accuracy"] for point in pair["points"]]
        heights = [pair["barrier"], pair["loss_barrier"]]
        rows.append([pair["first"], pair["second"], line[0], line[-1], min(line), *heights])
    table(["first", "second", "accuracy", "and", "lowest", "barrier", "of the loss"], rows)
    for kind, deviation in result["deviations"].items():
        say(f"  deviation of the accuracies of {kind}: {deviation:.4f}")


@verb(analyze, f"maskpack analyze similarity ./a ./b c.safetensors {SHARED} --limit 1024")
def similarity(refs: NetworkRefs, base: Base, measured: Measured, trust: Trust, per: Per = "block") -> None:
    """Compare every two networks: linear CKA layer by layer, distance of parameters, of masks also in bits."""
    evaluations, networks, initial = _opened(refs, base, measured, trust)
    from maskpack.lab import similarity_figure
    from maskpack.lab.analysis.network import grouped
    from maskpack.lab.analysis.pairs import distances
    from maskpack.lab.analysis.similarity import LEAST, similarities

    groups = grouped(evaluations.module, per)
    with progress_bar("comparing") as moved:
        result = similarities(evaluations, networks, groups, moved)
    result["distances"] = distances(networks, groups, initial)
    if result["examples"] < LEAST:
        note(f"Note: CKA of {result['examples']} examples; of fewer than {LEAST} it comes out too high.")
    _finish(result, measured.plot, lambda: similarity_figure(result["layers"], result["pairs"]))
    shown = [f"{pair['first']}, {pair['second']}" for pair in result["pairs"]]
    layers = [[name, *(pair["cka"][at] for pair in result["pairs"])] for at, name in enumerate(result["layers"])]
    table(["CKA", *shown], layers)
    say("")
    rows = []
    for row in result["distances"]:
        masks, own = row.get("masks", {}), row["parameters"]
        apart = [own["distance"], own["relative"], masks.get("hamming"), masks.get("weighted")]
        rows.append([f"{row['first']}, {row['second']}", *apart])
    table(["networks", "distance", "by the backbone's norm", "mask bits that differ", "weighted"], rows)


@verb(analyze, f"maskpack analyze mistakes ./a ./b {SHARED} --json")
def mistakes(refs: NetworkRefs, base: Base, measured: Measured, trust: Trust) -> None:
    """Compare what every two networks get wrong: overlap of errors, and Cohen's kappa."""
    evaluations, networks, _ = _opened(refs, base, measured, trust)
    from maskpack.lab import mistakes_figure
    from maskpack.lab.analysis.pairs import mistakes as compared

    with progress_bar("measuring") as moved:
        result = compared(evaluations, networks, moved)
    _finish(result, measured.plot, lambda: mistakes_figure([one.name for one in networks], result["pairs"]))
    table(["network", "accuracy"], [[one["network"], one["accuracy"]] for one in result["networks"]])
    say("")
    columns = ["first", "second", "both", "only_first", "only_second", "overlap", "kappa"]
    table([name.replace("_", " ") for name in columns], [[row[one] for one in columns] for row in result["pairs"]])


def named(given: str, otherwise: str) -> tuple[str, str]:
    """Return name and reference of REF or NAME=REF."""
    name, mark, ref = given.partition("=")
    return (name, ref) if mark and "/" not in name else (otherwise, given)


def _opened(
    refs: Sequence[str], base: Base, measured: Measured, trust: Trust
) -> "tuple[Evaluations, list[Network], dict[str, Any]]":
    """Return what measures the networks that the options name, these, and the tensors of the backbone."""
    from maskpack.lab.analysis.evaluation import Evaluations, evaluations_folder
    from maskpack.lab.analysis.network import is_adapter, read_networks, state_of
    from maskpack.lab.plots.figure import image_suffix
    from maskpack.training import load_data

    from .use import on_gpu

    if measured.plot is not None:
        image_suffix(measured.plot)
    pairs = [named(one, Path(one).name.removesuffix(".safetensors")) for one in refs]
    networks = [(name, trust.load(ref) if is_adapter(ref) else ref) for name, ref in pairs]
    adapters = [one for _, one in networks if not isinstance(one, str)]
    classes = next((one.about.class_names for one in adapters if one.about.class_names), None)
    note(f"Loading the backbone and {measured.data} …")
    backbone = on_gpu(_backbone(adapters, base, measured))
    data = load_data(
        measured.data,
        class_names=classes,
        input_column=measured.input_column,
        label_column=measured.label_column,
    )
    initial = state_of(backbone.model)
    used, classifier, read = read_networks(backbone, networks)
    evaluations = Evaluations(
        classifier,
        used,
        data,
        split=measured.split,
        limit=measured.limit,
        batch_size=measured.batch_size,
        folder=measured.output or evaluations_folder(),
    )
    return evaluations, read, {name: one for name, one in initial.items() if name.rpartition(".")[0] != used.head}


def _backbone(adapters: "Sequence[Adapter]", base: Base, measured: Measured) -> "Backbone":
    """Load the backbone that the options name, else the base of an adapter."""
    from maskpack import load_backbone

    if adapters:
        if measured.head is not None or measured.image_size is not None:
            raise ConfigError("--head and --image-size are for weights alone; an adapter has its own: leave them out")
        return base.of(adapters[0])
    if base.backbone is None:
        raise ConfigError("weights do not tell what they started from; give it with --backbone")
    return load_backbone(
        base.backbone,
        weights=base.weights,
        random_weights=base.random_weights,
        head=measured.head,
        image_size=measured.image_size,
    )


def _finish(result: Mapping[str, Any], plot: Path | None, draw: "Callable[[], Figure]") -> None:
    """Draw the picture if there is to be one, and print the result, or what of it is no table."""
    if plot is not None:
        from maskpack.lab import save_figure

        save_figure(draw(), plot)
        note(f"The picture is in {plot}")
    emit(result)
    say("")


# --- analyses of starts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drawn(Trials):
    """Trainings of one baseline, and their picture.

    Research:
        baseline: what is trained: `maskpack list baselines`.
        plot: picture to write: .png or .svg.
    """

    baseline: str = "full"
    plot: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Shuffled(Drawn):
    """Trainings on shuffled images.

    Research:
        block: side of the blocks in pixels. Default: image, half, …, 1.
        random_lr: peak learning rate of random starts. Default: --lr.
    """

    block: tuple[int, ...] = ()
    random_lr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoints(Drawn):
    """Trainings from checkpoints.

    Research:
        checkpoints: glob of the checkpoints: safetensors state dicts, in the order of names.
        pretraining: data of pretraining, to measure the checkpoints on, as --data.
    """

    checkpoints: str
    pretraining: str | None = None


Trained = Annotated[TrainConfig, Without(*DECIDED)]


@verb(analyze, f"maskpack analyze shuffle {SHARED} --block 224 --block 8 --output ./shuffled")
def shuffle(backbone: TrainedBackbone, data: DataRef, columns: Columns, settings: Trained, trials: Shuffled) -> None:
    """Train a pretrained and a random start on images whose blocks are shuffled, from whole images to pixels.

    Called again with the same folder, it does what is not done yet.
    """
    from maskpack.lab import shuffle_figure
    from maskpack.lab.analysis.starts import feature_reuse

    if backbone.random_weights is not None:
        raise ConfigError("--random-weights is the random start, which is there always; leave it out")
    options = {"blocks": trials.block, **({} if trials.random_lr is None else {"random_lr": trials.random_lr})}
    result = _trials(feature_reuse, shuffle_figure, (backbone.arguments(),), data, columns, settings, trials, options)
    keys = ["block", "start", "accuracy", "deviation"]
    table(keys, [[row[key] for key in keys] for row in result["rows"]])
    say("")
    table(["block", "gain of the pretrained start"], [[one["block"], one["gain"]] for one in result["gains"]])


@verb(analyze, f"maskpack analyze checkpoints {SHARED} --checkpoints 'run/epoch-*.safetensors' --output ./curve")
def checkpoints(
    backbone: TrainedBackbone, data: DataRef, columns: Columns, settings: Trained, trials: Checkpoints
) -> None:
    """Train one target from several checkpoints of a pretraining run.

    Called again with the same folder, it does what is not done yet.
    """
    from maskpack.lab import checkpoint_figure
    from maskpack.lab.analysis.starts import from_checkpoints
    from maskpack.lab.plots.figure import in_order
    from maskpack.training import load_data

    if backbone.weights is not None or backbone.random_weights is not None:
        raise ConfigError("the weights to start from are those of --checkpoints GLOB; give no other weights")
    found = in_order(glob.glob(trials.checkpoints))  # noqa: PTH207 (a pattern may be absolute)
    if not found:
        raise ConfigError(f"no file matches --checkpoints {trials.checkpoints!r}; expected safetensors state dicts")
    options = {"pretraining": None if trials.pretraining is None else load_data(trials.pretraining)}
    starts = (backbone.arguments(), found)
    result = _trials(from_checkpoints, checkpoint_figure, starts, data, columns, settings, trials, options)
    keys = ["checkpoint", "pretraining", "accuracy", "deviation"]
    table(keys, [[row[key] for key in keys] for row in result["rows"]])


def _trials(
    analysis: Callable[..., dict[str, Any]],
    figure: "Callable[[list[Mapping[str, Any]]], Figure]",
    starts: tuple[Any, ...],
    data: str,
    columns: Columns,
    settings: TrainConfig,
    trials: Drawn,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Run the trainings of an analysis, draw its picture if there is to be one, and return what it measured."""
    from maskpack.lab import save_figure
    from maskpack.lab.plots.figure import image_suffix
    from maskpack.training import load_data

    if trials.plot is not None:
        image_suffix(trials.plot)
    read = load_data(data, **vars(columns))
    with training_progress() as report:
        result = analysis(
            *starts,
            read,
            output=trials.output,
            seeds=range(trials.seeds),
            baseline=trials.baseline,
            config=settings,
            report=report,
            **options,
        )
    if trials.plot is not None:
        save_figure(figure(result["rows"]), trials.plot)
        note(f"The picture is in {trials.plot}")
    emit(result, shown={})
    return result
