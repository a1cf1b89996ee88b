"""Score-threshold masking."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import METHODS, Method


@METHODS.register
@dataclass(frozen=True)
class Threshold(Method):
    """Keep the weights whose score is above a threshold; straight-through gradient.

    Attributes:
        init: constant that all scores start from.
        threshold: a weight is kept if its score is strictly above; ties are off.
    """

    id: ClassVar[str] = "threshold"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"

    init: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not -math.inf < self.threshold < self.init < math.inf:
            raise ConfigError(
                f"scores start at {self.init} with the threshold {self.threshold}: every weight would start masked, or "
                f"stay as it is; choose finite values with init > threshold"
            )

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor) -> Tensor:
        return scores > self.threshold
