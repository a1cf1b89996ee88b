"""How likely each weight's bit is the rarer one, and the entropy coder that uses it (docs/format.md section 6.2)."""

import itertools
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import Bits, Numbers

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


CHUNK = 1 << 22  # weights; counting and looking up make copies of 8 bytes a weight
INFINITY = 0x7F80  # bfloat16 bits of |inf|; greater ones are NaN
MAGNITUDES = 128


def weight_classes(bf16_bits: NDArray[np.uint16]) -> Bits:
    """Sort weights into 128 classes of equal population by |weight|; the negative ones are 128 to 255.

    Equal values are always in the same class. Integers only, so that every platform gives the same classes. With H[v]
    weights of magnitude v among n, and B[v] of smaller magnitude, the class of v is floor(128 (2 B[v] + H[v]) / (2 n)).
    All NaN count as one magnitude above infinity. The sign is the sign bit, also of zeros; NaN have none, because casts
    change theirs.

    Args:
        bf16_bits: the weights rounded to bfloat16 (to nearest, ties to even), as 16-bit patterns, any shape.

    Returns:
        The class of every weight, row-major, uint8, flat.
    """
    flat = bf16_bits.reshape(-1)
    classes = np.empty(flat.size, dtype=np.uint8)
    if not flat.size:
        return classes
    histogram = np.zeros(1 << 15, dtype=np.int64)
    for start in range(0, flat.size, CHUNK):
        histogram += np.bincount(flat[start : start + CHUNK] & 0x7FFF, minlength=1 << 15)
    histogram[INFINITY + 1] = histogram[INFINITY + 1 :].sum()
    histogram[INFINITY + 2 :] = 0
    below = np.cumsum(histogram) - histogram
    # values that do not occur may come out as 128; they are never looked up
    look_up = np.minimum(MAGNITUDES * (2 * below + histogram) // (2 * flat.size), MAGNITUDES - 1).astype(np.uint8)
    look_up[INFINITY + 2 :] = look_up[INFINITY + 1]
    negative = look_up + MAGNITUDES * (np.arange(look_up.size) <= INFINITY)
    look_up = np.concatenate([look_up, negative.astype(np.uint8)])
    for start in range(0, flat.size, CHUNK):
        classes[start : start + CHUNK] = look_up[flat[start : start + CHUNK]]
    return classes


Floats = NDArray[np.float64]
ONE = 1 << 16  # probabilities are multiples of 1 / ONE
LEAST, MOST = 16.0, 57344.0  # of a probability
LEVELS = 48  # four an octave
CENTERS = np.array([((9 + 2 * (level & 3)) << (level >> 2) + 4) >> 3 for level in range(LEVELS)], dtype=np.float64)
_FIRST = (1023 + 4) << 2  # upper 14 bits of LEAST as binary64
MAX_BANDS, BAND = 32, 16
PRIOR = 8.0  # events that a context's factor has to be seen with before they count as much as the curve
KERNEL_PRIOR, SIGNED_PRIOR = 3.0, 1.0
LINK, LINK_PRIOR = 32, 16.0  # parts of what a lean can be
CHANNEL_PRIOR, DIRECTION_PRIOR = 3.0, 4.0
STRONGEST = 0.97  # a sign can leave 3 % of the rate
CONTEXTS = 32
SIGNS = np.repeat([1.0, -1.0], 128)  # by trait


class Settings(NamedTuple):
    """What a payload states beside its events: logarithms of the priors of rows and columns, and sign channels."""

    row_prior: int
    col_prior: int
    channels: int


class Known(NamedTuple):
    """What both sides know of a matrix of weights, and nobody transmits.

    Attributes:
        traits: of every weight, or None: its context in the lower five bits, in the top bit the weight's sign.
        curve: prior factor of each context.
        inputs: columns are positions of convolution kernels with so many input channels each; 0 without kernels.
        signed: whether the top bits of traits are set.
    """

    traits: NDArray[np.uint8] | None
    curve: Floats
    inputs: int = 0
    signed: bool = False


class Block(NamedTuple):
    """Rows and columns that are predicted at once."""

    rows: slice
    cols: slice


class Rates:
    """Predicts and learns: for each of `blocks()`, call `levels`, then `learn`."""

    def __init__(self, shape: tuple[int, int], events: int, settings: Settings, known: Known):
        rows, cols = shape
        self.share = events / (rows * cols)
        self.traits, self.curve, self.channels = known.traits, known.curve, settings.channels
        self.inputs, step = known.inputs, max(known.inputs, 1)
        self.row_bands = _bands(rows, rows * cols, 1)
        self.col_bands = _bands(cols // step, rows * cols, step)
        self.row = _Factors(rows, float(1 << settings.row_prior))
        self.col = _Factors(cols, float(1 << settings.col_prior))
        self.context = _Factors(CONTEXTS, PRIOR)
        self.signs = 2 if known.signed else 1
        self.kernel = _Factors((rows, self.signs, known.inputs), SIGNED_PRIOR if known.signed else KERNEL_PRIOR)
        self.link = _Factors(LINK, LINK_PRIOR)
        self.leaning = np.zeros((0, 0), dtype=np.int64)
        numbers = np.arange(1, settings.channels + 1)[:, None]
        self.directions: Floats = np.where(np.arange(cols) % numbers, -1.0, 1.0)  # anything that differs will do
        self.band = _Events(*(np.zeros(0, dtype=np.int64),) * 2, np.zeros(0))
        self.past = self.band

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks, a band of rows after another."""
        for rows in self.row_bands:
            for cols in self.col_bands:
                yield Block(rows, cols)
            if self.channels:
                self._turn(rows)

    def levels(self, block: Block) -> NDArray[np.uint8]:
        """Return the level of each weight's probability in a block."""
        rate = self.row.of(block.rows)[:, None] * (self.share * ONE * self.col.of(block.cols))
        if self.inputs:
            by_sign = self.kernel.of(block.rows)[:, :, None]
            of_kernel = by_sign[:, 0]
            if self.signs == 2:
                of_kernel = np.where(self._negative(block), by_sign[:, 1], of_kernel)
            rate.reshape(len(rate), -1, self.inputs)[:] *= of_kernel
        if self.traits is not None:
            factors = self.curve * self.context.of(slice(None))
            rate *= factors[self.traits[block] & CONTEXTS - 1]
        if self.channels and self.traits is not None:
            lean = np.zeros_like(rate)
            strengths = self.band.strengths(self.directions, block.rows.stop - block.rows.start)
            for strength, direction in zip(strengths, self.directions, strict=True):
                lean += strength[:, None] * direction[block.cols]
            np.clip(lean, -STRONGEST, STRONGEST, out=lean)
            lean *= SIGNS[self.traits[block]]
            lean += 1.0
            self.leaning = (lean * (LINK // 2)).astype(np.int64)
            rate *= lean * self.link.of(slice(None))[self.leaning]
        np.clip(rate, LEAST, MOST, out=rate)
        return ((rate.view(np.int64) >> 50) - _FIRST).astype(np.uint8)

    def learn(self, block: Block, levels: NDArray[np.uint8], events: NDArray[np.bool_]) -> None:
        """Take note of the events of a block."""
        expected: Floats = CENTERS[levels]
        self.row.add(block.rows, events.sum(1), expected.sum(1))
        self.col.add(block.cols, events.sum(0), expected.sum(0))
        if self.inputs:
            shape = (len(events), -1, self.inputs)
            seen, due = events.reshape(shape), expected.reshape(shape)
            if self.signs == 2:
                parts = [~self._negative(block), self._negative(block)]
                both = [np.stack([(one * part).sum(1) for part in parts], axis=1) for one in (seen, due)]
                self.kernel.add(block.rows, *both)
            else:
                self.kernel.add(block.rows, seen.sum(1, keepdims=True), due.sum(1, keepdims=True))
        if self.traits is not None:
            contexts = (self.traits[block] & CONTEXTS - 1).reshape(-1)
            hits = np.bincount(contexts[events.reshape(-1)], minlength=CONTEXTS)
            self.context.add(slice(None), hits, np.bincount(contexts, expected.reshape(-1), CONTEXTS))
        if self.channels and self.traits is not None:
            leaning = self.leaning.reshape(-1)
            hits = np.bincount(leaning[events.reshape(-1)], minlength=LINK)
            self.link.add(slice(None), hits, np.bincount(leaning, expected.reshape(-1), LINK))
            row, col = np.nonzero(events)
            self.band = self.band.plus(row, col + block.cols.start, SIGNS[self.traits[block][row, col]])

    def _negative(self, block: Block) -> NDArray[np.bool_]:
        """Return which weights of a block are negative in the base, as rows, positions and input channels."""
        assert self.traits is not None
        return (self.traits[block] > 127).reshape(block.rows.stop - block.rows.start, -1, self.inputs)

    def _turn(self, rows: slice) -> None:
        """After a band of rows: fit the channels' directions to all events so far."""
        self.past = self.past.plus(self.band.row + rows.start, self.band.col, self.band.sign)
        self.band = _Events(self.band.row[:0], self.band.col[:0], self.band.sign[:0])
        if self.past.row.size:
            self.past.turn(self.directions, rows.stop)


class _Factors:
    """Multipliers of the rate, one for each row, column, context or kernel: (seen + prior) / (expected + prior)."""

    def __init__(self, shape: int | tuple[int, int, int], prior: float):
        self.seen, self.expected = np.full(shape, prior), np.full(shape, prior)

    def of(self, part: slice) -> Floats:
        factors: Floats = self.seen[part] / self.expected[part]
        return factors

    def add(self, part: slice, seen: NDArray[Any], expected: NDArray[Any]) -> None:
        # what was expected holds the factor itself; without it remains what the others expected
        self.expected[part] += expected / ONE / self.of(part)
        self.seen[part] += seen


class _Events(NamedTuple):
    """Events and the sign of the base's weight there."""

    row: Numbers
    col: Numbers
    sign: Floats

    def plus(self, row: Numbers, col: Numbers, sign: Floats) -> "_Events":
        return _Events(*(np.concatenate(pair) for pair in zip(self, (row, col, sign), strict=True)))

    def strengths(self, directions: Floats, rows: int) -> list[Floats]:
        """Return how strongly each row leans to each direction, by shrunken least squares, one after another."""
        left, found = self.sign, []
        for direction in directions:
            along = direction[self.col]
            strength = _solved(self.row, rows, left, along, CHANNEL_PRIOR)
            left = left - strength[self.row] * along
            found.append(strength)
        return found

    def turn(self, directions: Floats, rows: int) -> None:
        """Improve directions in place: one round of alternating least squares."""
        left = self.sign
        for direction in directions:
            strength = _solved(self.row, rows, left, direction[self.col], CHANNEL_PRIOR)[self.row]
            mean = np.square(strength).sum() / strength.size
            if mean:
                direction[:] = _solved(self.col, direction.size, left, strength, DIRECTION_PRIOR * mean)
                length = np.sqrt(np.square(direction).sum() / direction.size)
                if length:
                    direction[:] = _rounded(direction / length, 8.0)
                    strength = _rounded(strength * length, 64.0)
            left = left - strength * direction[self.col]


def _solved(at: Numbers, count: int, left: Floats, along: Floats, prior: float) -> Floats:
    """Return for each row (or column) the multiple of `along` that comes closest to `left`, drawn towards zero."""
    return _rounded(np.bincount(at, left * along, count) / (np.bincount(at, along * along, count) + prior), 64.0)


def _rounded(values: NDArray[Any], bound: float) -> Floats:
    """Return multiples of 1/256, so that sums of their products are exact in any order."""
    rounded: Floats = np.rint(np.clip(values, -bound, bound) * 256.0) / 256.0
    return rounded


def _bands(size: int, count: int, step: int) -> list[slice]:
    """Cut rows (or columns, `step` together) of a matrix of `count` weights into bands; the first are small."""
    bands = min(size, MAX_BANDS, 1 + math.isqrt(count) // BAND)
    edges = sorted({size * band * (band + bands) // (2 * bands * bands) for band in range(bands + 1)})
    return [slice(step * start, step * stop) for start, stop in itertools.pairwise(edges)]
