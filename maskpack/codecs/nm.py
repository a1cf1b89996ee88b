"""N:M masks, as 2:4: which of the possible patterns each group of M weights has."""

from dataclasses import dataclass
from functools import cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import CODECS, Bits, Bytes, Codec, Profile, Reader, Side, from_frame, to_frame

GROUPS = (2, 4, 8, 16)
GLANCE = 256  # groups that are looked at before all are


@CODECS.register
@dataclass(frozen=True, slots=True)
class NM(Codec):
    """N true bits in every M consecutive ones, as 2:4; quick.

    Several patterns a byte, Huffman-coded by zstandard: 2:4 takes .653 bits a weight where all patterns are as
    frequent; the least is log2(6) / 4 = .646.
    """

    id = "nm"
    reference = "https://arxiv.org/abs/2104.08378"

    def encode(self, bits: Bits, side: Side) -> bytes | None:
        for size in GROUPS:
            if not side.count or side.count % size:
                continue
            glance = np.unpackbits(bits[: GLANCE * size // 8], count=min(side.count, GLANCE * size), bitorder="little")
            kept = int(glance[:size].sum())
            patterns = _patterns(size, kept)
            if not 1 < len(patterns) <= 256 or (glance.reshape(-1, size).sum(1) != kept).any():
                continue
            groups = np.unpackbits(bits, count=side.count, bitorder="little").reshape(-1, size)
            if (groups.sum(1) != kept).any():
                continue
            values = groups @ (1 << np.arange(size, dtype=np.uint32))
            digits = np.searchsorted(patterns, values)
            each = _digits(len(patterns))
            digits = np.append(digits, np.zeros(-digits.size % each, dtype=np.int64)).reshape(-1, each)
            joined = (digits @ len(patterns) ** np.arange(each)).astype(np.uint8)
            return bytes([size, kept]) + to_frame(joined.tobytes(), 1)
        return None

    def decode(self, data: Bytes, side: Side) -> Bits:
        reader = Reader(data)
        size, kept = reader.byte(), reader.byte()
        if size not in GROUPS or not 0 < kept < size or len(_patterns(size, kept)) > 256 or side.count % size:
            raise CorruptAdapterError(
                f"an nm payload states {kept} of {size} for {side.count} weights; groups have {GROUPS} weights, and at "
                f"most 256 patterns"
            )
        patterns = _patterns(size, kept)
        each, groups = _digits(len(patterns)), side.count // size
        joined = np.frombuffer(from_frame(reader.rest(), -(-groups // each)), dtype=np.uint8)
        unused = len(patterns) ** (groups % each or each)
        if joined.size and (joined.max() >= len(patterns) ** each or joined[-1] >= unused):
            raise CorruptAdapterError(f"an nm payload has bytes up to {joined.max()} for {len(patterns)} patterns")
        digits = np.arange(256)[:, None] // len(patterns) ** np.arange(each) % len(patterns)
        table = (patterns[digits][:, :, None] >> np.arange(size) & 1).astype(np.uint8).reshape(256, each * size)
        return side.checked(np.packbits(table[joined].reshape(-1)[: side.count], bitorder="little"))

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()]


@cache
def _patterns(size: int, kept: int) -> NDArray[np.int64]:
    """Return the numbers below 2^size with `kept` true bits, rising."""
    numbers = np.arange(1 << size)
    ones = (numbers[:, None] >> np.arange(size) & 1).sum(1)
    return np.flatnonzero(ones == kept)


def _digits(patterns: int) -> int:
    """Return how many patterns a byte holds: zstandard leaves bytes uncompressed that have much over 64 even values."""
    return next((each for each in range(6, 0, -1) if patterns**each <= 64), 1)
