"""train_jointly: several tasks learn on shared weights, which then are the frozen base of a mask for each."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..backbone.fingerprint import Fingerprint, fingerprint
from ..backbone.load import Backbone
from ..mask import MaskSet
from ..parts import Parts
from ..tensorfile import replacing
from .batchnorm import batchnorm_statistics
from .borrow import borrowed
from .config import TrainConfig
from .folder import run_folder
from .joint import JointRun
from .keep import Position
from .log import Report, RunLog
from .loop import TrainResult, finished
from .record import training_record
from .tasks import JointConfig, Task

HISTOGRAMS = "histograms.json"  # in the run's folder


@dataclass(frozen=True, slots=True, eq=False)
class JointResult:
    """What tasks learned together. The backbone's model has the shared weights.

    Attributes:
        base: fingerprint of the shared weights.
        results: by task, each ready for `save_adapter(path, result.parts, result.base, **result.about)`. Its metrics
            are those after hardening; "soft_…" are before.
    """

    base: Fingerprint
    results: dict[str, TrainResult]


def train_jointly(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    config: TrainConfig | None = None,
    joint: JointConfig | None = None,
    *,
    gated: bool = True,
    output: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: str | None = None,
    report: Report | None = None,
) -> JointResult:
    """Train one network on several tasks at once ("Like a Light Switch"). The backbone's weights are changed.

    For each step a task is drawn, each with the same chance. It has its own head and BatchNorm statistics; the weights
    of the body are shared and all learn. Those that would be masked have a gate for each task as well. At the end gates
    become masks, the weights stay as they are, and BatchNorm statistics are taken anew with the masks on. Those of the
    backbone become the means of the tasks', for masks that are trained on it later.

    Args:
        tasks: by name.
        config: of the run; `epochs` are passes over the rows of all tasks, `steps` are for each task.
        joint: rates of weights and gates, and regularisers.
        gated: without gates the weights are shared as they are, and every mask keeps all.
        output, resume, checkpoint_every, report: as in `train_mask`. With gates the folder also gets `histograms.json`:
            gates and effective weights by task and parameter, after every epoch.

    Raises:
        ConfigError: if the objective or the heads are others than linear ones trained on labels, or there are several
            processes. Others: as `train_mask`.
    """
    config, joint = config or TrainConfig(), joint or JointConfig()
    before = fingerprint(backbone.model, id=backbone.id, revision=backbone.revision, head=backbone.outside)
    with (
        run_folder(output, resume) as folder,
        borrowed(backbone),
        RunLog(folder, report, resume) as log,
        _run(backbone, tasks, config, joint, gated) as run,
    ):
        last = run.train(before, folder, resume, log, checkpoint_every)
        if folder is not None and run.history is not None:
            with replacing(folder / HISTOGRAMS) as (temporary,):
                temporary.write_text(json.dumps(run.history.content, sort_keys=True), encoding="utf-8")
        hard, soft = _accuracies(run), dict[str, float]()
        if run.gates is not None:
            soft = hard
            run.gates.hard = True
            for name in tasks if config.bn == "adapt" else ():
                run.use(name).recalibrate()
            hard = _accuracies(run)
        parts = {name: _parts(run, name) for name in tasks}
        whole = [name for name in tasks if gated and parts[name].masks.density == 1]
        if whole:
            warning = (
                f"no gate of {', '.join(whole)} has closed, so that the masks keep everything; take more steps, a "
                f"greater gate_factor, or a gate_start nearer to 0"
            )
            log.write({"event": "warning", "step": run.steps, "steps": run.steps, "warning": warning})
        measured = {**hard, **{f"soft_{key}": value for key, value in soft.items()}}
        log.write({"event": "end", "step": run.steps, "steps": run.steps, **last, **measured})
    with torch.no_grad():
        for name in next(iter(parts.values())).statistics:
            every = torch.stack([one.statistics[name] for one in parts.values()])
            backbone.model.get_buffer(name).copy_(every.mean(0))
    backbone = trained_backbone(backbone)
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    results = {}
    for name, task in tasks.items():
        metrics = {"train_loss": last["train_loss"], "density": parts[name].masks.density}
        for kind in ("validation_accuracy", "test_accuracy", "soft_validation_accuracy", "soft_test_accuracy"):
            if f"{kind}_{name}" in measured:
                metrics[kind] = measured[f"{kind}_{name}"]
        record = training_record(task.settings(config), task.data, run.steps, 1, metrics)
        record["joint"] = {**run.settings, "gated": gated, "tasks": list(tasks)}
        results[name] = finished(backbone, task.data, parts[name], base, record)
    return JointResult(base, results)


def trained_backbone(backbone: Backbone) -> Backbone:
    """Return a backbone that tasks learned on under another name: its weights are not those that its own stands for."""
    return replace(backbone, id=f"trained:{backbone.id}", revision=None)


def plan_jointly(
    backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
) -> dict[str, Any]:
    """Check a joint run without training: build everything, run a batch of each task; return its plan.

    Raises:
        What `train_jointly` raises before its first step.
    """
    with borrowed(backbone), _run(backbone, tasks, config, joint, gated) as run:
        for name in tasks:
            run.loss(run.use(name), next(run.stream(name, Position(run.steps)))).backward()  # type: ignore[no-untyped-call]
        shared = dict(backbone.model.named_parameters()) if run.gates is None else run.gates.weights()
        weights = sum(shared[name].numel() for name in run.selected)
        return {"parameters": len(run.selected), "weights": weights, "epochs": run.epochs, "steps": run.steps}


@contextmanager
def _run(
    backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
) -> Iterator[JointRun]:
    run = JointRun(backbone, tasks, config, joint, gated)
    try:
        yield run
    finally:
        run.close()


def _accuracies(run: JointRun) -> dict[str, float]:
    return {**run.accuracies("validation"), **run.accuracies("test")}


def _parts(run: JointRun, name: str) -> Parts:
    objective = run.use(name)
    if run.gates is not None:
        masks = run.gates.masks(name)
    else:
        model = run.backbone.model
        masks = MaskSet.from_tensors(
            {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in run.selected}
        )
    statistics = batchnorm_statistics(run.backbone.model) if run.config.bn == "adapt" else {}
    return Parts(masks, objective.head(), statistics)
