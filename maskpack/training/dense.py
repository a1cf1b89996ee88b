"""train_dense: weights themselves learn, by the loop that masks are trained by, to be compared with them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone
from ..backbone.model import inside
from ..errors import ConfigError
from .batchnorm import batchnorm_statistics
from .config import WEIGHT_LR, TrainConfig
from .data.base import Data
from .run_folder import Report, RunLog, is_main_process, run_folder
from .trainer import Learn, Run


@dataclass(frozen=True, slots=True, eq=False)
class DenseResult:
    """What a run without masks learned; the model has it.

    Attributes:
        classifier: the backbone with its new head, in evaluation mode.
        learned: what `learn` returned, by name. statistics: of BatchNorm, if they adapted.
        steps: optimiser steps.
        metrics: train_loss, and what the objective measures of the splits that exist.
    """

    classifier: nn.Module
    learned: Mapping[str, nn.Parameter]
    statistics: dict[str, Tensor]
    steps: int
    metrics: dict[str, float]


def body_parameters(backbone: Backbone) -> dict[str, nn.Parameter]:
    """Return the parameters of the body by name."""
    return {name: one for name, one in backbone.model.named_parameters() if not inside(name, backbone.outside)}


def of_weights(config: TrainConfig, weight_lr: float | None) -> TrainConfig:
    """Return settings whose `lr`, which is the scores', is the peak rate of weights; None: `WEIGHT_LR`.

    Raises:
        ConfigError: if it is not above 0.
    """
    lr = WEIGHT_LR[config.optimizer] if weight_lr is None else weight_lr
    if not 0 < lr < math.inf:
        raise ConfigError(f"weight_lr must be a finite number above 0, got {weight_lr}")
    return replace(config, lr=lr)


def train_dense(
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    learn: Learn,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: str | None = None,
    report: Report | None = None,
) -> DenseResult:
    """Train a head and what `learn` names of a backbone, at the rate of scores. The backbone is changed.

    Args:
        learn: gets the frozen backbone with its new head, and the settings; returns the parameters that learn. It may
            put modules into the model, as LoRA does.
        output, resume, checkpoint_every, report: as in `train_mask`.

    Raises:
        What `train_mask` raises.
    """
    main = is_main_process()
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    with (
        run_folder(output, resume) as folder,
        RunLog(folder if main else None, report if main else None, resume) as log,
    ):
        run = Run(backbone, data, config, learn)
        metrics = run.train(base, folder, resume, None, log, checkpoint_every)
    statistics = batchnorm_statistics(backbone.model) if config.bn == "adapt" else {}
    return DenseResult(run.objective.module.eval(), run.scores, statistics, run.steps, metrics)
