"""maskpack multitask: a mask for each of several tasks, on one backbone."""

import inspect
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import training
from .console import command, emit, examples, main_process, note, quiet_libraries, say
from .progress import Progress
from .settings import DATA, OWN, checked, kinds_of, option, read_settings, take

if TYPE_CHECKING:
    from maskpack.training.config import TrainConfig
    from maskpack.training.joint import Task

PANEL = "Many tasks"
OF_DATA = ("data", *DATA)
OF_TASK = ("name", *OF_DATA, "augment")
OF_JOINT = ("weight_lr", "gate_factor", "gate_start", "r1", "r2")

TASKS = inspect.Parameter(
    "config",
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    annotation=Annotated[
        Path,
        typer.Argument(
            metavar="TASKS.toml",
            help="A table `task` for each task, with name, data and its options; options for all as keys before them.",
        ),
    ],
)
OPTIONS = (
    option(PANEL, "mode", str | None, "sequential, gated, shared or separate. (default: sequential)"),
    option(PANEL, "weight_lr", float | None, "Peak rate of weights that learn. (default: 0.001; 0.05 for sgd)"),
    option(PANEL, "gate_factor", float | None, "Gates learn at this times --weight-lr. (default: 4 x tasks)"),
    option(PANEL, "gate_start", float | None, "Of the logits of gates; nearer to 0 they close sooner. (default: 2)"),
    option(PANEL, "r1", float | None, "Strength of the regulariser sum exp(-|l|) of gates. (default: 0)"),
    option(PANEL, "r2", float | None, "Strength of the regulariser sum exp(-l^2) of gates. (default: 0)"),
)


def multitask(**given: Any) -> None:
    """Train a mask for each of several tasks on one backbone; tasks that are finished in --output are left alone.

    sequential: the backbone stays as it is, one mask is trained after the other. gated: all tasks learn together on
    shared weights with soft masks, which are hardened at the end. shared and separate are for comparison: the same
    without masks, and a network for each task. The options of `maskpack train` hold for every task.
    """
    file, resume, dry_run, as_json, quiet = (given.pop(name) for name in OWN)
    given = {name: value for name, value in given.items() if value is not None and value != []}
    quiet_libraries(quiet)
    from maskpack import load_backbone
    from maskpack.training import train_tasks
    from maskpack.training.config import JointConfig, config_from
    from maskpack.training.multitask import BASE, markdown, plan_tasks
    from maskpack.training.run_folder import parse_every

    settings = read_settings(multitask, given, file, ("backbone", "output"), apart="task")
    entries = _entries(settings.pop("task", []), file)
    output, profile, mode = Path(settings.pop("output")), settings.pop("profile", "default"), settings.get("mode")
    settings.pop("mode", None)
    every = settings.pop("checkpoint_every", None)
    parse_every(every)
    common, joint = take(settings, *OF_DATA), JointConfig(**take(settings, *OF_JOINT))
    reference = settings.pop("backbone")
    of_backbone = take(settings, "weights", "random_weights", "head", "image_size", "mean", "std")
    config = config_from(settings)
    note(f"Loading {reference} and {len(entries)} tasks …", quiet)
    backbone = load_backbone(reference, **of_backbone)
    tasks = {entry["name"]: _task({**common, **entry}, settings, config, backbone.task) for entry in entries}
    options: dict[str, Any] = {"mode": mode or "sequential", "config": config, "joint": joint}
    plan = plan_tasks(backbone, tasks, output, **options)
    finished = f"; finished before: {', '.join(plan['finished'])}" if plan["finished"] else ""
    note(f"To train: {', '.join(plan['missing']) or 'nothing'}, {plan['steps']:,} steps{finished}", quiet)
    if dry_run:
        emit(plan, as_json, "Everything needed is there; nothing was trained or written.")
        return
    with Progress(quiet or as_json or not sys.stderr.isatty()) as report:
        options |= {"profile": profile, "resume": resume, "checkpoint_every": every, "report": report}
        result = train_tasks(backbone, tasks, output, **options)
    if not main_process():
        return
    if as_json:
        emit(result, True)
    else:
        say(*markdown(result).splitlines())
    first = entries[0]
    base = output / first["name"] / BASE if mode == "separate" else output / BASE
    words = training.evaluated(output / first["name"], {**common, **first, "backbone": reference, "weights": base})
    features = "" if tasks[first["name"]].data.class_names else " --knn --probe"
    note(f"Next: maskpack eval {words}{features}", quiet or as_json)


# the verb has the options of `maskpack train` and those above: they are written down once
multitask.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [TASKS, *(one for name, one in inspect.signature(training.train).parameters.items()
              if name not in ("config", "data")), *OPTIONS]
)  # fmt: skip


def _entries(entries: Any, file: Path) -> list[dict[str, Any]]:
    """The tables of the tasks, each with a name of its own and data."""
    from maskpack.errors import ConfigError

    if not isinstance(entries, list) or not entries or not all(isinstance(one, dict) for one in entries):
        raise ConfigError(f"{file} has no tasks; write a table [[task]] with name and data for each")
    kinds = {"name": str, **{k: v for k, v in kinds_of(training.train).items() if k in OF_TASK}}
    found = []
    for number, entry in enumerate(entries, 1):
        place = f"task {number} of {file}"
        own = checked(kinds, {key.replace("-", "_"): value for key, value in entry.items()}, place)
        missing = [key for key in ("name", "data") if key not in own]
        if missing:
            raise ConfigError(f"{place} lacks {' and '.join(missing)}; give each task a name and data")
        found.append(own)
    names = [entry["name"] for entry in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file} has several tasks called {twice!r}; give each a name of its own")
    return found


def _task(entry: dict[str, Any], settings: Collection[str], config: "TrainConfig", kind: str) -> "Task":
    """Load a task's data; `settings` are the names of those that all tasks have."""
    from maskpack.training import load_data
    from maskpack.training.joint import Task

    labelled = training.needs_labels(config.objective, kind, [*settings, *entry])
    options = {"validation_fraction": 0.1 if labelled else 0.0, **take(entry, *OF_DATA[1:])}
    return Task(load_data(entry["data"], labelled=labelled, seed=config.seed, **options), entry.get("augment"))


def register(app: typer.Typer) -> None:
    """Add this file's verb."""
    app.command(
        epilog=examples(
            "maskpack multitask tasks.toml --backbone timm/resnet18.a1_in1k --output ./many",
            "maskpack multitask tasks.toml --backbone timm/resnet18.a1_in1k --mode gated --output ./together",
        )
    )(command(multitask))
