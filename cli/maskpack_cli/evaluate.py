"""maskpack eval: what an adapter, or a backbone alone, is worth on a data set."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .adapters import RandomWeights, RequireRevision, RequireSignature, Revision, Weights
from .console import Json, Quiet, Token, command, emit, examples, note, quiet_libraries, say, table
from .use import BackboneOption, ModeOption, loaded, on_gpu

if TYPE_CHECKING:
    from maskpack.training.data.base import Data, Examples

TITLES = {"head": "head", "knn": "k-NN", "probe": "probe"}


def evaluate(
    data: Annotated[str, typer.Option(help="Hub data set, folder (parquet, csv, images), or digits:0-9.")],
    ref: Annotated[
        str | None,
        typer.Argument(
            help="user/name or user/name@revision, a folder, or a .safetensors file. (default: none, --backbone alone)"
        ),
    ] = None,
    backbone: BackboneOption = None,
    weights: Weights = None,
    random_weights: RandomWeights = None,
    head: Annotated[
        str | None, typer.Option(help="Module before which features are read. For --backbone alone.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels. For --backbone alone.")] = None,
    knn: Annotated[bool, typer.Option("--knn", help="k-NN on the features: k 200, temperature 0.1, cosine.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Linear probe on the features.")] = False,
    labels_fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share of the training rows for k-NN and probe; may be repeated. (default: 1)"),
    ] = None,
    mode: ModeOption = "target",
    split: Annotated[str, typer.Option(help="test, or train for the head.")] = "test",
    input_column: Annotated[str | None, typer.Option(help="Column of images or texts, where it is not found.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of labels, where it is not found.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 64,
    revision: Revision = None,
    require_revision: RequireRevision = False,
    require_signature: RequireSignature = None,
    token: Token = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure an adapter's accuracy on a data set, and the features of an adapter or of a backbone alone."""
    quiet_libraries(quiet)
    from maskpack import load_backbone
    from maskpack.training import load_data
    from maskpack.training.evaluate import adapter_accuracy, as_loaded, source_classes
    from maskpack.training.features import Measure, measure_features

    measures: list[Measure] = [*(["knn"] if knn else []), *(["probe"] if probe else [])]  # type: ignore[list-item]
    _check(ref, backbone, head, image_size, mode, split, bool(measures), labels_fraction)
    adapter = None
    if ref is not None:
        found, adapter = loaded(
            ref, revision, require_revision, require_signature, token, backbone, weights, random_weights, mode
        )
        model = as_loaded(found, adapter)
    else:
        assert backbone is not None
        model = on_gpu(
            load_backbone(backbone, weights=weights, random_weights=random_weights, head=head, image_size=image_size)
        )
    names = None if adapter is None else source_classes(adapter) if mode == "source" else adapter.about.class_names
    read = load_data(data, class_names=names, input_column=input_column, label_column=label_column)
    result: dict[str, Any] = {
        "adapter": adapter.pinned if adapter is not None else None,
        "backbone": model.id,
        "data": read.id,
        "split": split,
        "class_names": list(read.class_names),
    }
    own = adapter is not None and adapter.parts(stream=True).head is not None and adapter.about.preprocess is not None
    if adapter is not None and (own or not measures):  # without one this is the error that says so
        rows = _split(read, split)
        note(f"Evaluating {len(rows):,} examples …", quiet)
        result |= adapter_accuracy(model.model, adapter, rows, tokenizer=model.tokenizer, batch_size=batch_size)
    if measures:
        note("Computing the features of the training and the test rows …", quiet)
        shares = labels_fraction or [1.0]
        result["features"] = measure_features(model, read, measures, shares, batch_size=batch_size)
        result.setdefault("unreadable", len(_split(read, split).unreadable))
    emit(result, as_json, f"✓ {adapter.pinned if adapter is not None else model.id}")
    if not as_json:
        _tables(result)


def _check(
    ref: str | None,
    backbone: str | None,
    head: str | None,
    image_size: int | None,
    mode: str,
    split: str,
    measures: bool,
    shares: Sequence[float] | None,
) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    from maskpack.errors import ConfigError

    if ref is None and backbone is None:
        raise ConfigError("nothing to measure; give an adapter, or --backbone to measure its features without a mask")
    if ref is None and not measures:
        raise ConfigError("a backbone alone has no head for these data; give --knn, --probe or both")
    if ref is not None and (head is not None or image_size is not None):
        raise ConfigError("--head and --image-size are for a backbone alone; an adapter has its own")
    if ref is None and mode != "target":
        raise ConfigError("--mode is for an adapter, a backbone alone has one network; leave it out")
    if split not in ("test", "train"):
        raise ConfigError(f"--split must be test or train, got {split!r}")
    if measures and split == "train":
        raise ConfigError("--knn and --probe learn from the train split, so they are measured on the test split only")
    if any(not 0 < share <= 1 for share in shares or ()):
        raise ConfigError(f"--labels-fraction must be above 0 and at most 1, got {', '.join(map(str, shares or ()))}")
    if shares and not measures:
        raise ConfigError("--labels-fraction is for --knn and --probe")


def _split(data: "Data", name: str) -> "Examples":
    from maskpack.errors import DataError

    found = data.test if name == "test" else data.train
    if found is None:
        raise DataError(f"the data {data.id!r} have no {name} split; choose the other with --split")
    return found


def _tables(result: Mapping[str, Any]) -> None:
    """Print a line for each measure of features, and one for each class."""
    features = result.get("features", [])
    if features:
        say("")
        rows = [[TITLES[r["measure"]], r["labels_fraction"], r["labels"], r["accuracy"]] for r in features]
        table(["measure", "labels fraction", "labels", "accuracy"], rows)
    columns = [(TITLES["head"], result)] if "per_class" in result else []
    several = len({one["labels_fraction"] for one in features}) > 1
    columns += [(TITLES[r["measure"]] + (f" ({r['labels']:,})" if several else ""), r) for r in features]
    counts = [sum(row) for row in columns[0][1]["confusion"]]
    say("")
    by_class = zip(result["class_names"], counts, *(one["per_class"] for _, one in columns), strict=False)
    table(["class", "examples", *(title for title, _ in columns)], [list(row) for row in by_class])


def register(app: typer.Typer) -> None:
    """Add this file's verb."""
    app.command(
        "eval",
        epilog=examples(
            "maskpack eval user/mask-flowers --data ./flowers",
            "maskpack eval ./mask --data ./flowers --knn --probe --labels-fraction 1 --labels-fraction 0.01",
            "maskpack eval --backbone timm/resnet18.a1_in1k --data ./flowers --probe --json",
        ),
    )(command(evaluate))
