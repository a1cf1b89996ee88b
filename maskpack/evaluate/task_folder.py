"""The folder of many tasks: what is finished in it, whether it fits what is asked for now, and its table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..adapter.adapter import Adapter
from ..adapter.describe import describe
from ..adapter.file import MODEL_FILE, read_adapter
from ..adapter.record import member, metrics
from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone
from ..backbone.state import load_weights
from ..errors import ConfigError, StateError
from ..text import escape
from ..training.config import TrainConfig
from ..training.tasks import JointConfig, Task
from .trial import read_json

Mode = Literal["sequential", "gated", "shared", "separate"]
MODES: tuple[Mode, ...] = ("sequential", "gated", "shared", "separate")
TOGETHER = ("gated", "shared")
BASE, CLAIM, RESULT, RUNS = "backbone.safetensors", "multitask.json", "results.json", "training"
JOINT = "jointly"  # the joint run's folder inside RUNS


def survey(
    backbone: Backbone, tasks: Mapping[str, Task], folder: Path, mode: Mode, config: TrainConfig, joint: JointConfig
) -> list[str]:
    """Return the tasks that are not finished; load the base that tasks learned together, if it is there.

    Raises:
        ConfigError, StateError: as `train_tasks`.
    """
    _check(tasks, mode, joint)
    about = about_folder(backbone, mode)
    if (folder / CLAIM).exists():
        there = read_json(folder / CLAIM, frozenset(about), "it is of no folder of tasks; choose another one")
        differing = [f"{key} {there[key]}, now {about[key]}" for key in about if there[key] != about[key]]
        if differing:
            raise StateError(
                f"the tasks in {folder} were trained otherwise: {'; '.join(differing)}; take the same again, or "
                f"another output folder"
            )
    together = mode in TOGETHER
    if together and not (folder / BASE).exists():
        return list(tasks)  # what an interrupted run may have written is written again
    if together:
        load_weights(backbone.model, folder / BASE)
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    missing = []
    for name, task in tasks.items():
        if not (folder / name / MODEL_FILE).exists():
            missing.append(name)
            continue
        adapter = read_adapter(folder / name)
        _check_finished(adapter, name, task, folder, config, joint)
        if mode != "separate" and adapter.base.digests != base.digests:
            raise StateError(
                f"{folder / BASE} is not the base of the task {name!r}: one of them was changed; put the files back, "
                f"or take another output folder"
            )
    return missing


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
    record = adapter.training
    there, data, jointly = dict(member(record, "settings")), member(record, "data"), member(record, "joint")
    ours = task.settings(config).to_json()
    splits = {"train": task.data.train, "validation": task.data.validation, "test": task.data.test}
    rows = {key: len(split) for key, split in splits.items() if split is not None}
    ours |= {"data": task.data.digest, "rows": rows, "classes": list(task.data.class_names)}
    there |= {"data": data.get("digest"), "rows": data.get("rows"), "classes": list(adapter.class_names or ())}
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
    record: Mapping[str, Any] = adapter.training or {}
    found = metrics(record)
    whole = describe(adapter)["sets"]["default"]
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
