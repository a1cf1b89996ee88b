"""Masks of signs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...mask import Op
from ...registry import check_above_zero
from .base import FINISHED, METHODS, Method, State, StraightThrough


@METHODS.register
@dataclass(frozen=True)
class Flip(Method):
    """Invert the sign of the weights whose score is not above zero; none becomes zero.

    Attributes:
        init: constant that all scores start from, above 0.
    """

    id: ClassVar[str] = "flip"
    reference: ClassVar[str] = "https://arxiv.org/abs/2201.13361"
    op: ClassVar[Op] = "flip"
    rising: ClassVar[bool] = True

    init: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero(self, "init")

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores > 0

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        signed = torch.where(self.binarize(scores.detach()), weight, -weight)
        result: Tensor = StraightThrough.apply(scores, weight, signed, None, None)
        return result
