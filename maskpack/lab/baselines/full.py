"""Full fine-tuning."""

from collections.abc import Mapping
from typing import ClassVar

from ...training.learn import body_parameters
from .base import ROWS, Fitted, Row, Trial, fit_dense


@ROWS.register
class Full(Row):
    """Full fine-tuning: every weight of the body learns, and a head."""

    id: ClassVar[str] = "full"
    reference: ClassVar[str] = ""
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = {"adam": (1e-4, 3e-4, 1e-3), "sgd": (0.003, 0.01, 0.03)}

    def fit(self, trial: Trial) -> Fitted:
        return fit_dense(trial, lambda backbone, _: body_parameters(backbone))
