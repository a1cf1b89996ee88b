"""What several tasks are, and the settings with which they learn together."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..data.base import Data
from ..errors import ConfigError
from ..preprocess import Augment
from ..registry import check_above_zero
from .config import TrainConfig
from .dense import WEIGHT_LR
from .gated import START


@dataclass(frozen=True)
class Task:
    """One of several tasks.

    Attributes:
        data: its examples.
        augment: of its training images, in place of the settings'.
    """

    data: Data
    augment: Augment | None = None

    def settings(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a run with this task's own among them."""
        return config if self.augment is None else replace(config, augment=self.augment)


@dataclass(frozen=True)
class JointConfig:
    """How weights learn together with gates, beside `TrainConfig`, whose `lr` is for scores.

    Attributes:
        weight_lr: peak learning rate of the weights; None: 0.05 for SGD, 0.001 for Adam.
        gate_factor: gates learn at this times the rate of the weights; None: 4 times the number of tasks.
        gate_start: of every logit; the smaller, the sooner gates close.
        r1, r2: strength of the two regularisers, sum exp(-|l|) and sum exp(-l^2) over a task's logits.
    """

    weight_lr: float | None = None
    gate_factor: float | None = None
    gate_start: float = START
    r1: float = 0.0
    r2: float = 0.0

    def __post_init__(self) -> None:
        check_above_zero(self, *(n for n in ("weight_lr", "gate_factor", "gate_start") if getattr(self, n) is not None))
        for name in ("r1", "r2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def to_json(self, optimizer: str, tasks: int) -> dict[str, Any]:
        """Return the settings as JSON values, defaults resolved."""
        lr = WEIGHT_LR[optimizer] if self.weight_lr is None else self.weight_lr
        factor = 4.0 * tasks if self.gate_factor is None else self.gate_factor
        return {**asdict(self), "weight_lr": lr, "gate_factor": factor}
