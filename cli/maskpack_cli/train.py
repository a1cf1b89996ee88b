"""maskpack train | cascade | transfer | multitask."""

import json
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import maskpack
from maskpack import training
from maskpack.errors import ConfigError
from maskpack.preprocess import Augment, TaskName
from maskpack.training.config import RECIPES, JointConfig, Mode, Start, TrainConfig, read_config

from .console import Output, app, emit, hint, main_process, note, reading, say, table, training_progress, warn
from .options import (
    OF_A_CALL,
    POSITIVE,
    Base,
    BatchSize,
    Columns,
    DataRef,
    Folder,
    Overwrite,
    Packed,
    Ref,
    Rows,
    Source,
    TrainedBackbone,
    Without,
    check_free,
    described,
    group,
    read_settings,
    reference,
    verb,
)

if TYPE_CHECKING:
    from maskpack.backbone.load import Backbone
    from maskpack.training.data.base import Data
    from maskpack.training.multitask import Task

training_verb = partial(verb, app, "Training")
OF_LABELS = ("head_kind", "head_template", "label_smoothing")  # settings without meaning without labels
RUN_FOLDER = "training"  # inside the output folder: checkpoint and logs, never pushed
NOTHING_DONE = "Everything needed is there; nothing was trained or written."
SHARED = "--backbone timm/resnet18.a1_in1k --data ./flowers"


@group("Run")
class Run(Folder, Packed):
    """Options for how a training runs."""

    checkpoint_every: Annotated[str | None, "A time or steps, as in 10min or 500steps. Default: every epoch."] = None
    resume: Annotated[bool, "Continue from the last checkpoint in --output."] = False
    overwrite: Annotated[bool, "Replace what an earlier training left in --output."] = False
    dry_run: Annotated[bool, "Check everything, run one batch, write nothing."] = False

    def check(self, settings: TrainConfig) -> None:
        """Refuse what is wrong before anything is loaded."""
        from maskpack.training.run_folder import parse_every

        parse_every(self.checkpoint_every)
        if self.overwrite and self.resume:
            raise ConfigError("--resume goes on with what --overwrite replaces; give one of them")
        check_free(self.output, self.overwrite or self.resume)
        if self.profile == "fast" and (settings.bytes_budget is not None or settings.rate is not None):
            raise ConfigError("--bytes-budget and --rate are for the profiles default and max, not for fast")

    def tell(self, text: str) -> None:
        """Say what is to be done: a note before a training, the result of a dry run."""
        say(text) if self.dry_run else note(text)

    @property
    def replaces(self) -> bool:
        """Whether the folder may hold an earlier training."""
        return self.resume or self.overwrite

    def begin(self, plan: Mapping[str, Any]) -> None:
        """End a dry run here, with its plan; else delete the checkpoints and logs that are to be replaced."""
        if self.dry_run:
            emit(plan, NOTHING_DONE, {})
            raise typer.Exit
        if self.overwrite and main_process():
            shutil.rmtree(self.output / RUN_FOLDER, ignore_errors=True)

    def train(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Return what a training function gives; of several processes all but the one that writes end here."""
        with training_progress() as report:
            own = {"resume": self.resume, "checkpoint_every": self.checkpoint_every, "report": report}
            result = function(*inputs, **{**own, **options})
        if not main_process():
            raise typer.Exit
        return result

    def save(
        self, result: Any, model: Any, backbone: TrainedBackbone | None = None, **options: Any
    ) -> "maskpack.Adapter":
        """Write what was trained as an adapter, and remember where its backbone is."""
        from maskpack.backbone.fingerprint import remember_backbone

        content = (result.parts, result.base, result.about)
        options |= {"profile": self.profile, "weights": model, "overwrite": True}
        adapter = maskpack.save_adapter(self.output, *content, **options)
        if backbone is not None:
            remember_backbone(result.base.digests["float32"], backbone.arguments())
        return adapter


def load_inputs(
    backbone: TrainedBackbone,
    data: str,
    rows: Rows,
    settings: TrainConfig,
    labelled: bool | None = None,
    **options: Any,
) -> "tuple[Backbone, Data]":
    """Load a backbone and data.

    Args:
        labelled: as in `load_data`, None: if the objective needs labels. options: of `load_backbone`.
    """
    note(f"Loading {backbone.backbone} and {data} …")
    loaded = backbone.load(**options)
    needed = needs_labels(settings.objective, loaded.task, Output.given)
    labelled = needed if labelled is None else labelled
    task = options.get("task") if labelled else None
    return loaded, rows.load(data, supervised=needed, labelled=labelled, seed=settings.seed, task=task)


def needs_labels(objective: str, task: str, given: Collection[str]) -> bool:
    """Return True if an objective learns from labels; refuse options given, by name, that mean nothing to it."""
    from maskpack.training.objectives.base import find_objective

    cls = find_objective(objective, task)
    idle = [] if cls.trains_head else [name for name in OF_LABELS if name in given]
    idle += ["augment"] if "augment" in given and not cls.augments else []
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"the objective {objective!r} does not use {names}; leave out what is for labels")
    return cls.needs_labels


def planned(backbone: "Backbone", data: "Data", settings: TrainConfig, tell: Callable[[str], None]) -> dict[str, Any]:
    """Check a training, run one batch, tell what is to be done, and return it."""
    from maskpack.training.data.base import empty_classes
    from maskpack.training.trainer import plan_training

    note("Trying one batch …")
    plan = plan_training(backbone, data, settings)
    tell(
        f"Masking {plan['parameters']} parameters, {plan['weights']:,} weights; {plan['classes'] or 'no'} classes; "
        f"{plan['train']:,} rows to train, {plan['validation']:,} to validate, {plan['test']:,} to test; "
        f"{plan['steps']:,} steps"
    )
    unit = "pixels" if plan["input"] == "image" else "tokens at most"
    tell(
        f"Inputs of {plan['size']} {unit}, batches of {settings.batch_size}, on {plan['device']}, precision "
        f"{'float32' if settings.precision == 'no' else settings.precision}; {plan['memory'] / 1e9:.2f} GB in one batch"
    )
    assert data.train is not None
    if empty := empty_classes(data.train, data.class_names):
        tell(f"Warning: {len(empty)} classes have no training example: {', '.join(empty[:5])}")
    return plan


def worth_of(adapter: "maskpack.Adapter") -> dict[str, Any]:
    """Return what a result says of an adapter's bytes beside those of LoRA, and what its training warned of."""
    record = adapter.about.training or {}
    beside = {f"lora_{name}_bytes": size for name, size in record["lora_bytes"].items()}
    return {**beside, "file_bytes": adapter.size, "warnings": record.get("warnings", [])}


def evaluated(output: Path, data: str, backbone: TrainedBackbone, rows: Rows) -> str:
    """Return the arguments with which `eval` measures the adapter in a folder on what it was trained with."""
    named = {"data": data, **asdict(backbone), **asdict(rows)}
    words = [
        f"--{name.replace('_', '-')} {shlex.quote(str(named[name]))}"
        for name in ("data", "backbone", "weights", "random_weights", "input_column", "label_column")
        if named[name] is not None
    ]
    return " ".join([shlex.quote(reference(output)), *words])


@training_verb(
    "maskpack train --backbone timm/resnet18.a1_in1k --data ./flowers --output ./mask-flowers",
    "maskpack train --backbone hf/sentence-transformers/all-MiniLM-L6-v2 --data PolyAI/banking77 "
    "--epochs 4 --label-smoothing 0.05 --output ./mask-banking77",
    "maskpack train --backbone timm/resnet18.a1_in1k --data ./flowers --auto 1000 --output ./mask-flowers",
    "maskpack train --task text-generation --backbone hf/HuggingFaceTB/SmolLM2-135M-Instruct --data ./chats.jsonl "
    "--output ./mask-chats",
    "maskpack train --config run.toml --resume",
)
def train(
    backbone: TrainedBackbone,
    data: DataRef,
    rows: Rows,
    settings: TrainConfig,
    run: Run,
    task: Annotated[
        TaskName | None,
        "What the adapter is for. text-generation also takes the settings of language models: see "
        "docs/language-models.md. Default: classification of images or texts, as the backbone is.",
        typer.Option(rich_help_panel="Training"),
    ] = None,
    tokens: Annotated[
        int | None,
        "Tokens of a text, at most, or of a block of texts. Default: 128; 512 for text-generation.",
        typer.Option(min=2, rich_help_panel="Data"),
    ] = None,
    auto: Annotated[
        int | None,
        "Optimiser steps of a search before the training, which chooses the settings that are left open by short runs "
        "on a fifth of the training rows.",
        typer.Option(min=1, rich_help_panel="Training"),
    ] = None,
) -> None:
    """Train a mask on a frozen backbone and write it as an adapter."""
    from maskpack.training.auto import SEARCH, check_search, in_words, plan_search
    from maskpack.training.objectives.supervised import TEACHER, Distill, train_teacher
    from maskpack.training.run_folder import FILE, check_untaken

    usual = RECIPES.get(task or "", {})
    settings = replace(settings, **{name: one for name, one in usual.items() if name not in Output.given})
    run.check(settings)
    folder = run.output / RUN_FOLDER
    check_untaken(folder, run.replaces) if auto is None else check_search(folder / SEARCH, run.replaces)
    loaded, read = load_inputs(backbone, data, rows, settings, task=task, tokens=tokens)
    taught = settings.objective == Distill.id and not settings.objective_options.get(TEACHER)
    learner = replace(settings, objective="supervised", objective_options={}) if taught else settings
    plan = planned(loaded, read, learner, run.tell)
    options: dict[str, Any] = {}
    if taught:
        plan["teacher_steps"] = plan["steps"]
        run.tell(f"Fine-tuning a teacher first: {plan['steps']:,} steps")
    if auto is not None:
        search, options = plan_search(loaded, read, learner, auto), {"search_steps": auto}
        plan |= {"search_steps": search.steps, "candidates": len(search.candidates)}
        run.tell(f"Searching for settings first: {len(search.candidates)} candidates, {search.steps:,} steps at most")
    run.begin(plan)
    if taught:
        teacher = run.train(train_teacher, loaded, read, settings, folder)
        settings = replace(settings, objective_options={**settings.objective_options, TEACHER: str(teacher)})
        if auto is None:
            options["resume"] = run.resume and (folder / FILE).exists()
    function = training.train_mask if auto is None else training.train_auto
    result = run.train(function, loaded, read, settings, output=folder, **options)
    adapter = run.save(result, loaded.model, backbone)
    if unreadable := result.about.training["data"]["unreadable"]:
        warn(f"{unreadable} examples could not be read and were left out.")
    whole = maskpack.inspect_adapter(adapter)["sets"]["default"]
    sizes = {"mask_bytes": whole["payload_bytes"], "bits_per_weight": whole["bits_per_weight"]}
    facts = {
        "adapter": reference(run.output),
        **result.metrics,
        "weights": whole["weights"],
        **sizes,
        **worth_of(adapter),
    }
    if auto is not None:
        searched = result.about.training["auto"]
        facts |= {"chosen": in_words(searched["chosen"]), "auto": searched}
    emit(facts, f"✓ {run.output}")
    if loaded.task == "text-generation":
        prompt = '--prompt "…"'
        hint(f"Next: maskpack generate {reference(run.output)} --backbone {shlex.quote(backbone.backbone)} {prompt}")
    elif not read.class_names:
        words = evaluated(run.output, data, backbone, rows)
        hint(f"Next, if the data have labels: maskpack eval {words} --knn --probe")
    return hint(f"Next: maskpack push {shlex.quote(reference(run.output))} USER/NAME")


@training_verb("maskpack init run.toml --backbone timm/resnet18.a1_in1k --data ./flowers --output ./mask")
def init(
    file: Annotated[Path, "The TOML file to write.", typer.Argument()],
    backbone: Annotated[str, "As for train."] = "timm/resnet18.a1_in1k",
    data: Annotated[str, "As for train."] = "./flowers",
    output: Annotated[Path, "As for train."] = Path("mask"),
    overwrite: Overwrite = False,
) -> None:
    """Write a settings file for `maskpack train --config`: every option with its default and what it does."""
    from maskpack.safetensors_io import write_file

    if file.suffix != ".toml":
        raise ConfigError(f"{file} ends in {file.suffix!r}, expected .toml; give the settings this ending")
    check_free(file, overwrite)
    given = {"backbone": backbone, "data": data, "output": reference(output)}
    lines = ["# Settings of `maskpack train --config FILE`; the command line overrides them.", ""]
    lines += [f"{name} = {json.dumps(value)}" for name, value in given.items()]
    for cls in (TrainedBackbone, Rows, TrainConfig, Run):
        panel, defaults = "", {one.name: one for one in fields(cls)}
        for name, (section, text) in described(cls).items():
            if name in given or name in OF_A_CALL:
                continue
            if section != panel:
                lines += ["", f"# --- {section} " + "-" * (100 - len(section))]
                panel = section
            default, flag = defaults[name].default, name.replace("_", "-")
            if name.endswith("_options"):
                flag, default = flag.removesuffix("s"), []
            value = "" if default in (None, MISSING) else f" {json.dumps(default)}"
            lines += ["", *(f"# {line}" for line in wrap(text, 100)), f"#{flag} ={value}"]
    write_file(file, "\n".join([*lines, ""]))
    emit({"file": str(file)}, f"✓ {file}", {})
    return hint(f"Next: maskpack train --config {shlex.quote(str(file))}")


# --- cascade ---------------------------------------------------------------------------------------------------------

cascades = typer.Typer(help="Train a dispatcher and an expert for each cluster of the data, or evaluate them.")
cascade_verb = partial(verb, cascades, None)
app.add_typer(cascades, name="cascade", no_args_is_help=True, rich_help_panel="Training")


@group("Cascade")
class Experts:
    experts: Annotated[int, "Experts, one for each cluster."] = 5
    combine: Annotated[
        Literal["conditional", "unconditional"],
        "Conditional takes 2 forward passes for an input, unconditional one for each set.",
    ] = "conditional"
    reduce: Annotated[int | None, "Numbers that combined embeddings are reduced to. Default: all.", POSITIVE] = None
    no_labels: Annotated[bool, "The data have no labels: the cascade gets no head."] = False


@cascade_verb(
    f"maskpack cascade train {SHARED} --objective self-supervised --experts 4 --output ./cascade",
    "maskpack cascade train --config run.toml --combine unconditional --resume",
    name="train",
)
def train_experts(
    backbone: TrainedBackbone, data: DataRef, rows: Rows, settings: TrainConfig, cascade: Experts, run: Run
) -> None:
    """Train a dispatcher, a router and experts on a frozen backbone, and write them as one adapter.

    The options of `maskpack train` hold for the dispatcher and for every expert.
    """
    from maskpack.training.cascade import check_cascade, fit_cascade_head
    from maskpack.training.run_folder import check_parts

    run.check(settings)
    folder = run.output / RUN_FOLDER
    check_parts(folder, run.resume or (run.overwrite and folder.is_dir()))
    loaded, read = load_inputs(backbone, data, rows, settings, labelled=not cascade.no_labels)
    check_cascade(read, settings, cascade.experts)
    plan = planned(loaded, read, settings, run.tell)
    steps = (cascade.experts + 1) * plan["steps"]
    run.tell(f"A dispatcher and {cascade.experts} experts: about {steps:,} steps in all")
    run.begin({**plan, "experts": cascade.experts})
    result = run.train(training.train_cascade, loaded, read, settings, experts=cascade.experts, output=folder)
    result = fit_cascade_head(loaded, read, result, combine=cascade.combine, reduce=cascade.reduce)
    adapter = run.save(result, loaded.model, backbone, cascade=result.cascade)
    about = maskpack.inspect_adapter(adapter)
    facts = {
        "adapter": reference(run.output),
        **result.metrics,
        "combine": cascade.combine,
        "cluster_rows": ", ".join(map(str, about["training"]["cascade"]["rows"])),
        "dispatcher_mask_bytes": about["sets"]["dispatcher"]["payload_bytes"],
        "expert_mask_bytes": sum(about["sets"][name]["payload_bytes"] for name in about["cascade"]["experts"]),
        **{f"{role}_bytes": size for role, size in about["cascade"]["bytes"].items()},
        **worth_of(adapter),
    }
    for warning in () if cascade.no_labels else facts["warnings"]:  # those of a head, which is fitted last
        warn(warning)
    emit(facts, f"✓ {run.output}")
    if not cascade.no_labels:
        hint(f"Next: maskpack cascade eval {evaluated(run.output, data, backbone, rows)}")
    return hint(f"Next: maskpack push {shlex.quote(reference(run.output))} USER/NAME")


@cascade_verb("maskpack cascade eval ./cascade --data ./flowers --json", name="eval")
def evaluate_cascade(
    ref: Ref,
    data: DataRef,
    columns: Columns,
    base: Base,
    trust: Source,
    whiten: Annotated[int | None, "Numbers of a whitened embedding. Default: those of one set.", POSITIVE] = None,
    labels_fraction: Annotated[float, "Share of the training rows to use."] = 1.0,
    batch_size: BatchSize = 64,
) -> None:
    """Compare a cascade with its dispatcher and no mask: k-NN, linear probes, forward passes, steps and bytes."""
    from maskpack.training.data.base import LABELS_SEED
    from maskpack.training.evaluate import cascade_table

    adapter = trust.load(ref)
    backbone = base.of(adapter)
    found = training.load_data(data, **vars(columns), labels_fraction=labels_fraction, seed=LABELS_SEED)
    note("Embedding the training and the test rows by every set …")
    with reading("embedding, batches"):
        result = cascade_table(backbone, adapter, found, whiten=whiten, batch_size=batch_size)
    emit({"adapter": adapter.pinned, "data": found.id, **result})
    rows = result["rows"]
    for row in rows:
        row["embedding"] += ", whitened" if row.pop("whitened") else ""
    table(rows, rows[0], **{name: name.removesuffix("_bytes") for name in rows[0] if name.endswith("_bytes")})
    hint("knn, probe: accuracies on the test split. Columns behind steps: bytes.")


# --- transfer --------------------------------------------------------------------------------------------------------


@group("Transfer")
class Carried:
    source: Annotated[str, "Data that the network learns first, as for --data of train."]
    target: Annotated[str, "Data that it is carried to."]
    start: Annotated[
        Start | None,
        "Of the weights that learn the target: their values before the source, after it, or drawn anew. Default: "
        "source-start; source-end with --source-trained.",
    ] = None
    weight_lr: Annotated[float | None, "Peak learning rate of weights. Default: 0.001 for adam, 0.05 for sgd."] = None
    source_trained: Annotated[bool, "The backbone knows the source already."] = False
    baseline: Annotated[bool, "Fine-tune without a mask as well."] = False


# the settings that a transfer decides itself, see `check_transfer`
Carrying = Annotated[
    TrainConfig,
    Without(
        *("head_kind", "head_template", "objective", "objective_options", "scale", "train", "bytes_budget", "rate"),
        bn="freeze",
    ),
]


@training_verb(
    "maskpack transfer --backbone timm/resnet18.a1_in1k --source ./photos --target ./sketches --method naive "
    "--output ./sketches-of-photos",
    "maskpack transfer --config run.toml --start source-end --resume",
)
def transfer(backbone: TrainedBackbone, rows: Rows, settings: Carrying, carried: Carried, run: Run) -> None:
    """Train on a source, find the weights that it does not need, and let these alone learn a target.

    The options of `maskpack train` hold for every run.
    """
    from maskpack.training.evaluate import markdown, transfer_table
    from maskpack.training.run_folder import check_parts, write_json
    from maskpack.training.transfer import RUNS, SOURCE_FILE, check_transfer

    run.check(settings)
    output, trained = run.output, carried.source_trained
    start: Start = carried.start or ("source-end" if trained else "source-start")
    check_parts(output / RUNS, run.resume or (run.overwrite and (output / RUNS).is_dir()))
    loaded, source = load_inputs(backbone, carried.source, rows, settings)
    note(f"Loading {carried.target} …")
    target = rows.load(carried.target, seed=settings.seed)
    check_transfer(loaded, source, settings, start, trained, carried.weight_lr)
    plans = {}
    for name, data in (("source", source), ("target", target)):
        run.tell(f"The {name}, {data.id}:")
        plans[name] = planned(loaded, data, settings, run.tell)
    run.begin(plans)
    options = {"weight_lr": carried.weight_lr, "source_trained": trained, "baseline": carried.baseline}
    result = run.train(training.train_transfer, loaded, source, target, settings, start=start, output=output, **options)
    rows_found = transfer_table(result, source, target, batch_size=settings.batch_size)
    adapter = run.save(result, result.backbone.model)
    facts = {"adapter": reference(output), "start": start, **result.metrics, **worth_of(adapter)}
    if not trained:
        facts["source_weights"] = str(output / SOURCE_FILE)
        backbone = replace(backbone, weights=output / SOURCE_FILE, random_weights=None)
    write_json(output / "transfer.json", {**facts, "rows": rows_found})
    emit({**facts, "rows": rows_found}, f"✓ {output}")
    say("", *markdown(rows_found).splitlines())
    return hint(f"Next: maskpack eval {evaluated(output, carried.source, backbone, rows)} --mode source")


# --- multitask -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry(Rows):
    """A table [[task]] of a file of tasks."""

    name: str
    data: str
    augment: Augment | None = None


TaskFile = Annotated[
    Path,
    "A table `task` for each task, with name, data and its options; options for all as keys before them.",
    typer.Argument(metavar="TASKS.toml", callback=read_settings, is_eager=True),
]


@training_verb(
    "maskpack multitask tasks.toml --backbone timm/resnet18.a1_in1k --output ./many",
    "maskpack multitask tasks.toml --backbone timm/resnet18.a1_in1k --mode gated --output ./together",
)
def multitask(
    tasks: TaskFile,
    backbone: TrainedBackbone,
    rows: Rows,
    settings: TrainConfig,
    joint: JointConfig,
    run: Annotated[Run, Without("config", "overwrite")],
    mode: Annotated[Mode, "How the tasks are trained.", typer.Option(rich_help_panel="Many tasks")] = "sequential",
) -> None:
    """Train a mask for each of several tasks on one backbone; tasks that are finished in --output are left alone.

    sequential: the backbone stays as it is, one mask is trained after the other. gated: all tasks learn together on
    shared weights with soft masks, which are hardened at the end. shared and separate are for comparison: the same
    without masks, and a network for each task. The options of `maskpack train` hold for every task.
    """
    from maskpack.training.multitask import BASE, markdown, plan_tasks

    entries = _entries(tasks)
    run.check(settings)
    note(f"Loading {backbone.backbone} and {len(entries)} tasks …")
    loaded = backbone.load()
    read = {name: _task(entry, rows, settings, loaded.task) for name, entry in entries.items()}
    options: dict[str, Any] = {"mode": mode, "config": settings, "joint": joint}
    plan = plan_tasks(loaded, read, run.output, **options)
    finished = f"; finished before: {', '.join(plan['finished'])}" if plan["finished"] else ""
    run.tell(f"To train: {', '.join(plan['missing']) or 'nothing'}, {plan['steps']:,} steps{finished}")
    run.begin(plan)
    result = run.train(training.train_tasks, loaded, read, run.output, **options, profile=run.profile)
    emit(result)
    say(*markdown(result).splitlines())
    name, first = next(iter(entries.items()))
    weights = (run.output / name if mode == "separate" else run.output) / BASE
    backbone = replace(backbone, weights=weights, random_weights=None)
    words = evaluated(run.output / name, first["data"], backbone, _own_rows(rows, first))
    return hint(f"Next: maskpack eval {words}{'' if read[name].data.class_names else ' --knn --probe'}")


def _entries(file: Path) -> dict[str, dict[str, Any]]:
    """Return the tables of the tasks by name."""
    from maskpack.registry import check_fields

    tables = read_config(file).get("task")
    if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
        raise ConfigError(f"{file} has no tasks; write a table [[task]] with name and data for each")
    known = [field.name for field in fields(Entry)]
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(tables, 1):
        place = f"task {number} of {file}"
        own = {key.replace("-", "_"): value for key, value in entry.items()}
        for key in own.keys() - set(known):
            names = ", ".join(name.replace("_", "-") for name in known)
            raise ConfigError(f"{place} has the setting {key!r}, which cannot stand there; known: {names}")
        if missing := [key for key in ("name", "data") if key not in own]:
            raise ConfigError(f"{place} lacks {' and '.join(missing)}; give each task a name and data")
        try:
            check_fields(Entry(**own))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        if own["name"] in found:
            raise ConfigError(f"{file} has several tasks called {own['name']!r}; give each a name of its own")
        found[own["name"]] = own
    return found


def _own_rows(rows: Rows, entry: Mapping[str, Any]) -> Rows:
    return replace(rows, **{field.name: entry[field.name] for field in fields(Rows) if field.name in entry})


def _task(entry: Mapping[str, Any], rows: Rows, settings: TrainConfig, kind: str) -> "Task":
    """Load a task's data."""
    from maskpack.training.multitask import Task

    labelled = needs_labels(settings.objective, kind, [*Output.given, *entry])
    data = _own_rows(rows, entry).load(entry["data"], supervised=labelled, labelled=labelled, seed=settings.seed)
    return Task(data, entry.get("augment"))
