"""Model of the codec `logit`: the log-odds of each weight of a parameter, as integers in 1/16 nat."""

import math
from collections.abc import Sequence
from ctypes import c_int64
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import native
from .base import Bits, Numbers, Side, matrix_shape
from .classes import weight_classes, weight_signs
from .lanes import LEVELS

STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # of a coefficient, in 1/16 nat
CLASSES = 16  # of magnitude
SAME, OTHER = 5, 3  # contexts: events before in the kernel, of the same sign and of the other, at most 4 and 2
MAX_RANK, LEAST_SIDE = 8, 16  # of the low rank, and the rows and columns that it needs
HIGHEST = 32  # offset; even odds are 0
MAX_KERNELS = 1 << 24
GROUP = 8  # units whose bits no two lanes share
MAX_LANE = 1 << 18  # units

Ints = NDArray[np.int32]
Levels = NDArray[np.int16]


class Grid(NamedTuple):
    """A parameter as rows, inputs and positions of its kernels. A unit is a row and an input: all of a kernel."""

    rows: int
    inputs: int
    positions: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Grid":
        rows, cols = matrix_shape(shape)
        inputs = shape[1] if len(shape) > 2 and cols else cols
        return cls(rows, inputs, cols // inputs) if cols and rows * inputs <= MAX_KERNELS else cls(rows, cols, 1)

    @property
    def units(self) -> int:
        return self.rows * self.inputs

    def lanes(self, count: int) -> Numbers:
        """Return the unit at which each of `count` lanes begins, and the number of units."""
        groups = -(-self.units // GROUP)
        return np.minimum(GROUP * (groups * np.arange(count + 1, dtype=np.int64) // count), self.units)


class Known(NamedTuple):
    """Context of each weight, known when packing and unpacking: its class in the base, its bit in the reference."""

    classes: Bits | None
    reference: Bits | None

    @classmethod
    def of(cls, side: Side, base: bool, magnitudes: bool = True) -> "Known":
        """Return what is known; without `base` not the weights, without `magnitudes` only their signs."""
        grid, bits, classes = Grid.of(side.shape), side.reference, None
        if base:
            classes = weight_classes(side.base, CLASSES, side.ranks) if magnitudes else weight_signs(side.base)
        unpacked = None if bits is None else np.unpackbits(bits, count=side.count, bitorder="little")
        return cls(*(None if own is None else by_position(own, grid) for own in (classes, unpacked)))


class Cells(NamedTuple):
    """How many weights of each kind each row and each input has; a kind is a class and a bit in the reference.

    Attributes:
        kinds: number of kinds. by_row: (rows, kinds). by_input: (inputs, kinds). None where there is one kind.
    """

    kinds: int
    by_row: Ints | None = None
    by_input: Ints | None = None

    @classmethod
    def of(cls, grid: Grid, classes: Bits | None, reference: Bits | None) -> "Cells":
        """Count the weights of a parameter without kernels, of which classes, without signs, and bits are known."""
        kind = classes if reference is None else reference
        kinds = (1 if classes is None else CLASSES) * (1 if reference is None else 2)
        if kind is None:
            return cls(kinds)
        if classes is not None and reference is not None:
            kind = classes + np.uint8(CLASSES) * reference
        found = cls(kinds, np.zeros((grid.rows, kinds), np.int32), np.zeros((grid.inputs, kinds), np.int32))
        if (compiled := native.library()) is not None:
            pointers = (native.pointer(one) for one in (kind, *found[1:]))
            if not compiled.maskpack_cells(*map(c_int64, (*grid[:2], kinds)), *pointers):
                raise MemoryError
            return found
        flat, rows = kind.reshape(-1).astype(np.int64), np.arange(grid.units) // grid.inputs
        for own, array in ((rows, found.by_row), (np.arange(grid.units) % grid.inputs, found.by_input)):
            assert array is not None
            array += np.bincount(kinds * own + flat, minlength=array.size).reshape(array.shape).astype(np.int32)
        return found


def by_position(flat: Bits, grid: Grid) -> Bits:
    """Return what belongs to weights in the order of coding."""
    return np.ascontiguousarray(flat.reshape(grid.rows, grid.inputs, grid.positions).transpose(2, 0, 1))


def sizes(grid: Grid, base: bool, reference: bool) -> dict[str, int]:
    """Return the arrays of coefficients that there may be, in the order of the payload, and how many each has."""
    return {
        "row": grid.rows if grid.rows > 1 else 0,
        "input": grid.inputs if grid.inputs > 1 and grid.rows * grid.positions > 1 else 0,
        "position": grid.positions if grid.positions > 1 else 0,
        "before": 0 if grid.positions == 1 else SAME * OTHER if base else SAME,
        "magnitude": CLASSES if base else 0,
        "reference": 1 if reference else 0,
    }


def may_lean(grid: Grid, base: bool) -> bool:
    """Return True if a model may have a low rank: signs of the base, no kernels, and rows and inputs that are many."""
    return base and grid.positions == 1 and min(grid[:2]) >= LEAST_SIDE


class Model(NamedTuple):
    """A model whose coefficients are multiplied out, in 1/16 nat; an array that is not there is zero."""

    grid: Grid
    known: Known
    offset: int
    arrays: dict[str, Levels]
    left: NDArray[np.float32]  # (rows, rank)
    right: NDArray[np.float32]  # (inputs, rank)

    @classmethod
    def of(cls, grid: Grid, known: Known, offset: int, codes: dict[str, int], values: dict[str, Ints]) -> "Model":
        """Return the model of integers; `codes` has the step of each array in the upper four bits."""
        arrays = {
            name: ((np.cumsum(own) if name == "magnitude" else own) * STEPS[codes[name] >> 4]).astype(np.int16)
            for name, own in values.items()
        }
        left, right = (
            np.array([own for name, own in arrays.items() if name.startswith(side)], dtype=np.float32).reshape(-1, n).T
            for side, n in (("left", grid.rows), ("right", grid.inputs))
        )
        return cls(grid, known, offset, arrays, left, right)

    def levels(self, first: int, last: int) -> Levels:
        """Return the levels of the rows `first` to `last`, (positions, rows, inputs), without what events before add.

        No sum is over 2^15 in size.
        """
        grid, arrays, (classes, reference), rows = self.grid, self.arrays, self.known, slice(first, last)
        position, row, column = (
            arrays[name] if name in arrays else np.zeros(size, np.int16)
            for name, size in (("position", grid.positions), ("row", grid.rows), ("input", grid.inputs))
        )
        row = row[rows] + np.int16(LEVELS // 2 + self.offset)
        level: Levels = (position[:, None] + row)[:, :, None] + column
        if "magnitude" in arrays and classes is not None:
            level += arrays["magnitude"].take(classes[:, rows] & np.uint8(127))
        if "reference" in arrays and reference is not None:
            level += arrays["reference"] * reference[:, rows]
        if self.left.shape[1] and classes is not None:
            lean = (self.left[rows] @ self.right.T).astype(np.int32)  # sums below 2^24: exact
            sign = classes[0, rows].view(np.int8) >> 7
            lean ^= sign
            lean -= sign
            lean >>= 4
            np.add(level, lean, out=level, casting="unsafe")
        return level


class Before:
    """Counts of the events so far in each kernel, by the base's signs, and what they add to the levels.

    Args:
        units: of each model. arrays: what contexts add in each, or None.
    """

    def __init__(self, units: Sequence[int], arrays: Sequence[Levels | None] = ()):
        self.counts = np.zeros((2, sum(units)), dtype=np.uint8)
        self.adds = np.zeros((len(arrays), SAME * OTHER), dtype=np.int16)
        for own, array in zip(self.adds, arrays, strict=True):
            if array is not None:
                own[: array.size] = array
        self.start = np.repeat(np.arange(len(units)) * SAME * OTHER, units)

    def contexts(self, minus: Bits) -> Bits:
        """Return the contexts of the first units; `minus`: where the base's weights at this position are negative."""
        positive, negative = self.counts[:, : minus.size]
        swap = (positive ^ negative) * minus
        found: Bits = np.minimum(positive ^ swap, np.uint8(SAME - 1))
        found += np.uint8(SAME) * np.minimum(negative ^ swap, np.uint8(OTHER - 1))
        return found

    def add_to(self, level: Levels, minus: Bits) -> None:
        """Add to the levels of the first units what their contexts add."""
        level += self.adds.take(self.start[: level.size] + self.contexts(minus))

    def count(self, events: NDArray[Any], minus: Bits) -> None:
        """Count the events of the first units at the present position, as far as a context tells."""
        counts = self.counts[:, : events.size]
        counts[0] += events > minus
        counts[1] += events & minus
        np.minimum(counts, SAME, out=counts)


def signs_of(known: Known, grid: Grid) -> Bits:
    """Return 1 for each weight of the base that is negative, else 0, as (positions, units)."""
    if known.classes is None:
        return np.broadcast_to(np.uint8(0), (grid.positions, grid.units))
    return known.classes.reshape(grid.positions, -1) >> np.uint8(7)


def contexts(grid: Grid, known: Known, events: Bits) -> Bits:
    """Return the context of every weight inside its kernel."""
    flat, signs = events.reshape(grid.positions, -1), signs_of(known, grid)
    before, found = Before([grid.units]), np.empty(flat.shape, dtype=np.uint8)
    for position, (own, minus) in enumerate(zip(flat, signs, strict=True)):
        found[position] = before.contexts(minus)
        before.count(own, minus)
    return found.reshape(events.shape)


def natural(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return logarithms, to the bit the same wherever numbers are added and divided alike."""
    part, whole = np.frexp(values)
    part = (part - 1) / (part + 1)
    total = np.zeros_like(part)
    for k in range(33, 0, -2):
        total = total * (part * part) + 1 / k
    return np.asarray(whole * math.log(2) + 2 * part * total, dtype=np.float64)


def solved(matrices: NDArray[np.float64], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the solutions of many small positive definite systems, by elimination; both arguments are overwritten."""
    rank = vectors.shape[1]
    for k in range(rank):
        for row in range(k + 1, rank):
            factor = matrices[:, row, k] / matrices[:, k, k]
            matrices[:, row, k:] -= factor[:, None] * matrices[:, k, k:]
            vectors[:, row] -= factor * vectors[:, k]
    for k in reversed(range(rank)):
        for after in range(k + 1, rank):
            vectors[:, k] -= matrices[:, k, after] * vectors[:, after]
        vectors[:, k] /= matrices[:, k, k]
    return vectors
