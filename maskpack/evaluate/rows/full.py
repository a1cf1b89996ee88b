"""Full fine-tuning."""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from ...backbone.load import Backbone
from ...training.config import TrainConfig
from .base import ROWS, Fitted, Row, Trial
from .dense import body, fit_dense


@ROWS.register
class Full(Row):
    """Full fine-tuning: every weight of the body learns, and a head."""

    id: ClassVar[str] = "full"
    reference: ClassVar[str] = ""
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = {"adam": (1e-4, 3e-4, 1e-3), "sgd": (0.003, 0.01, 0.03)}

    def fit(self, trial: Trial) -> Fitted:
        return fit_dense(trial, all_weights)


def all_weights(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
    """Freeze what is not of the body, and return all that is."""
    backbone.model.requires_grad_(False)
    return body(backbone)
