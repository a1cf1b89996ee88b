"""Sparse edits, and masks by magnitude without training (Differentiable Weight Masks)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...mask import Op
from ...registry import NonNegative, Number, Positive, Share
from .base import FINISHED, METHODS, Method, State
from .topk import greatest

DEVIATION = 1e-3  # of the initial edits


@METHODS.register
@dataclass(frozen=True)
class Edit(Method):
    """Edit weights additively under a reward for large edits; keep those that were hardly edited.

    Scores are the edits E. Training computes with w + E and subtracts `strength` * mean(min(|E|, bound)) from the loss.
    At the end small edits are dropped, and the adapter stores w + E of the others.

    Attributes:
        threshold: edits of at most this absolute value are dropped.
        share: of the edits of each parameter that stay, the greatest ones, in place of a threshold; 0: the threshold.
        strength: of the reward. bound: absolute value up to which an edit is rewarded.
        rank: number of singular directions of an edit, as a matrix, that stay at the end; 0: all.
    """

    id: ClassVar[str] = "edit"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    op: ClassVar[Op] = "replace"
    hardens: ClassVar[bool] = True

    threshold: NonNegative = 0.01
    share: Share = 0.0
    strength: NonNegative = 1.0
    bound: Positive = 1.0
    rank: Number = 0

    def init_scores(self, weight: Tensor) -> Tensor:
        return (DEVIATION * torch.randn(weight.shape)).to(weight.device)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return self._small(self._low_rank(scores))

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        if state.training:
            return (weight + scores).to(weight.dtype)
        edit = self._low_rank(scores.detach())
        return torch.where(self._small(edit), weight, (weight + edit).to(weight.dtype))

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        return -self.strength * scores.abs().clamp(max=self.bound).mean()

    def values(self, weight: Tensor, scores: Tensor) -> Tensor:
        return (weight + self._low_rank(scores.detach())).to(weight.dtype)

    def _low_rank(self, edit: Tensor) -> Tensor:
        if not self.rank or edit.ndim < 2:
            return edit
        left, size, right = torch.linalg.svd(edit.flatten(1), full_matrices=False)
        nearest: Tensor = (left[:, : self.rank] * size[: self.rank]) @ right[: self.rank]
        return nearest.reshape(edit.shape)

    def _small(self, edit: Tensor) -> Tensor:
        """Return which edits are dropped, bool."""
        if not self.share:
            return edit.abs() <= self.threshold
        return ~greatest(edit.abs().flatten(), round(self.share * edit.numel())).reshape(edit.shape)


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
