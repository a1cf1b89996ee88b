"""BitFit."""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from ...backbone.load import Backbone
from ...errors import ConfigError
from ...training.config import TrainConfig
from ...training.learn import body_parameters
from .base import ROWS, Fitted, Row, Trial, fit_dense


@ROWS.register
class BitFit(Row):
    """Biases alone learn, those of normalisation layers included, and a head."""

    id: ClassVar[str] = "bitfit"
    reference: ClassVar[str] = "https://arxiv.org/abs/2106.10199"
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1)}

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        if not _biases(backbone):
            raise ConfigError(f"the backbone {backbone.id} has no biases, so there is no row 'bitfit'; leave it out")

    def fit(self, trial: Trial) -> Fitted:
        return fit_dense(trial, lambda backbone, _: _biases(backbone))


def _biases(backbone: Backbone) -> dict[str, nn.Parameter]:
    return {name: one for name, one in body_parameters(backbone).items() if name.rpartition(".")[2].endswith("bias")}
