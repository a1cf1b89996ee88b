"""maskpack compare | analyze | plot, which `maskpack lab` lists together."""

import glob
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import maskpack
from maskpack import lab, training
from maskpack.errors import ConfigError, DataError, StateError
from maskpack.training.config import TrainConfig

from .console import app, emit, lines, note, progress_bar, say, table, training_progress
from .options import (
    ARGUMENT,
    POSITIVE,
    AnyBase,
    Columns,
    DataRef,
    Folder,
    PackedBase,
    Token,
    TrainedBackbone,
    Trust,
    Without,
    group,
    verb,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from maskpack.lab.networks import Evaluations, Network

PANEL = "Research"
research = typer.Typer(help="The verbs for research: compare, analyze, plot.", no_args_is_help=True)
analyze = typer.Typer(help="Analyse what trained networks have of their backbone.", no_args_is_help=True)
plot = typer.Typer(help="Draw pictures: PNG or SVG, by the ending of --output.", no_args_is_help=True)
SHARED = "--backbone timm/resnet18.a1_in1k --data ./flowers"
# what a comparison decides itself, or has for every baseline
DECIDED = ("seed", "objective", "head_kind", "head_template")
Trained = Annotated[TrainConfig, Without(*DECIDED)]
Compared = Annotated[TrainConfig, Without("lr", *DECIDED)]
RESULTS = typer.Option(rich_help_panel="Results")
Picture = Annotated[Path | None, "Picture to write: .png or .svg.", RESULTS]


def check_picture(path: Path | None) -> None:
    """Refuse a wrong ending before any work is done."""
    from maskpack.lab.figure import image_suffix

    if path is not None:
        image_suffix(path)


def draw(figure: "Callable[..., Figure]", path: Path | None, *values: Any) -> None:
    """Write the picture of what an analysis found, if there is to be one."""
    if path is not None:
        lab.save_figure(figure(*values), path)
        note(f"The picture is in {path}")


# --- trainings -------------------------------------------------------------------------------------------------------


@group("Research")
class Trials(Folder):
    seeds: Annotated[int, "How many seeds: 0, 1, …", POSITIVE] = 3


@group("Research")
class Comparison(Trials):
    baseline: Annotated[tuple[str, ...], "ID or ID:ARGUMENT: `maskpack list baselines`. Default: all."] = ()
    labels_fraction: Annotated[tuple[float, ...], "Share of the labels. Default: 1."] = ()
    lr: Annotated[tuple[str, ...], "BASELINE=RATE,RATE,… to choose from; one is taken as it is."] = ()
    shard: Annotated[str, "NUMBER/COUNT, as 3/16: do a sixteenth of the trainings, beside other processes."] = "1/1"

    def part(self) -> tuple[int, int]:
        """Return number and count of --shard."""
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"--shard must be NUMBER/COUNT with a number from 1 to the count, got {self.shard!r}")
        return int(number), int(count)

    def rates(self) -> dict[str, list[float]]:
        """Return the rates of --lr by baseline."""
        found = {}
        for text in self.lr:
            name, _, values = text.partition("=")
            try:
                found[name] = [float(value) for value in values.split(",")]
            except ValueError:
                raise ConfigError(f"--lr must be BASELINE=RATE or BASELINE=RATE,RATE,…, got {text!r}") from None
        return found


def compare(backbone: TrainedBackbone, data: DataRef, columns: Columns, settings: Compared, trials: Comparison) -> None:
    """Compare a mask with every alternative: same backbone, data, splits and budget; each in a process of its own.

    Learning rates are chosen on a validation split. Called again, it does what is not done yet.
    """
    from maskpack.lab.comparison import cells

    rates, part = trials.rates(), trials.part()
    with training_progress() as report:
        result = lab.compare(
            backbone.arguments(),
            {"reference": data, **{name: one for name, one in vars(columns).items() if one is not None}},
            trials.output,
            baselines=trials.baseline,
            seeds=range(trials.seeds),
            fractions=trials.labels_fraction or [1.0],
            rates=rates,
            config=settings,
            report=report,
            shard=part,
        )
    emit(result)
    if waiting := result.get("waiting"):
        note(f"{waiting} trainings are other shards', or wait for theirs; call it again when those are done")
        return
    rows = [cells(one) for one in result["rows"]]
    table(rows, rows[0])
    note(f"The same in {trials.output / 'results.md'}, and all of it in {trials.output / 'results.json'}")


for parent, panel in ((app, PANEL), (research, None)):
    verb(
        parent,
        panel,
        f"maskpack compare {SHARED} --baseline full --baseline lora:8 --baseline mask --output ./comparison",
        f"maskpack compare {SHARED} --labels-fraction 1 --labels-fraction 0.1 --seeds 3 --output ./comparison",
        "maskpack compare --config run.toml --lr mask=0.02 --lr full=0.0003 --json",
        f"maskpack compare {SHARED} --output ./shared/comparison --shard 3/16",
    )(compare)
    parent.add_typer(analyze, name="analyze", rich_help_panel=panel)
    parent.add_typer(plot, name="plot", rich_help_panel=panel)
app.add_typer(research, name="lab", rich_help_panel=PANEL)


@group("Research")
class Drawn(Trials):
    baseline: Annotated[str, "What is trained: `maskpack list baselines`."] = "full"
    plot: Picture = None

    def measure(
        self, analysis: Callable[..., dict[str, Any]], starts: tuple[Any, ...], data: Any, **options: Any
    ) -> dict[str, Any]:
        """Run the trainings of an analysis, print what it measured under --json, and return it."""
        own = {"output": self.output, "seeds": range(self.seeds), "baseline": self.baseline}
        with training_progress() as report:
            result = analysis(*starts, data, **own, **options, report=report)
        emit(result)
        return result


@group("Research")
class Shuffled(Drawn):
    block: Annotated[tuple[int, ...], "Side of the blocks in pixels. Default: image, half, …, 1."] = ()
    random_lr: Annotated[float | None, "Peak learning rate of random starts. Default: --lr."] = None


@group("Research")
class Checkpoints(Drawn):
    checkpoints: Annotated[str, "Glob of the checkpoints: safetensors state dicts, in the order of names."]
    pretraining: Annotated[str | None, "Data of pretraining, to measure the checkpoints on, as --data."] = None


@verb(analyze, None, f"maskpack analyze shuffle {SHARED} --block 224 --block 8 --output ./shuffled")
def shuffle(backbone: TrainedBackbone, data: DataRef, columns: Columns, settings: Trained, trials: Shuffled) -> None:
    """Train a pretrained and a random start on images whose blocks are shuffled, from whole images to pixels.

    Called again with the same folder, it does what is not done yet.
    """
    check_picture(trials.plot)
    if backbone.random_weights is not None:
        raise ConfigError("--random-weights is the random start, which is there always; leave it out")
    options = {"config": settings, "blocks": trials.block, "random_lr": trials.random_lr}
    read = training.load_data(data, **vars(columns))
    result = trials.measure(lab.feature_reuse, (backbone.arguments(),), read, **options)
    draw(lab.shuffle_figure, trials.plot, result["rows"])
    table(result["rows"], ["block", "start", "accuracy", "deviation"])
    say("")
    table(result["gains"], ["block", "gain"], gain="gain of the pretrained start")


@verb(analyze, None, f"maskpack analyze checkpoints {SHARED} --checkpoints 'run/epoch-*.safetensors' --output ./curve")
def checkpoints(
    backbone: TrainedBackbone, data: DataRef, columns: Columns, settings: Trained, trials: Checkpoints
) -> None:
    """Train one target from several checkpoints of a pretraining run.

    Called again with the same folder, it does what is not done yet.
    """
    from maskpack.lab.figure import in_order

    check_picture(trials.plot)
    if backbone.weights is not None or backbone.random_weights is not None:
        raise ConfigError("the weights to start from are those of --checkpoints GLOB; give no other weights")
    found = in_order(glob.glob(trials.checkpoints))  # noqa: PTH207 (a pattern may be absolute)
    if not found:
        raise ConfigError(f"no file matches --checkpoints {trials.checkpoints!r}; expected safetensors state dicts")
    pretraining = None if trials.pretraining is None else training.load_data(trials.pretraining)
    read, starts = training.load_data(data, **vars(columns)), (backbone.arguments(), found)
    result = trials.measure(lab.from_checkpoints, starts, read, config=settings, pretraining=pretraining)
    draw(lab.checkpoint_figure, trials.plot, result["rows"])
    table(result["rows"], ["checkpoint", "pretraining", "accuracy", "deviation"])


# --- analyses of networks --------------------------------------------------------------------------------------------

NETWORK = "adapter, or safetensors file of fine-tuned weights with their head"
NetworkRef = Annotated[str, f"An {NETWORK}.", typer.Argument(metavar="NETWORK")]
NetworkRefs = Annotated[
    tuple[str, ...],
    f"Each REF or NAME=REF of an {NETWORK}; those of one NAME are of a kind.",
    typer.Argument(metavar="NETWORK"),
]
Steps = Annotated[int, "Steps of the direct path from start to trained.", POSITIVE]
Draws = Annotated[int, "Draws of noise, for noise radii and formal measure; 0: neither.", typer.Option(min=0)]
Points = Annotated[int, "Networks on a line, its ends included.", typer.Option(min=3)]
Per = Annotated[Literal["module", "block"], "A row for each module, or for each block."]


@group("Data")
class Measured(Columns):
    data: DataRef
    split: Annotated[Literal["test", "train"], "Rows to measure on."] = "test"
    limit: Annotated[int | None, "At most so many of them, drawn by a seed. Default: all."] = None
    batch_size: Annotated[int, "Examples per forward pass.", POSITIVE] = 64
    output: Annotated[Path | None, "Folder for evaluations. Default: in the cache.", RESULTS] = None
    plot: Picture = None

    def open(
        self, refs: tuple[str, ...], base: AnyBase, trust: Trust
    ) -> "tuple[Evaluations, list[Network], dict[str, Any]]":
        """Return what measures networks, these, and the tensors of the backbone without its head."""
        from maskpack.lab.networks import Evaluations, evaluations_folder, is_adapter, read_networks, state_of

        check_picture(self.plot)
        pairs = [named(one, file_name(one)) for one in refs]
        networks = [(name, trust.load(ref) if is_adapter(ref) else ref) for name, ref in pairs]
        adapters = [one for _, one in networks if not isinstance(one, str)]
        note(f"Loading the backbone and {self.data} …")
        base.check(not adapters, "weights do not tell what they started from; give it with --backbone")
        backbone = base.of_any(adapters[0] if adapters else None)
        classes = next((one.about.class_names for one in adapters if one.about.class_names), None)
        data = training.load_data(
            self.data, class_names=classes, input_column=self.input_column, label_column=self.label_column
        )
        initial = state_of(backbone.model)
        used, classifier, read = read_networks(backbone, networks)
        options: dict[str, Any] = {"split": self.split, "limit": self.limit, "batch_size": self.batch_size}
        evaluations = Evaluations(classifier, used, data, folder=self.output or evaluations_folder(), **options)
        return evaluations, read, {n: one for n, one in initial.items() if n.rpartition(".")[0] != used.head}


def named(given: str, otherwise: str) -> tuple[str, str]:
    """Return name and reference of REF or NAME=REF."""
    name, mark, ref = given.partition("=")
    return (name, ref) if mark and "/" not in name else (otherwise, given)


def file_name(ref: str) -> str:
    """Return what an adapter is called where nobody names it."""
    return Path(ref).name.removesuffix(".safetensors")


def print_whole(result: Mapping[str, Any]) -> None:
    """Print a result, or what of it is no table."""
    emit(result)
    lines(result)
    say("")


@verb(analyze, None, f"maskpack analyze criticality ./mask {SHARED} --points 4 --plot criticality.svg")
def criticality(
    ref: NetworkRef,
    base: AnyBase,
    measured: Measured,
    trust: Trust,
    per: Per = "module",
    points: Steps = 1,
    noise: Draws = 0,
) -> None:
    """Rewind one module at a time to where it started: fine-tuned weights to the backbone's, a mask to all ones."""
    evaluations, (network,), _ = measured.open((ref,), base, trust)
    from maskpack.lab.pairs import Noise

    groups = lab.grouped(evaluations.module, per, network.initial)
    looked = Noise(draws=noise) if noise else None
    with progress_bar("rewinding") as moved:
        result = lab.criticality(
            evaluations, network.state, network.initial, groups, points=points, noise=looked, report=moved
        )
    draw(lab.criticality_figure, measured.plot, result["rows"])
    print_whole({"network": network.name, "per": per, **result})
    columns = ["module", "parameters", "distance", "accuracy", "drop", *(["radius", "criticality"] if noise else [])]
    table(result["rows"], columns, accuracy="rewound")


@verb(analyze, None, f"maskpack analyze barrier mask=./a mask=./b tuned=c.safetensors {SHARED}")
def barrier(refs: NetworkRefs, base: AnyBase, measured: Measured, trust: Trust, points: Points = 11) -> None:
    """Measure the loss barrier on the straight line between every two networks; BatchNorm statistics are recomputed."""
    evaluations, networks, _ = measured.open(refs, base, trust)
    with progress_bar("interpolating") as moved:
        result = lab.barriers(evaluations, networks, points, moved)
    draw(lab.barrier_figure, measured.plot, result["pairs"])
    print_whole(result)
    rows = []
    for pair in result["pairs"]:
        line = [point["accuracy"] for point in pair["points"]]
        rows.append({**pair, "accuracy": line[0], "and": line[-1], "lowest": min(line)})
    columns = ["first", "second", "accuracy", "and", "lowest", "barrier", "loss_barrier"]
    table(rows, columns, loss_barrier="of the loss")
    for kind, deviation in result["deviations"].items():
        say(f"  deviation of the accuracies of {kind}: {100 * deviation:.2f} %")


@verb(analyze, None, f"maskpack analyze similarity ./a ./b c.safetensors {SHARED} --limit 1024")
def similarity(refs: NetworkRefs, base: AnyBase, measured: Measured, trust: Trust, per: Per = "block") -> None:
    """Compare every two networks: linear CKA layer by layer, distance of parameters, of masks also in bits."""
    evaluations, networks, initial = measured.open(refs, base, trust)
    from maskpack.lab.pairs import LEAST

    groups = lab.grouped(evaluations.module, per)
    with progress_bar("comparing") as moved:
        result = lab.similarities(evaluations, networks, groups, moved)
    result["distances"] = lab.distances(networks, groups, initial)
    if result["examples"] < LEAST:
        note(f"Note: CKA of {result['examples']} examples; of fewer than {LEAST} it comes out too high.")
    draw(lab.similarity_figure, measured.plot, result["layers"], result["pairs"])
    print_whole(result)
    shown = {f"{pair['first']}, {pair['second']}": pair["cka"] for pair in result["pairs"]}
    layers = enumerate(result["layers"])
    rows: list[dict[str, Any]] = [{"CKA": name, **{one: cka[at] for one, cka in shown.items()}} for at, name in layers]
    table(rows, ["CKA", *shown], **{one: one for one in shown})
    say("")
    rows = []
    for row in result["distances"]:
        masks = {"hamming": None, "weighted": None, **row.get("masks", {})}
        rows.append({"networks": f"{row['first']}, {row['second']}", **masks, **row["parameters"]})
    titles = {"relative": "by the backbone's norm", "hamming": "mask bits that differ"}
    table(rows, ["networks", "distance", "relative", "hamming", "weighted"], **titles)


@verb(analyze, None, f"maskpack analyze mistakes ./a ./b {SHARED} --json")
def mistakes(refs: NetworkRefs, base: AnyBase, measured: Measured, trust: Trust) -> None:
    """Compare what every two networks get wrong: overlap of errors, and Cohen's kappa."""
    evaluations, networks, _ = measured.open(refs, base, trust)
    with progress_bar("measuring") as moved:
        result = lab.mistakes(evaluations, networks, moved)
    draw(lab.mistakes_figure, measured.plot, [one.name for one in networks], result["pairs"])
    print_whole(result)
    table(result["networks"], ["network", "accuracy"])
    say("")
    table(result["pairs"], ["first", "second", "both", "only_first", "only_second", "overlap", "kappa"])


# --- pictures --------------------------------------------------------------------------------------------------------

Refs = Annotated[tuple[str, ...], "Adapters, each as REF or NAME=REF.", ARGUMENT]
Results = Annotated[Path, "JSON file with a list of rows under the key `rows`.", ARGUMENT]
Written = Annotated[Path, "The picture to write: .png or .svg."]
Curves = dict[str, list[tuple[float, float, float | None]]]


def picture(example: str, name: str | None = None) -> Callable[..., Any]:
    """Decorator: make a verb of `plot` of a function that returns a figure; it gets the option --output."""

    def decorate(function: "Callable[..., Figure]") -> "Callable[..., Figure]":
        def run(output: Path, **values: Any) -> None:

            check_picture(output)
            lab.save_figure(function(**values), output)
            emit({"file": str(output), "bytes": output.stat().st_size}, f"✓ {output}")

        output = inspect.Parameter("output", inspect.Parameter.KEYWORD_ONLY, annotation=Written)
        own = [one.replace(kind=one.KEYWORD_ONLY) for one in inspect.signature(function).parameters.values()]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature([*own, output])  # type: ignore[attr-defined]
        verb(plot, None, f"maskpack plot {example}", name=name)(run)
        return function

    return decorate


@picture("density labels=./a labels=./b none=./c --output density.svg")
def density(refs: Refs, token: Token = None) -> "Figure":
    """Density per layer; adapters of the same NAME are one series, with mean and deviation."""
    from maskpack.adapter.card import parameter_densities
    from maskpack.lab.figure import label

    groups: dict[str, list[dict[str, float]]] = {}
    totals: list[str] = []
    for name, adapter, one in _sets(refs, token, lambda ref: ""):
        described = maskpack.inspect_adapter(adapter)["sets"][one]
        groups.setdefault(name or "adapters", []).append(dict(parameter_densities(described)))
        totals.append(f"{adapter.base.id}: {described['kept']:,} of {described['weights']:,} weights kept")
    figure = lab.density_figure(groups)
    if len(totals) == 1:
        figure.suptitle(label(totals[0], 100), fontsize="medium")
    return figure


@picture("scores ./mask --output scores.png")
def scores(run: Annotated[Path, "Folder of a training run, or of the adapter that it wrote.", ARGUMENT]) -> "Figure":
    """Histogram of the scores in a run's last checkpoint: of all, and layer by layer."""
    from maskpack.training.methods.base import build_method
    from maskpack.training.run_folder import FILE, load_checkpoint
    from maskpack.training.scores import scores_among

    found = next((place for place in (run / FILE, run / "training" / FILE) if place.is_file()), None)
    if found is None:
        raise StateError(f"there is no {FILE} in {run} or in {run / 'training'}; give the folder of a training run")
    tensors, facts = load_checkpoint(found)
    config = facts["run"]["config"]
    method = build_method(config["method"], config["method_options"])
    return lab.score_figure(scores_among(tensors), getattr(method, "threshold", None))


@picture("overlap ./a ./b ./c --output overlap.svg")
def overlap(refs: Refs, base: PackedBase, token: Token = None) -> "Figure":
    """How much masks agree, pair by pair: as a share of the weights, and beyond chance."""
    return lab.overlap_figure(_masks(refs, base, token))


@picture("features ./many/flowers ./many/digits --output features.svg")
def features(refs: Refs, base: PackedBase, token: Token = None) -> "Figure":
    """How many of several tasks use each weight, layer by layer: what is shared, and what is a task's own."""
    from maskpack.lab.pictures import users

    return lab.feature_figure(users(_masks(refs, base, token)))


@picture("gates ./many --output gates.svg")
def gates(
    run: Annotated[Path, "Folder of `maskpack multitask --mode gated`, or histograms.json in it.", ARGUMENT],
) -> "Figure":
    """Histograms of the gates and the effective weights of each task over time."""
    file = run if run.suffix == ".json" else run / "training" / "jointly" / "histograms.json"
    return lab.gate_figure(_read(file, ["rows"], "expected the histograms.json of a gated run; give its output folder"))


@picture("bytes results.json --output bytes.svg", name="bytes")
def accuracy_bytes(results: Results) -> "Figure":
    """Accuracy against bytes, from rows with `method`, `bytes`, `accuracy` and perhaps `deviation`.

    Of a method with several `labels_fraction` the greatest is drawn.
    """
    return lab.bytes_figure(_curves(results, "bytes", most_labels=True))


@picture("labels results.json --output labels.svg")
def labels(results: Results) -> "Figure":
    """Few-label curves, from rows with `method`, `labels_fraction`, `accuracy` and perhaps `deviation`."""
    return lab.label_figure(_curves(results, "labels_fraction"))


@picture("clusters clusters.json --output clusters.png")
def clusters(file: Annotated[Path, "JSON file with `points`, pairs of numbers, and `expert`.", ARGUMENT]) -> "Figure":
    """Which expert a cascade's router gives each sample to."""
    return lab.cluster_figure(*_members(file, "points", "expert"))


@picture("confusion eval.json --output confusion.svg")
def confusion(
    file: Annotated[Path, "JSON file with `confusion`, rows of counts, and `class_names`.", ARGUMENT],
) -> "Figure":
    """Which classes are taken for which; `maskpack eval --json` prints the file."""
    from maskpack.lab.figure import label

    figure = lab.confusion_figure(*_members(file, "confusion", "class_names"))
    found = _read(file, (), "")
    if isinstance(found.get("data"), str):
        figure.suptitle(label(f"{found['data']}, {found.get('split', 'test')} split"), fontsize="medium")
    return figure


def _sets(
    refs: tuple[str, ...], token: str | None, unnamed: Callable[[str], str]
) -> "Iterator[tuple[str, maskpack.Adapter, str]]":
    """Give (name, adapter, mask set) of every mask set of adapters given as REF or NAME=REF."""
    for given in refs:
        name, ref = named(given, unnamed(given))
        adapter = maskpack.load_adapter(ref, token=token)
        for one in adapter.sets:
            yield name if len(adapter.sets) == 1 else f"{name} {one}".strip(), adapter, one


def _masks(refs: tuple[str, ...], base: PackedBase, token: str | None) -> "dict[str, maskpack.MaskSet]":
    """Return the mask sets of adapters by name, decoded."""
    model: Any = None
    masks: dict[str, maskpack.MaskSet] = {}
    for name, adapter, one in _sets(refs, token, file_name):
        if name in masks:
            raise ConfigError(f"two masks would be called {name!r}; name the adapters, as in first=REF second=REF")
        model = base.model_of(adapter) if model is None else model
        masks[name] = adapter.parts(one, model).masks
    return masks


def _read(file: Path, keys: Iterable[str], expected: str) -> dict[str, Any]:
    """Return the object in a JSON file, which must have these keys."""
    from maskpack.training.run_folder import read_json

    if not file.is_file():
        raise DataError(f"there is no file {file}; {expected}")
    return read_json(file, frozenset(keys), expected)


def _members(file: Path, *keys: str) -> list[Any]:
    """Return these members, all of them lists, of the JSON object in a file."""
    expected = f"expected an object with the lists {' and '.join(keys)}"
    found = _read(file, {*keys} - {"confusion"}, expected)
    if "confusion" in keys and "confusion" not in found:
        match found.get("features"):  # of `maskpack eval --json` with k-NN or a probe
            case [{"confusion": counts}]:
                found["confusion"] = counts
            case [_, _, *_]:
                raise DataError(f"{file} has several measures; print it with --knn or --probe alone, of one share")
    for key in keys:
        if not isinstance(found.get(key), list):
            raise DataError(f"{file} has no list {key!r}; {expected}")
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
