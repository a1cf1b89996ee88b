"""Binary masks drawn from learned probabilities."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...registry import check_above_zero
from .base import FINISHED, METHODS, Method, State, straight_through

LEAST = 1e-10  # of the logarithms, as published


@METHODS.register
@dataclass(frozen=True)
class Gumbel(Method):
    """Draw each bit with a learned probability (Gumbel-sigmoid), and remove as many weights as possible.

    Scores are the logits of the probabilities. In training a mask is drawn at every step, and the gradient goes through
    sigmoid((logit + noise) / temperature); in evaluation mode and in the adapter a weight is kept if its logit is at
    least 0. The sum of all logits times `strength` / batch size is added to the loss.

    Attributes:
        init: constant that all logits start from, above 0.
        temperature: of the sigmoid.
        strength: of the pressure to remove weights.
    """

    id: ClassVar[str] = "gumbel"
    reference: ClassVar[str] = "https://arxiv.org/abs/2010.02066"
    draws: ClassVar[bool] = True
    hardens: ClassVar[bool] = True
    rising: ClassVar[bool] = True

    init: float = 2.0
    temperature: float = 1.0
    strength: float = 1e-4

    def __post_init__(self) -> None:
        check_above_zero(self, "init", "temperature")
        if not 0 <= self.strength < math.inf:
            raise ConfigError(f"strength must be a finite number of at least 0, got {self.strength}")

    def init_scores(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, self.init, dtype=torch.float32)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return scores >= 0

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        if not state.training:
            return straight_through(weight, scores, self.binarize(scores.detach()), scale)
        first, second = torch.rand(2, *scores.shape, device=scores.device).add_(LEAST).log_()
        soft = ((scores - (second / first + LEAST).log()) / self.temperature).sigmoid()
        return straight_through(weight, soft, soft.detach() > 0.5, scale)

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        return self.strength / state.batch_size * scores.sum()
