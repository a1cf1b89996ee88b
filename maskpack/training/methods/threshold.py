"""Masks by thresholds of scores: kept or removed, drawn at random, inverted, or all three."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mask import Op, PackedMask, masked_weight
from ...registry import Finite, NonNegative, Positive
from .base import FINISHED, METHODS, Method, State, StraightThrough, alpha, straight_through


@dataclass(frozen=True)
class Even(Method):
    """A method whose scores all begin with the value `init`."""

    init: Positive = 1.0

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)


@dataclass(frozen=True)
class FromAbove(Even):
    """A method whose scores begin with a value above `threshold`, which they are compared with."""

    init: Finite = 1.0
    threshold: Finite = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold >= self.init:
            raise ConfigError(
                f"init must be above threshold, or all weights start removed; got {self.init} and {self.threshold}"
            )


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


@METHODS.register
@dataclass(frozen=True)
class Flip(Even):
    """Invert the sign of weights whose score is at most 0; straight-through gradient.

    Attributes:
        init: initial value of all scores.
    """

    id: ClassVar[str] = "flip"
    reference: ClassVar[str] = "https://arxiv.org/abs/2201.13361"
    op: ClassVar[Op] = "flip"
    rising: ClassVar[bool] = True
    partial: ClassVar[bool] = True

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores > 0

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        signed = torch.where(self.binarize(scores.detach()), weight, -weight)
        result: Tensor = StraightThrough.apply(scores, weight, signed, None, None)
        return result


EPSILON = 1e-10  # added within logarithms, as published


@METHODS.register
@dataclass(frozen=True)
class Gumbel(Even):
    """Learn a keep probability per weight (Gumbel-sigmoid) under a density penalty.

    Scores are the logits. Training draws a mask at every step, with the gradient of sigmoid((logit + noise) /
    temperature). In evaluation mode and in the adapter a weight is kept if its logit is at least 0.

    Attributes:
        init: initial value of all logits.
        temperature: of the sigmoid.
        strength: of the penalty: the sum of all logits times strength / batch size is added to the loss.
    """

    id: ClassVar[str] = "gumbel"
    reference: ClassVar[str] = "https://arxiv.org/abs/2010.02066"
    draws: ClassVar[bool] = True
    hardens: ClassVar[bool] = True
    rising: ClassVar[bool] = True
    partial: ClassVar[bool] = True

    init: Positive = 2.0
    temperature: Positive = 1.0
    strength: NonNegative = 1e-4

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores >= 0

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        if not state.training:
            return super().effective(weight, scores, scale, state)
        first, second = torch.rand(2, *scores.shape, device=scores.device).add_(EPSILON).log_()
        soft = ((scores - (second / first + EPSILON).log()) / self.temperature).sigmoid()
        return straight_through(weight, soft, soft.detach() > 0.5, scale)

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        return self.strength / state.batch_size * scores.sum()


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
