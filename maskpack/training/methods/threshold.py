"""Score thresholds (Piggyback, Self-Masking Networks)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import FINISHED, METHODS, FromAbove, State, straight_through


@METHODS.register
@dataclass(frozen=True)
class Threshold(FromAbove):
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

    detach_scale: bool = False

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores > self.threshold

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        mask = self.binarize(scores.detach())
        return straight_through(weight, scores, mask, scale, detach_scale=self.detach_scale)
