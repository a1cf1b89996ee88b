"""Entropy coding of events at known odds: rANS in independent lanes of 16-bit words (docs/format.md section 6.2)."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..threads import once
from . import native
from .base import Numbers

BITS = 15  # of a probability
ONE = 1 << BITS
LOW = 1 << 16  # a state below it takes the next word
UNIT = 4096  # the hazard of an event with probability one half
WINDOW = 2 * UNIT  # hazard after which a step without an event ends
NEVER = 65535  # more hazard than any window has
LEVELS = 1024  # of log-odds, 1/16 apart; those of the middle are even
STRIDE = 32  # weights that are skipped at once in search of an event of a lane
DENSE = 600  # hazard of a weight
FEW = 32  # lanes that are decoded one by one
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
    """The constant tables of the format.

    Attributes:
        hazard: of each level, -log2 of the probability of no event, in 1/UNIT.
        survival: of each hazard in a window, the probability of no event, in 1/ONE.
        reach: of each slot, the least hazard whose survival is at most the slot.
        first: for each table of coefficients, where each of the 15 begins, and ONE.
        wide: survival, and the least of reach and WINDOW, in eight bytes.
        lists: the same, which are quicker one by one.
    """

    hazard: NDArray[np.uint16]
    survival: NDArray[np.uint16]
    reach: NDArray[np.uint16]
    first: NDArray[np.int32]
    wide: tuple[NDArray[np.int64], NDArray[np.int64]]
    lists: tuple[list[int], list[int]]


@once
def pointers() -> native.Tables:
    """Return the constant tables that compiled loops take."""
    own = tables()
    arrays: list[NDArray[Any]] = [own.hazard, own.survival, own.reach, own.first]
    return native.Tables(*map(native.address, arrays))


@once
def tables() -> Tables:
    """Return the constant tables; no entry is so close to one half that another machine could round it differently."""
    odds = np.exp2((np.arange(LEVELS) - LEVELS // 2) / 16 * np.log2(np.e))
    hazard = np.clip(np.rint(UNIT * np.log2(1 + odds)), 1, 8 * UNIT).astype(np.uint16)
    survival = np.rint(ONE * np.exp2(-np.arange(10 * UNIT) / UNIT)).astype(np.uint16)
    reach = np.searchsorted(-survival.astype(np.int64), -np.arange(ONE), side="left")
    reach[reach == survival.size] = NEVER
    halves = np.array([line.split() for line in _FREQUENCIES.strip().split("\n")], dtype=np.int32)
    first = np.zeros((len(halves), 2 * RANGE + 2), dtype=np.int32)
    np.cumsum(np.concatenate([halves[:, :0:-1], halves], axis=1), axis=1, out=first[:, 1:])
    wide = survival.astype(np.int64), np.minimum(reach, WINDOW)
    lists = survival.tolist(), wide[1].tolist()
    return Tables(hazard, survival, reach.astype(np.uint16), first, wide, lists)


class Lanes:
    """Lanes during decoding: the state of each, and the words that it has yet to read.

    Many go side by side, an event of each a step, which takes as long as few events one by one.

    Attributes:
        state: of each. at, end: the next word of each, and where its words end.
        spent: hazard of the window that is open.
    """

    def __init__(self, words: Sequence[Numbers]):
        lengths = np.array([own.size for own in words], dtype=np.int64)
        self.words = np.concatenate([*words, np.zeros(1, np.uint16)]).astype(np.int64)  # one is looked at, not taken
        self.listed = self.words.tolist()
        self.end = np.cumsum(lengths)
        self.at = self.end - lengths
        self.state, self.spent = np.zeros((2, lengths.size), dtype=np.int64)
        for _ in range(2):
            self.state, self.at = self._filled(self.state, self.at, self.end)

    def _filled(self, state: Numbers, at: Numbers, end: Numbers) -> tuple[Numbers, Numbers]:
        """Return states with the next word, where they want one and have one, and the next words."""
        want = state < LOW
        want &= at < end
        filled = state << 16
        filled |= self.words.take(at)
        np.copyto(state, filled, where=want)
        return state, at + want

    def coefficients(self, kinds: Sequence[Numbers]) -> list[Numbers]:
        """Return the next coefficients of each lane, each coded with the table of that number."""
        counts = np.array([own.size for own in kinds])
        order = np.argsort(-counts, kind="stable")  # the lanes that go on are the first ones
        kind, found = np.zeros((2, max(counts, default=0), counts.size), dtype=np.int64)
        for place, lane in enumerate(order):
            kind[: counts[lane], place] = kinds[lane]
        state, at, end = self.state[order], self.at[order], self.end[order]
        slots_of, number, edges = kind * ONE, coefficient_of(), tables().first.reshape(-1)
        kind *= 16
        going = np.searchsorted(-counts[order], -np.arange(len(kind)), side="left")
        steps = int(np.searchsorted(-going, -FEW, side="right"))
        for step, here in enumerate(going[:steps].tolist()):
            own, slot = state[:here], state[:here] & ONE - 1
            symbol = kind[step, :here]
            symbol += number.take(slots_of[step, :here] + slot)
            first = edges.take(symbol)
            own >>= BITS
            own *= edges.take(symbol + 1) - first
            own += slot - first
            state[:here], at[:here] = self._filled(own, at[:here], end[:here])
            found[step, :here] = symbol
        for place in range(int(going[steps]) if steps < len(kind) else 0):
            last = counts[order[place]]
            one = state[place], at[place], end[place], slots_of[steps:last, place], kind[steps:last, place]
            state[place], at[place], found[steps:last, place] = self._alone_coefficients(*(own.tolist() for own in one))
        self.state[order], self.at[order] = state, at
        places = np.argsort(order)
        return [(found[: counts[lane], places[lane]] & 15) - RANGE for lane in range(counts.size)]

    def _alone_coefficients(
        self, state: int, at: int, end: int, slots: list[int], kinds: list[int]
    ) -> tuple[int, int, list[int]]:
        """Return state, next word and coefficients of one lane, of the tables that begin at these slots and edges."""
        number, edges, found = coefficient_of().data, tables().first.reshape(-1).data, list[int]()
        for slot_of, kind in zip(slots, kinds, strict=True):
            slot = state & 32767
            symbol = kind + number[slot_of + slot]
            first = edges[symbol]
            state = (edges[symbol + 1] - first) * (state >> 15) + slot - first
            if state < 65536 and at < end:
                state = state << 16 | self.listed[at]
                at += 1
            found.append(symbol)
        return state, at, found

    def events(self, lanes: Numbers, sums: NDArray[np.int64], starts: Numbers) -> list[Numbers | list[int]]:
        """Return which of the next weights of some lanes are events, in any order.

        Args:
            sums: hazards before each of these weights, one lane's after another's, and of all; then, as often as
                STRIDE, a larger number.
            starts: the first weight of each lane, and the number of all.
        """
        survival, targets = tables().wide
        state, at, end, here = self.state[lanes], self.at[lanes], self.end[lanes], starts[:-1]
        begin, last, stop = sums[here] - self.spent[lanes], sums[starts[1:]], starts[1:]
        weights, events = list[Numbers](), list[Numbers]()
        blocks = sums[: sums.size // STRIDE * STRIDE].reshape(-1, STRIDE)
        coarse = blocks[:, -1].copy() if lanes.size >= FEW else blocks[:0, 0]
        while lanes.size >= FEW:
            slot = state & ONE - 1
            target = targets.take(slot)
            target += begin
            over = target > last
            if over.any():
                done, stay = lanes[over], ~over
                self.state[done], self.at[done], self.spent[done] = state[over], at[over], (last - begin)[over]
                lanes, state, at, end, here, begin, last, stop, slot, target = (
                    one[stay] for one in (lanes, state, at, end, here, begin, last, stop, slot, target)
                )
            block = coarse.searchsorted(target)
            here = (blocks.take(block, axis=0) >= target[:, None]).argmax(1)
            block *= STRIDE
            here += block
            now = sums.take(here)
            used = now - begin
            here -= 1
            weights.append(here)
            before = sums.take(here)
            before -= begin
            low, high = survival.take(used), survival.take(before)
            none = slot < low
            events.append(~none)
            # an event has the slots from low on to those of the weight before, all else those below low
            np.copyto(high, low, where=none)
            np.copyto(low, 0, where=none)
            slot -= low
            high -= low
            state >>= BITS
            state *= high
            state += slot
            state, at = self._filled(state, at, end)
            here = here + 1
            begin = now
        found = [np.concatenate(weights)[np.concatenate(events)]] if weights else list[Any]()
        for own in zip(*(one.tolist() for one in (lanes, state, at, here, begin, stop)), strict=True):
            found.append(self._alone(sums, *own))
        return found

    def _alone(
        self, sums: NDArray[np.int64], lane: int, state: int, at: int, here: int, begin: int, stop: int
    ) -> list[int]:
        """Return the events of one lane from the weight `here` on, whose window began at the sum `begin`."""
        survival, targets = tables().lists
        own = sums[here : stop + 1 + STRIDE] - begin
        last, first, found = int(own[stop - here]), here, list[int]()
        dense = last > DENSE * (stop - here)
        # a list is quicker to look into, and takes its time to make
        total, coarse = own.tolist() if dense else own.data, own[::STRIDE].tolist()
        words = self.listed[at : self.end[lane]]
        words.reverse()
        left, here, begin, block = len(words), 0, 0, 0
        while (target := begin + targets[slot := state & 32767]) <= last:
            if dense:
                here = bisect_left(total, target, here + 1)
            else:
                block = bisect_left(coarse, target, block)
                here = bisect_left(total, target, STRIDE * (block - 1) + 1, STRIDE * block)
            now = total[here]
            low = survival[now - begin]
            if slot >= low:
                found.append(here - 1)
                state = (survival[total[here - 1] - begin] - low) * (state >> 15) + slot - low
            else:
                state = low * (state >> 15) + slot
            begin = now
            if state < 65536 and words:
                state = state << 16 | words.pop()
        self.state[lane], self.spent[lane] = state, last - begin
        self.at[lane] = at + left - len(words)
        return [first + one for one in found]


@once
def hazards_of() -> NDArray[np.int64]:
    """Return the hazard of each level, by the two bytes of the level, which may be one that is too low or too high."""
    levels = np.arange(1 << 16, dtype=np.uint16).view(np.int16)
    return tables().hazard.take(levels, mode="clip").astype(np.int64)


@once
def coefficient_of() -> NDArray[np.uint8]:
    """Return, for each table and slot, the number of the coefficient there."""
    return np.concatenate(
        [np.repeat(np.arange(15, dtype=np.uint8), sizes) for sizes in np.diff(tables().first[:, :16])]
    )


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
