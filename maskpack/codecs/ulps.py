"""Stored values as steps from the base's, in units in the last place: nearly all are one step (docs/format.md 6.3).

How large a step is depends on the exponent of the weight that it starts from: an optimiser moves large and small
weights alike. So there is a table of sizes for each of up to 16 exponents; the sign, and what is below the first two
bits of a size, is noise and stands in bits as it is.
"""

from collections.abc import Sized
from ctypes import byref, c_int32, c_int64
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from . import native
from .base import Bits, Bytes, Reader, Words, count_ones, varint

if TYPE_CHECKING:
    from torch import Tensor

BUCKETS = 64  # of sizes: 0, 1, 2, 3, 4 to 5, 6 to 7, 8 to 11, 12 to 15, 16 to 23, …
SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
LOW = 1 << 16  # a state below it takes the next word
EXPONENTS = 256
MOST_CONTEXTS = 16
MOST_LANES, PER_LANE = 128, 4096  # values
WEIGHTS = np.array([0, 1, 2, 3, 5, 9, 16, 28, 49, 85, 149, 261, 457, 800, 1400, 2450])  # of a bucket in a table


class Float(NamedTuple):
    """A dtype of values: its name in the file, bits of its mantissa, its words."""

    name: str
    mantissa: int
    words: type[np.unsignedinteger]

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << 8 * np.dtype(self.words).itemsize - 1


FLOATS = (Float("F32", 23, np.uint32), Float("BF16", 7, np.uint16), Float("F16", 10, np.uint16))
BOUNDS = np.sqrt(WEIGHTS[1:-1] * WEIGHTS[2:])
# bits of a symbol with so many slots, whose sums are exact
LOGS = np.rint(65536 * (SLOT_BITS - np.log2(np.maximum(np.arange(SLOTS + 1), 1)))) / 65536
HALVES = [bytes([byte & 15, byte >> 4]) for byte in range(256)]
Tables = NDArray[np.uint8]  # (contexts, BUCKETS): of each context the number of the weight of each bucket


def _sizes(tables: Tables) -> NDArray[np.int64]:
    """Return the slots of each bucket of each table, (tables, BUCKETS)."""
    weights = WEIGHTS[tables]
    sizes: NDArray[np.int64] = np.maximum(SLOTS * weights // weights.sum(1, keepdims=True), 1) * (weights > 0)
    sizes[np.arange(len(sizes)), weights.argmax(1)] += SLOTS - sizes.sum(1)
    return sizes


def _entries(tables: Tables) -> NDArray[np.uint32]:
    """Return for each context and bucket: slots << 18 | first slot << 6 | bucket."""
    if (library := native.library()) is not None:
        entries = np.empty(tables.shape, np.uint32)
        library.maskpack_steps_entries(c_int64(len(tables)), native.pointer(tables), native.pointer(entries))
        return entries
    sizes = _sizes(tables)
    found = sizes << 18 | (np.cumsum(sizes, 1) - sizes) << 6 | np.arange(BUCKETS)
    # behind the last slot there is no room for another first one
    return np.where(sizes > 0, found, 0).astype(np.uint32)


def _nearest(counts: NDArray[np.int64]) -> Tables:
    """Return the table nearest to how often each bucket comes, of each row; where none does, all are in the first."""
    wanted = counts / np.maximum(counts.max(1, keepdims=True), 1) * WEIGHTS[-1]
    found = np.where(wanted > 0, np.searchsorted(BOUNDS, wanted) + 1, 0).astype(np.uint8)
    found[~counts.any(1), 0] = 1
    return found


def _bits(counts: NDArray[np.int64], tables: Tables) -> list[float]:
    """Return the bits that each table takes to code buckets of these counts, its own description included."""
    used = (tables > 0) * np.arange(1, BUCKETS + 1)
    saying = (counts * LOGS[np.where(counts > 0, _sizes(tables), SLOTS)]).sum(1)
    found: list[float] = (saying + 8 + 4 * used.max(1)).tolist()
    return found


def _chosen(counts: NDArray[np.int64]) -> tuple[int, Tables]:
    """Return the highest exponent and the table of each context, with as many contexts as save bits."""
    if (library := native.library()) is not None:
        room, highest = np.empty((MOST_CONTEXTS + 1, BUCKETS), np.uint8), c_int32(0)
        arrays = native.pointer(counts), native.pointer(BOUNDS), native.pointer(LOGS)
        count = library.maskpack_steps_choose(*arrays, byref(highest), native.pointer(room))
        return highest.value, room[:count]
    present = np.flatnonzero(counts.any(1))
    top, bottom = int(present[-1]), int(present[0])
    tried = [1, 2, 4, 8, 12, MOST_CONTEXTS]
    tried = tried[: 1 + sum(contexts <= top - bottom for contexts in tried)]
    alone = [counts[top - k] if top >= k else counts[0] * 0 for k in range(MOST_CONTEXTS - 1)]
    rows = np.array([*alone, *(counts[: max(0, top - contexts + 2)].sum(0) for contexts in tried)])
    tables = _nearest(rows)
    costs, last = _bits(rows, tables), len(alone)
    each = [sum(costs[: contexts - 1]) + costs[last + k] for k, contexts in enumerate(tried)]
    best = each.index(min(each))
    return top, tables[[*range(tried[best] - 1), last + best]]


def _ordered(words: Words, sign: int) -> NDArray[np.int64]:
    wide = words.astype(np.int64)
    return np.where(wide & sign, ~wide & 2 * sign - 1, wide | sign)


def _steps(kind: Float, base: Words, values: Words) -> NDArray[np.int64]:
    """Return 2 |step| + (step < 0) from each word of the base to the value, away from zero."""
    sign = kind.sign
    forth = _ordered(values, sign) - _ordered(base, sign)
    forth = np.where(base.astype(np.int64) & sign, -forth, forth) & 2 * sign - 1
    size = np.where(forth & sign, 2 * sign - forth, forth)
    found: NDArray[np.int64] = 2 * size + (forth >= sign)
    return found


def _buckets(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    size = steps >> 1
    octave = np.frexp(size.astype(np.float64))[1].astype(np.int64) - 1
    return np.where(size < 2, size, 2 * octave + (size >> np.maximum(octave - 1, 0) & 1))


def _exponents(kind: Float, base: Words) -> NDArray[np.int64]:
    return (base.astype(np.int64) & kind.sign - 1) >> kind.mantissa


def lane_count(count: int) -> int:
    """Return the number of lanes of so many values."""
    return min(MOST_LANES, max(1, count // PER_LANE))


def _given(kind: Float, base: Words, tables: Sized, top: int, table: NDArray[np.uint32]) -> native.Steps:
    sizes = base.size, lane_count(base.size), len(tables), top, base.itemsize, kind.mantissa
    return native.Steps(*sizes, native.address(base), native.address(table))


def encode(name: str, base: Words, values: Words) -> bytes:
    """Return the payload of values of a dtype; `base`: what stands in their places there, in the same dtype."""
    number = next(k for k, kind in enumerate(FLOATS) if kind.name == name)
    kind, library = FLOATS[number], native.library()
    if not base.size:
        return bytes([number])
    counts = np.zeros((EXPONENTS, BUCKETS), np.int64)
    if library is not None:
        kinds, room = np.empty(base.size, np.uint16), np.empty(base.nbytes + base.size // 8 + 16, np.uint8)
        none = native.Steps(base.size, 0, 0, 0, base.itemsize, kind.mantissa, native.address(base))
        pointers = (native.pointer(one) for one in (values, counts, kinds, room))
        bits = room[: library.maskpack_steps_count(byref(none), *pointers)]
        top, tables = _chosen(counts)
        entries, words = _entries(tables), np.empty(2 * lane_count(base.size) + base.size, np.uint16)
        given = _given(kind, base, tables, top, entries)
        made = library.maskpack_steps_encode(byref(given), native.pointer(kinds), native.pointer(words))
        words = words[words.size - made :]
    else:
        np.add.at(counts, (_exponents(kind, base), _buckets(_steps(kind, base, values))), 1)
        top, tables = _chosen(counts)
        words, bits = _encoded(kind, base, values, top, _entries(tables))
    head = bytearray([number, top, len(tables)])
    for row in tables:
        table = row.tobytes().rstrip(b"\0")
        halves = bytes([len(table) >> 4, len(table) & 15]) + table + b"\0"
        head += bytes([one | other << 4 for one, other in zip(halves[::2], halves[1::2], strict=False)])
    return bytes(head) + varint(bits.size) + bits.tobytes() + words.astype("<u2").tobytes()


def _encoded(
    kind: Float, base: Words, values: Words, top: int, entries: NDArray[np.uint32]
) -> tuple[NDArray[np.uint16], Bits]:
    """Return words and bits, by numpy."""
    steps, lanes = _steps(kind, base, values), lane_count(base.size)
    buckets = _buckets(steps)
    rest = np.maximum(buckets >> 1, buckets > 0)  # bits of each
    own = entries[np.clip(top - _exponents(kind, base), 0, len(entries) - 1), buckets].astype(np.int64)
    where = np.repeat(np.cumsum(rest) - rest, rest)
    shifts = np.arange(where.size) - where
    bits = np.packbits((np.repeat(steps, rest) >> shifts & 1).astype(np.uint8), bitorder="little")
    state, made = np.full(lanes, LOW, np.int64), list[NDArray[np.uint16]]()
    for start in range((base.size - 1) // lanes * lanes, -1, -lanes):
        row = own[start : start + lanes]
        size, some = row >> 18, state[: row.size]
        full = some >= size << 20
        made.append((some[full] & 0xFFFF).astype(np.uint16))
        some[full] >>= 16
        some[:] = (some // size << SLOT_BITS) + some % size + (row >> 6 & SLOTS - 1)
    return np.concatenate([np.stack([state & 0xFFFF, state >> 16], 1).ravel().astype(np.uint16), *made[::-1]]), bits


def kind_of(data: Bytes) -> Float:
    """Return the dtype of the values of a payload."""
    number = Reader(data).byte()
    if number >= len(FLOATS):
        raise CorruptAdapterError(f"stored values have the dtype {number}, expected 0 to {len(FLOATS) - 1}")
    return FLOATS[number]


class Parsed(NamedTuple):
    """A parsed payload of values: highest exponent, `_entries`, rest bits, and the words of the lanes."""

    kind: Float
    top: int
    entries: NDArray[np.uint32]
    bits: Bits
    words: NDArray[np.uint16]

    @classmethod
    def of(cls, data: Bytes, count: int) -> "Parsed | None":
        """Take the payload of so many values apart; None where there are none."""
        kind, reader = kind_of(data), Reader(data)
        reader.byte()
        if not count:
            if reader.rest().size:
                raise CorruptAdapterError("a payload of no values goes on behind its first byte")
            return None
        top, tables = reader.byte(), _read_tables(reader)
        bits, rest = reader.take(reader.varint()), reader.rest()
        if rest.size % 2 or rest.size < 4 * lane_count(count):
            raise CorruptAdapterError(f"{rest.size} bytes of words are too few, or odd, for {count} stored values")
        return cls(kind, top, _entries(tables), bits, np.frombuffer(rest.tobytes(), np.uint16))  # aligned


def decode(data: Bytes, base: Words) -> Words:
    """Return the values of a payload, as many as there are words of the base, which have the values' dtype."""
    parsed, library = Parsed.of(data, base.size), native.library()
    if parsed is None:
        return base.copy()
    kind, top, entries, bits, words = parsed
    if library is None:
        return _decoded(parsed, base)
    values = np.empty(base.size, kind.words)
    given = _given(kind, base, entries, top, entries)
    pairs = native.pointer(words), c_int64(words.size), native.pointer(bits), c_int64(bits.size)
    if (done := library.maskpack_steps_decode(byref(given), *pairs, native.pointer(values))) < 0:
        raise MemoryError
    if not done:
        raise unlike()
    return values


def at_zeros(words: Words, bits: Bits) -> Words:
    """Return the words at the zeros of packed bits, in order."""
    found = np.empty(_zeros(words, bits), words.dtype)
    _exchange(words, bits, found, False)
    return found


def put_at_zeros(words: Words, bits: Bits, values: Words) -> None:
    """Put values in the place of the words at the zeros of packed bits."""
    if values.size != _zeros(words, bits):
        raise ValueError(f"{values.size} values are not those of the {_zeros(words, bits)} zeros of these bits")
    _exchange(words, bits, values, True)


def _zeros(words: Words, bits: Bits) -> int:
    if bits.size != (words.size + 7) // 8:
        raise ValueError(f"{bits.size} bytes of bits are not those of {words.size} words")
    return words.size - count_ones(bits)


def _exchange(words: Words, bits: Bits, values: Words, put: bool) -> None:
    if (library := native.library()) is not None:
        pointers = (native.pointer(one) for one in (words, values))
        library.maskpack_at_zeros(c_int64(words.itemsize), put, native.pointer(bits), c_int64(words.size), *pointers)
        return
    zeros = np.unpackbits(bits, count=words.size, bitorder="little") == 0
    if put:
        words[zeros] = values
    else:
        values[:] = words[zeros]


def _read_tables(reader: Reader) -> Tables:
    count = reader.byte()
    if not 1 <= count <= MOST_CONTEXTS:
        raise CorruptAdapterError(f"stored values have {count} tables, expected 1 to {MOST_CONTEXTS}")
    found = np.zeros((count, BUCKETS), np.uint8)
    for table in found:
        first = reader.byte()
        size = (first & 15) << 4 | first >> 4
        if not 1 <= size <= BUCKETS:
            raise CorruptAdapterError(f"a table of stored values has {size} buckets, expected 1 to {BUCKETS}")
        halves = b"".join([HALVES[byte] for byte in reader.take((size + 1) // 2).tobytes()])
        if not any(halves[:size]) or any(halves[size:]):
            raise CorruptAdapterError("a table of stored values is empty, or does not end where it says")
        table[:size] = np.frombuffer(halves, np.uint8, size)
    return found


def unlike() -> CorruptAdapterError:
    return CorruptAdapterError("the words and bits of stored values say more, or less, than there are values")


def _decoded(parsed: Parsed, base: Words) -> Words:
    """Return the values, by numpy."""
    import torch

    kind, top, entries, bits, words = parsed
    lanes = lane_count(base.size)
    table = np.stack([np.repeat(row, row >> 18) for row in entries])
    state = words[: 2 * lanes].astype(np.int64).reshape(-1, 2) @ np.array([1, 1 << 16])
    contexts = np.clip(top - _exponents(kind, base), 0, len(table) - 1)
    at, buckets = 2 * lanes, np.empty(base.size, np.int64)
    for start in range(0, base.size, lanes):
        context = contexts[start : start + lanes]
        some = state[: context.size]
        slot = some & SLOTS - 1
        entry = table[context, slot].astype(np.int64)
        buckets[start : start + lanes] = entry & 63
        some[:] = (entry >> 18) * (some >> SLOT_BITS) + slot - (entry >> 6 & SLOTS - 1)
        empty = np.flatnonzero(some < LOW)
        taken = words[at : at + empty.size]
        if taken.size < empty.size:
            raise unlike()
        some[empty] = some[empty] << 16 | taken
        at += empty.size
    if at != words.size or (state != LOW).any():
        raise unlike()
    here = (torch.from_numpy(one) for one in (base.view(f"i{base.itemsize}"), buckets, np.array(bits)))
    found: Words = valued(kind, *here).numpy().view(kind.words)
    return found


def valued(kind: Float, base: "Tensor", buckets: "Tensor", bits: "Tensor") -> "Tensor":
    """Return values as integers, from those of the base, the bucket of each step and the rest bits, where they lie."""
    import torch

    octave = buckets >> 1
    width, sign = torch.maximum(octave, buckets.clamp(max=1)), kind.sign
    ends = width.cumsum(0)
    used = int(ends[-1])
    if (used + 7) // 8 != len(bits) or (used % 8 and int(bits[-1]) >> used % 8):
        raise unlike()
    first, padded = ends - width, torch.nn.functional.pad(bits, (0, 8)).long()
    rest = sum(padded[(first >> 3) + k] << 8 * k for k in range(5)) >> (first & 7) & (1 << width) - 1
    size = torch.where(buckets < 2, buckets, (2 | buckets & 1) << (octave - 1).clamp(min=0) | rest >> 1)
    word = base.long() & 2 * sign - 1
    negative = (word & sign) > 0
    number = torch.where(negative, ~word & 2 * sign - 1, word | sign)
    number = number + torch.where(((rest & 1) > 0) != negative, -size, size) & 2 * sign - 1
    return torch.where((number & sign) > 0, number ^ sign, ~number & 2 * sign - 1).to(base.dtype)
