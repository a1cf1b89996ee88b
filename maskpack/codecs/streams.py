"""Pieces that payloads are made of: varints, unary numbers, bit planes, the rarer symbol (docs/format.md section 6)."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import Bits, Bytes

Numbers = NDArray[Any]  # integers: of four bytes where all fit, as most masks' positions do
FOUR_BYTES = 1 << 30
CHUNK = 1 << 20  # numbers, or bytes of packed bits, that are worked on at once where copies would add up
MAX_VARINT = 9  # bytes, 63 bits
NO_EVENTS = 0x80  # in the first byte, and with the symbol all of the payload
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def varint(value: int) -> bytes:
    """Return an integer >= 0 in groups of seven bits, lowest first; the top bit of a byte says that another follows."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


class Reader:
    """Takes a payload apart from the front; every piece is checked against what is there.

    Raises:
        CorruptAdapterError: from each method, if the payload ends too early.
    """

    def __init__(self, data: Bytes):
        self.data = memoryview(data)
        self.at = 0

    def take(self, size: int) -> Bits:
        """Return the next `size` bytes."""
        if not 0 <= size <= len(self.data) - self.at:
            raise CorruptAdapterError(
                f"a piece of {size} bytes is stated at byte {self.at} of a payload of {len(self.data)}"
            )
        self.at += size
        return np.frombuffer(self.data[self.at - size : self.at], dtype=np.uint8)

    def byte(self) -> int:
        """Return the next byte."""
        return int(self.take(1)[0])

    def varint(self) -> int:
        """Return the next varint."""
        value = 0
        for shift in range(0, 7 * MAX_VARINT, 7):
            group = self.byte()
            value |= (group & 0x7F) << shift
            if group < 0x80:
                return value
        raise CorruptAdapterError(f"a number has more than {MAX_VARINT} bytes in the payload")

    def rest(self) -> Bits:
        """Return all bytes that are left."""
        return self.take(len(self.data) - self.at)


def pack_unary(values: Numbers) -> bytes:
    """Return numbers >= 0 as bits: as many zeros as the number says, then a one."""
    if not values.size:
        return b""
    ends = values + 1
    np.cumsum(ends, out=ends)
    ends -= 1
    bits = np.zeros(int(ends[-1]) + 1, dtype=np.bool_)
    bits[ends] = True
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_unary(packed: Bits) -> Numbers:
    """Return the numbers that `pack_unary` packed; zeros after the last one are padding."""
    ends = where_ones(packed)
    if len(packed) and (not ends.size or ends[-1] < 8 * len(packed) - 8):
        raise CorruptAdapterError("the unary numbers of the payload end before their last byte")
    return distances(ends)


def distances(positions: Numbers) -> Numbers:
    """Return how many places lie between each of rising positions and the one before, or the start."""
    found = positions.copy()
    found[1:] -= positions[:-1]
    found[1:] -= 1
    return found


def planes(values: Numbers, width: int) -> list[NDArray[np.uint8]]:
    """Return the lower `width` bits of numbers as planes: bit 0 of every number, then bit 1, and so on."""
    return [(values >> bit & 1).astype(np.uint8) for bit in range(width)]


def add_planes(values: Numbers, bits: NDArray[np.uint8], width: int) -> None:
    """Shift numbers by `width` bits to the left and fill these from planes."""
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        part <<= width
        for bit in range(width):
            first = bit * values.size + start
            part |= np.left_shift(bits[first : first + part.size], bit, dtype=part.dtype)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that codecs see a parameter as: output units and what feeds them."""
    count = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else min(count, 1)
    return rows, count // rows if rows else 0


def count_ones(bits: Bits) -> int:
    """Return the number of true bits."""
    return int(ONES[bits].sum(dtype=np.int64))


def where_ones(bits: Bits) -> Numbers:
    """Return the positions of true bits, in increasing order."""
    found, at = np.empty(count_ones(bits), dtype=np.int32 if 8 * len(bits) < FOUR_BYTES else np.int64), 0
    for start in range(0, len(bits), CHUNK):
        own = np.flatnonzero(np.unpackbits(bits[start : start + CHUNK], bitorder="little").view(np.bool_))
        np.add(own, 8 * start, out=found[at : at + own.size], casting="unsafe")
        at += own.size
    return found


def rarer(bits: Bits, count: int) -> tuple[int, Numbers]:
    """Return the rarer of the two symbols (1 if they are even) and where it is, in increasing order."""
    symbol = int(2 * count_ones(bits) <= count)
    return symbol, where_ones(bits if symbol else flipped(bits, count))


def flipped(bits: Bits, count: int) -> Bits:
    """Return packed bits with each of the `count` bits inverted."""
    bits = ~bits
    if count % 8:
        bits[-1] &= (1 << count % 8) - 1
    return bits


def place(symbol: int, where: Numbers, count: int) -> Bits:
    """Return packed bits that are `symbol` at distinct positions and the other symbol elsewhere."""
    bits = np.zeros((count + 7) // 8, dtype=np.uint8)
    for start in range(0, where.size, CHUNK):
        own = where[start : start + CHUNK]
        np.add.at(bits, own >> 3, np.left_shift(1, own & 7).astype(np.uint8))
    return bits if symbol else flipped(bits, count)
