"""Score-threshold masking."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from .base import FINISHED, METHODS, Method, State, straight_through


@METHODS.register
@dataclass(frozen=True)
class Threshold(Method):
    """Keep the weights whose score is above a threshold; straight-through gradient.

    Attributes:
        init: constant that all scores start from.
        threshold: a weight is kept if its score is strictly above; ties are off.
        detach_scale: leave the gradient of the scale out of that of the scores.
    """

    id: ClassVar[str] = "threshold"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    rising: ClassVar[bool] = True

    init: float = 1.0
    threshold: float = 0.0
    detach_scale: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.threshold < self.init < math.inf:
            raise ConfigError(
                f"scores start at {self.init} with the threshold {self.threshold}: every weight would start masked, or "
                f"stay as it is; choose finite values with init > threshold"
            )

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores > self.threshold

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        mask = self.binarize(scores.detach())
        return straight_through(weight, scores, mask, scale, detach_scale=self.detach_scale)
