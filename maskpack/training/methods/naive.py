"""Masks by magnitude, without training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...registry import Positive
from .base import FINISHED, METHODS, Method, State


@METHODS.register
@dataclass(frozen=True)
class Naive(Method):
    """Keep weights far from the mean, without training.

    A weight w is removed (in transfer: reused) if |w - mean| < width * standard deviation.

    Attributes:
        width: in standard deviations.
        scope: "tensor": mean and deviation of each parameter; "global": of all together.
    """

    id: ClassVar[str] = "naive"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    learns: ClassVar[bool] = False

    width: Positive = 1.0
    scope: Literal["tensor", "global"] = "tensor"

    def init_scores(self, weight: Tensor) -> Tensor:
        return weight.detach().to(torch.float32, copy=True)

    def shared(self, scores: Sequence[Tensor], progress: float) -> Sequence[Tensor] | None:
        if self.scope == "tensor":
            return None
        return [_mean_and_deviation(torch.cat([one.detach().flatten().cpu() for one in scores]))] * len(scores)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        mean, deviation = (_mean_and_deviation(scores) if state.shared is None else state.shared).to(scores.device)
        far: Tensor = (scores - mean).abs() >= self.width * deviation
        return far


def _mean_and_deviation(values: Tensor) -> Tensor:
    wide = values.double()
    return torch.stack([wide.mean(), wide.std(correction=0)]).float()
