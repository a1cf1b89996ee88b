"""Packed bits as they are."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from .base import CODECS, Bits, Bytes, Codec, Profile, Side


@CODECS.register
@dataclass(frozen=True, slots=True)
class Raw(Codec):
    """Packed bits as they are: for masks near density one half."""

    id = "raw"

    def encode(self, bits: Bits, side: Side) -> bytes:
        return bits.tobytes()

    def decode(self, data: Bytes, side: Side) -> Bits:
        return side.checked(np.frombuffer(data, dtype=np.uint8))

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()]
