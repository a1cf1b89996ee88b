"""Masks with signs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...mask import PackedMask, masked_weight
from ...registry import NonNegative, Positive
from .base import FINISHED, METHODS, FromAbove, State, StraightThrough, alpha


@METHODS.register
@dataclass(frozen=True)
class Ternary(FromAbove):
    """Keep, remove or invert weights by two score thresholds; straight-through gradient.

    Attributes:
        init: initial value of all scores, above the threshold.
        threshold: a weight is kept if its score is greater, inverted if it is below 0, else removed.
    """

    id: ClassVar[str] = "ternary"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"

    init: Positive = 1.0
    threshold: NonNegative = 0.5

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return (scores > self.threshold) | (scores < 0)

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        mask = self.binarize(scores.detach())
        divisor = alpha(mask) if scale else None
        signed = torch.where(scores.detach() < 0, -weight, weight)
        result: Tensor = StraightThrough.apply(scores, weight, masked_weight(signed, mask, divisor), divisor, None)
        return result

    def packed(self, scores: Tensor, scale: bool, state: State = FINISHED) -> PackedMask:
        return replace(super().packed(scores, scale, state), signs=PackedMask.from_tensor(scores >= 0).bits)
