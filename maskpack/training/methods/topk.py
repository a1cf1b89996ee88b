"""The best-scored share of the weights (edge-popup)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...backbone.shards import whole
from ...registry import Range
from .base import FINISHED, METHODS, Method, State, straight_through


@METHODS.register
@dataclass(frozen=True)
class TopK(Method):
    """Keep a fixed share of the weights, those with the greatest scores (edge-popup).

    Of n weights ceil(share * n) are kept; of equal scores the first by parameter name and index.

    Attributes:
        share: of the weights that is kept.
        scope: "tensor": of each parameter; "global": of all together.
        progressive: begin with all weights and decrease linearly to the share at the end of training.
        absolute: compare absolute values of the scores.
        init: "kaiming": random, uniform; "magnitude": absolute values of the weights.
    """

    id: ClassVar[str] = "topk"
    reference: ClassVar[str] = "https://arxiv.org/abs/1911.13299"
    partial: ClassVar[bool] = True

    share: Annotated[float, Range(above=0, most=1)] = 0.5
    scope: Literal["tensor", "global"] = "tensor"
    progressive: bool = False
    absolute: bool = True
    init: Literal["kaiming", "magnitude"] = "kaiming"

    def init_scores(self, weight: Tensor) -> Tensor:
        if self.init == "magnitude":
            return weight.abs().to(torch.float32)
        scores = torch.empty(weight.shape, dtype=torch.float32)
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        # as nn.Linear and nn.Conv2d start: kaiming-uniform with a = sqrt(5)
        nn.init.uniform_(scores, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        return (scores.abs() if self.absolute else scores).to(weight.device)

    def shared(self, scores: Sequence[Tensor], progress: float) -> Sequence[Tensor] | None:
        """Return the number of kept weights of each parameter, for the scope "global"."""
        if self.scope == "tensor":
            return None
        flat = torch.cat([self._compared(whole(one)).flatten().cpu() for one in scores])
        kept = greatest(flat, self._kept(flat.numel(), progress))
        return [part.count_nonzero() for part in torch.split(kept, [one.numel() for one in scores])]

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        kept = self._kept(scores.numel(), state.progress) if state.shared is None else int(state.shared)
        return greatest(self._compared(scores).flatten(), kept).reshape(scores.shape)

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        mask = self.binarize(scores.detach(), state)
        # the density is given, so the scale is a constant
        return straight_through(weight, scores.abs() if self.absolute else scores, mask, scale, detach_scale=True)

    def _compared(self, scores: Tensor) -> Tensor:
        return scores.detach().abs() if self.absolute else scores.detach()

    def _kept(self, count: int, progress: float) -> int:
        share = self.share + (1 - progress) * (1 - self.share) if self.progressive else self.share
        # of the share as it is written: in floats 0.07 of 100 are more than 7
        return math.ceil(Fraction(str(min(share, 1.0))) * count)


def greatest(values: Tensor, kept: int) -> Tensor:
    """Return which of the flat values are the `kept` greatest, bool; of equal ones the first."""
    if kept <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    least = values.kthvalue(values.numel() - kept + 1).values
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= kept - above.count_nonzero()))
