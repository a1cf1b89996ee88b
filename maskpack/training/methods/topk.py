"""Masks that keep a fixed share: the best-scored weights (edge-popup), or N of every M (MaskLLM)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...backbone.shards import whole
from ...errors import ConfigError
from ...mask import masked_weight
from ...registry import Positive, Range
from .base import FINISHED, METHODS, Method, State


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
    detach_scale = True  # the density is given, so the scale is a constant

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
        return super().effective(weight, scores.abs() if self.absolute else scores, scale, state)

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


DEVIATION = 0.01  # of the initial logits
MOST = 8  # weights of a group: 70 choices of 4


@METHODS.register
@dataclass(frozen=True)
class NM(Method):
    """Keep N of every M consecutive weights, by a Gumbel softmax over all choices (MaskLLM).

    A group is M weights along the last dimension, of a convolution along its input channels, and has a logit for each
    choice. Training computes with soft masks; temperature and factor move linearly from their first to their last
    value. In evaluation mode and in the adapter the choice with the greatest logit is taken.

    Attributes:
        kept, group: N and M.
        temperature, last_temperature: of the softmax. factor, last_factor: of the logits.
        prior: initial preference for the choice of the greatest absolute weights, in deviations.
    """

    id: ClassVar[str] = "nm"
    reference: ClassVar[str] = "https://arxiv.org/abs/2409.17481"
    draws: ClassVar[bool] = True
    hardens: ClassVar[bool] = True

    kept: int = 2
    group: int = 4
    temperature: Positive = 4.0
    last_temperature: Positive = 0.05
    factor: Positive = 100.0
    last_factor: Positive = 500.0
    prior: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.kept < self.group <= MOST:
            raise ConfigError(f"expected 0 < kept < group <= {MOST}, got kept = {self.kept}, group = {self.group}")

    def init_scores(self, weight: Tensor) -> Tensor:
        """Return the logits, (groups, choices)."""
        if weight.ndim < 2 or weight.shape[1] % self.group:
            raise ConfigError(
                f"a weight of shape {tuple(weight.shape)} has no whole groups of {self.group} along its inputs; leave "
                f"it out with --exclude"
            )
        magnitude = weight.detach().abs().float().movedim(1, -1).reshape(-1, self.group)
        choices = self._choices(weight.device)
        best = choices[(magnitude @ choices.T).argmax(1)]
        alike = best @ choices.T
        drawn = DEVIATION * torch.randn(alike.shape).to(weight.device)
        return drawn + DEVIATION * self.prior * (alike - alike.mean(1, keepdim=True))

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return self._weights(self._choices(scores.device)[scores.argmax(1)].bool(), state)

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        divisor = torch.tensor(math.sqrt(self.kept / self.group)) if scale else None
        if not state.training:
            return masked_weight(weight, self.binarize(scores.detach(), state), divisor)
        temperature = self.temperature + state.progress * (self.last_temperature - self.temperature)
        factor = self.factor + state.progress * (self.last_factor - self.factor)
        scores = scores.float()
        noise = -torch.rand_like(scores).clamp(min=1e-10).log_().neg_().clamp(min=1e-10).log_()
        soft = ((scores * factor + noise) / temperature).softmax(1)
        masked = weight * self._weights(soft @ self._choices(scores.device), state)
        return masked if divisor is None else masked / divisor

    def _weights(self, groups: Tensor, state: State) -> Tensor:
        """Return groups, (groups, M), in the shape of the weight."""
        assert state.shape is not None
        rows, inputs, *rest = state.shape
        return groups.reshape(rows, *rest, inputs).movedim(-1, 1).contiguous()

    def _choices(self, device: torch.device) -> Tensor:
        """Return every choice of N of M weights as zeros and ones, (choices, M)."""
        choices = torch.zeros(math.comb(self.group, self.kept), self.group)
        for row, kept in zip(choices, combinations(range(self.group), self.kept), strict=True):
            row[list(kept)] = 1
        return choices.to(device)
