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
FEW, STRIDE = 24, 64  # lanes that are walked one by one, weights that are skipped on the way
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
    """The states of lanes that are decoded together, and their words.

    Attributes:
        state, at, end: of each lane: its state, its next word, the end of its words.
    """

    def __init__(self, words: NDArray[np.uint16], ends: Numbers):
        self.words = np.append(words, np.uint16(0))  # read in vain where a lane has no word left
        self.end = np.asarray(ends, dtype=np.int64)
        self.at = np.append(0, self.end[:-1])
        self.state = np.zeros(self.end.size, dtype=np.int64)
        for _ in range(2):
            self._refill(slice(None))

    def _refill(self, which: slice | Numbers) -> None:
        at, state = self.at[which], self.state[which]
        take = (state < LOW) & (at < self.end[which])
        self.state[which] = np.where(take, state << 16 | self.words[at], state)
        self.at[which] = at + take

    def pointers(self) -> native.Lanes:
        """Return what compiled loops take; they change the states in place."""
        return native.Lanes(*(native.pointer(array) for array in (self.state, self.at, self.end, self.words)))

    def step(self, which: Numbers, slot: Numbers, first: Numbers, size: Numbers) -> None:
        """Take a symbol that was found off the states of some lanes."""
        self.state[which] = size * (self.state[which] >> BITS) + slot - first
        self._refill(which)

    def coefficients(self, table: Numbers) -> NDArray[np.int32]:
        """Return coefficients, each coded with the table of that number; every lane has an equal part of them."""
        found, lanes, compiled = np.zeros(table.size, dtype=np.int32), self.state.size, native.library()
        if compiled is not None:
            first, kinds = tables().first, table.astype(np.uint8)
            arrays = [native.pointer(array) for array in (kinds, first, found)]
            compiled.maskpack_coefficients(byref(self.pointers()), c_int64(lanes), c_int64(table.size), *arrays)
            return found
        at, stop = spread(table.size, lanes)
        if lanes < FEW:
            for lane, (first, last) in enumerate(zip(at.tolist(), stop.tolist(), strict=True)):
                found[first:last] = self._walk_coefficients(lane, table[first:last].tolist())
            return found
        cumulative = tables().first
        for _ in range(int((stop - at).max())):
            which = np.flatnonzero(at < stop)
            of, slot = cumulative[table[at[which]]], self.state[which] & ONE - 1
            symbol = (of[:, 1:-1] <= slot[:, None]).sum(1)
            low, high = (of[np.arange(which.size), symbol + one] for one in (0, 1))
            self.step(which, slot, low, high - low)
            found[at[which]] = symbol - RANGE
            at[which] += 1
        return found

    def events(self, hazards: NDArray[np.uint16], starts: Numbers, first: int, spent: Numbers) -> NDArray[np.bool_]:
        """Return which of some weights are events.

        Args:
            hazards: of the weights of a run of lanes, one lane after another.
            starts: where each lane begins among them, and their end. first: the first of the lanes.
            spent: for each lane the hazard of its open window up to here; changed in place.
        """
        fixed, found = tables(), np.zeros(hazards.size, dtype=np.bool_)
        total = np.zeros(hazards.size + 1, dtype=np.int64)
        np.cumsum(hazards, out=total[1:])
        if spent.size < FEW:
            for lane, (begin, stop) in enumerate(itertools.pairwise(starts.tolist())):
                hits, spent[lane] = self._walk_events(first + lane, total.data, begin, stop, int(spent[lane]))
                found[hits] = True
            return found
        begin, stop = total[starts[:-1]] - spent, total[starts[1:]]
        which = np.arange(stop.size)
        while which.size:
            slot = self.state[first + which] & ONE - 1
            reach = fixed.reach[slot].astype(np.int64)
            target = begin[which] + np.minimum(reach, WINDOW)
            inside = target <= stop[which]
            which, slot, reach, target = which[inside], slot[inside], reach[inside], target[inside]
            last = np.searchsorted(total, target)
            after, before = (total[at] - begin[which] for at in (last, last - 1))
            is_event = after >= reach
            low = fixed.survival[after].astype(np.int64)
            size = np.where(is_event, fixed.survival[before] - low, low)
            self.step(first + which, slot, np.where(is_event, low, 0), size)
            found[last[is_event] - 1] = True
            begin[which] = total[last]
        spent[:] = stop - begin
        return found

    def _walk_coefficients(self, lane: int, table: list[int]) -> list[int]:
        """Return the coefficients of one lane; where there are few, this is quicker than a step of all together."""
        cumulative, found, ahead = tables().first.tolist(), list[int](), _Ahead(self, lane)
        for number in table:
            slot, of = ahead.state & ONE - 1, cumulative[number]
            symbol = bisect_right(of, slot) - 1
            ahead.take(slot, of[symbol], of[symbol + 1] - of[symbol])
            found.append(symbol - RANGE)
        ahead.close(self, lane)
        return found

    def _walk_events(self, lane: int, total: memoryview, here: int, stop: int, spent: int) -> tuple[list[int], int]:
        """Return the events of one lane among weights `here` to `stop`, and the hazard of the window left open."""
        reaches, survival = _listed()
        ahead, begin, end, found = _Ahead(self, lane), total[here] - spent, total[stop], list[int]()
        while True:
            slot = ahead.state & ONE - 1
            reach = reaches[slot]
            target = begin + (reach if reach < WINDOW else WINDOW)
            if target > end:
                break
            top = here + STRIDE
            while top < stop and total[top] < target:
                here, top = top, top + STRIDE
            before, here = begin, bisect_left(total, target, here + 1, min(top, stop) + 1)
            begin = total[here]
            low = survival[begin - before]
            if begin - before >= reach:
                found.append(here - 1)
                ahead.take(slot, low, survival[total[here - 1] - before] - low)
            else:
                ahead.take(slot, 0, low)
        ahead.close(self, lane)
        return found, end - begin

    def check_end(self) -> None:
        """Raise CorruptAdapterError unless all words were read and no state holds anything more."""
        if self.state.any() or (self.at != self.end).any():
            raise CorruptAdapterError("the words of a lane say more, or less, than its weights and coefficients")


class _Ahead:
    """One lane's state and the words ahead of it, as Python's own integers."""

    __slots__ = ("state", "words")

    def __init__(self, lanes: Lanes, lane: int):
        self.state = int(lanes.state[lane])
        self.words = lanes.words[lanes.at[lane] : lanes.end[lane]].tolist()[::-1]

    def take(self, slot: int, first: int, size: int) -> None:
        """Take a symbol off the state; see `Lanes.step`."""
        self.state = state = size * (self.state >> BITS) + slot - first
        if state < LOW and self.words:
            self.state = state << 16 | self.words.pop()

    def close(self, lanes: Lanes, lane: int) -> None:
        """Give back to the lanes what is left."""
        lanes.state[lane], lanes.at[lane] = self.state, lanes.end[lane] - len(self.words)


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
        return cls(low, high - low, spread(values.size, lanes)[1])

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


def spread(count: int, lanes: int) -> tuple[Numbers, Numbers]:
    """Return where each lane's part of `count` things begins and ends."""
    edges = count * np.arange(lanes + 1, dtype=np.int64) // lanes
    return edges[:-1].copy(), edges[1:]


def joined(one: Symbols, other: Symbols) -> Symbols:
    """Return the symbols of the same lanes, in each of them those of `one` first."""
    counts = [np.diff(part.ends, prepend=0) for part in (one, other)]
    lane = np.concatenate([np.repeat(np.arange(count.size), count) for count in counts])
    order = np.argsort(lane, kind="stable")
    first, size = (np.concatenate(pair)[order] for pair in ((one.first, other.first), (one.size, other.size)))
    return Symbols(first, size, one.ends + other.ends)
