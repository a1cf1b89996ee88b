"""Row and column densities in octaves, gaps in Rice codes: for masks whose rows and columns differ."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import CODECS, Bits, Bytes, Codec, Profile, Side
from .streams import (
    NO_EVENTS,
    Numbers,
    Reader,
    count_ones,
    from_planes,
    matrix_shape,
    pack_unary,
    place,
    planes,
    rarer,
    unpack_unary,
    varint,
)

OCTAVES = np.arange(-8, 9)
MAX_WIDTH = 40
MOST = 1 << 62
CROWDED = 0.35  # share of the rarer bit from which Rice codes are slower and larger than packed bits
CHUNK = 1 << 20  # events that are mapped at once
ROUNDS = 6  # of fitting rows, then columns; changes after that are rare


@CODECS.register
@dataclass(frozen=True, slots=True)
class Density(Codec):
    """Gaps of the rarer bit in Rice codes, whose width follows the density of row and column. Needs no base.

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
        in_rows, in_cols = np.bincount(where // cols, minlength=rows), np.bincount(where % cols, minlength=cols)
        fits = (_fit(in_rows, in_cols, use_rows, use_cols) for use_rows in (False, True) for use_cols in (False, True))
        fit = min(fits, key=lambda fitted: fitted.cost)
        cells = _Cells.of(fit.rows, fit.cols)
        for start in range(0, where.size, CHUNK):
            where[start : start + CHUNK] = cells.places(where[start : start + CHUNK])
        places = where
        places.sort()
        starts = np.searchsorted(places, cells.class_starts)
        quotients, fields, counts = [], [np.zeros(0, dtype=np.uint8)], b""
        for index, octave in enumerate(cells.octaves):
            own = places[starts[index] : starts[index + 1]] - cells.class_starts[index]
            gaps = np.diff(own, prepend=-1) - 1
            width = fit.width - int(octave)
            counts += varint(own.size)
            quotients.append(gaps >> width)
            fields += planes(gaps, width)
        classes = [_fold(fit.rows)] * fit.use_rows + [_fold(fit.cols)] * fit.use_cols
        unary = pack_unary(np.concatenate([*classes, *quotients]))
        head = bytes([symbol | fit.use_rows << 1 | fit.use_cols << 2, fit.width]) + varint(len(unary))
        return head + unary + counts + np.packbits(np.concatenate(fields), bitorder="little").tobytes()

    def decode(self, data: Bytes, side: Side) -> Bits:
        reader = Reader(data)
        flags = reader.byte()
        if flags & ~1 == NO_EVENTS and len(data) == 1:
            return place(flags & 1, np.zeros(0, dtype=np.int64), side.count)
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
        cells = _Cells.of(
            classes[:split] if flags & 2 else np.zeros(rows, dtype=np.int64),
            classes[split:] if flags & 4 else np.zeros(cols, dtype=np.int64),
        )
        counts = [reader.varint() for _ in cells.octaves]
        widths = [width - int(octave) for octave in cells.octaves]
        bits = sum(count * width for count, width in zip(counts, widths, strict=True))
        packed = reader.rest()
        if sum(counts) != quotients.size or min(widths) < 0 or max(widths) > MAX_WIDTH or len(packed) != (bits + 7) // 8:
            raise CorruptAdapterError(
                f"a density payload has {quotients.size} gaps and {len(packed)} bytes of fields; its counts {counts} "
                f"and widths {widths} say otherwise"
            )
        unpacked = np.unpackbits(packed, bitorder="little")
        if unpacked[bits:].any():
            raise CorruptAdapterError("a density payload has bits after its last field")
        places, at, field = np.empty(quotients.size, dtype=np.int64), 0, 0
        for index, (count, width) in enumerate(zip(counts, widths, strict=True)):
            own = places[at : at + count]
            quotient = quotients[at : at + count]
            fits = int(quotient.sum()) << width <= side.count and count << width < MOST  # nothing overflows
            if fits:
                gaps = from_planes(unpacked[field : field + count * width], count, width) + (quotient << width) + 1
                np.cumsum(gaps, out=own)
                own += cells.class_starts[index] - 1
            if not fits or (count and own[-1] >= cells.class_starts[index + 1]):
                raise CorruptAdapterError(f"the gaps of a density payload run past the end of octave {index}")
            at, field = at + count, field + count * width
        for start in range(0, places.size, CHUNK):
            places[start : start + CHUNK] = cells.positions(places[start : start + CHUNK])
        return place(flags & 1, places, side.count)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [] if profile == "fast" else [cls()]


class _Fit(NamedTuple):
    """Classes of rows and columns, whether they are stored, the width of class 0, and about how many bits it takes."""

    rows: Numbers
    cols: Numbers
    use_rows: bool
    use_cols: bool
    width: int
    cost: float


def _fit(in_rows: Numbers, in_cols: Numbers, use_rows: bool, use_cols: bool) -> _Fit:
    """Choose classes for the numbers of events in rows and columns.

    In a Rice code of width w, an event costs w + 1 bits, and every 2^w weights that pass another, less .443 an event
    for those that rounding down saves.
    """
    events = int(in_rows.sum())
    share = events / (in_rows.size * in_cols.size)
    middle = max(0, round(float(np.log2(np.log(2) / share))))
    best: _Fit | None = None
    for width in range(max(0, middle - 1), middle + 2):
        rows, cols = np.zeros(in_rows.size, dtype=np.int64), np.zeros(in_cols.size, dtype=np.int64)
        for _ in range(ROUNDS if use_rows and use_cols else 1):
            if use_rows:
                rows = _classes(in_rows, cols, width)
            if use_cols:
                cols = _classes(in_cols, rows, width)
        passed = float(np.exp2(rows).sum() * np.exp2(cols).sum()) / 2**width
        cost = passed + events * (width + 0.557) - float(in_rows @ rows + in_cols @ cols)
        cost += float((_fold(rows) + 1).sum()) * use_rows + float((_fold(cols) + 1).sum()) * use_cols
        if best is None or cost < best.cost:
            best = _Fit(rows, cols, use_rows, use_cols, width, cost)
    assert best is not None
    return best


def _classes(events: Numbers, others: Numbers, width: int) -> Numbers:
    """Return the cheapest class of every row (or column), given those of the columns (or rows)."""
    passed = np.exp2(others).sum() * np.exp2(OCTAVES - width)
    cost = passed - events[:, None] * OCTAVES + _fold(OCTAVES)
    cost[:, width - OCTAVES - others.max() < 0] = np.inf
    return OCTAVES[cost.argmin(1)]


def _fold(classes: Numbers) -> Numbers:
    """Return 0, -1, 1, -2, 2 … as 0, 1, 2, 3, 4 …"""
    return np.where(classes < 0, -2 * classes - 1, 2 * classes)


def _unfold(numbers: Numbers) -> Numbers:
    return np.where(numbers & 1, -(numbers + 1) // 2, numbers // 2)


class _Cells(NamedTuple):
    """The order of weights: by octave (sum of the two classes), then row class, row, column.

    Attributes:
        octaves: those that occur, rising. class_starts: where each begins, and the end.
        table: for each cell (octave, row class) in order: start, columns, first of its rows, first of its columns.
        by_row, by_col: rows and columns in order of class.
    """

    octaves: Numbers
    class_starts: Numbers
    table: NDArray[np.int64]
    by_row: Numbers
    by_col: Numbers
    row_class: Numbers
    col_class: Numbers

    @classmethod
    def of(cls, rows: Numbers, cols: Numbers) -> "_Cells":
        """Order the weights by the classes of their rows and columns."""
        row_kinds, row_class, row_counts = np.unique(rows, return_inverse=True, return_counts=True)
        col_kinds, col_class, col_counts = np.unique(cols, return_inverse=True, return_counts=True)
        row_starts, col_starts = np.cumsum(row_counts) - row_counts, np.cumsum(col_counts) - col_counts
        sums = row_kinds[:, None] + col_kinds
        order = np.argsort(sums, axis=None, kind="stable")  # row-major, so that row classes rise within an octave
        row, col = np.divmod(order, col_kinds.size)
        sizes = row_counts[row] * col_counts[col]
        starts = np.cumsum(sizes) - sizes
        octaves, first = np.unique(sums.reshape(-1)[order], return_index=True)
        return cls(
            octaves,
            np.append(starts[first], sizes.sum()),
            np.stack([starts, col_counts[col], row_starts[row], col_starts[col], row, col]),
            np.argsort(rows, kind="stable"),
            np.argsort(cols, kind="stable"),
            row_class.reshape(-1),
            col_class.reshape(-1),
        )

    def positions(self, places: Numbers) -> Numbers:
        """Return row-major positions of rising places in the order."""
        if self.table.shape[1] == 1:
            return places
        starts, width, first_row, first_col, _, _ = self.table
        counts = np.diff(np.searchsorted(places, starts[1:]), prepend=0, append=places.size)
        local = places - np.repeat(starts, counts)
        width = np.repeat(width, counts)
        row = local // width
        col = local - row * width
        row = self.by_row[row + np.repeat(first_row, counts)]
        return row * self.by_col.size + self.by_col[col + np.repeat(first_col, counts)]

    def places(self, positions: Numbers) -> Numbers:
        """Return where weights stand in the order, given their row-major positions."""
        row, col = np.divmod(positions, self.by_col.size)
        starts, width, first_row, first_col, row_kind, col_kind = self.table
        at = np.empty((row_kind.max() + 1, col_kind.max() + 1), dtype=np.int64)
        at[row_kind, col_kind] = np.arange(starts.size)
        cell = at[self.row_class[row], self.col_class[col]]
        row_rank, col_rank = np.argsort(self.by_row), np.argsort(self.by_col)
        return starts[cell] + (row_rank[row] - first_row[cell]) * width[cell] + col_rank[col] - first_col[cell]
