"""The order of a matrix's weights by the classes of their rows and columns."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .streams import Numbers


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
