"""A static model of each weight's odds, evaluated in integers, and rANS in lanes: small, and quick to decode."""

import ctypes
import itertools
import math
from collections.abc import Iterator
from ctypes import byref, c_int64
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from . import native
from .base import CODECS, NO_EVENTS, Bits, Bytes, Codec, Numbers, Profile, Reader, Side, flipped, place, rarer, varint
from .lanes import LEVELS, Lanes, Symbols, joined, tables
from .logit_fit import fitted
from .logit_model import (
    GROUP,
    HIGHEST,
    MAX_LANE,
    MAX_RANK,
    Before,
    Grid,
    Known,
    Model,
    Scaled,
    by_position,
    may_lean,
    sizes,
)

BATCH = 1 << 20  # units that are worked on at once
LANE_BYTES = 1200  # of a mask's entropy, for which a lane is worth its three bytes
T = TypeVar("T", bound=np.generic)


@CODECS.register
@dataclass(frozen=True, slots=True)
class Logit(Codec):
    """Odds of rows, columns and kernels, as integers; small, quick."""

    id = "logit"
    reference = "https://arxiv.org/abs/1311.2540"

    def encode(self, bits: Bits, side: Side) -> bytes | None:
        return encode(bits, side, self.needs_base)

    def decode(self, data: Bytes, side: Side) -> Bits:
        return decode(data, side, self.needs_base)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [] if profile == "fast" else [cls()]


@CODECS.register
@dataclass(frozen=True, slots=True)
class LogitBase(Logit):
    """As logit, and by the base's weights, which it needs; smallest.

    Scores trained with SGD move in proportion to the weight, so that its magnitude tells much. Scores trained with Adam
    move with the sign of weight times gradient, and gradients are nearly of low rank, so that signs tell much.
    """

    id = "logit-base"
    needs_base = True

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()] if profile == "max" else []


def encode(bits: Bits, side: Side, base: bool) -> bytes:
    """Return the payload of packed bits."""
    symbol, where = rarer(bits, side.count)
    if not where.size:
        return bytes([symbol | NO_EVENTS])
    events, grid = np.zeros(side.count, dtype=np.uint8), Grid.of(side.shape)
    events[where] = 1
    known, own = Known.of(side, base).ordered(grid), by_position(events, grid).view(np.bool_)
    return write(fitted(grid, known, own), symbol, own)


def read(data: Bytes, side: Side, known: Known) -> tuple[int, Model, Lanes] | int:
    """Take a payload apart: the symbol of its events, its model, its lanes; the symbol alone if there are no events."""
    reader, grid = Reader(data), Grid.of(side.shape)
    first = reader.byte()
    if first & ~1 == NO_EVENTS and len(data) == 1:
        return first & 1
    flags, counts = first >> 1, sizes(grid, known)
    shapes = {name: size for number, (name, size) in enumerate(counts.items()) if flags >> number & 1}
    offset = HIGHEST - reader.varint()
    rank = reader.byte() if may_lean(grid, known) else 0
    if flags >> len(counts) or not all(shapes.values()) or rank > MAX_RANK or offset < -LEVELS:
        raise CorruptAdapterError(
            f"a logit payload of shape {side.shape} states the arrays {flags:06b}, a low rank of {rank} and an offset "
            f"of {offset}, which do not go together"
        )
    for number in range(rank):
        shapes |= {f"left {number}": grid.rows, f"right {number}": grid.inputs}
    codes = dict(zip(shapes, reader.take(len(shapes)).tolist(), strict=True))
    count = reader.varint()
    if not max(1, -(-grid.units // MAX_LANE)) <= count <= min(-(-grid.units // GROUP), 1 + len(data)):
        raise CorruptAdapterError(f"a logit payload of {len(data)} bytes and {grid.units} units states {count} lanes")
    lengths = np.array([reader.varint() for _ in range(count - 1)], dtype=np.int64)
    lengths = np.cumsum((lengths >> 1) ^ -(lengths & 1))
    words = reader.rest()
    last = len(words) // 2 - int(lengths.sum())
    if len(words) % 2 or last < 0 or not len(words) or ((lengths < 0) | (lengths > len(words))).any():
        raise CorruptAdapterError(f"the lanes of a logit payload do not add up to its {len(words)} bytes of words")
    lanes = Lanes(words.view("<u2").astype(np.uint16), np.cumsum(np.append(lengths, last)))
    kinds = {name: code & 15 for name, code in codes.items()}
    if not all(kinds.values()):
        raise CorruptAdapterError(f"a logit payload states table 0 for an array, expected 1 to 15: {kinds}")
    found = np.split(lanes.coefficients(kinds_of(kinds, shapes)), np.cumsum([*shapes.values()])[:-1])
    values = dict(zip(shapes, found, strict=False))
    return (
        first & 1,
        Model(grid, known, rank, offset, {n: code >> 4 for n, code in codes.items()}, kinds, values),
        lanes,
    )


def kinds_of(kinds: dict[str, int], shapes: dict[str, int]) -> Numbers:
    """Return the table of each coefficient, counted from 0."""
    return np.repeat(np.array([*kinds.values()], dtype=np.int64) - 1, [*shapes.values()])


def decode(data: Bytes, side: Side, base: bool) -> Bits:
    """Return the packed bits of a payload."""
    known, compiled = Known.of(side, base), native.library()
    found = read(data, side, known if compiled is not None else known.ordered(Grid.of(side.shape)))
    if isinstance(found, int):
        return place(found, np.zeros(0, dtype=np.int64), side.count)
    symbol, model, lanes = found
    scaled, bounds = model.scaled(), model.grid.lanes(lanes.state.size)
    bits = _events(scaled, lanes, bounds) if compiled is None else _compiled_events(compiled, scaled, lanes, bounds)
    lanes.check_end()
    return bits if symbol else flipped(bits, side.count)


def _compiled_events(compiled: ctypes.CDLL, model: Scaled, lanes: Lanes, bounds: Numbers) -> Bits:
    """Return the events as packed bits, by the compiled loops, which want what is known row-major."""
    fixed, grid, arrays = tables(), model.grid, model.arrays
    named = [arrays.get(name) for name in ("row", "input", "position", "before", "magnitude", "reference")]
    left, right = model.left, None if model.right is None else np.ascontiguousarray(model.right.T)
    held = [*named, left, right, *model.known]
    rank = 0 if left is None else left.shape[1]
    own = native.Model(*grid, rank, model.offset, *map(native.pointer, held))
    constants = native.Tables(*map(native.pointer, (fixed.hazard, fixed.survival, fixed.reach)))
    counts = np.empty(int(np.diff(bounds).max()) if "before" in arrays else 1, dtype=np.uint8)
    bits = np.zeros(-(-grid.units * grid.positions // 8), dtype=np.uint8)
    given = (native.pointer(array) for array in (bounds, counts, bits))
    compiled.maskpack_events(byref(constants), byref(own), byref(lanes.pointers()), c_int64(bounds.size - 1), *given)
    return bits


def _events(scaled: Scaled, lanes: Lanes, bounds: Numbers) -> Bits:
    """Return the events as packed bits, by numpy, which wants what is known in the order of coding."""
    grid = scaled.grid
    if grid.units * grid.positions > native.LARGE:
        native.say_what_is_lost()
    bits = np.empty(-(-grid.units * grid.positions // 8), dtype=np.uint8)
    for lane, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
        before, spent = Before.of(scaled, first, last), 0
        events = np.zeros((last - first, grid.positions), dtype=np.bool_)
        for position in range(grid.positions):
            hits, spent = lanes.events(lane, scaled.hazards(position, first, last, before), spent)
            events[hits, position] = True
            if before is not None:
                before.add(events[:, position])
        at = first * grid.positions // 8
        packed = np.packbits(events.reshape(-1), bitorder="little")
        bits[at : at + packed.size] = packed
    return bits


def write(model: Model, symbol: int, events: NDArray[np.bool_]) -> bytes:
    """Return the payload of events, in the order of coding, by a model."""
    scaled, grid, flat = model.scaled(), model.grid, events.reshape(model.grid.positions, -1)
    shapes = {name: array.size for name, array in model.values.items()}
    values = np.concatenate([np.zeros(0, dtype=np.int32), *model.values.values()])
    table = kinds_of(model.tables, shapes)
    count = lane_count(grid, int(np.count_nonzero(events)))
    bounds = grid.lanes(count)
    made = list[tuple[NDArray[np.uint16], Numbers]]()
    coefficients = Symbols.of_coefficients(values, table, count)
    for lane, stop in batches(bounds):
        first, last = int(bounds[lane]), int(bounds[stop])
        hazards, seen = seen_hazards(scaled, flat[:, first:last], first), flat[:, first:last]
        cuts = bounds[lane : stop + 1] - first
        own = Symbols.of_events(by_lane(hazards, cuts), by_lane(seen, cuts), cuts * grid.positions)
        made.append(joined(coefficients.part(lane, stop), own).words())
    words, lengths = (np.concatenate(parts) for parts in zip(*made, strict=True))
    flags = sum(1 << number for number, name in enumerate(sizes(grid, model.known)) if name in shapes)
    head = bytes([symbol | flags << 1]) + varint(HIGHEST - model.offset)
    head += bytes([model.rank]) if may_lean(grid, model.known) else b""
    head += bytes(model.steps[name] << 4 | model.tables[name] for name in shapes) + varint(count)
    head += b"".join(varint(int(one << 1 ^ one >> 63)) for one in np.diff(lengths[:-1], prepend=0))
    return head + words.astype("<u2").tobytes()


def lane_count(grid: Grid, events: int) -> int:
    """Return the number of lanes of a payload: as many as are worth their bytes, and no fewer than are allowed."""
    weights = grid.units * grid.positions
    share = events / weights
    size = -weights * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
    return min(-(-grid.units // GROUP), max(-(-grid.units // MAX_LANE), round(size / LANE_BYTES), 1))


def seen_hazards(model: Scaled, events: NDArray[np.bool_], first: int) -> NDArray[np.uint16]:
    """Return the hazards of units from `first` on, whose events (positions, units) are known."""
    hazards, before = np.empty(events.shape, dtype=np.uint16), Before.of(model, first, first + events.shape[1])
    for position, own in enumerate(events):
        hazards[position] = model.hazards(position, first, first + own.size, before)
        if before is not None:
            before.add(own)
    return hazards


def by_lane(array: NDArray[T], cuts: Numbers) -> NDArray[T]:
    """Return what (positions, units) have, one lane after another."""
    if len(array) == 1:
        return array.reshape(-1)
    return np.concatenate([array[:, a:b].reshape(-1) for a, b in itertools.pairwise(cuts.tolist())])


def batches(bounds: Numbers) -> Iterator[tuple[int, int]]:
    """Yield runs of lanes, as the first and the one behind the last, that have at most BATCH units or are one."""
    first = 0
    while first < bounds.size - 1:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + BATCH, side="right")) - 1)
        yield first, last
        first = last
