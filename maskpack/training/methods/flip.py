"""Masks of signs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...mask import Op
from ...registry import Positive
from .base import FINISHED, METHODS, Method, State, StraightThrough


@METHODS.register
@dataclass(frozen=True)
class Flip(Method):
    """Invert the sign of weights whose score is at most 0; straight-through gradient.

    Attributes:
        init: initial value of all scores.
    """

    id: ClassVar[str] = "flip"
    reference: ClassVar[str] = "https://arxiv.org/abs/2201.13361"
    op: ClassVar[Op] = "flip"
    rising: ClassVar[bool] = True
    partial: ClassVar[bool] = True

    init: Positive = 1.0

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores > 0

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        signed = torch.where(self.binarize(scores.detach()), weight, -weight)
        result: Tensor = StraightThrough.apply(scores, weight, signed, None, None)
        return result
