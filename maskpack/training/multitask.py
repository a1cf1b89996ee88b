"""train_tasks: many tasks on one backbone, a mask for each, in a folder to which tasks may be added later."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, get_args

from ..adapter.card import member, metrics
from ..adapter.describe import inspect_adapter
from ..adapter.read import MODEL_FILE, Adapter, read_adapter
from ..adapter.write import save_adapter
from ..backbone.load import Backbone, export_state, load_weights
from ..codecs.base import Profile
from ..errors import ConfigError, StateError
from .config import JointConfig, Mode, TrainConfig
from .evaluate import percent, table
from .joint import Task, plan_jointly, train_jointly, trained_backbone
from .learn import base_of
from .run_folder import PartOptions, claim, differing, is_main_process, locked, part_options, write_json
from .trainer import plan_training, train_mask

MODES: tuple[Mode, ...] = get_args(Mode)
TOGETHER = ("gated", "shared")
BASE, CLAIM, RESULT, RUNS = "backbone.safetensors", "multitask.json", "results.json", "training"
JOINT = "jointly"  # the joint run's folder inside RUNS


def train_tasks(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    output: str | Path,
    *,
    mode: Mode = "sequential",
    config: TrainConfig | None = None,
    joint: JointConfig | None = None,
    profile: Profile = "default",
    **options: Unpack[PartOptions],
) -> dict[str, Any]:
    """Train a mask for each task on weights that all share; tasks that are finished in `output` are left alone.

    `output` gets `backbone.safetensors`, the base of all masks, and for each task a folder with its adapter. Called
    again with more tasks it trains those alone, as masks on that base; if "separate", as the others.

    Args:
        backbone: from `load_backbone`; ends with the weights of the base (those of the last task if "separate").
        tasks: by name, which is the name of the folder.
        mode: "sequential": the backbone stays as it is, a mask is trained for each task in turn. "gated": tasks learn
            together on shared weights with gates, which become the masks. For comparison "shared", the same without
            gates, and "separate", a network for each task.
        config: of every run. joint: rates of weights and gates, and regularisers, for modes in which weights learn.
        profile: as in `save_adapter`.
        options: `resume`, `checkpoint_every` and `report`, as in `train_mask`.

    Returns:
        {"mode", "backbone", "rows": [{"task", "accuracy", "soft_accuracy", "density", …}]}, which is also in
        `results.json`.

    Raises:
        ConfigError: if a name or a setting is impossible. StateError: if `output` was made with another mode or
            backbone, or a finished task with other settings or data. Others: as the runs raise.
    """
    config, joint, folder = config or TrainConfig(), joint or JointConfig(), Path(output)
    with locked(folder):
        start = _state(backbone) if mode == "separate" else {}
        about, done, left = survey(backbone, tasks, folder, mode, config, joint)
        main, masks_only = is_main_process(), mode != "separate" and JOINT not in left
        claim(folder / CLAIM, about)
        if masks_only and main and not (folder / BASE).exists():
            export_state(folder / BASE, backbone.model)
        base = trained_backbone(backbone) if mode in TOGETHER else backbone
        for run, own in left.items():
            parts = part_options(options, folder / RUNS, run)
            if mode == "separate":
                backbone.model.load_state_dict(start)
            if masks_only:
                settings = own[run].settings(config)
                results = {run: train_mask(base, own[run].data, settings, longer=False, **parts)}
            else:
                results = train_jointly(backbone, own, config, joint, gated=mode == "gated", **parts)
            for name, one in results.items() if main else ():
                said, saved = replace(one.about, training={**(one.about.training or {}), "mode": mode}), folder / name
                done[name] = save_adapter(saved, one.parts, one.base, said, profile=profile, weights=backbone.model)
            if not masks_only:  # last: a base that is there says that its tasks are finished
                export_state((folder / run if mode == "separate" else folder) / BASE, backbone.model)
        if not main:
            return about
        found = {**about, "rows": [row_of(name, done[name]) for name in tasks]}
        write_json(folder / RESULT, found)
        return found


def plan_tasks(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    output: str | Path,
    mode: Mode,
    config: TrainConfig,
    joint: JointConfig,
) -> dict[str, Any]:
    """Check everything without training or writing, with a batch of every task that is not finished.

    Returns:
        {"mode", "finished": names, "missing": names, "steps": of all runs that are left}.
    """
    start = _state(backbone)
    try:
        _, done, left = survey(backbone, tasks, Path(output), mode, config, joint)
        if mode == "separate" or JOINT in left:
            plans = [plan_jointly(backbone, own, config, joint, gated=mode == "gated") for own in left.values()]
        else:
            plans = [plan_training(backbone, own[n].data, own[n].settings(config)) for n, own in left.items()]
    finally:
        backbone.model.load_state_dict(start)
    missing, steps = [name for name in tasks if name not in done], sum(plan["steps"] for plan in plans)
    return {"mode": mode, "finished": list(done), "missing": missing, "steps": steps}


def _state(backbone: Backbone) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def survey(
    backbone: Backbone, tasks: Mapping[str, Task], folder: Path, mode: Mode, config: TrainConfig, joint: JointConfig
) -> tuple[dict[str, Any], dict[str, Adapter], dict[str, Mapping[str, Task]]]:
    """Return what the folder is for, the adapters of finished tasks, and the tasks of each run that is left, by name.

    Loads the base that tasks learned together, if it is there.
    """
    _check(tasks, mode, joint)
    weights = base_of(backbone)
    about = {"mode": mode, "backbone": backbone.id, "weights": weights.digests[weights.dtype]}
    claim(folder / CLAIM, about, write=False)
    if mode in TOGETHER:
        if not (folder / BASE).exists():
            return about, {}, {JOINT: tasks}  # what an interrupted run may have written is written again
        load_weights(backbone.model, folder / BASE)
    base, done = base_of(backbone), dict[str, Adapter]()
    for name, task in tasks.items():
        if not (folder / name / (BASE if mode == "separate" else MODEL_FILE)).exists():  # what is written last
            continue
        done[name] = read_adapter(folder / name)
        _check_finished(done[name], name, task, folder, config, joint)
        if mode != "separate" and done[name].base.digests != base.digests:
            raise StateError(
                f"{folder / BASE} is not the base of the task {name!r}: one of them was changed; put the files back, "
                f"or take another output folder"
            )
    return about, done, {name: {name: task} for name, task in tasks.items() if name not in done}


def _check(tasks: Mapping[str, Task], mode: str, joint: JointConfig) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not tasks:
        raise ConfigError("there is no task; name at least one")
    if mode == "sequential" and joint != JointConfig():
        raise ConfigError(
            "weight_lr, gate_factor, gate_start, r1 and r2 are for weights that learn; in sequence only masks do"
        )
    if mode in ("shared", "separate") and joint != JointConfig(weight_lr=joint.weight_lr):
        raise ConfigError(
            f"gate_factor, gate_start, r1 and r2 are for gates, and the mode {mode!r} has none; leave them out"
        )
    seen: set[str] = set()
    for name in tasks:
        plain = name.replace("-", "").replace("_", "").replace(".", "").isalnum() and name.isascii()
        if not plain or name.startswith(".") or name in (RUNS, JOINT) or name.casefold() in seen:
            raise ConfigError(
                f"a task cannot be called {name!r}: its folder has this name; take letters, digits, '-', '_' and '.', "
                f"another name for each task, and not {RUNS!r} or {JOINT!r}"
            )
        seen.add(name.casefold())


def _check_finished(
    adapter: Adapter, name: str, task: Task, folder: Path, config: TrainConfig, joint: JointConfig
) -> None:
    """Compare what a finished task was trained with and what it would be trained with now."""
    record = adapter.about.training
    there, data, jointly = dict(member(record, "settings")), member(record, "data"), member(record, "joint")
    there |= {"data": data.get("digest"), "rows": data.get("rows"), "classes": list(adapter.about.class_names or ())}
    rows = {split: len(examples) for split, examples in task.data.splits.items()}
    ours = {**task.settings(config).to_json(), "data": task.data.digest, "rows": rows, "classes": task.data.class_names}
    if isinstance(tasks := jointly.get("tasks"), list):
        ours |= joint.to_json(config.optimizer, len(tasks))
        there |= jointly
    ours = json.loads(json.dumps(ours))  # as the record has been
    other = differing(ours, there)
    if other:
        said = [
            key if key in ("data", "rows", "classes") else f"{key} {there.get(key)}, now {ours[key]}" for key in other
        ]
        raise StateError(
            f"the task {name!r} in {folder} is finished, and was trained with other settings or data: "
            f"{'; '.join(said)}; take the earlier ones, another name, or another output folder"
        )


def row_of(name: str, adapter: Adapter) -> dict[str, Any]:
    """Return what the table says of a finished task."""
    record: Mapping[str, Any] = adapter.about.training or {}
    found = metrics(record)
    whole = inspect_adapter(adapter)["sets"]["default"]
    return {
        "task": name,
        "jointly": "joint" in record,
        "accuracy": found.get("test_accuracy"),
        "soft_accuracy": found.get("soft_test_accuracy"),
        "density": whole["density"],
        "mask_bytes": whole["payload_bytes"],
        "file_bytes": adapter.size,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the rows of `train_tasks` as a Markdown table."""
    soft = any(row["soft_accuracy"] is not None for row in result["rows"])
    columns = ["task", "accuracy", *(["before hardening"] if soft else []), "density", "mask bytes", "file bytes"]
    lines = []
    for row in result["rows"]:
        cells = [percent(row["accuracy"]), *([percent(row["soft_accuracy"])] if soft else [])]
        cells += [f"{row['density']:.4f}", f"{row['mask_bytes']:,}", f"{row['file_bytes']:,}"]
        lines.append([row["task"], *cells])
    return table(columns, lines)
