"""Masks by magnitude, without training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from ...registry import check_above_zero
from .base import FINISHED, METHODS, Method, State


@METHODS.register
@dataclass(frozen=True)
class Naive(Method):
    """Keep the weights that are far from the mean; nothing is learned.

    A weight w is removed (in transfer: reused) if |w - mean| < width * standard deviation.

    Attributes:
        width: of the band, in standard deviations.
        scope: "tensor": mean and deviation of every parameter; "global": of all of them together.
    """

    id: ClassVar[str] = "naive"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    learns: ClassVar[bool] = False

    width: float = 1.0
    scope: str = "tensor"

    def __post_init__(self) -> None:
        check_above_zero(self, "width")
        if self.scope not in ("tensor", "global"):
            raise ConfigError(f"scope must be tensor or global, got {self.scope!r}")

    def init_scores(self, weight: Tensor) -> Tensor:
        """Return the weight itself."""
        return weight.detach().to(torch.float32, copy=True)

    def shared(self, scores: Sequence[Tensor], progress: float) -> Sequence[Tensor] | None:
        """Return mean and deviation of all weights, for each parameter the same two."""
        if self.scope == "tensor":
            return None
        found = _band(torch.cat([one.detach().flatten().cpu() for one in scores]))
        return [found] * len(scores)

    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        mean, deviation = (_band(scores) if state.shared is None else state.shared).to(scores.device)
        far: Tensor = (scores - mean).abs() >= self.width * deviation
        return far


def _band(values: Tensor) -> Tensor:
    """Mean and standard deviation, (2,)."""
    wide = values.double()
    return torch.stack([wide.mean(), wide.std(correction=0)]).float()
