"""Binary masks drawn from learned probabilities (Gumbel-sigmoid)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...registry import NonNegative, Positive
from .base import FINISHED, METHODS, Method, State, straight_through

EPSILON = 1e-10  # added within logarithms, as published


@METHODS.register
@dataclass(frozen=True)
class Gumbel(Method):
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

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores >= 0

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        if not state.training:
            return straight_through(weight, scores, self.binarize(scores.detach()), scale)
        first, second = torch.rand(2, *scores.shape, device=scores.device).add_(EPSILON).log_()
        soft = ((scores - (second / first + EPSILON).log()) / self.temperature).sigmoid()
        return straight_through(weight, soft, soft.detach() > 0.5, scale)

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        return self.strength / state.batch_size * scores.sum()
