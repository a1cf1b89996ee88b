"""train_tasks: many tasks on one backbone, a mask for each, in a folder to which tasks may be added later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.file import read_adapter, save_adapter
from ..backbone.load import Backbone
from ..backbone.state import export_state
from ..codecs.base import Profile
from ..training.accelerator import is_main_process
from ..training.checkpoint import FILE
from ..training.config import TrainConfig
from ..training.folder import locked
from ..training.log import Report
from ..training.loop import TrainResult, plan_training, train_mask
from ..training.multitask import plan_jointly, train_jointly, trained_backbone
from ..training.tasks import JointConfig, Task
from .task_folder import BASE, CLAIM, JOINT, RESULT, RUNS, TOGETHER, Mode, about_folder, row_of, survey
from .trial import write_json


def train_tasks(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    output: str | Path,
    *,
    mode: Mode = "sequential",
    config: TrainConfig | None = None,
    joint: JointConfig | None = None,
    profile: Profile = "default",
    resume: bool = False,
    checkpoint_every: str | None = None,
    report: Report | None = None,
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
        resume: continue runs that were interrupted.
        checkpoint_every: as in `train_mask`.
        report: as in `train_mask`; every event has also "part", the name of the task, or "jointly".

    Returns:
        {"mode", "backbone", "rows": [{"task", "accuracy", "soft_accuracy", "density", …}]}, which is also in
        `results.json`.

    Raises:
        ConfigError: if a name or a setting is impossible. StateError: if `output` was made with another mode or
            backbone, or a finished task with other settings or data. Others: as the runs raise.
    """
    config, joint, folder = config or TrainConfig(), joint or JointConfig(), Path(output)
    main = is_main_process()
    about = about_folder(backbone, mode)
    with locked(folder):
        missing = survey(backbone, tasks, folder, mode, config, joint)
        if main:
            write_json(folder / CLAIM, about)

        def place_of(name: str) -> dict[str, Any]:
            place = folder / RUNS / name
            again = resume and (place / FILE).exists()
            options = {"checkpoint_every": checkpoint_every, "report": _tagged(report, name)}
            return {"output": place, "resume": again, **options}

        def save(name: str, result: TrainResult) -> None:
            if main:
                training = {**result.about["training"], "mode": mode}
                whole = {**result.about, "training": training}
                save_adapter(folder / name, result.parts, result.base, profile=profile, weights=backbone.model, **whole)

        if mode == "separate":
            start = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
            for name in missing:
                backbone.model.load_state_dict(start)
                alone = train_jointly(backbone, {name: tasks[name]}, config, joint, gated=False, **place_of(name))
                (folder / name).mkdir(exist_ok=True)
                export_state(folder / name / BASE, backbone.model)
                save(name, alone.results[name])
        elif mode in TOGETHER and not (folder / BASE).exists():
            together = train_jointly(backbone, tasks, config, joint, gated=mode == "gated", **place_of(JOINT))
            for name, one_of_them in together.results.items():
                save(name, one_of_them)
            export_state(folder / BASE, backbone.model)  # last: from now on every further task is a mask on it
        else:
            if main and not (folder / BASE).exists():
                export_state(folder / BASE, backbone.model)
            base = trained_backbone(backbone) if mode in TOGETHER else backbone
            for name in missing:
                data, settings = tasks[name].data, tasks[name].settings(config)
                save(name, train_mask(base, data, settings, longer=False, **place_of(name)))
        if not main:
            return about
        result = {**about, "rows": [row_of(name, read_adapter(folder / name)) for name in tasks]}
        write_json(folder / RESULT, result)
        return result


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
        missing = survey(backbone, tasks, folder, mode, config, joint)
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
        "finished": [name for name in tasks if name not in missing],
        "missing": missing,
        "steps": sum(plan["steps"] for plan in plans),
    }


def _tagged(report: Report | None, part: str) -> Report | None:
    return None if report is None else lambda event: report({**event, "part": part})
