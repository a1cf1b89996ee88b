"""Rate-aware training: a penalty on the coded size of masks, strong enough to keep a budget of bytes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs.base import Side
from ..codecs.choose import rivals, smallest
from ..errors import ConfigError
from ..mask import PackedMask, packed_bits
from .config import TrainConfig
from .methods.base import methods_that_are
from .scores import ScoredWeight

LEAST, REACTION = 0.01, 0.15  # of the pressure: its first and least value, and how fast it follows the size
HORIZON, SMOOTHING = 20, 0.2  # steps that are looked ahead, and the weight of the last step in the trend
HALVINGS = 24  # of the interval in which the shift that fits lies
MARGIN = 1.002  # where an exact size turned out too great
STATE = ("pressure", "trend", "before", "ratio")  # of a `RateControl`, beside the scores


def coded_bits(mask: Tensor) -> Tensor:
    """Return the bits of a mask (float, 1 = kept) that is coded with the densities of its rows and columns.

    With removed shares r_i of R rows, c_j of C columns and e of all, and the binary entropy H, this is
    C sum H(r_i) + R sum H(c_j) - R C H(e): the entropy under independent bits whose odds are the product of a row's and
    a column's, up to second order. It is differentiable in the mask. Of one dimension, it is R C H(e).
    """
    removed = 1 - mask
    whole = mask.numel() * _entropy(removed.mean(), mask.numel())
    if mask.ndim < 2:
        return whole
    matrix = removed.flatten(1)
    rows, columns = matrix.shape
    by_row = columns * _entropy(matrix.mean(1), columns).sum()
    by_column = rows * _entropy(matrix.mean(0), rows).sum()
    return (by_row + by_column - whole).clamp(min=0.0)


def _entropy(share: Tensor, count: int) -> Tensor:
    """Return the binary entropy, in bits, of shares of `count`.

    It is straight below half a one and above all but that, so that its slope is finite and it is 0 at both ends.
    """
    least = 0.5 / count
    p = share.clamp(least, 1 - least)
    entropy = -(p * p.log2() + (1 - p) * (1 - p).log2())
    slope = (-least * math.log2(least) - (1 - least) * math.log2(1 - least)) / least
    return torch.minimum(entropy, torch.minimum(share, 1 - share) * slope)


def coded_bytes(masks: Iterable[PackedMask]) -> int:
    """Return the bytes of the payloads of masks in the profile "default"."""
    codecs = rivals("default", None, base=False)
    return sum(
        len(smallest(codecs, [(packed_bits(bits), Side(mask.shape))]).payload)
        for mask in masks
        for _, bits in mask.payloads()
    )


def rate_control(config: TrainConfig, scored: Sequence[ScoredWeight]) -> "RateControl | None":
    """Return a control for the byte budget of the settings, or None without a budget or masks."""
    weights = sum(math.prod(one.shape) for one in scored)
    budget = config.bytes_budget if config.rate is None else config.rate * weights / 8
    return None if budget is None or not scored else RateControl(scored, budget)


class RateControl:
    """Keeps the masks of a run within a budget of bytes.

    The loss of a step gets pressure * coded bits / weights. The pressure rises where the masks will be too large in
    HORIZON steps and falls where they will not: its logarithm by REACTION times the logarithm of that size / budget, at
    most 1, each step. Without looking ahead it rises as long as the size is too great, and is far too strong then.
    `trend` is the logarithm by which the size grows in a step, smoothed; `ratio` that of the codecs' bytes to those of
    `coded_bits`, when they were last compared.
    """

    def __init__(self, scored: Sequence[ScoredWeight], budget: float):
        self.scored, self.budget = scored, budget
        self.weights = sum(math.prod(one.shape) for one in scored)
        self.pressure, self.trend, self.ratio = LEAST, 0.0, 1.0
        self.size, self.before = 0.0, 0.0  # bytes by `coded_bits`, in this step and in the one before
        if not scored[0].method.rising:
            raise ConfigError(
                f"a budget of bytes needs scores that keep more weights the higher they are, one for each weight, and "
                f"those of the method {scored[0].method.id!r} are others; take {methods_that_are('rising')}, or leave "
                f"the budget out"
            )
        least = coded_bytes(PackedMask.from_tensor(torch.ones(one.shape, dtype=torch.bool)) for one in scored)
        if budget < least:
            raise ConfigError(
                f"a budget of {budget:.0f} bytes is less than the {least} bytes that masks of these {len(scored)} "
                f"parameters take where every weight is kept; give more, or mask fewer parameters"
            )

    def penalty(self) -> Tensor:
        """Return the penalty on the coded size, for the loss of a step."""
        bits = torch.stack([coded_bits(one.straight()) for one in self.scored]).sum()
        self.size = max(float(bits.detach()) / 8, 1.0)
        return self.pressure / self.weights * bits

    def follow(self) -> None:
        """Adapt the weight of the penalty to the coded size; called after each step of the optimiser."""
        grown = math.log(self.size / self.before) if self.before else 0.0
        self.trend += SMOOTHING * (grown - self.trend)
        self.before = self.size
        ahead = math.log(self.size * self.ratio / self.budget) + HORIZON * self.trend
        self.pressure = max(self.pressure * math.exp(REACTION * min(max(ahead, -1.0), 1.0)), LEAST)

    def compare(self) -> int:
        """Compare the estimate with the codecs; return the bytes that the masks take."""
        size = coded_bytes(one.mask() for one in self.scored)
        self.ratio = size / max(self._estimate(0.0), 1.0)
        return size

    def fit(self) -> int:
        """Raise all scores by the least number that lets the masks fit into the budget; return their bytes."""
        while (size := self.compare()) > self.budget:
            self.ratio *= MARGIN
            # of masks whose rows are all or nothing the estimate is 0, whatever the codecs take
            fits = self._fits_coded if self._fits(0.0) else self._fits
            least, most = 0.0, 1.0
            while not fits(most):
                least, most = most, 2 * most
            for _ in range(HALVINGS):
                middle = (least + most) / 2
                least, most = (least, middle) if fits(middle) else (middle, most)
            with torch.no_grad():
                for one in self.scored:
                    one.scores.add_(most)
        return size

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, beside the scores."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue as a checkpoint left off."""
        for name in STATE:
            setattr(self, name, state[name])

    def _fits(self, shift: float) -> bool:
        return self._estimate(shift) * self.ratio <= self.budget

    @torch.no_grad()
    def _fits_coded(self, shift: float) -> bool:
        masks = (PackedMask.from_tensor(one.binary(shift)) for one in self.scored)
        return coded_bytes(masks) <= self.budget

    @torch.no_grad()
    def _estimate(self, shift: float) -> float:
        """Bytes by `coded_bits`, of scores that are raised."""
        bits = (coded_bits(one.binary(shift).float()) for one in self.scored)
        return sum(float(one) for one in bits) / 8
