"""The odds of each weight of a parameter, as integers in 1/16 nat: what the codec `logit` knows and evaluates."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .base import Bits, Numbers, Side, matrix_shape
from .lanes import LEVELS, tables

STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # of a coefficient, in 1/16 nat
CLASSES = 16  # of magnitude
SAME, OTHER = 5, 3  # contexts: events before in the kernel, of the same sign and of the other, at most 4 and 2
MAX_RANK, LEAST_SIDE = 8, 16  # of the low rank, and the rows and columns that it needs
HIGHEST = 32  # offset; even odds are 0
MAX_KERNELS = 1 << 24
GROUP = 8  # units whose bits no two lanes share
MAX_LANE = 1 << 18  # units

Ints = NDArray[np.int32]


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
    """What both sides know of each weight: its class and sign in the base, its bit in the reference."""

    classes: Bits | None
    reference: Bits | None

    @classmethod
    def of(cls, side: Side, base: bool) -> "Known":
        """Return it row-major and flat."""
        bits = side.reference
        unpacked = None if bits is None else np.unpackbits(bits, count=side.count, bitorder="little")
        return cls(side.classes if base else None, unpacked)

    def ordered(self, grid: Grid) -> "Known":
        """Return the same in the order of coding: positions, rows, inputs."""
        return Known(*(None if own is None else by_position(own, grid) for own in self))


def by_position(flat: Bits, grid: Grid) -> Bits:
    """Return what belongs to weights in the order of coding."""
    return np.ascontiguousarray(flat.reshape(grid.rows, grid.inputs, grid.positions).transpose(2, 0, 1))


def sizes(grid: Grid, known: Known) -> dict[str, int]:
    """Return the arrays of coefficients that there may be, in the order of the payload, and how many each has."""
    return {
        "row": grid.rows if grid.rows > 1 else 0,
        "input": grid.inputs if grid.inputs > 1 and grid.rows * grid.positions > 1 else 0,
        "position": grid.positions if grid.positions > 1 else 0,
        "before": 0 if grid.positions == 1 else SAME if known.classes is None else SAME * OTHER,
        "magnitude": 0 if known.classes is None else CLASSES,
        "reference": 0 if known.reference is None else 1,
    }


def may_lean(grid: Grid, known: Known) -> bool:
    """Return True if a model may have a low rank: signs of the base, no kernels, and rows and inputs that are many."""
    return known.classes is not None and grid.positions == 1 and min(grid[:2]) >= LEAST_SIDE


@dataclass(slots=True)
class Model:
    """Coefficients in 1/16 nat, each its integer times its array's step; an array that is not there is zero.

    Attributes:
        offset: of all weights. steps, tables, values: for each array that is not all zero, in the order of the payload,
            its step's and its table's number, and its integers.
    """

    grid: Grid
    known: Known
    rank: int
    offset: int
    steps: dict[str, int]
    tables: dict[str, int]
    values: dict[str, Ints]

    def array(self, name: str) -> Ints:
        """Return the coefficients of an array, in 1/16 nat."""
        values = np.cumsum(self.values[name], dtype=np.int32) if name == "magnitude" else self.values[name]
        return values * np.int32(STEPS[self.steps[name]])

    def scaled(self) -> "Scaled":
        """Return what evaluates the model."""
        arrays = {name: self.array(name) for name in self.values}
        ranks = [n for n in range(self.rank) if f"left {n}" in arrays and f"right {n}" in arrays]
        left, right = (
            np.stack([arrays[f"{side} {n}"] for n in ranks], axis=1).astype(np.float32) if ranks else None
            for side in ("left", "right")
        )
        return Scaled(self.grid, self.known, self.offset, arrays, left, right)


class Scaled(NamedTuple):
    """A model whose coefficients are multiplied out."""

    grid: Grid
    known: Known
    offset: int
    arrays: dict[str, Ints]
    left: NDArray[np.float32] | None
    right: NDArray[np.float32] | None

    def hazards(self, position: int, first: int, last: int, before: "Before | None") -> NDArray[np.uint16]:
        """Return the hazards of the weights at one position of the kernels of the units `first` to `last`."""
        inputs, arrays, (classes, reference) = self.grid.inputs, self.arrays, self.known
        rows = slice(first // inputs, -(-last // inputs))
        level = np.full((rows.stop - rows.start, inputs), LEVELS // 2 + self.offset, dtype=np.int32)
        if "position" in arrays:
            level += arrays["position"][position]
        if "row" in arrays:
            level += arrays["row"][rows, None]
        if "input" in arrays:
            level += arrays["input"]
        if "magnitude" in arrays and classes is not None:
            level += arrays["magnitude"][classes[position, rows] >> 3 & 15]
        if "reference" in arrays and reference is not None:
            level += arrays["reference"] * reference[position, rows]
        if self.left is not None and self.right is not None and classes is not None:
            lean = (self.left[rows] @ self.right.T).astype(np.int32)  # sums below 2^24: exact
            level += np.where(classes[position, rows] > 127, -lean, lean) >> 4
        own = level.reshape(-1)[first - rows.start * inputs : last - rows.start * inputs]
        if "before" in arrays and before is not None:
            own += arrays["before"][before.context()]
        return np.take(tables().hazard, np.clip(own, 0, LEVELS - 1, out=own))


class Before:
    """For the units `first` to `last`, how many events there were so far in each kernel, by the base's signs."""

    def __init__(self, signs: Numbers | None, count: int):
        self.counts = np.zeros((2, count), dtype=np.uint8)
        self.signs, self.position, self.every = signs, 0, np.arange(count)

    @classmethod
    def of(cls, model: Scaled, first: int, last: int) -> "Before | None":
        """Return the counts, or None if the model has no use for them."""
        if "before" not in model.arrays:
            return None
        classes = model.known.classes
        signs = None if classes is None else classes.reshape(len(classes), -1)[:, first:last] >> 7
        return cls(signs, last - first)

    def context(self) -> Bits:
        """Return the contexts of the weights at the present position."""
        sign = 0 if self.signs is None else self.signs[self.position]
        same, other = self.counts[sign, self.every], self.counts[1 - sign, self.every]
        found: Bits = np.minimum(same, SAME - 1) + SAME * np.minimum(other, OTHER - 1)
        return found

    def add(self, events: NDArray[np.bool_]) -> None:
        """Count the events of the present position, as far as a context tells, and go to the next."""
        sign = 0 if self.signs is None else self.signs[self.position]
        self.counts[sign, self.every] = np.minimum(self.counts[sign, self.every] + events, SAME)
        self.position += 1
