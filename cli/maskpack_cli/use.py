"""maskpack predict | export | eval: an adapter on its backbone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from maskpack.errors import ConfigError, DataError

from .console import app, emit, hint, note, say, table
from .options import Base, BatchSize, Columns, DataRef, Mode, Ref, Revision, Trust, verb

if TYPE_CHECKING:
    from maskpack.backbone.load import Backbone
    from maskpack.training.data.base import Data, Examples
    from maskpack.training.features import Measure

PANEL = "Use"
TITLES = {"head": "head", "knn": "k-NN", "probe": "probe"}


def on_gpu(backbone: "Backbone") -> "Backbone":
    """Move a backbone, before anything is loaded into it, to the GPU where there is one and training would use it."""
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    if torch.cuda.is_available() and not on_cpu:
        backbone.model.cuda()
    return backbone


@verb(app, "maskpack predict user/mask-flowers a.jpg b.jpg", panel=PANEL)
def predict(
    ref: Ref,
    files: Annotated[
        list[str], typer.Argument(help="Image files; for text adapters, text files with one text a line.")
    ],
    base: Base,
    trust: Trust,
    revision: Revision = None,
    mode: Mode = "target",
) -> None:
    """Classify files with an adapter."""
    from maskpack import load_cascade, load_mask
    from maskpack.training.evaluate import source_classes

    adapter = trust.load(ref, revision)
    if adapter.cascade is not None and mode != "target":
        raise ConfigError(f"--mode is for adapters of `maskpack transfer`, and {ref} is a cascade; leave it out")
    backbone = on_gpu(base.of(adapter))
    together = None if adapter.cascade is None else load_cascade(backbone.model, adapter)
    if together is None:
        load_mask(backbone.model, adapter, mode=mode)
    inputs = files
    if adapter.about.task == "text-classification":
        inputs = []
        for file in files:
            try:
                inputs += [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read the text file {file!r}: {error}") from None
    hint(f"Adapter: {adapter.pinned}")
    if together is None:
        names = source_classes(adapter) if mode == "source" else None
        found = adapter.predict(backbone.model, inputs, class_names=names, tokenizer=backbone.tokenizer)
    else:
        found = together.predict(inputs, tokenizer=backbone.tokenizer)
    columns = ["input", "label", "score"]
    rows: list[list[Any]] = [[x, one.label, one.score] for x, one in zip(inputs, found, strict=True)]
    emit({"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}, shown={})
    table(columns, rows)


@verb(app, "maskpack export user/mask-flowers --output flowers.safetensors", panel=PANEL)
def export(
    ref: Ref,
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    base: Base,
    trust: Trust,
    revision: Revision = None,
) -> None:
    """Write the masked dense model as a safetensors state dict, for tools that know nothing of masks."""
    from maskpack import load_mask
    from maskpack.backbone.load import export_state

    adapter = trust.load(ref, revision)
    backbone = on_gpu(base.of(adapter))
    load_mask(backbone.model, adapter)
    count = export_state(output, backbone.model, {"maskpack_mask_id": adapter.mask_id})
    hint(f"Adapter: {adapter.pinned}")
    hint("The weights are in the file whole: it is as large as the backbone.")
    emit({"file": str(output), "tensors": count, "bytes": output.stat().st_size}, f"✓ {output}")


@verb(
    app,
    "maskpack eval user/mask-flowers --data ./flowers",
    "maskpack eval ./mask --data ./flowers --knn --probe --labels-fraction 1 --labels-fraction 0.01",
    "maskpack eval --backbone timm/resnet18.a1_in1k --data ./flowers --probe --json",
    name="eval",
    panel=PANEL,
)
def evaluate(
    data: DataRef,
    columns: Columns,
    base: Base,
    trust: Trust,
    ref: Annotated[
        str | None,
        typer.Argument(help="As for inspect. Default: none, --backbone alone."),
    ] = None,
    revision: Revision = None,
    head: Annotated[
        str | None, typer.Option(help="For --backbone alone: module before which features are read.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="For --backbone alone: pixels.")] = None,
    knn: Annotated[bool, typer.Option("--knn", help="k-NN on the features: k 200, temperature 0.1, cosine.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Linear probe on the features.")] = False,
    labels_fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share of the training rows for k-NN and probe; may be repeated. Default: 1."),
    ] = None,
    mode: Mode = "target",
    split: Annotated[Literal["test", "train"], typer.Option(help="train is for the head.")] = "test",
    batch_size: BatchSize = 64,
) -> None:
    """Measure an adapter's accuracy on a data set, and the features of an adapter or of a backbone alone."""
    from maskpack import load_backbone, load_mask
    from maskpack.training import load_data
    from maskpack.training.evaluate import adapter_accuracy, as_loaded, source_classes
    from maskpack.training.features import measure_features

    wanted: dict[Measure, bool] = {"knn": knn, "probe": probe}
    measures = [name for name, is_wanted in wanted.items() if is_wanted]
    _check_features(bool(measures), split, labels_fraction)
    adapter, names = None, None
    if ref is None:
        if base.backbone is None:
            raise ConfigError(
                "nothing to measure; give an adapter, or --backbone to measure its features without a mask"
            )
        if not measures:
            raise ConfigError("a backbone alone has no head for these data; give --knn, --probe or both")
        if mode != "target":
            raise ConfigError("--mode is for an adapter, a backbone alone has one network; leave it out")
        options: dict[str, Any] = {"weights": base.weights, "random_weights": base.random_weights}
        model = on_gpu(load_backbone(base.backbone, head=head, image_size=image_size, **options))
    else:
        if head is not None or image_size is not None:
            raise ConfigError("--head and --image-size are for a backbone alone; an adapter has its own")
        adapter = trust.load(ref, revision)
        backbone = on_gpu(base.of(adapter))
        load_mask(backbone.model, adapter, mode=mode)
        model = as_loaded(backbone, adapter)
        names = source_classes(adapter) if mode == "source" else adapter.about.class_names
    read = load_data(data, class_names=names, **vars(columns))
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
        note(f"Evaluating {len(rows):,} examples …")
        result |= adapter_accuracy(model.model, adapter, rows, tokenizer=model.tokenizer, batch_size=batch_size)
    if measures:
        note("Computing the features of the training and the test rows …")
        shares = labels_fraction or [1.0]
        result["features"] = measure_features(model, read, measures, shares, batch_size=batch_size)
        result.setdefault("unreadable", len(_split(read, split).unreadable))
    emit(result, f"✓ {adapter.pinned if adapter is not None else model.id}")
    _tables(result)


def _check_features(measures: bool, split: str, shares: Sequence[float] | None) -> None:
    """Refuse options of k-NN and probe that contradict each other, before anything is loaded."""
    if measures and split == "train":
        raise ConfigError("--knn and --probe learn from the train split, so they are measured on the test split only")
    if any(not 0 < share <= 1 for share in shares or ()):
        raise ConfigError(f"--labels-fraction must be above 0 and at most 1, got {', '.join(map(str, shares or ()))}")
    if shares and not measures:
        raise ConfigError("--labels-fraction is for --knn and --probe")


def _split(data: "Data", name: str) -> "Examples":
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
