"""Events at known odds <-> 16-bit words: rANS in independent lanes, a step an event (docs/format.md section 6.2)."""

import itertools
from bisect import bisect_left, bisect_right
from ctypes import byref, c_int64
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from . import native
from .base import Numbers

BITS = 15  # of a probability
ONE = 1 << BITS
LOW = 1 << 16  # a state below it takes the next word
UNIT = 4096  # the hazard of an event with probability one half
WINDOW = 2 * UNIT  # hazard after which a step without an event ends
NEVER = 65535  # more hazard than any window has
LEVELS = 1024  # of log-odds, 1/16 apart; those of the middle are even
STRIDE = 64  # weights that are skipped at once in search of an event
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
    """

    hazard: NDArray[np.uint16]
    survival: NDArray[np.uint16]
    reach: NDArray[np.uint16]
    first: NDArray[np.int32]


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
    return Tables(hazard, survival, reach.astype(np.uint16), first)


class Lanes:
    """The states of the lanes of a payload, and their words.

    Attributes:
        state, at, end: of each lane: its state, its next word, the end of its words.
    """

    def __init__(self, words: NDArray[np.uint16], ends: Numbers):
        self.words = np.append(words, np.uint16(0))  # read in vain where a lane has no word
        self.end = np.asarray(ends, dtype=np.int64)
        self.at, self.state = np.append(0, self.end[:-1]), np.zeros(self.end.size, dtype=np.int64)
        for _ in range(2):
            take = (self.state < LOW) & (self.at < self.end)
            self.state[take] = self.state[take] << 16 | self.words[self.at[take]]
            self.at += take

    def pointers(self) -> native.Lanes:
        """Return what compiled loops take; they change the states in place."""
        return native.Lanes(*(native.pointer(array) for array in (self.state, self.at, self.end, self.words)))

    def coefficients(self, table: Numbers) -> NDArray[np.int32]:
        """Return coefficients, each coded with the table of that number; every lane has an equal part of them."""
        found, lanes, compiled = np.zeros(table.size, dtype=np.int32), self.state.size, native.library()
        if compiled is not None:
            first, kinds = tables().first, table.astype(np.uint8)
            arrays = [native.pointer(array) for array in (kinds, first, found)]
            compiled.maskpack_coefficients(byref(self.pointers()), c_int64(lanes), c_int64(table.size), *arrays)
            return found
        cumulative, kind = tables().first.tolist(), table.tolist()
        edges = [table.size * lane // lanes for lane in range(lanes + 1)]
        for number, (start, stop) in enumerate(itertools.pairwise(edges)):
            lane = _Lane(self, number)
            for at in range(start, stop):
                of = cumulative[kind[at]]
                symbol = bisect_right(of, lane.state & ONE - 1) - 1
                found[at] = symbol - RANGE
                lane.take(of[symbol], of[symbol + 1] - of[symbol])
            lane.close()
        return found

    def events(self, number: int, hazards: NDArray[np.uint16], spent: int) -> tuple[list[int], int]:
        """Return which of a lane's next weights are events, and the hazard of the window that is open behind them.

        Args:
            number: of the lane. hazards: of these weights. spent: hazard of the window that is open before them.
        """
        reaches, survival = _listed()
        sums = np.zeros(hazards.size + 1, dtype=np.int64)
        np.cumsum(hazards, out=sums[1:])
        lane, total, found = _Lane(self, number), sums.data, list[int]()
        begin, here, stop = -spent, 0, hazards.size
        while True:
            reach = reaches[lane.state & ONE - 1]
            target = begin + (reach if reach < WINDOW else WINDOW)
            if target > total[stop]:
                break
            top = here + STRIDE
            while top < stop and total[top] < target:
                here, top = top, top + STRIDE
            before, here = begin, bisect_left(total, target, here + 1, min(top, stop) + 1)
            begin = total[here]
            low = survival[begin - before]
            if begin - before >= reach:
                found.append(here - 1)
                lane.take(low, survival[total[here - 1] - before] - low)
            else:
                lane.take(0, low)
        lane.close()
        return found, total[stop] - begin

    def check_end(self) -> None:
        """Raise CorruptAdapterError unless all words were read and no state holds anything more."""
        if self.state.any() or (self.at != self.end).any():
            raise CorruptAdapterError("the words of a lane say more, or less, than its weights and coefficients")


class _Lane:
    """One lane's state and the words ahead of it, as Python's own integers, which are quicker one by one."""

    __slots__ = ("lanes", "number", "state", "words")

    def __init__(self, lanes: Lanes, number: int):
        self.lanes, self.number, self.state = lanes, number, int(lanes.state[number])
        self.words = lanes.words[lanes.at[number] : lanes.end[number]].tolist()[::-1]

    def take(self, first: int, size: int) -> None:
        """Take a symbol off the state."""
        self.state = state = size * (self.state >> BITS) + (self.state & ONE - 1) - first
        if state < LOW and self.words:
            self.state = state << 16 | self.words.pop()

    def close(self) -> None:
        """Give back to the lanes what is left."""
        self.lanes.state[self.number] = self.state
        self.lanes.at[self.number] = self.lanes.end[self.number] - len(self.words)


@cache
def _listed() -> tuple[list[int], list[int]]:
    return tables().reach.tolist(), tables().survival.tolist()


class Symbols(NamedTuple):
    """Symbols of lanes, one lane after another: where their slots begin, how many they have, and each lane's end."""

    first: Numbers
    size: Numbers
    ends: Numbers

    @classmethod
    def of_coefficients(cls, values: Numbers, table: Numbers, lanes: int) -> "Symbols":
        """Return the symbols of coefficients, each with its table."""
        low, high = (tables().first[table, values + RANGE + one] for one in (0, 1))
        return cls(low, high - low, values.size * np.arange(1, lanes + 1) // lanes)

    @classmethod
    def of_events(cls, hazards: NDArray[np.uint16], events: NDArray[np.bool_], starts: Numbers) -> "Symbols":
        """Return the symbols of the events among weights of lanes; see `Lanes.events`."""
        total, survival = np.zeros(hazards.size + 1, dtype=np.int64), tables().survival.astype(np.int64)
        np.cumsum(hazards, out=total[1:])
        where = np.flatnonzero(events)
        lane = np.searchsorted(starts, where, side="right") - 1
        begin = total[np.maximum(np.append(0, where[:-1] + 1), starts[lane])]
        low = np.zeros(where.size, dtype=np.int64)
        size = low.copy()
        open_, ends, sizes = np.arange(where.size), [where], [size]
        while open_.size:
            late = total[where[open_]] - begin[open_] >= WINDOW
            ready = open_[~late]
            low[ready] = survival[total[where[ready] + 1] - begin[ready]]
            size[ready] = survival[total[where[ready]] - begin[ready]] - low[ready]
            open_ = open_[late]
            closed = np.searchsorted(total, begin[open_] + WINDOW)
            ends.append(closed - 1)
            sizes.append(survival[total[closed] - begin[open_]])
            begin[open_] = total[closed]
        at, every = np.concatenate(ends), np.concatenate(sizes)
        order = np.argsort(at)
        firsts = np.concatenate([low, np.zeros(at.size - low.size, dtype=np.int64)])
        return cls(firsts[order], every[order], np.searchsorted(at[order], starts[1:]))

    def part(self, lane: int, stop: int) -> "Symbols":
        """Return the symbols of the lanes `lane` to `stop`."""
        start = int(self.ends[lane - 1]) if lane else 0
        end = int(self.ends[stop - 1])
        return Symbols(self.first[start:end], self.size[start:end], self.ends[lane:stop] - start)

    def words(self) -> tuple[NDArray[np.uint16], Numbers]:
        """Return the words of all lanes, in the order of reading, and how many each lane has."""
        lanes, compiled = self.ends.size, native.library()
        words, lengths = np.empty(self.first.size + 2 * lanes, dtype=np.uint16), np.empty(lanes, dtype=np.int64)
        if compiled is not None:
            arrays = [native.pointer(array) for array in (self.ends, self.first, self.size, words, lengths)]
            return words[: compiled.maskpack_words(c_int64(lanes), *arrays)], lengths
        made, start = list[int](), 0
        for lane, end in enumerate(self.ends.tolist()):
            state, own = 0, list[int]()
            part = slice(start, end)
            for first, size in zip(self.first[part][::-1].tolist(), self.size[part][::-1].tolist(), strict=True):
                if state >= size << 17:
                    own.append(state & 0xFFFF)
                    state >>= 16
                state = (state // size << BITS) + state % size + first
            while state:
                own.append(state & 0xFFFF)
                state >>= 16
            made += own[::-1]
            start, lengths[lane] = end, len(own)
        words[: len(made)] = made
        return words[: len(made)], lengths


def joined(one: Symbols, other: Symbols) -> Symbols:
    """Return the symbols of the same lanes, in each of them those of `one` first."""
    counts = [np.diff(part.ends, prepend=0) for part in (one, other)]
    lane = np.concatenate([np.repeat(np.arange(count.size), count) for count in counts])
    order = np.argsort(lane, kind="stable")
    first, size = (np.concatenate(pair)[order] for pair in ((one.first, other.first), (one.size, other.size)))
    return Symbols(first, size, one.ends + other.ends)
