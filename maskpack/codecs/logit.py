"""A static model of each weight's odds, evaluated in integers, and rANS in lanes: small, and quick to decode."""

import ctypes
import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from ctypes import byref, c_int64
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError, by_triton
from . import native
from .base import (
    CODECS,
    NO_EVENTS,
    Bits,
    Bytes,
    Codec,
    Numbers,
    Profile,
    Reader,
    Side,
    There,
    count_ones,
    flipped,
    varint,
    words_of,
)
from .lanes import LEVELS, STRIDE, Lanes, hazards_of, pointers, symbols, tables, words
from .logit_fit import Fitted, fitted, margins
from .logit_model import (
    GROUP,
    HIGHEST,
    MAX_LANE,
    MAX_RANK,
    Before,
    Grid,
    Known,
    Model,
    by_position,
    may_lean,
    signs_of,
    sizes,
)

LANE_BYTES = 1200  # of a mask's entropy, for which a lane is worth its three bytes
TOGETHER = 1 << 24  # units whose lanes numpy decodes side by side
PIECE = 1 << 15  # weights whose model it evaluates at once
LARGE = 1 << 25  # bytes of packed bits, from which a payload is looked at before they are made room for


@CODECS.register
@dataclass(frozen=True, slots=True)
class Logit(Codec):
    """Odds of rows, columns and kernels, as integers; small, quick."""

    id = "logit"
    reference = "https://arxiv.org/abs/1311.2540"

    def encode(self, bits: Bits, side: Side) -> bytes | None:
        return encode(bits, side, self.needs_base)

    def at_least(self, bits: Bits, side: Side) -> float:
        grid = Grid.of(side.shape)
        if self.needs_base or side.reference is not None or grid.positions > 1 or not grid.units:
            return 0
        # the entropy of the whole, without what rows alone and inputs alone tell, noise included
        by_row, by_input = margins(grid, bits)
        whole = _entropy(by_row.sum(keepdims=True), grid.units)
        return max(0.0, _entropy(by_row, grid.inputs) + _entropy(by_input, grid.rows) - whole) / 8

    def decode(self, data: Bytes, side: Side) -> Bits:
        return decode(data, side, self.needs_base)

    def decodes_on(self, device: str) -> bool:
        return by_triton(device) or (device == "cpu" and native.library() is None)

    def decode_on(self, payloads: Sequence[There]) -> Sequence[Any]:
        weight = payloads[0][2]
        if weight is not None and by_triton(weight.device.type):
            from .native import gpu

            return gpu.decode_on(payloads, self.needs_base)
        sides = [
            Side(shape, words_of(own) if self.needs_base and own is not None else None) for _, shape, own, _ in payloads
        ]
        found = decode_together([data for data, *_ in payloads], sides, self.needs_base)
        return [None if own is None else (own, None) for own in found]

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [] if profile == "fast" else [cls()]


@CODECS.register
@dataclass(frozen=True, slots=True)
class LogitBase(Logit):
    """Codec logit with a model of the base's weights; the smallest.

    Scores trained with SGD move in proportion to the weight, so that its magnitude tells much. Scores trained with Adam
    move with the sign of weight times gradient, and gradients are nearly of low rank, so that signs tell much.
    """

    id = "logit-base"
    needs_base = True
    supersedes = "logit"

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()] if profile == "max" else []


class Head(NamedTuple):
    """Header of a payload: the model and the layout of its lanes, before their words.

    Attributes:
        codes, sizes: of each array: its step and table, the number of its coefficients.
        lanes: the words of each.
    """

    symbol: int
    grid: Grid
    offset: int
    codes: dict[str, int]
    sizes: dict[str, int]
    lanes: list[NDArray[np.uint16]]

    @classmethod
    def read(cls, data: Bytes, side: Side, base: bool) -> Self:
        """Take a payload with events apart."""
        reader, grid = Reader(data), Grid.of(side.shape)
        first = reader.byte()
        flags, possible = first >> 1, sizes(grid, base, side.reference is not None)
        shapes = {name: size for number, (name, size) in enumerate(possible.items()) if flags >> number & 1}
        offset = HIGHEST - reader.varint()
        rank = reader.byte() if may_lean(grid, base) else 0
        if flags >> len(possible) or not all(shapes.values()) or rank > MAX_RANK or offset < -LEVELS:
            raise CorruptAdapterError(
                f"a logit payload of shape {side.shape} states the arrays {flags:06b}, a low rank of {rank} and an "
                f"offset of {offset}, which do not go together"
            )
        for number in range(rank):
            shapes |= {f"left {number}": grid.rows, f"right {number}": grid.inputs}
        codes = dict(zip(shapes, reader.take(len(shapes)).tolist(), strict=True))
        if not all(code & 15 for code in codes.values()):
            raise CorruptAdapterError(f"a logit payload states table 0 for an array, expected 1 to 15: {codes}")
        count = reader.varint()
        if not max(1, -(-grid.units // MAX_LANE)) <= count <= min(-(-grid.units // GROUP), 1 + len(data)):
            raise CorruptAdapterError(
                f"a logit payload of {len(data)} bytes and {grid.units} units states {count} lanes"
            )
        changes = np.array([reader.varint() for _ in range(count - 1)], dtype=np.int64)
        lengths = np.cumsum((changes >> 1) ^ -(changes & 1))
        rest = reader.rest()
        if (
            len(rest) % 2
            or not len(rest)
            or ((lengths < 0) | (lengths > len(rest))).any()
            or 2 * lengths.sum() > len(rest)
        ):
            raise CorruptAdapterError(f"the lanes of a logit payload do not add up to its {len(rest)} bytes of words")
        return cls(first & 1, grid, offset, codes, shapes, np.split(rest.view("<u2"), np.cumsum(lengths)))


def decode(data: Bytes, side: Side, base: bool) -> Bits:
    """Return the packed bits of a payload."""
    if len(data) == 1 and data[0] & ~1 == NO_EVENTS:
        bits, symbol = np.zeros(side.size, dtype=np.uint8), data[0] & 1
    elif (compiled := native.library()) is not None:
        if side.size > LARGE:
            Head.read(data, side, base)  # a short payload must not fill the memory
        payload = np.frombuffer(data, dtype=np.uint8)
        bits, symbol = np.zeros(side.size, dtype=np.uint8), int(payload[0]) & 1 if payload.size else 0
        given, events = given_of(side, base), (native.pointer(payload), c_int64(payload.size), native.pointer(bits))
        done = compiled.maskpack_decode(byref(pointers()), byref(given), *events)
        if done < 0:
            raise MemoryError
        if not done:
            Head.read(data, side, base)  # says what is wrong, if it is that
            raise unlike()
    else:
        (found,), symbol = _decoded([(Head.read(data, side, base), side)], base), data[0] & 1
        if found is None:
            raise unlike()
        bits = found
    return bits if symbol else flipped(bits, side.count)


def decode_together(payloads: Sequence[Bytes], sides: Sequence[Side], base: bool) -> list[Bits | None]:
    """Return the packed bits of payloads, by numpy; None for those that `decode` has to decode, or refuse."""
    jobs = dict[int, tuple[Head, Side]]()
    for number, (data, side) in enumerate(zip(payloads, sides, strict=True)):
        with suppress(CorruptAdapterError):
            if len(data) > 1:
                jobs[number] = Head.read(data, side, base), side
    found: list[Bits | None] = [None] * len(payloads)
    for number, events in zip(jobs, _decoded([*jobs.values()], base), strict=True):
        head, side = jobs[number]
        found[number] = events if events is None or head.symbol else flipped(events, side.count)
    return found


def given_of(side: Side, base: bool) -> native.Given:
    """Return what compiled loops take of a side."""
    weights = side.base if base else None
    width = 0 if weights is None else weights.itemsize
    known = weights, side.reference, side.ranks if base else None
    return native.Given(*Grid.of(side.shape), width, *map(native.address, known))


def unlike() -> CorruptAdapterError:
    """Return the error of a lane whose words and weights do not agree."""
    return CorruptAdapterError("the words of a lane say more, or less, than its weights and coefficients")


def _decoded(jobs: Sequence[tuple[Head, Side]], base: bool) -> list[Bits | None]:
    """Return the events of payloads as packed bits, by numpy; None where words and weights do not agree."""
    if not jobs:
        return []
    if sum(side.count for _, side in jobs) > native.LARGE:
        native.say_what_is_lost()
    lanes, kinds, parts = Lanes([own for head, _ in jobs for own in head.lanes]), list[Numbers](), list[Part]()
    for head, _ in jobs:
        own = np.repeat([code - 1 & 15 for code in head.codes.values()], [*head.sizes.values()])
        kinds += np.split(own, own.size * np.arange(1, len(head.lanes)) // len(head.lanes))
    coefficients, first = lanes.coefficients(kinds), 0
    for number, (head, side) in enumerate(jobs):
        last, edges = first + len(head.lanes), np.cumsum([*head.sizes.values()])[:-1]
        values = dict(zip(head.sizes, np.split(np.concatenate(coefficients[first:last]), edges), strict=False))
        model = Model.of(head.grid, Known.of(side, base, "magnitude" in values), head.offset, head.codes, values)
        starts = head.grid.lanes(last - first)
        step = last - first if head.grid.positions > 1 else max(1, TOGETHER * (last - first) // (head.grid.units + 1))
        for at in range(0, last - first, step):
            end = min(at + step, last - first)
            parts.append(Part(number, model, np.arange(first + at, first + end), starts[at : end + 1]))
        first = last
    bits, together = [np.zeros(side.size, dtype=np.uint8) for _, side in jobs], list[Part]()
    for part in parts:
        if sum(one.units for one in together) + part.units > TOGETHER:
            _decode_parts(together, lanes, bits)
            together = []
        together.append(part)
    _decode_parts(together, lanes, bits)
    good = np.split((lanes.state == 0) & (lanes.at == lanes.end), np.cumsum([len(head.lanes) for head, _ in jobs])[:-1])
    return [own if fits.all() else None for own, fits in zip(bits, good, strict=True)]


class Part(NamedTuple):
    """Lanes of a payload that are decoded together: its number, its model, the lanes, where their units begin."""

    job: int
    model: Model
    lanes: Numbers
    starts: Numbers

    @property
    def units(self) -> int:
        return int(self.starts[-1] - self.starts[0])

    def hazards(self, out: NDArray[np.int64]) -> None:
        """Write the hazards of a part without kernels."""
        inputs, (begin, end) = self.model.grid.inputs, self.starts[[0, -1]].tolist()
        rows, at = max(1, PIECE // inputs), 0
        for row in range(begin // inputs, -(-end // inputs), rows):
            level = self.model.levels(row, min(row + rows, -(-end // inputs))).reshape(-1)
            own = level[max(begin - row * inputs, 0) : end - row * inputs]
            hazards_of().take(own.view(np.uint16), out=out[at : at + own.size], mode="clip")
            at += own.size


def _decode_parts(parts: Sequence[Part], lanes: Lanes, bits: Sequence[Bits]) -> None:
    """Set the events of parts in the packed bits of their payloads."""
    # those with the most positions first, so that at each position the first ones go on
    parts = sorted(parts, key=lambda part: -part.model.grid.positions)
    positions = [part.model.grid.positions for part in parts]
    deep = [part for part in parts if part.model.grid.positions > 1]
    before = Before([part.units for part in deep], [part.model.arrays.get("before") for part in deep])
    levels = [part.model.levels(0, part.model.grid.rows).reshape(part.model.grid.positions, -1) for part in deep]
    signs = [signs_of(part.model.known, part.model.grid) for part in deep]
    marks = [np.zeros((part.units, count), dtype=np.bool_) for part, count in zip(parts, positions, strict=True)]
    for position in range(max(positions, default=0)):
        own = parts[: sum(count > position for count in positions)]
        edges = np.cumsum([0, *(part.units for part in own)])
        sums = np.zeros(edges[-1] + 1 + STRIDE, dtype=np.int64)
        sums[edges[-1] + 1 :] = 1 << 62
        kernels = min(len(deep), len(own))
        if kernels:
            level, minus = (np.concatenate([one[position] for one in of[:kernels]]) for of in (levels, signs))
            before.add_to(level, minus)
            hazards_of().take(level.view(np.uint16), out=sums[1 : level.size + 1], mode="clip")
        for part, at in zip(own[kernels:], edges[kernels:-1] + 1, strict=True):
            part.hazards(sums[at : at + part.units])
        np.cumsum(sums[: edges[-1] + 1], out=sums[: edges[-1] + 1])
        starts = [at + part.starts[:-1] - part.starts[0] for part, at in zip(own, edges[:-1], strict=True)]
        events = np.zeros(edges[-1], dtype=np.bool_)
        for found in lanes.events(
            np.concatenate([part.lanes for part in own]), sums, np.concatenate([*starts, edges[-1:]])
        ):
            events[found] = True
        if kernels:
            before.count(events[: level.size], minus)
        for mark, found in zip(marks, np.split(events, edges[1:-1]), strict=False):
            mark[:, position] = found
    for part, mark in zip(parts, marks, strict=True):
        begin, packed = int(part.starts[0]) * mark.shape[1] // 8, np.packbits(mark.reshape(-1), bitorder="little")
        bits[part.job][begin : begin + packed.size] = packed


def encode(bits: Bits, side: Side, base: bool) -> bytes:
    """Return the payload of packed bits."""
    ones = count_ones(bits)
    symbol = int(2 * ones <= side.count)  # of the events, which are rarer
    events, number = (bits, ones) if symbol else (flipped(bits, side.count), side.count - ones)
    if not number:
        return bytes([symbol | NO_EVENTS])
    grid, known = Grid.of(side.shape), Known.of(side, base)
    found = fitted(grid, known, events, side.lean)
    possible = sizes(grid, base, side.reference is not None)
    head = bytes([symbol | sum(2 << n for n, name in enumerate(possible) if name in found.codes)])
    head += varint(HIGHEST - found.offset) + (bytes([found.rank]) if may_lean(grid, base) else b"")
    head += bytes(found.codes.values()) + varint(count := lane_count(grid, number))
    compiled = native.library()
    if compiled is None:
        unpacked = by_position(np.unpackbits(events, count=side.count, bitorder="little"), grid)
        made, lengths = _coded(Model.of(grid, known, *found), found, unpacked, count)
    else:
        made, lengths = _compiled(compiled, head, side, base, found, events, count)
    return head + b"".join(varint(int(one << 1 ^ one >> 63)) for one in np.diff(lengths[:-1], prepend=0)) + made


def _compiled(
    compiled: ctypes.CDLL, head: bytes, side: Side, base: bool, found: Fitted, events: Bits, count: int
) -> tuple[bytes, Numbers]:
    """Return the words of all lanes, and how many each has, by the compiled loops."""
    given, values, lengths = given_of(side, base), found.coefficients(), np.zeros(count, dtype=np.int64)
    arrays = [native.pointer(own) for own in (values, events, lengths)]
    pieces = byref(pointers()), byref(given), head, c_int64(len(head))
    where = compiled.maskpack_encode(*pieces, *arrays)
    if not where:
        raise MemoryError
    try:
        return np.frombuffer(ctypes.string_at(where, 2 * int(lengths.sum())), np.uint16).astype(
            "<u2"
        ).tobytes(), lengths
    finally:
        compiled.maskpack_free(ctypes.c_void_p(where))


def _coded(model: Model, found: Fitted, events: Bits, count: int) -> tuple[bytes, Numbers]:
    """Return the words of all lanes, and how many each has, by numpy."""
    grid, flat, values = model.grid, events.reshape(model.grid.positions, -1), found.coefficients()
    kinds = [code - 1 & 15 for name, code in found.codes.items() for _ in range(found.values[name].size)]
    edges, made = tables().first, list[list[int]]()
    levels, signs = model.levels(0, grid.rows).reshape(grid.positions, -1), signs_of(model.known, grid)
    for lane, (first, last) in enumerate(itertools.pairwise(grid.lanes(count).tolist())):
        own, before = flat[:, first:last], Before([last - first], [model.arrays.get("before")])
        hazards = np.empty(own.shape, dtype=np.uint16)
        for position in range(grid.positions):
            level, minus = levels[position, first:last].copy(), signs[position, first:last]
            before.add_to(level, minus)
            before.count(own[position], minus)
            hazards[position] = hazards_of()[level.view(np.uint16)]
        part = range(values.size * lane // count, values.size * (lane + 1) // count)
        slots = [(int(edges[kinds[c], values[c] + 7]), int(edges[kinds[c], values[c] + 8])) for c in part]
        coefficients = [(begin, end - begin) for begin, end in slots]
        made.append(words(coefficients + symbols(hazards.reshape(-1), np.flatnonzero(own).tolist())))
    return np.array([*itertools.chain(*made)], dtype="<u2").tobytes(), np.array(
        [len(one) for one in made], dtype=np.int64
    )


def lane_count(grid: Grid, events: int) -> int:
    """Return the number of lanes of a payload: as many as are worth their bytes, and no fewer than are allowed."""
    weights = grid.units * grid.positions
    share = events / weights
    size = -weights * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
    return min(-(-grid.units // GROUP), max(-(-grid.units // MAX_LANE), round(size / LANE_BYTES), 1))


def _entropy(events: Numbers, each: int) -> float:
    """Return the bits of the entropies of so many weights each, of which so many have an event."""
    share = np.clip(events / each, 1e-9, 1 - 1e-9)
    return float(-each * (share * np.log2(share) + (1 - share) * np.log2(1 - share)).sum())
