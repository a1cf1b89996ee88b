"""The adaptive codec with the base at hand: the magnitude and the sign of the frozen weights."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..errors import CorruptAdapterError
from .adaptive import decode, encode, known
from .base import CODECS, Bits, Bytes, Codec, Profile, Side
from .rates import CONTEXTS, Floats

CHANNELS = 3
CLASSES = 16
UNIT = 4096  # a factor of one in the table


@CODECS.register
@dataclass(frozen=True, slots=True)
class AdaptiveBase(Codec):
    """As adaptive, also by the base's weights, which it needs; slow.

    Scores trained with SGD move in proportion to the weight, so that its magnitude tells much. Scores trained with Adam
    move with the sign of weight times gradient, and gradients are nearly of low rank, so that signs tell much.
    """

    id = "adaptive-base"
    reference = "https://arxiv.org/abs/1311.2540"
    needs_base = True

    def encode(self, bits: Bits, side: Side) -> bytes | None:
        return encode(bits, side, known(side, side.classes, _curve(side.table)), (0, CHANNELS))

    def decode(self, data: Bytes, side: Side) -> Bits:
        return decode(data, side, known(side, side.classes, _curve(side.table)), CHANNELS)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()] if profile == "max" else []


def _curve(table: bytes | None) -> Floats | None:
    if table is None:
        return None
    factors = np.frombuffer(table, dtype="<u2") if len(table) == 2 * CLASSES else np.zeros(1)
    if not factors.all():
        raise CorruptAdapterError(
            f"a table of {len(table)} bytes, expected {CLASSES} factors over zero of 2 bytes each"
        )
    return np.tile(factors / UNIT, CONTEXTS // CLASSES)
