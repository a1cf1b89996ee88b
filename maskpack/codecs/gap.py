"""Gaps between the rarer bits, as bytes in a zstandard frame: quick, for masks that are nearly all ones or zeros."""

from ctypes import c_int64
from dataclasses import dataclass
from typing import Self

import numpy as np

from ..errors import CorruptAdapterError
from . import native
from .base import (
    CHUNK,
    CODECS,
    FOUR_BYTES,
    Bits,
    Bytes,
    Codec,
    Profile,
    Reader,
    Side,
    distances,
    from_frame,
    place,
    rarer,
    to_frame,
)

FAR = 255  # as many weights without an event


@CODECS.register
@dataclass(frozen=True, slots=True)
class Gap(Codec):
    """Gaps between the rarer bits as bytes, Huffman-coded; quick."""

    id = "gap"
    reference = "https://www.rfc-editor.org/rfc/rfc8878"
    local = True

    def encode(self, bits: Bits, side: Side) -> bytes:
        symbol, where = rarer(bits, side.count)
        if (library := native.library()) is not None and where.dtype == np.int32:
            steps = np.empty(where.size + side.count // FAR, dtype=np.uint8)
            number = library.maskpack_gaps(c_int64(where.size), native.pointer(where), native.pointer(steps))
            return bytes([symbol]) + to_frame(steps[:number].tobytes(), 1)
        gaps, made = distances(where), list[bytes]()
        for start in range(0, gaps.size, CHUNK):
            own = gaps[start : start + CHUNK]
            ends = np.cumsum(own // FAR + 1) - 1
            steps = np.full(int(ends[-1]) + 1, FAR, dtype=np.uint8)
            steps[ends] = own % FAR
            made.append(steps.tobytes())
        return bytes([symbol]) + to_frame(b"".join(made), 1)

    def decode(self, data: Bytes, side: Side) -> Bits:
        reader = Reader(data)
        symbol = reader.byte()
        if symbol > 1:
            raise CorruptAdapterError(f"a gap payload begins with {symbol}, expected 0 or 1")
        steps = np.frombuffer(from_frame(reader.rest(), 0, side.count), dtype=np.uint8)
        near = steps != FAR
        widths = np.add(steps, near, dtype=np.uint16)
        end = int(widths.sum(dtype=np.int64))
        if steps.size and (not near[-1] or end > side.count):
            raise CorruptAdapterError(f"the gaps of a payload end at weight {end} of {side.count}")
        ends = np.cumsum(widths, dtype=np.int32 if side.count < FOUR_BYTES else np.int64)
        where = ends[near]
        where -= 1
        return place(symbol, where, side.count)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()]
