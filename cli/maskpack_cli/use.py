"""maskpack predict | generate | export | serve-switch | eval: an adapter on its backbone."""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import maskpack
from maskpack import training
from maskpack.errors import ConfigError, DataError

from .console import app, emit, hint, note, progress_bar, reading, say, table
from .options import (
    ARGUMENT,
    POSITIVE,
    AnyBase,
    Base,
    BatchSize,
    Columns,
    DataRef,
    Mode,
    Overwrite,
    Ref,
    Source,
    Without,
    check_free,
    verb,
)

if TYPE_CHECKING:
    from maskpack.training.features import Measure

use_verb = partial(verb, app, "Use")
DATA = typer.Option(rich_help_panel="Data")
Files = Annotated[
    tuple[str, ...],
    "Images or folders of images; for text adapters, files with one text a line; - reads such lines, or the names of "
    "images, from stdin.",
    ARGUMENT,
]
Texts = Annotated[tuple[str, ...], "A text itself, for text adapters.", typer.Option("--text")]
AT_ONCE = 64  # inputs of a batch
TITLES = {"head": "head", "knn": "k-NN", "probe": "probe"}


@use_verb(
    "maskpack predict user/mask-flowers a.jpg b.jpg ./more-images",
    "maskpack predict user/mask-banking77 --text 'My card was declined'",
    "cut -f 2 questions.tsv | maskpack predict user/mask-banking77 - --json",
)
def predict(ref: Ref, base: Base, trust: Source, files: Files = (), text: Texts = (), mode: Mode = "target") -> None:
    """Classify images or texts with an adapter."""
    from maskpack.training.evaluate import source_classes

    adapter = trust.load(ref)
    if adapter.cascade is not None and mode != "target":
        raise ConfigError(f"--mode is for adapters of `maskpack transfer`, and {ref} is a cascade; leave it out")
    inputs = _inputs(files, text, (adapter.about.preprocess or {}).get("kind") == "text")
    backbone = base.loaded(adapter, mode=mode) if adapter.cascade is None else base.of(adapter)
    together = None if adapter.cascade is None else maskpack.load_cascade(backbone.model, adapter)
    hint(f"Adapter: {adapter.pinned}")
    if together is None:
        names = source_classes(adapter) if mode == "source" else None
        run: Callable[..., list[Any]] = partial(adapter.predict, backbone.model, class_names=names)
    else:
        run = together.predict
    found: list[Any] = []
    with progress_bar("predicting", percent=False) as moved:
        for start in range(0, len(inputs), AT_ONCE):
            found += run(inputs[start : start + AT_ONCE], tokenizer=backbone.tokenizer)
            moved(len(found), len(inputs))
    rows = [{"input": x, "label": one.label, "score": one.score} for x, one in zip(inputs, found, strict=True)]
    emit({"predictions": rows})
    table(rows, ["input", "label", "score"])


def _inputs(files: tuple[str, ...], texts: tuple[str, ...], are_texts: bool) -> list[str]:
    """Return the texts, or the names of the images, that the arguments stand for."""
    from maskpack.preprocess import IMAGE_ENDINGS

    if texts and not are_texts:
        raise ConfigError("--text is for adapters of texts, and this one is for images; give image files")
    found = list(texts)
    for name in files:
        path = Path(name)
        if name == "-" or (are_texts and path.is_file()):
            try:
                content = sys.stdin.read() if name == "-" else path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {name!r}: {error}; give text in UTF-8, a line each") from None
            found += [line for line in content.splitlines() if line.strip()]
        elif not path.exists():
            more = "; a text itself is given by --text" if are_texts else ""
            raise DataError(f"there is no file {name!r}; give files that are there, or - for stdin{more}")
        elif path.is_dir() and are_texts:
            raise DataError(f"{name!r} is a folder; give files with one text a line")
        elif path.is_dir():
            found += sorted(str(one) for one in path.rglob("*") if one.suffix.lower() in IMAGE_ENDINGS)
        else:
            found.append(name)
    if not found:
        raise DataError("nothing to classify: what was given has no image or line; name files, or - for stdin")
    return found


@use_verb('maskpack generate user/mask-chats --prompt "What is the capital of France?"')
def generate(
    ref: Ref,
    prompt: Annotated[tuple[str, ...], "What the text begins with, or what a user says to a chat."],
    base: Base,
    trust: Source,
    tokens: Annotated[int, "New tokens, at most.", POSITIVE] = 256,
    temperature: Annotated[float, "0: the most likely token each time; else sampled at this temperature."] = 0.0,
    seed: Annotated[int, "Of what is sampled."] = 0,
) -> None:
    """Generate text with a language model that has an adapter loaded."""
    import torch

    adapter = trust.load(ref)
    backbone = base.loaded(adapter)
    hint(f"Adapter: {adapter.pinned}")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"tokenizer": backbone.tokenizer, "tokens": tokens, "temperature": temperature}
    with progress_bar("generating, tokens", percent=False) as moved:
        texts = adapter.generate(backbone.model, prompt, progress=moved, **options)
    emit({"generated": [{"prompt": one, "text": text} for one, text in zip(prompt, texts, strict=True)]})
    say(*texts)


@use_verb("maskpack export user/mask-flowers --output flowers.safetensors")
def export(
    ref: Ref,
    output: Annotated[Path, "The .safetensors file to write."],
    base: Base,
    trust: Source,
    overwrite: Overwrite = False,
) -> None:
    """Write the masked dense model as a safetensors state dict, for tools that know nothing of masks."""
    import torch

    from maskpack.backbone.load import export_state
    from maskpack.backbone.model import CASTS

    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output} must end in .safetensors, which is the format that is written")
    check_free(output, overwrite)
    adapter = trust.load(ref)
    backbone = base.loaded(adapter)
    dtype = (
        getattr(torch, adapter.base.dtype) if adapter.base.dtype in CASTS else None
    )  # the file's, of a base that was loaded in float32 in any case
    count = export_state(output, backbone.model, {"maskpack_mask_id": adapter.mask_id}, dtype)
    hint(f"Adapter: {adapter.pinned}")
    hint("The weights are in the file whole: it is as large as the backbone.")
    emit({"file": str(output), "tensors": count, "bytes": output.stat().st_size}, f"✓ {output}")


@use_verb(
    "maskpack serve-switch http://localhost:8000 user/mask-chat",
    "maskpack serve-switch http://localhost:8000 ./patch --in-flight hold",
    "maskpack serve-switch http://localhost:8000 --off",
)
def serve_switch(
    url: Annotated[str, "Of the vLLM server.", ARGUMENT],
    trust: Annotated[Source, Without("token")],
    ref: Annotated[str | None, "As for inspect; a path is the server's.", ARGUMENT] = None,
    off: Annotated[bool, "Take the adapter off."] = False,
    in_flight: Annotated[
        Literal["finish", "hold", "abort"],
        "What is being answered ends on the old weights first, goes on with the new ones, or is ended.",
    ] = "finish",
) -> None:
    """Switch the adapter of a running vLLM server, or take it off."""
    from maskpack.runtime.serve import switch_server

    if (ref is None) != off:
        raise ConfigError("give the adapter to switch to, or --off to take off the one that is on; one of the two")
    done = switch_server(url, ref, in_flight=in_flight, **vars(trust))
    seconds = {name: round(value, 3) for name, value in asdict(done).items() if name.endswith("_s")}
    emit(asdict(done), f"✓ {done.ref or 'base'}, after a pause of {done.pause_s * 1000:.0f} ms", seconds)


@use_verb(
    "maskpack eval user/mask-flowers --data ./flowers",
    "maskpack eval ./mask --data ./flowers --knn --probe --labels-fraction 1 --labels-fraction 0.01",
    "maskpack eval --backbone timm/resnet18.a1_in1k --data ./flowers --probe --json",
    name="eval",
)
def evaluate(
    data: DataRef,
    columns: Columns,
    base: AnyBase,
    trust: Source,
    ref: Annotated[str | None, "As for inspect. Default: none, --backbone alone.", ARGUMENT] = None,
    knn: Annotated[bool, "k-NN on the features: k 200, temperature 0.1, cosine."] = False,
    probe: Annotated[bool, "Linear probe on the features."] = False,
    labels_fraction: Annotated[tuple[float, ...], "Share of the training rows for k-NN and probe. Default: 1."] = (),
    mode: Mode = "target",
    split: Annotated[Literal["test", "train"], "train is for the head."] = "test",
    answers: Annotated[
        int | None,
        "Of a language model: also generate answers to so many prompts, and count those whose last number is right.",
        POSITIVE,
    ] = None,
    batch_size: BatchSize = 64,
) -> None:
    """Measure an adapter on a data set (accuracy, perplexity), and features of an adapter or of a backbone alone."""
    from maskpack.training.evaluate import figures, source_classes

    wanted: dict[Measure, bool] = {"knn": knn, "probe": probe}
    measures = [name for name, is_wanted in wanted.items() if is_wanted]
    if measures and split == "train":
        raise ConfigError("--knn and --probe learn from the train split, so they are measured on the test split only")
    if any(not 0 < share <= 1 for share in labels_fraction):
        given = ", ".join(map(str, labels_fraction))
        raise ConfigError(f"--labels-fraction must be above 0 and at most 1, got {given}")
    if labels_fraction and not measures:
        raise ConfigError("--labels-fraction is for --knn and --probe")
    base.check(ref is None, "nothing to measure; give an adapter, or --backbone to measure its features without a mask")
    if ref is None:
        if not measures:
            raise ConfigError("a backbone alone has no head for these data; give --knn, --probe or both")
        if mode != "target":
            raise ConfigError("--mode is for an adapter, a backbone alone has one network; leave it out")
    adapter = None if ref is None else trust.load(ref)
    model = base.of_any(adapter)
    names = None
    if adapter is not None:
        names = source_classes(adapter) if mode == "source" else adapter.about.class_names
    read = training.load_data(data, class_names=names, task=model.task, **vars(columns))
    asked: dict[str, Any] = {"mode": mode, "split": split, "measures": measures, "shares": labels_fraction}
    note("Evaluating …")
    with reading("evaluating, batches"):
        result = figures(model, adapter, read, **asked, answers=answers, batch_size=batch_size)
    if adapter is not None:
        base.remember(adapter)
    emit(result, f"✓ {adapter.pinned if adapter is not None else model.id}")
    tables(result)


@use_verb(
    "maskpack report user/mask-flowers",
    "maskpack report ./mask --data ./flowers --output flowers.html",
    name="report",
)
def write_report(
    ref: Ref,
    base: Base,
    columns: Columns,
    trust: Source,
    data: Annotated[str | None, "Measure the test split, and show examples: as for eval.", DATA] = None,
    output: Annotated[Path | None, "The .html file to write. Default: the adapter's name, here."] = None,
    overwrite: Overwrite = False,
    examples: Annotated[int, "How many examples to show.", typer.Option(min=0, rich_help_panel="Data")] = 24,
    batch_size: BatchSize = 64,
) -> None:
    """Write all that is known of an adapter as one HTML file, to be opened or sent as it is."""
    from maskpack import lab
    from maskpack.adapter.signature import describe_signature
    from maskpack.hub.pull import open_adapter
    from maskpack.safetensors_io import write_file

    file = output or Path(f"{Path(ref.partition('@')[0]).name.removesuffix('.safetensors') or 'adapter'}.html")
    if file.suffix != ".html":
        raise ConfigError(f"{file} ends in {file.suffix!r}, expected .html; give the report this ending")
    check_free(file, overwrite)
    opened = open_adapter(ref, **vars(trust))
    adapter, read = opened.adapter, None
    if data is not None:
        read = training.load_data(data, class_names=adapter.about.class_names, **vars(columns))
    backbone = base.of(adapter) if data is not None or base.backbone is not None else None
    note(f"Verifying {adapter.pinned}{'' if read is None else ' and measuring its test split'} …")
    signature = describe_signature(opened.contents, opened.signed)
    options: dict[str, Any] = {"examples": examples, "signature": signature, "batch_size": batch_size}
    with nullcontext() if read is None else reading("evaluating, batches"):
        page = lab.adapter_report(adapter, backbone=backbone, data=read, **options)
    write_file(file, page)
    emit({"file": str(file), "bytes": file.stat().st_size}, f"✓ {file}")


def tables(result: Mapping[str, Any]) -> None:
    """Print a line for each measure of features, and one for each class."""
    if not result["class_names"] or not result.keys() & {"per_class", "features"}:
        return
    features = [{**one, "measure": TITLES[one["measure"]]} for one in result.get("features", [])]
    if features:
        say("")
        table(features, ["measure", "labels_fraction", "labels", "accuracy"])
    columns = {TITLES["head"]: result} if "per_class" in result else {}
    several = len({one["labels_fraction"] for one in features}) > 1
    columns |= {one["measure"] + (f" ({one['labels']:,})" if several else ""): one for one in features}
    counts = [sum(row) for row in next(iter(columns.values()))["confusion"]]
    say("")
    rows = [
        {"class": name, "examples": count, **{title: one["per_class"][at] for title, one in columns.items()}}
        for at, (name, count) in enumerate(zip(result["class_names"], counts, strict=False))
    ]
    table(rows, ["class", "examples", *columns])
