"""Score thresholds (Piggyback, Self-Masking Networks)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...registry import Finite
from .base import FINISHED, METHODS, Method, State, straight_through


@METHODS.register
@dataclass(frozen=True)
class Threshold(Method):
    """Keep weights whose score is above a threshold; straight-through gradient.

    Attributes:
        init: initial value of all scores, above the threshold.
        threshold: a weight is kept if its score is greater.
        detach_scale: leave the gradient of the scale out.
    """

    id: ClassVar[str] = "threshold"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    rising: ClassVar[bool] = True
    partial: ClassVar[bool] = True

    init: Finite = 1.0
    threshold: Finite = 0.0
    detach_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold >= self.init:
            raise ConfigError(
                f"init must be above threshold, or all weights start removed; got {self.init} and {self.threshold}"
            )

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores > self.threshold

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        mask = self.binarize(scores.detach())
        return straight_through(weight, scores, mask, scale, detach_scale=self.detach_scale)
