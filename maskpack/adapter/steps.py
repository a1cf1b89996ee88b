"""Values as whole numbers of steps: norms relative to the base's, rows of a head (docs/format.md section 4.2).

Values that are no such multiples are rounded by training, before it measures, never where a file is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backbone.model import MAX_WEIGHTS
from ..codecs.base import Bytes, from_frame, to_frame
from ..errors import AdapterError, CorruptAdapterError, short_repr

if TYPE_CHECKING:
    from torch import Tensor

Integers = NDArray[np.int32]

OCTAVE = 32  # steps of a scale that double it
FACTORS = np.exp2(np.arange(OCTAVE) / OCTAVE).astype(np.float32).astype(np.float64)
SHIFT = float(np.float32(math.log(2) / OCTAVE))  # a step of a shift, in absolute values of the base's scale
MOST_SCALE, MOST_SHIFT = 1 << 12, 1 << 22  # steps
ROW = 64  # steps from zero to the greatest absolute value of a row
PLANES = 3  # bytes of an integer at most
FREE, EACH = 1 << 22, 1 << 8  # integers that a frame may stand for at all, and for each of its bytes
LEVEL = 19


def integers_to_frame(parts: Sequence[Integers]) -> bytes:
    """Return a frame of integers: 0, -1, 1, -2, … as 0, 1, 2, 3, …; all lowest bytes, then all second ones."""
    flat = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int64)
    codes = np.where(flat < 0, -2 * flat - 1, 2 * flat)
    planes = max(1, (int(codes.max(initial=0)).bit_length() + 7) // 8)
    return to_frame(b"".join((codes >> 8 * k & 0xFF).astype(np.uint8).tobytes() for k in range(planes)), LEVEL)


def integers_from_frame(data: Bytes, count: int) -> Integers:
    """Return the `count` integers of a frame, at least one; CorruptAdapterError if it holds more or fewer."""
    if count > FREE + EACH * len(data):
        raise CorruptAdapterError(f"a frame of {len(data)} bytes is too short for {count} integers")
    content = from_frame(data, count, PLANES * count)
    if len(content) % count:
        raise CorruptAdapterError(
            f"a frame of {len(content)} bytes holds no whole number of bytes for {count} integers"
        )
    codes = np.zeros(count, np.int32)
    for k, plane in enumerate(np.frombuffer(content, np.uint8).reshape(-1, count)):
        codes |= plane.astype(np.int32) << 8 * k
    return (codes >> 1) ^ -(codes & 1)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """The scale and the shift of a normalisation layer, channel by channel, as steps from those of the base.

    Attributes:
        scale: (C,), twice the steps of which 32 double the weight, plus 1 where it changes its sign.
        shift: (C,), steps of 0.022 times the base's absolute weight, from its bias times the factor of the scale; None
            for a layer without bias.
    """

    scale: Integers
    shift: Integers | None = None

    __repr__ = short_repr

    def values(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, float32, from those of the base and where they lie."""
        import torch

        where = "cpu" if weight.is_mps else weight.device  # which has no float64
        old, factor = weight.detach().to(where, torch.float64), torch.from_numpy(self._factors()).to(where)
        if self.shift is None or bias is None:
            return (old * factor).float(), None
        shift = torch.from_numpy(self.shift * SHIFT).to(where)
        shifted = bias.detach().to(where, torch.float64) * factor + shift * old.abs()
        return (old * factor).float(), shifted.float()

    @classmethod
    def nearest(cls, weight: Tensor, bias: Tensor | None, new: Tensor, shifted: Tensor | None) -> Norm | None:
        """Return the steps from the base's weight and bias to values nearest to the given ones, or None.

        That is where a weight is or becomes 0, or is not finite, or the way is too far.
        """
        old, target = _double(weight), _double(new)
        if not (np.isfinite(old).all() and np.isfinite(target).all() and old.all() and target.all()):
            return None
        steps = np.rint(OCTAVE * np.log2(np.abs(target / old)))
        if np.abs(steps).max(initial=0) >= MOST_SCALE // 2 - 1:
            return None
        found = cls(2 * steps.astype(np.int32) + (old * target < 0))
        if bias is None or shifted is None:
            return found
        factor = found._factors()
        shift = np.rint((_double(shifted) - _double(bias) * factor) / (SHIFT * np.abs(old)))
        fits = np.isfinite(shift).all() and np.abs(shift).max(initial=0) < MOST_SHIFT
        return cls(found.scale, shift.astype(np.int32)) if fits else None

    def _factors(self) -> NDArray[np.float64]:
        steps, sign = self.scale >> 1, 1 - 2 * (self.scale & 1)
        found: NDArray[np.float64] = sign * np.ldexp(FACTORS[steps % OCTAVE], steps // OCTAVE)
        return found


def _double(tensor: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = tensor.detach().cpu().double().numpy()
    return found


def norms_to_frame(norms: Mapping[str, Norm]) -> bytes:
    """Return the frame of the norms of a set: all scales, then all shifts."""
    scales, shifts = [one.scale for one in norms.values()], [one.shift for one in norms.values()]
    return integers_to_frame([*scales, *(one for one in shifts if one is not None)])


def norms_from_frame(data: Bytes, layers: Mapping[str, tuple[int, bool]]) -> dict[str, Norm]:
    """Return norms by the names of layers, whose channels are given and whether they have shifts."""
    sizes = [size for size, _ in layers.values()]
    sizes += [size for size, shifted in layers.values() if shifted]
    pieces = iter(np.split(integers_from_frame(data, sum(sizes)), np.cumsum(sizes)[:-1]))
    scales = {name: next(pieces) for name in layers}
    norms = {name: Norm(scales[name], next(pieces) if shifted else None) for name, (_, shifted) in layers.items()}
    for name, one in norms.items():
        far = max(
            np.abs(one.scale).max() / MOST_SCALE, 0 if one.shift is None else np.abs(one.shift).max() / MOST_SHIFT
        )
        if far >= 1:
            raise CorruptAdapterError(f"the norm {name!r} has more steps than {MOST_SCALE} or {MOST_SHIFT} allow")
    return norms


def row_steps(weight: Tensor) -> Tensor:
    """Return a step for each row of a head, (C,) float32: a power of two below its greatest absolute value; 1 if 0."""
    most = weight.detach().cpu().float().abs().amax(1)
    return (most / ROW).where(most / ROW > 0, 1.0)


def _counts(weight: Tensor, steps: Tensor) -> Tensor:
    return (weight.detach().cpu().double() / steps.cpu().double().unsqueeze(1)).round().int()


def rounded_rows(weight: Tensor) -> Tensor:
    """Return the nearest multiples of each row's `row_steps`, float32 on the CPU."""
    steps = row_steps(weight)
    return _counts(weight, steps).float() * steps.unsqueeze(1)


def rows_to_frame(weight: Tensor, steps: Tensor) -> bytes:
    """Return the frame of a head's weight in steps; AdapterError unless it comes back as it is."""
    counts = _counts(weight, steps)
    if not (counts.float() * steps.unsqueeze(1)).equal(weight.detach().cpu().float()):
        raise AdapterError("the weight of the head is no multiple of its `steps`, row by row; leave them out")
    return integers_to_frame([counts.flatten().numpy()])


def rows_from_frame(data: Bytes, steps: NDArray[Any], features: int) -> NDArray[np.float32]:
    """Return the weight (C, features) of a head; CorruptAdapterError if steps or integers cannot be."""
    if not 1 <= steps.size * features <= MAX_WEIGHTS or not (steps > 0).all():
        raise CorruptAdapterError(
            f"the head has {steps.size} steps for {features} features, expected numbers above 0, and at most "
            f"{MAX_WEIGHTS} weights; fetch the file again"
        )
    counts = integers_from_frame(data, steps.size * features).reshape(steps.size, features)
    weight: NDArray[np.float32] = counts.astype(np.float32) * steps.astype(np.float32)[:, None]
    return weight
