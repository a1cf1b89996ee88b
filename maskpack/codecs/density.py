"""Row and column densities in octaves, gaps in Rice codes: for masks whose rows and columns differ."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import (
    CHUNK,
    CODECS,
    FOUR_BYTES,
    NO_EVENTS,
    Bits,
    Bytes,
    Codec,
    Numbers,
    Profile,
    Reader,
    Side,
    add_planes,
    count_ones,
    distances,
    matrix_shape,
    pack_unary,
    place,
    planes,
    rarer,
    unpack_unary,
    varint,
)


class Octaves(NamedTuple):
    """Weights sorted by octave (the sum of row class and column class), then row class, row, column.

    Attributes:
        numbers: the octaves that occur, rising. starts: where each begins, and the end of the last.
        table: for each cell (octave, row class) in order: start, columns, first of its rows and of its columns, the
            numbers of its row class and its column class.
        row, col: how rows and columns are sorted.
    """

    numbers: Numbers
    starts: Numbers
    table: NDArray[np.int64]
    row: "_Sorted"
    col: "_Sorted"
    cols: int

    @classmethod
    def of(cls, rows: int, cols: int, row_classes: Numbers | None, col_classes: Numbers | None) -> "Octaves":
        """Order the weights of a matrix; None where all classes are 0, which takes no memory."""
        row, col = _Sorted.of(rows, row_classes), _Sorted.of(cols, col_classes)
        if row_classes is None and col_classes is None:  # most small masks
            return cls(row.kinds, np.array([0, rows * cols]), np.zeros((6, 1), dtype=np.int64), row, col, cols)
        sums = row.kinds[:, None] + col.kinds
        order = np.argsort(sums, axis=None, kind="stable")  # row-major, so that row classes rise within an octave
        of_row, of_col = np.divmod(order, col.kinds.size)
        sizes = row.counts[of_row] * col.counts[of_col]
        starts = np.cumsum(sizes) - sizes
        numbers, first = np.unique(sums.reshape(-1)[order], return_index=True)
        row_starts, col_starts = np.cumsum(row.counts) - row.counts, np.cumsum(col.counts) - col.counts
        table = np.stack([starts, col.counts[of_col], row_starts[of_row], col_starts[of_col], of_row, of_col])
        return cls(numbers, np.append(starts[first], sizes.sum()), table, row, col, cols)

    def positions(self, places: Numbers) -> Numbers:
        """Return row-major positions of rising places in the order."""
        if self.table.shape[1] == 1:
            return places
        starts, width, first_row, first_col, _, _ = self.table
        counts = np.diff(np.searchsorted(places, starts[1:]), prepend=0, append=places.size)
        local = places - np.repeat(starts, counts)
        width = np.repeat(width, counts)
        row = local // width
        col: Numbers = local - row * width
        row += np.repeat(first_row, counts)
        col += np.repeat(first_col, counts)
        return self.row.at(row) * self.cols + self.col.at(col)

    def places(self, positions: Numbers) -> Numbers:
        """Return where weights stand in the order, given their row-major positions."""
        if self.table.shape[1] == 1:
            return positions
        starts, width, first_row, first_col, of_row, of_col = self.table
        row, col = np.divmod(positions, self.cols)
        cells = np.empty((self.row.kinds.size, self.col.kinds.size), dtype=np.int64)
        cells[of_row, of_col] = np.arange(starts.size)
        cell = cells[self.row.kind_of(row), self.col.kind_of(col)]
        places: Numbers = starts[cell] + (self.row.rank(row) - first_row[cell]) * width[cell]
        places += self.col.rank(col) - first_col[cell]
        return places


class _Sorted(NamedTuple):
    """Rows (or columns) sorted by class: the classes that occur, how many have each; the rest is None if all are 0."""

    kinds: Numbers
    counts: Numbers
    order: Numbers | None = None
    kind: Numbers | None = None

    @classmethod
    def of(cls, size: int, classes: Numbers | None) -> "_Sorted":
        if classes is None:
            return cls(np.zeros(1, dtype=np.int64), np.array([size]))
        kinds, kind, counts = np.unique(classes, return_inverse=True, return_counts=True)
        return cls(kinds, counts, np.argsort(classes, kind="stable"), kind.reshape(-1))

    def at(self, rank: Numbers) -> Numbers:
        return rank if self.order is None else np.take(self.order, rank)

    def rank(self, index: Numbers) -> Numbers:
        return index if self.order is None else np.take(np.argsort(self.order), index)

    def kind_of(self, index: Numbers) -> Numbers:
        return np.zeros_like(index) if self.kind is None else np.take(self.kind, index)


CLASSES = np.arange(-8, 9)
MAX_WIDTH = 40
MOST = 1 << 62
CROWDED = 0.35  # share of the rarer bit from which Rice codes are slower and larger than packed bits
LEAST_SAVED = 256  # bits: classes take time to decode, as much as for 30,000 weights
ROUNDS = 6  # of fitting rows, then columns; changes after that are rare


@CODECS.register
@dataclass(frozen=True, slots=True)
class Density(Codec):
    """Gaps in Rice codes of a width for each row and column; quick.

    Every row and every column has a class; the density at their crossing doubles from one sum of classes to the next,
    so that the Rice code's width, which halves its mean, always fits. Classes cost a bit or two each.
    """

    id = "density"
    reference = "https://doi.org/10.1109/TIT.1966.1053907"

    def encode(self, bits: Bits, side: Side) -> bytes | None:
        share = count_ones(bits) / max(side.count, 1)
        if CROWDED < share < 1 - CROWDED:
            return None
        symbol, where = rarer(bits, side.count)
        if not where.size:
            return bytes([symbol | NO_EVENTS])
        rows, cols = matrix_shape(side.shape)
        fit = _best_fit(where, rows, cols)
        octaves = Octaves.of(rows, cols, fit.rows, fit.cols)
        for start in range(0, where.size, CHUNK):
            where[start : start + CHUNK] = octaves.places(where[start : start + CHUNK])
        where.sort()
        starts = np.append(np.searchsorted(where, octaves.starts[:-1]), where.size)
        fields, counts = [np.zeros(0, dtype=np.uint8)], b""
        for index, octave in enumerate(octaves.numbers):
            own = where[starts[index] : starts[index + 1]]
            gaps, width = distances(own - octaves.starts[index]), fit.width - int(octave)
            counts += varint(own.size)
            fields += planes(gaps, width)
            own[:] = gaps >> width
        unary = pack_unary(np.concatenate([*(_fold(one) for one in (fit.rows, fit.cols) if one is not None), where]))
        flags = symbol | (fit.rows is not None) << 1 | (fit.cols is not None) << 2
        head = bytes([flags, fit.width]) + varint(len(unary))
        return head + unary + counts + np.packbits(np.concatenate(fields), bitorder="little").tobytes()

    def decode(self, data: Bytes, side: Side) -> Bits:
        return place(*self.events(data, side), side.count)

    def events(self, data: Bytes, side: Side) -> tuple[int, Numbers]:
        reader = Reader(data)
        flags = reader.byte()
        if flags & ~1 == NO_EVENTS and len(data) == 1:
            return flags & 1, np.zeros(0, dtype=np.int64)
        if flags > 7:
            raise CorruptAdapterError(f"a density payload begins with {flags}, expected 0 to 7")
        width = reader.byte()
        rows, cols = matrix_shape(side.shape)
        numbers = unpack_unary(reader.take(reader.varint()))
        stated = rows * (flags >> 1 & 1) + cols * (flags >> 2)
        if not stated < numbers.size <= stated + side.count:
            raise CorruptAdapterError(f"a density payload has {numbers.size} numbers for {rows} rows, {cols} columns")
        split = rows if flags & 2 else 0
        classes, quotients = _unfold(numbers[:stated]), numbers[stated:]
        octaves = Octaves.of(rows, cols, classes[:split] if flags & 2 else None, classes[split:] if flags & 4 else None)
        counts = [reader.varint() for _ in octaves.numbers]
        widths = [width - int(octave) for octave in octaves.numbers]
        bits = sum(count * width for count, width in zip(counts, widths, strict=True))
        packed = reader.rest()
        if (
            sum(counts) != quotients.size
            or min(widths) < 0
            or max(widths) > MAX_WIDTH
            or len(packed) != (bits + 7) // 8
        ):
            raise CorruptAdapterError(
                f"a density payload has {quotients.size} gaps and {len(packed)} bytes of fields; its counts {counts} "
                f"and widths {widths} say otherwise"
            )
        unpacked = np.unpackbits(packed, bitorder="little")
        if unpacked[bits:].any():
            raise CorruptAdapterError("a density payload has bits after its last field")
        wide = side.count >= FOUR_BYTES or max(widths) >= 30
        places, at, field = quotients.astype(np.int64) if wide else quotients, 0, 0
        for index, (count, width) in enumerate(zip(counts, widths, strict=True)):
            own = places[at : at + count]
            fits = int(own.sum(dtype=np.int64)) << width <= side.count and count << width < MOST  # nothing overflows
            if fits:
                add_planes(own, unpacked[field : field + count * width], width)
                own += 1
            if not fits or int(own.sum(dtype=np.int64)) > octaves.starts[index + 1] - octaves.starts[index]:
                raise CorruptAdapterError(f"the gaps of a density payload run past the end of octave {index}")
            np.cumsum(own, out=own)
            own += int(octaves.starts[index]) - 1
            at, field = at + count, field + count * width
        for start in range(0, places.size, CHUNK):
            places[start : start + CHUNK] = octaves.positions(places[start : start + CHUNK])
        return flags & 1, places

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [] if profile == "fast" else [cls()]


class _Fit(NamedTuple):
    """Classes of rows and columns, if they are worth their bits, the width of octave 0, and the bits it all takes."""

    rows: Numbers | None
    cols: Numbers | None
    width: int
    cost: float


def _best_fit(where: Numbers, rows: int, cols: int) -> _Fit:
    """Choose whether rows and columns have classes, and which, for events at row-major positions."""
    share = where.size / (rows * cols)
    middle = max(0, round(float(np.log2(np.log(2) / share))))
    fits = [
        _Fit(None, None, w, _cost(where.size, rows * cols / 2**w, w)) for w in (max(0, middle - 1), middle, middle + 1)
    ]
    if min(rows, cols) > 1:
        in_rows, in_cols = np.zeros(rows, dtype=np.int64), np.zeros(cols, dtype=np.int64)
        for start in range(0, where.size, CHUNK):
            row, col = np.divmod(where[start : start + CHUNK], cols)
            in_rows += np.bincount(row, minlength=rows)
            in_cols += np.bincount(col, minlength=cols)
        fits += [
            _fit(in_rows, in_cols, use, width)
            for use in ((True, False), (False, True), (True, True))
            for width in (max(0, middle - 1), middle, middle + 1)
        ]
    return min(fits, key=lambda fit: fit.cost + LEAST_SAVED * (fit.rows is not None or fit.cols is not None))


def _cost(events: int, passed: float, width: int) -> float:
    """Return about how many bits Rice codes take.

    An event costs width + 1 bits, and every 2^width weights that pass another, less .443 an event for those that
    rounding down saves.
    """
    return passed + events * (width + 0.557)


def _fit(in_rows: Numbers, in_cols: Numbers, use: tuple[bool, bool], width: int) -> _Fit:
    """Choose classes for the numbers of events in rows and columns."""
    rows, cols = np.zeros(in_rows.size, dtype=np.int64), np.zeros(in_cols.size, dtype=np.int64)
    for _ in range(ROUNDS if all(use) else 1):
        if use[0]:
            rows = _classes(in_rows, cols, width)
        if use[1]:
            cols = _classes(in_cols, rows, width)
    passed = float(np.exp2(rows).sum() * np.exp2(cols).sum()) / 2**width
    cost = _cost(int(in_rows.sum()), passed, width) - float(in_rows @ rows + in_cols @ cols)
    cost += sum(float((_fold(one) + 1).sum()) for one, used in zip((rows, cols), use, strict=True) if used)
    return _Fit(rows if use[0] else None, cols if use[1] else None, width, cost)


def _classes(events: Numbers, others: Numbers, width: int) -> Numbers:
    """Return the cheapest class of every row (or column), given those of the columns (or rows)."""
    passed = np.exp2(others).sum() * np.exp2(CLASSES - width)
    cost = passed - events[:, None] * CLASSES + _fold(CLASSES)
    cost[:, width - CLASSES - others.max() < 0] = np.inf
    chosen: Numbers = np.take(CLASSES, cost.argmin(1))
    return chosen


def _fold(classes: Numbers) -> Numbers:
    """Return 0, -1, 1, -2, 2 … as 0, 1, 2, 3, 4 …"""
    folded: Numbers = np.where(classes < 0, -2 * classes - 1, 2 * classes)
    return folded


def _unfold(numbers: Numbers) -> Numbers:
    classes: Numbers = np.where(numbers & 1, -(numbers + 1) // 2, numbers // 2)
    return classes
