"""Events at known odds <-> 16-bit words: rANS in independent lanes, a step an event (docs/format.md section 6.2)."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import native
from .base import Numbers

BITS = 15  # of a probability
ONE = 1 << BITS
LOW = 1 << 16  # a state below it takes the next word
UNIT = 4096  # the hazard of an event with probability one half
WINDOW = 2 * UNIT  # hazard after which a step without an event ends
NEVER = 65535  # more hazard than any window has
LEVELS = 1024  # of log-odds, 1/16 apart; those of the middle are even
STRIDE = 32  # weights that are skipped at once in search of an event
DENSE = 600  # hazard of a weight
RANGE = 7  # a coefficient is an integer within ±RANGE
_FREQUENCIES = """
32420 126 8 8 8 8 8 8
31426 623 8 8 8 8 8 8
29024 1824 8 8 8 8 8 8
25450 3609 10 8 8 8 8 8
21616 5450 86 8 8 8 8 8
18184 6883 369 8 8 8 8 8
15282 7705 975 31 8 8 8 8
12842 7927 1842 162 8 8 8 8
10794 7685 2742 492 44 8 8 8
9076 7144 3451 1026 188 21 8 8
7640 6447 3856 1637 494 106 16 8
6432 5699 3964 2165 928 312 83 17
5414 4970 3846 2509 1380 640 250 82
4582 4313 3599 2662 1745 1014 522 238
3924 3762 3311 2676 1986 1353 847 487
"""  # of the coefficients 0 to 7 in each table; those of -1 to -7 are the same


class Tables(NamedTuple):
    """What the format fixes.

    Attributes:
        hazard: of each level, -log2 of the probability of no event, in 1/UNIT.
        survival: of each hazard in a window, the probability of no event, in 1/ONE.
        reach: of each slot, the least hazard whose survival is at most the slot.
        first: for each table of coefficients, where each of the 15 begins, and ONE.
        lists: survival, reach, and the least of reach and WINDOW, as lists, which are quicker one by one.
    """

    hazard: NDArray[np.uint16]
    survival: NDArray[np.uint16]
    reach: NDArray[np.uint16]
    first: NDArray[np.int32]
    lists: tuple[list[int], list[int], list[int]]

    def pointers(self) -> native.Tables:
        """Return what compiled loops take."""
        arrays: list[NDArray[Any]] = [self.hazard, self.survival, self.reach, self.first]
        return native.Tables(*map(native.address, arrays))


@cache
def tables() -> Tables:
    """Return the tables; no entry lies so close to one half that another rounding of the logarithm could change it."""
    odds = np.exp2((np.arange(LEVELS) - LEVELS // 2) / 16 * np.log2(np.e))
    hazard = np.clip(np.rint(UNIT * np.log2(1 + odds)), 1, 8 * UNIT).astype(np.uint16)
    survival = np.rint(ONE * np.exp2(-np.arange(10 * UNIT) / UNIT)).astype(np.uint16)
    reach = np.searchsorted(-survival.astype(np.int64), -np.arange(ONE), side="left")
    reach[reach == survival.size] = NEVER
    halves = np.array([line.split() for line in _FREQUENCIES.strip().split("\n")], dtype=np.int32)
    first = np.zeros((len(halves), 2 * RANGE + 2), dtype=np.int32)
    np.cumsum(np.concatenate([halves[:, :0:-1], halves], axis=1), axis=1, out=first[:, 1:])
    lists = survival.tolist(), reach.tolist(), np.minimum(reach, WINDOW).tolist()
    return Tables(hazard, survival, reach.astype(np.uint16), first, lists)


class Lane:
    """A lane that is decoded: its state, and the words ahead of it, the next one last."""

    __slots__ = ("state", "words")

    def __init__(self, words: Numbers):
        self.state, self.words = 0, words.tolist()[::-1]
        for _ in range(2):
            if self.state < LOW and self.words:
                self.state = self.state << 16 | self.words.pop()

    def coefficients(self, kinds: list[int]) -> list[int]:
        """Return the next coefficients, each coded with the table of that number."""
        edges, found, state = tables().first.tolist(), list[int](), self.state
        for kind in kinds:
            of = edges[kind]
            symbol = bisect_right(of, state & ONE - 1) - 1
            found.append(symbol - RANGE)
            state = (of[symbol + 1] - of[symbol]) * (state >> BITS) + (state & ONE - 1) - of[symbol]
            if state < LOW and self.words:
                state = state << 16 | self.words.pop()
        self.state = state
        return found

    def events(self, hazards: NDArray[np.uint16], spent: int) -> tuple[list[int], int]:
        """Return which of the next weights are events, and the hazard of the window that is open behind them.

        Args:
            hazards: of these weights. spent: hazard of the window that is open before them.
        """
        survival, reaches, targets = tables().lists
        sums = np.zeros(hazards.size // STRIDE * STRIDE + STRIDE + 1, dtype=np.int64)
        np.cumsum(hazards, out=sums[1 : hazards.size + 1])
        last = int(sums[hazards.size])
        sums[hazards.size + 1 :] = last  # whatever the target, the search ends there
        coarse = sums[::STRIDE].tolist()
        # a list is quicker to look into, and takes its time to make
        total = sums.tolist() if last > DENSE * hazards.size else sums.data
        state, words, found = self.state, self.words, list[int]()
        begin, block = -spent, 0
        while (target := begin + targets[slot := state & 32767]) <= last:
            while coarse[block] < target:
                block += 1
            here = bisect_left(total, target, block * STRIDE - STRIDE + 1, block * STRIDE)
            now = total[here]
            low = survival[now - begin]
            if now - begin >= reaches[slot]:
                found.append(here - 1)
                state = (survival[total[here - 1] - begin] - low) * (state >> 15) + slot - low
            else:
                state = low * (state >> 15) + slot
            begin = now
            if state < 65536 and words:
                state = state << 16 | words.pop()
        self.state = state
        return found, last - begin


def symbols(hazards: NDArray[np.uint16], where: Sequence[int]) -> list[tuple[int, int]]:
    """Return where the slots of a lane's symbols begin, and how many each has, for events at these weights."""
    sums, survival, begin = np.zeros(hazards.size + 1, dtype=np.int64), tables().lists[0], 0
    np.cumsum(hazards, out=sums[1:])
    total, found = sums.data, list[tuple[int, int]]()
    for at in where:
        while total[at] - begin >= WINDOW:
            now = total[bisect_left(total, begin + WINDOW)]
            found.append((0, survival[now - begin]))
            begin = now
        low = survival[total[at + 1] - begin]
        found.append((low, survival[total[at] - begin] - low))
        begin = total[at + 1]
    return found


def words(found: Sequence[tuple[int, int]]) -> list[int]:
    """Return the words of a lane with these symbols, in the order of reading."""
    state, made = 0, list[int]()
    for first, size in reversed(found):
        if state >= size << 17:
            made.append(state & 0xFFFF)
            state >>= 16
        state = (state // size << BITS) + state % size + first
    while state:
        made.append(state & 0xFFFF)
        state >>= 16
    return made[::-1]
