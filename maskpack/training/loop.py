"""train_mask: scores learn, weights never move."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..backbone.fingerprint import Fingerprint, fingerprint
from ..backbone.head import find_head
from ..backbone.load import Backbone
from ..data.base import Data
from ..data.batches import readable
from ..errors import TrainingError
from ..parts import FEATURES, Parts
from ..preprocess import preprocess_to_json
from .accelerator import is_main_process
from .batchnorm import batchnorm_statistics
from .borrow import borrowed
from .config import TrainConfig
from .folder import run_folder
from .keep import parse_every
from .learn import Learn, learn_scores
from .log import Report, RunLog
from .run import Run
from .scored import extract_masks, replaced_values


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """What a run learned, ready for `save_adapter(path, result.parts, result.base, **result.about)`.

    Attributes:
        parts: masks, head (None without labels), BatchNorm statistics, parameters that learned themselves.
        base: fingerprint of the backbone.
        about: task, class names, preprocessing and training record.
        metrics: train_loss, density, and what the objective measures of the splits that exist.
    """

    parts: Parts
    base: Fingerprint
    about: dict[str, Any]
    metrics: dict[str, float]


def train_mask(
    model: Backbone | nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
    checkpoint_every: str | None = None,
    longer: bool = True,
    learn: Learn = learn_scores,
    report: Report | None = None,
) -> TrainResult:
    """Train a mask on a frozen backbone.

    Args:
        model: from `load_backbone`, or any module that gives logits for images; its tensors have the same bits
            afterwards.
        data: from `load_data`. The test split is only read after the last step.
        output: folder for the checkpoint, `log.jsonl` and TensorBoard curves; None keeps nothing. One run at a time.
        resume: continue from the checkpoint in `output`. On one process and CPU the masks are, bit for bit, those of
            a run that was not interrupted.
        checkpoint_every: a time or a number of optimiser steps, as in "10min" or "500steps"; None: every epoch.
        longer: `epochs` or `steps` may be greater than those of the run that is resumed. False: that is an error.
        start_from: `output` of a finished run on the same backbone, with whose scores, head and statistics this one
            starts; the optimiser starts afresh.
        learn: attaches what is trained as scores, and returns it; the default does what `config` says.
        report: called, in the main process, with every event: {"event": "step" | "epoch" | "warning" | "end",
            "step", "steps", "loss", "density", …}.

    Raises:
        TrainingError: if the loss is not finite, or no example of an epoch can be read.
        StateError: if the checkpoint is damaged or belongs to another run, `output` has one and `resume` is not asked
            for, or another run writes into it.
        StoppedError: after SIGTERM or SIGUSR1, at the next optimiser step, when the checkpoint is written. Only with
            `output`, in the main thread; a second signal is not waited for.
        SelectionError, DataError: if patterns or data do not fit the backbone.
    """
    config = config or TrainConfig()
    parse_every(checkpoint_every)
    backbone = model if isinstance(model, Backbone) else Backbone(model, type(model).__name__, head=find_head(model))
    main = is_main_process()
    before = fingerprint(backbone.model, id=backbone.id, revision=backbone.revision, head=backbone.outside)
    start = None if start_from is None else Path(start_from)
    with (
        run_folder(output, resume) as folder,
        borrowed(backbone, config.train),
        RunLog(folder if main else None, report if main else None, resume) as log,
    ):
        run = Run(backbone, data, config, learn)
        metrics = run.train(before, folder, resume, start, log, checkpoint_every, longer)
        statistics = batchnorm_statistics(backbone.model) if config.bn == "adapt" else {}
        head = run.objective.head()
        values = replaced_values(backbone.model)
        whole = {name: parameter.detach().cpu().clone() for name, parameter in run.whole.items()}
        parts = Parts(extract_masks(backbone.model), head, statistics, whole, values)
    after = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    if after.digests != before.digests:
        raise TrainingError(
            "the backbone's tensors changed during training: its forward pass changes them, or this is a defect of "
            "maskpack; report it"
        )
    return finished(backbone, data, parts, before, run.record(metrics))


def plan_training(backbone: Backbone, data: Data, config: TrainConfig) -> dict[str, Any]:
    """Check a run without training: build everything, run one batch forward and backward; return its plan.

    Raises:
        What `train_mask` raises before its first step.
    """
    with borrowed(backbone):
        run = Run(backbone, data, config)
        batch = next(readable(run.loader), None)
        if batch is None:
            raise TrainingError("no example of the training split can be read")
        loss = run.objective.loss(run.module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "backbone": backbone.id,
            "parameters": len(run.scores),
            "weights": sum(math.prod(one.shape) for one in run.scored),
            "classes": len(data.class_names),
            "train": len(run.train_split),
            "validation": len(data.validation) if data.validation else 0,
            "test": len(data.test) if data.test else 0,
            "epochs": run.epochs,
            "steps": run.steps,
            "loss": float(loss.detach()),
        }


def finished(backbone: Backbone, data: Data, parts: Parts, base: Fingerprint, record: dict[str, Any]) -> TrainResult:
    """Return the result of a run with this training record; `base` is the fingerprint of the whole body."""
    about = {
        "task": data.task if parts.head is not None else FEATURES[data.task],
        "class_names": list(data.class_names) if parts.head is not None else None,
        "preprocess": preprocess_to_json(backbone.preprocess),
        "training": record,
    }
    masked = Fingerprint(**{**asdict(base), "tensors": {name: base.tensors[name] for name in parts.masks}})
    return TrainResult(parts, masked, about, record["metrics"])
