"""Entropy coding of where events are, given a level of probability for each weight: asymmetric numeral system of gaps.

https://arxiv.org/abs/1311.2540; docs/format.md section 6.
"""

from array import array
from bisect import bisect_right
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import Bits
from .rates import CENTERS, LEVELS, ONE

LOWEST = 1 << 24  # the state lies between this and LOWEST << 16
STATE_BYTES = 5
MOST_PER_BYTE = 24_000  # weights: at the lowest level, 5,679 without an event take two bits
FREQUENCY = (1 << 17) - 1


@cache
def steps(level: int) -> list[int]:
    """Return the cumulative frequencies of gaps 0, 1, 2 … at a level, until an event has come in three of four cases.

    The last entry is where the symbol "no event in as many weights" begins.
    """
    probability, cumulative = int(CENTERS[level]), [0]
    while cumulative[-1] < ONE * 3 // 4:
        left = ONE - cumulative[-1]
        cumulative.append(cumulative[-1] + (left * probability + ONE // 2) // ONE)
    return cumulative


def by_level(levels: NDArray[np.uint8]) -> tuple[NDArray[np.intp], list[int]]:
    """Return the order in which a block's weights are coded, level after level, and how many each level has."""
    flat = levels.reshape(-1)
    return np.argsort(flat, kind="stable"), np.bincount(flat, minlength=LEVELS).tolist()


class GapEncoder:
    """Collects the symbols of blocks; `finish` returns their bytes."""

    def __init__(self) -> None:
        self.blocks: list[NDArray[np.int64]] = []  # a symbol is its first slot << 17 | its frequency

    def put(self, levels: NDArray[np.uint8], events: NDArray[np.bool_]) -> None:
        """Code the events of a block."""
        order, counts = by_level(levels)
        where, symbols, at, start = np.flatnonzero(events.reshape(-1)[order]).tolist(), [], 0, 0
        where.append(events.size)
        for level, count in enumerate(counts):
            if not count:
                continue
            cumulative, stop = steps(level), start + count
            longest = len(cumulative) - 1
            while start < stop:
                gap, reach = where[at] - start, min(longest, stop - start)
                if gap < reach:
                    symbols.append(cumulative[gap] << 17 | cumulative[gap + 1] - cumulative[gap])
                    start += gap + 1
                    at += 1
                else:
                    symbols.append(cumulative[reach] << 17 | ONE - cumulative[reach])
                    start += reach
        self.blocks.append(np.array(symbols, dtype=np.int64))

    def finish(self) -> bytes:
        """Return the final state and the words that it lacks, in the order of reading."""
        state, words = LOWEST, array("H")
        for block in reversed(self.blocks):
            for symbol in reversed(block.tolist()):
                frequency = symbol & FREQUENCY
                if state >= frequency << 24:
                    words.append(state & 0xFFFF)
                    state >>= 16
                state = (state // frequency << 16) + state % frequency + (symbol >> 17)
        return state.to_bytes(STATE_BYTES, "little") + np.array(words, dtype="<u2")[::-1].tobytes()


class GapDecoder:
    """Gives back the events of blocks, in the order in which they were put."""

    def __init__(self, data: Bits):
        if len(data) < STATE_BYTES or (len(data) - STATE_BYTES) % 2:
            raise CorruptAdapterError(f"{len(data)} bytes of coded gaps, expected {STATE_BYTES} and pairs")
        self.state = int.from_bytes(data[:STATE_BYTES].tobytes(), "little")
        self.words = array("H", np.frombuffer(data[STATE_BYTES:].tobytes(), dtype="<u2")[::-1].astype("=u2").tobytes())

    def get(self, levels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return the events of the next block."""
        order, counts = by_level(levels)
        events = np.zeros(levels.size, dtype=np.bool_)
        events[order[self._positions(counts)]] = True
        return events.reshape(levels.shape)

    def _positions(self, counts: list[int]) -> list[int]:
        state, words, start, found = self.state, self.words, 0, []
        for level, count in enumerate(counts):
            if not count:
                continue
            cumulative, stop = steps(level), start + count
            longest = len(cumulative) - 1
            while start < stop:
                slot = state & 0xFFFF
                gap = bisect_right(cumulative, slot) - 1
                reach = min(longest, stop - start)
                if gap < reach:
                    first = cumulative[gap]
                    frequency = cumulative[gap + 1] - first
                    start += gap
                    found.append(start)
                    start += 1
                else:
                    first = cumulative[reach]
                    frequency = ONE - first
                    start += reach
                state = frequency * (state >> 16) + slot - first
                if state < LOWEST:
                    if not words:
                        raise CorruptAdapterError("the coded gaps end too early")
                    state = state << 16 | words.pop()
        self.state = state
        return found

    def end(self) -> None:
        """Check that all was read: the state is back where the encoder began."""
        if self.words or self.state != LOWEST:
            raise CorruptAdapterError(f"{2 * len(self.words)} bytes of coded gaps are left, or the last state is wrong")
