"""Masks with signs: keep, remove or invert."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mask import PackedMask, masked_weight
from .base import FINISHED, METHODS, Method, State, StraightThrough, alpha


@METHODS.register
@dataclass(frozen=True)
class Ternary(Method):
    """Keep weights with a score above a threshold, invert those with a negative one, remove what is between.

    Attributes:
        init: constant that all scores start from.
        threshold: a weight is kept if its score is strictly above, inverted if it is below 0.
    """

    id: ClassVar[str] = "ternary"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"

    init: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < self.init < math.inf:
            raise ConfigError(
                f"scores start at {self.init} with the threshold {self.threshold}; choose finite values with "
                f"0 <= threshold < init, so that every weight starts as it is"
            )

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

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
