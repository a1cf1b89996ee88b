"""Sparse edits: which weights can change without harm."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mask import Op
from .base import FINISHED, METHODS, Method, State
from .topk import greatest

DEVIATION = 1e-3  # of the edits at the start


@METHODS.register
@dataclass(frozen=True)
class Edit(Method):
    """Learn an edit of every weight, as many as do no harm; the mask keeps the weights that were hardly edited.

    Scores are the edits E: the weight is w + E, and `strength` * mean(min(|E|, bound)) is taken off the loss. Edits of
    at most the threshold are dropped at the end; the adapter stores w + E of the others.

    Attributes:
        threshold: edits with a greater absolute value count. share: of the weights of each parameter that count, those
            with the greatest edits, in place of a threshold; 0 for the threshold.
        strength: of the pressure to edit. bound: of an edit, up to which a larger one is rewarded.
        rank: of an edit as a matrix, how many of its leading singular directions are kept at the end; 0 for all.
    """

    id: ClassVar[str] = "edit"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    op: ClassVar[Op] = "replace"
    hardens: ClassVar[bool] = True

    threshold: float = 0.01
    share: float = 0.0
    strength: float = 1.0
    bound: float = 1.0
    rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share must be from 0 to 1, got {self.share}")
        if not (0 <= self.threshold < math.inf and 0 < self.bound < math.inf and 0 <= self.strength < math.inf):
            raise ConfigError(
                f"threshold and strength must be finite numbers of at least 0 and bound above 0; got {self.threshold}, "
                f"{self.strength} and {self.bound}"
            )
        if self.rank < 0:
            raise ConfigError(f"rank must be at least 0, got {self.rank}")

    def init_scores(self, weight: Tensor) -> Tensor:
        return (DEVIATION * torch.randn(weight.shape)).to(weight.device)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        return self._small(self._kept(scores))

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        """Return the edited weight, with every edit while `state.training`."""
        if state.training:
            return (weight + scores).to(weight.dtype)
        kept = self._kept(scores.detach())
        return torch.where(self._small(kept), weight, (weight + kept).to(weight.dtype))

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        return -self.strength * scores.abs().clamp(max=self.bound).mean()

    def values(self, weight: Tensor, scores: Tensor) -> Tensor:
        return (weight + self._kept(scores.detach())).to(weight.dtype)

    def _kept(self, scores: Tensor) -> Tensor:
        """The edit, or the nearest one of the rank that is asked for."""
        if not self.rank or scores.ndim < 2:
            return scores
        left, size, right = torch.linalg.svd(scores.flatten(1), full_matrices=False)
        kept: Tensor = (left[:, : self.rank] * size[: self.rank]) @ right[: self.rank]
        return kept.reshape(scores.shape)

    def _small(self, edit: Tensor) -> Tensor:
        """Which edits do not count, bool."""
        if not self.share:
            return edit.abs() <= self.threshold
        return ~greatest(edit.abs().flatten(), round(self.share * edit.numel())).reshape(edit.shape)
