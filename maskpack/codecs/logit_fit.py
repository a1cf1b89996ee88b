"""The model of a mask's events that takes the fewest bytes: penalised logistic regression, then rounding by cost.

What is summed up are integers, or multiples of powers of two that are exact in any order: the same mask gives the same
bytes on every machine, whatever its libraries and threads.
"""

import ctypes
import math
import types
from collections.abc import Mapping, Sequence
from ctypes import byref, c_double, c_int64, c_void_p
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..threads import once
from . import native
from .base import Bits, count_ones, flipped, where_ones
from .lanes import BITS, LEVELS, ONE, RANGE, tables
from .logit_model import (
    CLASSES,
    HIGHEST,
    MAX_RANK,
    OTHER,
    SAME,
    STEPS,
    Cells,
    Grid,
    Ints,
    Known,
    by_position,
    contexts,
    may_lean,
    natural,
    sizes,
    solved,
)

Floats = NDArray[np.float64]
Longs = NDArray[np.int64]
NAT = 256  # coefficients that are fitted are multiples of 1/NAT
EXTREME, PARTS = 12, 32  # log-odds are looked up within ±EXTREME nats, in parts of a nat
BLOCK = 1 << 18  # weights that numpy works on at once
ROUNDS, SEARCHES, LEAN_ROUNDS = 5, 6, 4  # of all coefficients, of the search for directions, of the low rank
TOGETHER = ("magnitude", "position", "reference"), ("before",), ("row", "input")  # hardly depend on each other
PRIORS = {"row": 4.0, "input": 4.0, "position": 1.0, "before": 0.3, "magnitude": 0.3, "reference": 0.3}
LAST_PRIOR = 0.3  # before coefficients are rounded
LEAST_WORTH = 12.0  # bits
LEAN_PRIOR = 0.8
BOLDEST = 1.0  # nats that a coefficient moves at once
EDGE = 1.15  # of the greatest singular value of noise, from which a direction is worth its bytes
TRIED = (1, 2, 3, 5, 7, 9, 11, 12, 13)  # numbers of steps
LEAN_STEPS = (7, 9, 11, 12, 13)
ARRAYS = ("row", "input", "position", "before", "magnitude", "reference")
BINS = {"before": SAME * OTHER, "magnitude": CLASSES, "reference": 2}
CELLS, LEAST_CELLS = 1 << 16, 64  # weights, and rows and inputs, from which cells are summed up and not weights
SPREAD, BIN, FINER = 32, 32, 8  # of coefficients: bins to either side, 1/NAT in each; bits that averages have more
FINE, BIG = 1 << 15, 1 << 20  # probes, and what is made of images, are integers of about and at most this size


class Fitted(NamedTuple):
    """A model as its payload has it: of each array that is not all zero, in order, its step and table, its integers."""

    offset: int
    codes: dict[str, int]
    values: dict[str, Ints]

    @property
    def rank(self) -> int:
        """Number of directions of the low rank."""
        return sum(name.startswith("left") for name in self.codes)

    def coefficients(self) -> Ints:
        """Return the integers of all arrays, one after another."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *self.values.values()])


class Rounded(NamedTuple):
    """Integers that stand for coefficients: their table (0: all are 0), the number of their step, what they cost."""

    integers: Ints
    table: int
    step: int
    cost: float

    def nats(self, differences: bool = False) -> Floats:
        """Return the coefficients that they stand for."""
        whole = np.cumsum(self.integers) if differences else self.integers
        return np.asarray(whole * (STEPS[self.step] / 16), dtype=np.float64)


class Probes(NamedTuple):
    """Probe vectors that residuals or variances are multiplied by, and the sums of the products over inputs and rows.

    Attributes:
        along: (probes, inputs), whose sums over inputs are `images` (rows, probes). across: (rows, probes), whose sums
            over rows are `others` (probes, inputs). factors: of each row, by which images are multiplied, and rounded,
            to be `across`.
    """

    along: Ints | None
    across: Ints | None
    factors: Floats | None
    images: Longs
    others: Longs

    @classmethod
    def of(
        cls, grid: Grid, along: Ints | None = None, across: Ints | None = None, factors: Floats | None = None
    ) -> "Probes":
        """Return probes whose sums are 0 so far."""
        count = len(along) if along is not None else 0 if across is None else across.shape[1]
        images, others = np.zeros((grid.rows, count), dtype=np.int64), np.zeros((count, grid.inputs), dtype=np.int64)
        return cls(along, across, factors, images, others)

    def native(self) -> native.Probes:
        """Return what compiled loops take."""
        return native.Probes(len(self.others), *map(native.address, self))

    def add(self, own: slice, weights: Longs) -> None:
        """Add some rows' weights, by numpy."""
        part = None if self.across is None else self.across[own]
        if self.along is not None:
            self.images[own] = _product(weights, self.along.T)
        if self.factors is not None:
            part = np.rint(np.clip(self.images[own] * self.factors[own, None], -BIG, BIG))
        if part is not None:
            self.others[:] += _product(part.T, weights)


class Sums(NamedTuple):
    """Slopes and curvatures of the likelihood: along all coefficients, and along each of some arrays."""

    total: Floats
    arrays: dict[str, Floats]


class Fit:
    """Coefficients that are no integers yet, and the events that they are fitted to.

    Attributes:
        values: of each array, in nats. left, right: (rows, rank) and (rank, inputs).
        cells: that odds are summed up over, as if rows and inputs were independent; None: over single weights.
    """

    def __init__(self, grid: Grid, known: Known, bits: Bits):
        self.grid, self.bits, self.number = grid, bits, count_ones(bits)
        self.worth: dict[str, float] = {}  # about how many bits each array saves, but for what noise would
        self.left_over = 0.0  # by the boldest step of the last round, twice the nats
        self.sizes = sizes(grid, known.classes is not None, known.reference is not None)
        self.values = {name: np.zeros(size) for name, size in self.sizes.items() if size}
        self.left, self.right = np.zeros((grid.rows, 0)), np.zeros((0, grid.inputs))
        share = self.number / (grid.units * grid.positions)
        self.offset = _moved(0.0, math.log(share / (1 - share)), EXTREME)
        self.index: dict[str, Bits] = {}
        if "before" in self.values:
            self.index["before"] = contexts(grid, known, self.events)
        if known.classes is not None:
            self.index["magnitude"] = np.bitwise_and(known.classes, np.uint8(127))
        if known.reference is not None:
            self.index["reference"] = known.reference
        self.signs = known.classes
        large = grid.positions == 1 and grid.units >= CELLS and min(grid[:2]) >= LEAST_CELLS
        self.cells = Cells.of(grid, self.index.get("magnitude"), self.index.get("reference")) if large else None

    @cached_property
    def events(self) -> Bits:
        """1 for each weight with an event, else 0, in the order of coding."""
        return by_position(np.unpackbits(self.bits, count=math.prod(self.grid), bitorder="little"), self.grid)

    @cached_property
    def counts(self) -> dict[str, Longs]:
        """How many events each row, input and class has, without kernels."""
        return counted(
            self.grid, self.bits, {name: BINS.get(name, self.sizes[name]) for name in self.values}, self.index
        )

    def sums(self, names: Sequence[str], residuals: Probes | None = None, variances: Probes | None = None) -> Sums:
        """Return what a step of Newton's asks for, summed up over all weights.

        Args:
            names: arrays. residuals: probes of (event - p) times sign. variances: of p (1 - p).
        """
        found = {name: np.zeros((2, BINS.get(name, self.sizes[name])), dtype=np.int64) for name in names}
        whole, total = {name: _integers(NAT * own) for name, own in self.values.items()}, np.zeros(2, dtype=np.int64)
        if "reference" in whole:
            whole["reference"] = np.append(np.int32(0), whole["reference"])
        left, right = _integers(NAT * self.left), _integers(NAT * self.right)
        compiled = native.library()
        if compiled is None:
            none = Probes.of(self.grid)
            if self.cells is None:
                self._numpy_sums(whole, left, right, total, found, residuals or none, variances or none)
            else:
                self._numpy_sums_of_cells(self.cells, whole, total, found)
        else:
            probes = (native.Probes() if one is None else one.native() for one in (residuals, variances))
            fit, sums = self.native(whole, left, right, *probes), _addresses(found)
            held = np.empty(4 * self.grid.inputs, dtype=np.int32)
            if self.cells is None:
                compiled.maskpack_sums(byref(fit), native.pointer(total), sums, native.pointer(held))
            else:
                compiled.maskpack_sums_of_cells(byref(fit), native.pointer(total), sums)
        if self.cells is not None:  # what was summed up are p, not what they leave of the events
            total[0] = ONE * self.number - total[0]
            for name, own in found.items():
                own[0] = ONE * self.counts[name] - own[0]
        every = {name: own / ONE for name, own in found.items()}
        if "reference" in every:
            every["reference"] = every["reference"][:, 1:]
        return Sums(total / ONE, {name: own[:, : self.sizes[name]] for name, own in every.items()})

    def native(self, whole: Mapping[str, Ints], left: Ints, right: Ints, *probes: native.Probes) -> native.Fit:
        """Return what compiled loops take; `whole`: coefficients in 1/NAT."""
        given = left, right, self.signs, _curve()
        kinds, by_row, by_input = self.cells or (0, None, None)
        looked = kinds, *map(native.address, (by_row, by_input, None if self.cells else self.events))
        arrays = round(NAT * self.offset), *looked, _addresses(self.index), _addresses(whole)
        return native.Fit(*self.grid, left.shape[1], *arrays, *map(native.address, given), *probes)

    def _numpy_sums(
        self, whole: Mapping[str, Ints], left: Ints, right: Ints, total: Longs, found: Mapping[str, Longs],
        residuals: Probes, variances: Probes,
    ) -> None:  # fmt: skip
        """Add up, by numpy, what `sums` asks for."""
        rows, inputs, positions = self.grid
        shapes = {"row": (1, -1, 1), "input": (1, 1, -1), "position": (-1, 1, 1)}
        axes = {"row": (0, 2), "input": (0, 1), "position": (1, 2)}
        width = max(1, BLOCK // (inputs * positions))
        for start in range(0, rows, width):
            own = slice(start, start + width)
            events = self.events[:, own]
            at = np.full(events.shape, round(NAT * self.offset), dtype=np.int64)
            for name, array in whole.items():
                if name in self.index:
                    at += array[self.index[name][:, own]]
                else:
                    at += array[own if name == "row" else slice(None)].reshape(shapes[name])
            at *= 1 << 8
            signs = None if self.signs is None else 1 - (self.signs[0, own] >> 6 & 2).astype(np.int64)
            if left.shape[1] and signs is not None:
                at[0] += signs * _product(left[own], right)
            both = _curve()[np.clip((at + 1024 >> 11) + EXTREME * PARTS, 0, 2 * EXTREME * PARTS)].astype(np.int64)
            residual, variance = (events.astype(np.int64) << BITS) - (both >> 16), both & 0xFFFF
            for turn, weights in enumerate((residual, variance)):
                total[turn] += weights.sum()
                for name, sums in found.items():
                    if name == "row":
                        sums[turn, own] += weights.sum((0, 2))
                    elif name in axes:
                        sums[turn] += weights.sum(axes[name])
                    else:
                        flat = self.index[name][:, own].reshape(-1)
                        sums[turn] += np.bincount(flat, weights.reshape(-1), sums.shape[1]).astype(np.int64)
            if signs is not None:
                residuals.add(own, residual[0] * signs)
                variances.add(own, variance[0])

    def _numpy_sums_of_cells(
        self, cells: Cells, whole: Mapping[str, Ints], total: Longs, found: Mapping[str, Longs]
    ) -> None:
        """Add up p and p (1 - p) of all weights from cells, by numpy."""
        classes, sides = CLASSES if "magnitude" in self.index else 1, (("row", cells.by_row), ("input", cells.by_input))
        kinds = np.tile(whole.get("magnitude", np.zeros(classes, np.int32)), cells.kinds // classes)
        kinds += np.repeat(whole.get("reference", np.zeros(2, np.int32))[: cells.kinds // classes], classes)
        for (side, have), (other, _), others in zip(sides, sides[::-1], self.grid[1::-1], strict=False):
            if side == "input" and side not in found:
                continue
            own = whole.get(side, np.zeros(self.sizes[side], np.int32))
            at = (round(NAT * self.offset) + own[:, None] + kinds + 4 >> 3) + EXTREME * PARTS
            for turn, curve in enumerate(_smoothed(whole.get(other), others)):
                sums = curve[np.clip(at, 0, 2 * EXTREME * PARTS)] * (others if have is None else have)
                if side in found:
                    found[side][turn] = _whole(sums.sum(1))
                if side == "row":
                    total[turn] = _whole(sums.sum())
                    of_kinds = sums.sum(0).reshape(-1, classes)
                    for name, axis in (("magnitude", 0), ("reference", 1)):
                        if name in found:
                            found[name][turn] = _whole(of_kinds.sum(axis))

    def better(self, names: Sequence[str], priors: Mapping[str, float] = PRIORS) -> Sums:
        """Improve the offset, and the coefficients of arrays that hardly depend on each other, by Newton's step."""
        return self._stepped(self.sums(names), priors)

    def start(self) -> None:
        """Start arrays that hardly depend on rows and inputs from the log-odds of their bins; all others are 0."""
        found = self.sums([name for name in TOGETHER[0] if name in self.values])
        both = int(_curve()[(round(NAT * self.offset) + 4 >> 3) + EXTREME * PARTS])
        p, variance = (both >> 16) / ONE, (both & 0xFFFF) / ONE
        for name, (slopes, curvatures) in found.arrays.items():
            have, rest = (np.maximum(curvatures / variance * share, 0) for share in (p, 1 - p))
            odds = (np.maximum(have + slopes, 0) + 1) / (np.maximum(rest - slopes, 0) + 1)
            self.values[name] = _exact(natural(odds) - self.offset)

    def _stepped(self, found: Sums, priors: Mapping[str, float] = PRIORS) -> Sums:
        step, self.left_over = float(found.total[0] / found.total[1]), 0.0
        self.offset = _moved(self.offset, step)
        for name, (slopes, curvatures) in found.arrays.items():
            if name not in self.values:
                continue
            if name != "reference":  # all weights are in the sums, and the offset comes first
                slopes = slopes - step * curvatures
            prior = priors[name]
            moved = (slopes - prior * self.values[name]) / (curvatures + prior)
            step_of = np.clip(moved, -BOLDEST, BOLDEST)
            self.left_over += float(_exact(curvatures * np.square(moved - step_of)).sum())
            self.values[name] = _exact(self.values[name] + step_of)
            noise = np.square(curvatures / (curvatures + prior)) * (EDGE if self.cells else 0)
            self.worth[name] = float(_exact(curvatures * np.square(self.values[name]) - noise).sum()) / (
                2 * math.log(2)
            )
        return found

    def better_lean(self, turn: int, move: bool = True) -> Floats:
        """Improve the rows' part of the low rank (0) or the inputs' part (1) by a step, with rows and inputs.

        Returns:
            The curvatures along them.
        """
        own, other = (self.left, self.right.T) if turn == 0 else (self.right.T, self.left)
        rank = own.shape[1]
        upper = np.triu_indices(rank)
        given, pairs = _integers(NAT * other), _integers(other[:, upper[0]] * other[:, upper[1]] * NAT)
        way = (lambda one: {"along": np.ascontiguousarray(one.T)}) if turn == 0 else (lambda one: {"across": one})
        residuals, variances = Probes.of(self.grid, **way(given)), Probes.of(self.grid, **way(pairs))
        found = self.sums(ARRAYS[:2], residuals, variances)
        slopes, curved = (one.images if turn == 0 else one.others.T for one in (residuals, variances))
        curvatures = np.empty((len(own), rank, rank))
        curvatures[:, upper[0], upper[1]] = curvatures[:, upper[1], upper[0]] = curved / (ONE * NAT)
        if move:
            diagonal = curvatures.copy()
            diagonal[:, np.arange(rank), np.arange(rank)] += LEAN_PRIOR
            step = solved(diagonal, slopes / (ONE * NAT) - LEAN_PRIOR * own)
            own[:] = _exact(np.clip(own + np.clip(step, -BOLDEST, BOLDEST), -7, 7))
            self._stepped(found)
        return curvatures

    def better_all(self, groups: Sequence[Sequence[str]] = TOGETHER) -> None:
        """Improve all coefficients but those of the low rank, a step each."""
        for group in groups:
            if names := [name for name in group if name in self.values]:
                self.better(names)

    def forget(self) -> None:
        """Set arrays that save fewer bits than they cost to 0, for good."""
        for name in [name for name in self.values if self.worth[name] < LEAST_WORTH]:
            del self.values[name]

    def search(self) -> None:
        """Search the directions of the low rank, by power iteration on the residuals times the base's signs."""
        (rows, inputs, _), found = self.grid, self.sums(ARRAYS[:2])
        scales = [np.maximum(np.sqrt(found.arrays[name][1] / math.sqrt(found.total[1])), 1e-3) for name in ARRAYS[:2]]
        odd = 2654435761 * (2 * np.arange(MAX_RANK + 2, dtype=np.uint64) + 3)
        right = np.where(np.arange(inputs, dtype=np.uint64)[:, None] * odd >> 13 & 1, 1.0, -1.0)  # whatever differs
        middle = float(np.median(scales[0]))
        for _ in range(SEARCHES):
            right = orthonormal(right)
            probes = right / scales[1][:, None]
            unit = FINE * 2.0 ** -math.ceil(math.log2(float(np.abs(probes).max())))
            factors = 1024 * middle / (unit * ONE * np.square(scales[0]))
            sums = Probes.of(self.grid, _integers(probes.T * unit), factors=factors)
            self.sums((), sums)
            along, right = right, _exact(sums.others.T / (1024 * middle * ONE) / scales[1][:, None])
        images = _exact(sums.images / (unit * ONE) / scales[0][:, None], 1024)
        strength = np.sqrt(np.square(images).sum(0))
        edge = math.sqrt(rows) + math.sqrt(inputs)
        best = [k for k in np.argsort(-strength, kind="stable")[:MAX_RANK] if strength[k] > EDGE * edge]
        strong = strength[best]
        clean = np.sqrt(np.sqrt((strong**2 - rows - inputs) ** 2 - 4 * rows * inputs) / strong)
        self.left = _exact(np.clip(images[:, best] / strong / scales[0][:, None] * clean, -3, 3))
        self.right = _exact(np.clip(along[:, best] / scales[1][:, None] * clean, -3, 3)).T

    def balance(self) -> None:
        """Give both parts of the low rank the same size."""
        for k in range(len(self.right)):
            own, other = self.left[:, k], self.right[k]
            ratio = math.sqrt(math.sqrt((np.square(other).mean() + 1e-6) / (np.square(own).mean() + 1e-6)))
            own[:], other[:] = _exact(own * ratio), _exact(other / ratio)

    def round_lean(self) -> dict[str, Rounded]:
        """Round the rows' part of the low rank, fit the inputs' part to that, and round it too."""
        chosen = dict[str, Rounded]()
        for turn, (side, own) in enumerate((("left", self.left), ("right", self.right.T))):
            for _ in range(2 * turn):
                self.better_lean(1)
            curvatures = self.better_lean(turn, move=False)
            for k in range(own.shape[1]):
                chosen[f"{side} {k}"] = one = rounded(own[:, k], curvatures[:, k, k], LEAN_STEPS, False)
                own[:, k] = one.nats()
        return chosen


def fitted(grid: Grid, known: Known, bits: Bits, lean: bool = True) -> Fitted:
    """Return the model of events, as packed bits, of which there is one or more, perhaps with a low rank."""
    fit, chosen, lean = Fit(grid, known, bits), dict[str, Rounded](), lean and may_lean(grid, known.classes is not None)
    if (compiled := native.library()) is not None and not lean:
        return assembled(fit, _chosen(compiled, fit))
    if fit.cells:
        fit.start()
    for number in range(ROUNDS):
        fit.better_all(TOGETHER if fit.cells is None else (ARRAYS,))
        if fit.cells is not None and fit.left_over < 8 * LEAST_WORTH:
            fit.forget()
            break
        if number == 1:
            fit.forget()
    cells, fit.cells = fit.cells, None
    if lean:
        fit.search()
    if len(fit.right):
        for _ in range(LEAN_ROUNDS):
            fit.balance()
            fit.better_all(TOGETHER[:-1])
            for turn in (0, 1):
                fit.better_lean(turn)
        fit.balance()
        chosen |= fit.round_lean()
        fit.better_all()
    fit.cells = None if len(fit.right) else cells
    for name in ("magnitude", "before", "position", "reference", "input", "row"):
        if name in fit.values:
            (_, curvatures) = fit.better([name], dict.fromkeys(PRIORS, LAST_PRIOR)).arrays[name]
            chosen[name] = rounded(fit.values[name], curvatures, TRIED, name == "magnitude")
            fit.values[name] = chosen[name].nats(name == "magnitude")
    for _ in range(1 if fit.cells else 2):
        fit.better(())
    return assembled(fit, chosen)


def counted(
    grid: Grid, bits: Bits, sizes: Mapping[str, int], index: Mapping[str, Bits] = types.MappingProxyType({})
) -> dict[str, Longs]:
    """Return how many events the rows, inputs and kinds of weights have, of a parameter without kernels."""
    found = {name: np.zeros(size, dtype=np.int64) for name, size in sizes.items()}
    if (compiled := native.library()) is not None:
        own, arrays = np.ascontiguousarray(bits), (_addresses(index), _addresses(found))
        compiled.maskpack_counts(c_int64(grid.inputs), native.pointer(own), c_int64(own.size), *arrays)
        return found
    places = where_ones(bits)
    of = {"row": places // grid.inputs, "input": places % grid.inputs}
    of |= {name: own.reshape(-1)[places] for name, own in index.items()}
    return {name: np.bincount(of[name], minlength=own.size) for name, own in found.items()}


def margins(grid: Grid, bits: Bits) -> tuple[Longs, Longs]:
    """Return how many of the rarer bits each row and each input of a parameter without kernels has."""
    symbol = int(2 * count_ones(bits) <= grid.units)
    found = counted(grid, bits if symbol else flipped(bits, grid.units), {"row": grid.rows, "input": grid.inputs})
    return found["row"], found["input"]


def _chosen(compiled: ctypes.CDLL, fit: Fit) -> dict[str, Rounded]:
    """Return what `fitted` chooses without a low rank, by the compiled loops, which leave the offset with the fit."""
    integers = {name: np.zeros(own.size, dtype=np.int32) for name, own in fit.values.items()}
    given = fit.native({}, _integers(NAT * fit.left), _integers(NAT * fit.right), native.Probes(), native.Probes())
    sizes, counts = (fit.sizes[name] for name in ARRAYS), _addresses(fit.counts if fit.cells else {})
    arrays = native.address(_prices()), fit.offset, 0.0, _addresses(fit.values)
    own = native.Fitting(given, fit.number, (c_int64 * len(ARRAYS))(*sizes), counts, *arrays)
    own.integers = _addresses(integers)
    if not compiled.maskpack_fit(byref(own)):
        raise MemoryError
    fit.offset = own.offset
    codes = dict(zip(ARRAYS, own.codes, strict=True))
    return {name: Rounded(one, codes[name] & 15, codes[name] >> 4, 0.0) for name, one in integers.items()}


def rounded(values: Floats, curvature: Floats, steps: tuple[int, ...], differences: bool) -> Rounded:
    """Return the integers, step and table of little cost: bits of the coefficients, and of the events by them.

    From the middle of the steps it goes on to smaller or larger ones as long as they cost less.
    """
    lost = curvature / (2 * math.log(2))
    none = Rounded(np.zeros(values.size, dtype=np.int32), 0, 0, float(_exact(lost * values * values).sum()))
    at = len(steps) // 2
    best = _in_steps(values, lost, steps[at], differences)
    for way in (1, -1):
        place = at + way if best.step == steps[at] else -1
        while 0 <= place < len(steps):
            found = _in_steps(values, lost, steps[place], differences)
            if found.cost >= best.cost:
                break
            best, place = found, place + way
    return min(none, best, key=lambda one: one.cost)


def _in_steps(values: Floats, lost: Floats, number: int, differences: bool) -> Rounded:
    """Return integers for a step; `lost`: bits for a unit of squared error."""
    step, prices = STEPS[number] / 16, _prices()
    if differences:
        integers = np.rint(values / step).astype(np.int32)
        integers = np.clip(np.diff(integers, prepend=np.int32(0)), -RANGE, RANGE)
        loss = float(_exact(lost * np.square(values - np.cumsum(integers) * step)).sum())
    else:
        candidates = np.arange(-RANGE, RANGE + 1) * step
        if (compiled := native.library()) is not None:
            integers, found = np.empty(values.size, dtype=np.int32), np.zeros(2)
            arrays = (native.pointer(one) for one in (values, lost, candidates, prices, integers, found))
            table = compiled.maskpack_in_steps(c_int64(values.size), c_double(step), *arrays)
            return Rounded(integers, table + 1, number, float(found.sum()))
        error = _exact(lost[:, None] * np.square(values[:, None] - candidates))
        integers = np.clip(np.rint(values / step), -RANGE, RANGE).astype(np.int32)
        for _ in range(2):
            table = _cheapest(integers)[0]
            integers = ((error + prices[table]).argmin(1) - RANGE).astype(np.int32)
        loss = float(error[np.arange(values.size), integers + RANGE].sum())
    table, price = _cheapest(integers)
    return Rounded(integers, table + 1, number, price + loss)


def assembled(fit: Fit, chosen: dict[str, Rounded]) -> Fitted:
    """Return the model of rounded coefficients, without the arrays that are all zero."""
    names = {name: name for name in ARRAYS if name in chosen and chosen[name].table}
    lean = [k for k in range(len(fit.right)) if chosen[f"left {k}"].table and chosen[f"right {k}"].table]
    for number, k in enumerate(lean):
        names |= {f"{side} {number}": f"{side} {k}" for side in ("left", "right")}
    own = {name: chosen[old] for name, old in names.items()}
    codes = {name: one.step << 4 | one.table for name, one in own.items()}
    offset = max(-LEVELS, min(HIGHEST, round(16 * fit.offset)))
    return Fitted(offset, codes, {name: one.integers for name, one in own.items()})


def orthonormal(columns: Floats) -> Floats:
    """Return columns that span the same and are nearly orthonormal."""
    made = columns / np.maximum(np.abs(columns).max(0), 1e-9)
    for k in range(made.shape[1]):
        own = _exact(made[:, k], ONE)
        for before in made[:, :k].T:
            own = _exact(own - before * float(before @ own), ONE)
        made[:, k] = _exact(own / max(math.sqrt(float(own @ own)), 1e-3), ONE)
    return np.asarray(made, dtype=np.float64)


def _addresses(arrays: Mapping[str, NDArray[Any]]) -> Any:
    return (c_void_p * len(ARRAYS))(*(native.address(arrays.get(name)) for name in ARRAYS))


def _moved(value: float, step: float, most: float = BOLDEST) -> float:
    return round(NAT * (value + max(-most, min(most, step)))) / NAT


def _exact(values: Floats, parts: int = NAT) -> Floats:
    return np.asarray(np.rint(values * parts) / parts, dtype=np.float64)


def _integers(values: Floats) -> Ints:
    return np.ascontiguousarray(np.rint(values).astype(np.int32))


def _product(one: NDArray[Any], other: NDArray[Any]) -> Longs:
    """Return the matrix product of integers, exact below 2^53."""
    return np.asarray(one.astype(np.float64) @ other.astype(np.float64), dtype=np.float64).astype(np.int64)


@once
def _curve() -> Ints:
    """Return p and p (1 - p) of log-odds, in 1/ONE: 2^16 times the one plus the other."""
    odds = np.arange(-EXTREME * PARTS, EXTREME * PARTS + 1) / PARTS
    p = np.clip(np.rint(ONE / (1 + np.exp(-odds))), 1, ONE - 1)
    return _integers(65536 * p + np.rint(p * (ONE - p) / ONE))


def _smoothed(other: Ints | None, count: int) -> Longs:
    """Return `_curve`, p and p (1 - p) in 2^-FINER / ONE, on the average over the other side's coefficients."""
    places = np.zeros(1, np.int32) if other is None else np.clip(other + BIN // 2 >> 5, -SPREAD, SPREAD)
    found, at = np.zeros((2, _curve().size), dtype=np.int64), np.arange(_curve().size)
    for place, number in zip(*np.unique(places, return_counts=True), strict=True):
        both = _curve()[np.clip(at + BIN // 8 * place, 0, at[-1])].astype(np.int64)
        found += np.stack([both >> 16, both & 0xFFFF]) * (count if other is None else number)
    return np.asarray((found << FINER) // count, dtype=np.int64)


def _whole(sums: Any) -> Any:
    return sums + (1 << FINER - 1) >> FINER


@once
def _prices() -> Floats:
    """Return for each table the bits of each coefficient."""
    return _exact(-np.log2(np.diff(tables().first, axis=1) / ONE))


def _cheapest(integers: Ints) -> tuple[int, float]:
    """Return the table that takes the fewest bits for coefficients, and those bits."""
    bits = _prices() @ np.bincount(integers + RANGE, minlength=2 * RANGE + 1)
    return int(bits.argmin()), float(bits.min())
