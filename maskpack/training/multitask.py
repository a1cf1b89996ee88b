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
from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone, export_state, load_weights
from ..codecs.base import Profile
from ..errors import ConfigError, StateError, escape
from .config import JointConfig, Mode, TrainConfig
from .joint import Task, plan_jointly, train_jointly, trained_backbone
from .run_folder import PartOptions, RunOptions, check_claim, claim, is_main_process, locked, part_options, write_json
from .trainer import TrainResult, plan_training, train_mask

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
    about = about_folder(backbone, mode)

    def run(name: str) -> RunOptions:
        return part_options(options, name, folder / RUNS / name)

    def save(name: str, result: TrainResult) -> None:
        if is_main_process():
            said = replace(result.about, training={**(result.about.training or {}), "mode": mode})
            own = folder / name
            done[name] = save_adapter(own, result.parts, result.base, said, profile=profile, weights=backbone.model)

    with locked(folder):
        done = survey(backbone, tasks, folder, mode, config, joint)
        missing = [name for name in tasks if name not in done]
        claim(folder / CLAIM, about)
        if mode == "separate":
            start = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
            for name in missing:
                backbone.model.load_state_dict(start)
                alone = train_jointly(backbone, {name: tasks[name]}, config, joint, gated=False, **run(name))
                (folder / name).mkdir(exist_ok=True)
                export_state(folder / name / BASE, backbone.model)
                save(name, alone[name])
        elif mode in TOGETHER and not (folder / BASE).exists():
            together = train_jointly(backbone, tasks, config, joint, gated=mode == "gated", **run(JOINT))
            for name, result in together.items():
                save(name, result)
            export_state(folder / BASE, backbone.model)  # last: from now on every further task is a mask on it
        else:
            if is_main_process() and not (folder / BASE).exists():
                export_state(folder / BASE, backbone.model)
            base = trained_backbone(backbone) if mode in TOGETHER else backbone
            for name in missing:
                data, settings = tasks[name].data, tasks[name].settings(config)
                save(name, train_mask(base, data, settings, longer=False, **run(name)))
        if not is_main_process():
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
        {"finished": names, "missing": names, "steps": of all runs that are left}.

    Raises:
        What `train_tasks` raises before its first step.
    """
    folder, start = Path(output), {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    try:
        done = survey(backbone, tasks, folder, mode, config, joint)
        missing = [name for name in tasks if name not in done]
        if mode == "separate":
            plans = [plan_jointly(backbone, {name: tasks[name]}, config, joint, gated=False) for name in missing]
        elif mode in TOGETHER and not (folder / BASE).exists():
            plans = [plan_jointly(backbone, tasks, config, joint, gated=mode == "gated")]
        else:
            plans = [plan_training(backbone, tasks[name].data, tasks[name].settings(config)) for name in missing]
    finally:
        backbone.model.load_state_dict(start)
    return {
        "mode": mode,
        "finished": list(done),
        "missing": missing,
        "steps": sum(plan["steps"] for plan in plans),
    }


def survey(
    backbone: Backbone, tasks: Mapping[str, Task], folder: Path, mode: Mode, config: TrainConfig, joint: JointConfig
) -> dict[str, Adapter]:
    """Return the adapters of the finished tasks; load the base that tasks learned together, if it is there.

    Raises:
        ConfigError, StateError: as `train_tasks`.
    """
    _check(tasks, mode, joint)
    check_claim(folder / CLAIM, about_folder(backbone, mode))
    together = mode in TOGETHER
    if together and not (folder / BASE).exists():
        return {}  # what an interrupted run may have written is written again
    if together:
        load_weights(backbone.model, folder / BASE)
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    found = {name: read_adapter(folder / name) for name in tasks if (folder / name / MODEL_FILE).exists()}
    for name, adapter in found.items():
        _check_finished(adapter, name, tasks[name], folder, config, joint)
        if mode != "separate" and adapter.base.digests != base.digests:
            raise StateError(
                f"{folder / BASE} is not the base of the task {name!r}: one of them was changed; put the files back, "
                f"or take another output folder"
            )
    return found


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


def about_folder(backbone: Backbone, mode: str) -> dict[str, Any]:
    """Return what must stay the same in a folder."""
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    return {"mode": mode, "backbone": backbone.id, "weights": base.digests[base.dtype]}


def _check_finished(
    adapter: Adapter, name: str, task: Task, folder: Path, config: TrainConfig, joint: JointConfig
) -> None:
    """Compare what a finished task was trained with and what it would be trained with now."""
    record = adapter.about.training
    there, data, jointly = dict(member(record, "settings")), member(record, "data"), member(record, "joint")
    ours = task.settings(config).to_json()
    splits = {"train": task.data.train, "validation": task.data.validation, "test": task.data.test}
    rows = {key: len(split) for key, split in splits.items() if split is not None}
    ours |= {"data": task.data.digest, "rows": rows, "classes": list(task.data.class_names)}
    there |= {"data": data.get("digest"), "rows": data.get("rows"), "classes": list(adapter.about.class_names or ())}
    if isinstance(tasks := jointly.get("tasks"), list):
        ours |= joint.to_json(config.optimizer, len(tasks))
        there |= jointly
    # through JSON, as the record has been
    ours = json.loads(json.dumps(ours))
    differing = [
        key if key in ("data", "rows", "classes") else f"{key} {there.get(key)}, now {value}"
        for key, value in ours.items()
        if there.get(key) != value
    ]
    if differing:
        raise StateError(
            f"the task {name!r} in {folder} is finished, and was trained with other settings or data: "
            f"{'; '.join(differing)}; take the earlier ones, another name, or another output folder"
        )


def row_of(name: str, adapter: Adapter) -> dict[str, Any]:
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

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    soft = any(row["soft_accuracy"] is not None for row in result["rows"])
    lines = ["| task | accuracy |" + (" before hardening |" if soft else "") + " density | mask bytes | file bytes |"]
    lines.append("| --- |" + " ---: |" * (lines[0].count("|") - 2))
    for row in result["rows"]:
        name = escape(row["task"], "markdown")
        cells = [name, share(row["accuracy"]), *([share(row["soft_accuracy"])] if soft else [])]
        cells += [f"{row['density']:.4f}", f"{row['mask_bytes']:,}", f"{row['file_bytes']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
