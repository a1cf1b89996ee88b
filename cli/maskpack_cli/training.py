"""maskpack train."""

import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .adapters import PROFILES, Profile, RandomWeights
from .console import Json, Quiet, command, emit, examples, main_process, note, quiet_libraries
from .progress import Progress
from .settings import DATA, OWN, read_settings, take

if TYPE_CHECKING:
    from maskpack.backbone.load import Backbone
    from maskpack.training.config import TrainConfig
    from maskpack.training.data.base import Data

PANEL = {"backbone": "Backbone", "data": "Data", "mask": "Mask", "training": "Training", "run": "Run"}
OF_LABELS = ("head_kind", "head_template", "label_smoothing")  # settings without meaning without labels
RUN_FOLDER = "training"  # inside the output folder: checkpoint and logs, never pushed


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL[panel])


EPILOG = examples(
    "maskpack train --backbone timm/resnet18.a1_in1k --data ./flowers --output ./mask-flowers",
    "maskpack train --backbone hf/sentence-transformers/all-MiniLM-L6-v2 --data PolyAI/banking77 "
    "--epochs 4 --label-smoothing 0.05 --output ./mask-banking77",
    "maskpack train --config run.toml --resume",
)


def train(
    backbone: Annotated[
        str | None, _option("backbone", "timm/NAME, torchvision/NAME, hf/REPO, hf/FOLDER or PATH.py:FUNCTION.")
    ] = None,
    weights: Annotated[
        Path | None, _option("backbone", "Safetensors state dict, loaded strictly: file, index or folder.")
    ] = None,
    random_weights: RandomWeights = None,
    head: Annotated[str | None, _option("backbone", "Module that gives the logits, where it is not found.")] = None,
    image_size: Annotated[int | None, _option("backbone", "Pixels. (default: the backbone's)")] = None,
    mean: Annotated[
        str | None, _option("backbone", "Three numbers joined by commas. (default: the backbone's)")
    ] = None,
    std: Annotated[str | None, _option("backbone", "Three numbers joined by commas. (default: the backbone's)")] = None,
    data: Annotated[str | None, _option("data", "Hub data set, folder (parquet, csv, images), or digits:0-9.")] = None,
    input_column: Annotated[str | None, _option("data", "Column of images or texts, where it is not found.")] = None,
    label_column: Annotated[str | None, _option("data", "Column of labels, where it is not found.")] = None,
    labels_fraction: Annotated[float | None, _option("data", "Share of the training rows to use. (default: 1)")] = None,
    validation_fraction: Annotated[
        float | None, _option("data", "Share of the training rows held out. (default: 0.1; 0 without labels)")
    ] = None,
    augment: Annotated[
        str | None, _option("data", "none, crop, flip or crop-flip, for images. (default: crop-flip)")
    ] = None,
    method: Annotated[str | None, _option("mask", "How scores become a mask: `maskpack list methods`.")] = None,
    method_option: Annotated[
        list[str] | None, _option("mask", "KEY=VALUE for the method; may be repeated.", "--method-option")
    ] = None,
    objective: Annotated[
        str | None, _option("mask", "supervised or self-supervised: `maskpack list objectives`. (default: supervised)")
    ] = None,
    objective_option: Annotated[
        list[str] | None, _option("mask", "KEY=VALUE for the objective; may be repeated.", "--objective-option")
    ] = None,
    include: Annotated[list[str] | None, _option("mask", "Glob of parameters to mask; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, _option("mask", "Glob of parameters to leave out; may be repeated.")] = None,
    selective: Annotated[
        str | None,
        _option("mask", "Scores that learn: all, first:STAGES, random:SHARE or largest:SHARE. (default: all)"),
    ] = None,
    train: Annotated[
        list[str] | None, _option("mask", "Glob of norms or biases that learn themselves; may be repeated.", "--train")
    ] = None,
    scale: Annotated[
        bool | None, _option("mask", "Divide kept weights by sqrt(density). (default: off)", "--scale/--no-scale")
    ] = None,
    head_kind: Annotated[
        str | None,
        _option("mask", "linear (trained), masked (random, under a mask), text (CLIP) or own. (default: linear)"),
    ] = None,
    head_template: Annotated[
        str | None, _option("mask", "Of a text head. (default: This is a photo of a {label})")
    ] = None,
    bytes_budget: Annotated[
        str | None, _option("mask", "Most bytes of the masks, as in 200kB or 1.5MB. (default: no limit)")
    ] = None,
    rate: Annotated[float | None, _option("mask", "The same in bits a weight. (default: no limit)")] = None,
    bn: Annotated[str | None, _option("mask", "BatchNorm statistics: adapt or freeze. (default: adapt)")] = None,
    epochs: Annotated[int | None, _option("training", "Passes over the training rows. (default: 10)")] = None,
    steps: Annotated[int | None, _option("training", "Optimiser steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, _option("training", "Examples per forward pass. (default: 64)")] = None,
    accumulate: Annotated[int | None, _option("training", "Forward passes per step. (default: 1)")] = None,
    lr: Annotated[float | None, _option("training", "Peak rate of the scores. (default: 0.02; 50 for sgd)")] = None,
    head_lr: Annotated[float | None, _option("training", "Peak rate of the head. (default: 0.01; 0.1 for sgd)")] = None,
    optimizer: Annotated[str | None, _option("training", "adam or sgd (momentum 0.9). (default: adam)")] = None,
    schedule: Annotated[str | None, _option("training", "cosine or constant. (default: cosine)")] = None,
    warmup: Annotated[float | None, _option("training", "Share of the steps. (default: 0.1)")] = None,
    clip: Annotated[float | None, _option("training", "Largest gradient norm. (default: none)")] = None,
    label_smoothing: Annotated[float | None, _option("training", "From 0 to 1. (default: 0)")] = None,
    precision: Annotated[str | None, _option("training", "no, bf16 or fp16. (default: no)")] = None,
    workers: Annotated[int | None, _option("training", "Processes that read the data. (default: 0)")] = None,
    seed: Annotated[int | None, _option("training", "Of everything random. (default: 0)")] = None,
    output: Annotated[Path | None, _option("run", "Folder for the adapter, the checkpoint and the logs.")] = None,
    config: Annotated[
        Path | None, _option("run", "TOML file with these options as keys; the command line overrides it.")
    ] = None,
    profile: Annotated[Profile | None, _option("run", f"{PROFILES} (default: default)")] = None,
    checkpoint_every: Annotated[
        str | None, _option("run", "A time or steps, as in 10min or 500steps. (default: every epoch)")
    ] = None,
    resume: Annotated[bool, _option("run", "Continue from the last checkpoint in --output.", "--resume")] = False,
    dry_run: Annotated[bool, _option("run", "Check everything, run one batch, write nothing.", "--dry-run")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a mask on a frozen backbone and write it as an adapter."""
    given = {k: v for k, v in locals().items() if v is not None and v != [] and k not in OWN}
    _train(given, config, resume, dry_run, as_json, quiet)


def load_inputs(
    settings: dict[str, Any], quiet: bool, labelled: bool | None = None
) -> "tuple[Backbone, Data, TrainConfig]":
    """Take what settings name: backbone, data, and how to train; `labelled` as in `load_data`, None: if it must."""
    from maskpack import load_backbone
    from maskpack.training import load_data
    from maskpack.training.config import config_from

    reference, data_reference = settings.pop("backbone"), settings.pop("data")
    data_options = take(settings, *DATA)
    backbone_options = take(settings, "weights", "random_weights", "head", "image_size", "mean", "std")
    config = config_from(settings)
    note(f"Loading {reference} and {data_reference} …", quiet)
    backbone = load_backbone(reference, **backbone_options)
    needed = needs_labels(config.objective, backbone.task, settings)
    data_options.setdefault("validation_fraction", 0.1 if needed else 0.0)
    labelled = needed if labelled is None else labelled
    return backbone, load_data(data_reference, labelled=labelled, seed=config.seed, **data_options), config


def needs_labels(objective: str, task: str, settings: Collection[str]) -> bool:
    """Tell whether an objective learns from labels.

    Raises:
        ConfigError: if one of these settings, by name, means nothing to it.
    """
    from maskpack.errors import ConfigError
    from maskpack.training.objectives.base import find_objective

    cls = find_objective(objective, task)
    idle = [] if cls.needs_labels else [name for name in OF_LABELS if name in settings]
    idle += ["augment"] if "augment" in settings and not cls.augments else []
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"the objective {objective!r} takes no notice of {names}; leave out what is for labels")
    return cls.needs_labels


def _train(
    given: Mapping[str, Any], config: Path | None, resume: bool, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    quiet_libraries(quiet)
    from maskpack import inspect_adapter, save_adapter
    from maskpack.training import train_mask
    from maskpack.training.run_folder import check_untaken, parse_every
    from maskpack.training.trainer import plan_training

    settings = read_settings(train, given, config)
    output, profile = Path(settings.pop("output")), settings.pop("profile", "default")
    every = settings.pop("checkpoint_every", None)
    parse_every(every)
    check_untaken(output / RUN_FOLDER, resume)
    inputs = evaluated(output, settings)
    backbone, data, run_config = load_inputs(settings, quiet)
    plan = plan_training(backbone, data, run_config)
    describe_plan(plan, data, quiet)
    if dry_run:
        emit(plan, as_json, "Everything needed is there; nothing was trained or written.")
        return
    folder = output / RUN_FOLDER
    with Progress(quiet or as_json or not sys.stderr.isatty()) as report:
        result = train_mask(
            backbone, data, run_config, output=folder, resume=resume, checkpoint_every=every, report=report
        )
    if not main_process():
        return
    adapter = save_adapter(output, result.parts, result.base, result.about, profile=profile, weights=backbone.model)
    about = inspect_adapter(adapter)
    whole = about["sets"]["default"]
    unreadable = (result.about.training or {})["data"]["unreadable"]
    if unreadable:
        note(f"Warning: {unreadable} examples could not be read and were left out.")
    facts = {
        "adapter": str(output),
        **result.metrics,
        "weights": whole["weights"],
        "mask_bytes": whole["payload_bytes"],
        "bits_per_weight": whole["bits_per_weight"],
        "file_bytes": adapter.size,
    }
    emit(facts, as_json, f"✓ {output}")
    if not data.class_names:
        note(f"Next, if the data have labels: maskpack eval {inputs} --knn --probe", quiet or as_json)
    note(f"Next: maskpack push {reference(output)} USER/NAME", quiet or as_json)


def reference(output: Path) -> str:
    """Return what verbs take for the adapter in a folder."""
    return shlex.quote(str(output) if output.is_absolute() else f"./{output}")


def evaluated(output: Path, settings: Mapping[str, Any]) -> str:
    """Return the arguments with which `eval` measures the adapter in a folder on what it was trained with."""
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(settings[name]))}"
        for name in ("data", "backbone", "weights", "random_weights", "input_column", "label_column")
        if name in settings
    ]
    return " ".join([reference(output), *words])


def describe_plan(plan: Mapping[str, Any], data: "Data", quiet: bool) -> None:
    from maskpack.training.data.base import empty_classes

    note(
        f"Masking {plan['parameters']} parameters, {plan['weights']:,} weights; {plan['classes'] or 'no'} classes; "
        f"{plan['train']:,} rows to train, {plan['validation']:,} to validate, {plan['test']:,} to test; "
        f"{plan['steps']:,} steps",
        quiet,
    )
    assert data.train is not None
    empty = empty_classes(data.train, data.class_names)
    if empty:
        note(f"Warning: {len(empty)} classes have no training example: {', '.join(empty[:5])}", quiet)


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog=EPILOG)(command(train))
