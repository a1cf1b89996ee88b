"""The model of a mask's events that takes the fewest bytes: penalised logistic regression, then rounding by cost.

All sums are of multiples of powers of two and so exact in any order: the same mask gives the same bytes on every
machine, whatever its libraries and threads.
"""

import math
from collections.abc import Mapping, Sequence
from ctypes import c_int64
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import native
from .lanes import LEVELS, ONE, RANGE, tables
from .logit_model import HIGHEST, MAX_RANK, STEPS, Before, Grid, Known, Model, may_lean, sizes

Floats = NDArray[np.float64]
EXTREME, PARTS = 12, 32  # log-odds are looked up within ±EXTREME nats, in parts of a nat
EXACT = 1 << 15  # probabilities are multiples of 1/EXACT
BLOCK = 1 << 15  # weights that are worked on at once
SMALL = 1 << 20  # weights up to which many rounds are made
ROUNDS, FEW = (8, 14), (3, 5)  # of all coefficients, and of the search for directions
PRIORS = {"row": 4.0, "input": 4.0, "position": 1.0, "before": 0.3, "magnitude": 0.3, "reference": 0.3}
LAST_PRIOR = 0.3  # before coefficients are rounded
LEAST_WORTH = 12.0  # bits
LEAN_PRIOR = 0.8
BOLDEST = 1.0  # nats that a coefficient moves at once
EDGE = 1.15  # of the greatest singular value of noise, from which a direction is worth its bytes
TRIED = (1, 2, 3, 5, 7, 9, 11, 12, 13)  # numbers of steps
LEAN_STEPS = (7, 9, 11, 12, 13)


class Rounded(NamedTuple):
    """Integers that stand for coefficients: their table (0: all are 0), the number of their step, what they cost."""

    integers: NDArray[np.int32]
    table: int
    step: int
    cost: float

    def nats(self, differences: bool = False) -> Floats:
        """Return the coefficients that they stand for."""
        whole = np.cumsum(self.integers) if differences else self.integers
        return np.asarray(whole * (STEPS[self.step] / 16), dtype=np.float64)


class Fit:
    """Coefficients that are no integers yet, and the events that they are fitted to.

    Attributes:
        values: of each array, in nats. left, right: (rows, rank) and (inputs, rank).
    """

    def __init__(self, grid: Grid, known: Known, events: NDArray[np.bool_]):
        self.grid, self.known, self.events = grid, known, events
        self.worth: dict[str, float] = {}  # about how many bits each array saves
        self.values = {name: np.zeros(size) for name, size in sizes(grid, known).items() if size}
        self.left, self.right = np.zeros((grid.rows, 0)), np.zeros((grid.inputs, 0))
        share = np.count_nonzero(events) / events.size
        self.offset = _moved(0.0, math.log(share / (1 - share)), EXTREME)
        self.index: dict[str, NDArray[Any]] = {}
        if "before" in self.values:
            self.index["before"] = contexts(grid, known, events)
        if known.classes is not None:
            self.index["magnitude"] = known.classes >> 3 & 15
            self.sign = np.where(known.classes[0] > 127, np.int8(-1), np.int8(1))
        if known.reference is not None:
            self.index["reference"] = known.reference
        width = max(1, BLOCK // (grid.inputs * grid.positions))
        self.blocks = [slice(start, min(start + width, grid.rows)) for start in range(0, grid.rows, width)]
        self.rounds, self.searches = ROUNDS if events.size <= SMALL else FEW

    def residuals(self, rows: slice) -> tuple[Floats, Floats]:
        """Return event - p and p (1 - p) of some rows' weights (positions, rows, inputs)."""
        at = np.full((self.grid.positions, rows.stop - rows.start, self.grid.inputs), PARTS * (self.offset + EXTREME))
        for name, own in self.values.items():
            scaled = own * PARTS
            if name == "row":
                at += scaled[rows, None]
            elif name == "input":
                at += scaled
            elif name == "position":
                at += scaled[:, None, None]
            elif name == "reference":
                at += scaled * self.index[name][:, rows]
            else:
                at += np.take(scaled, self.index[name][:, rows])
        if self.left.shape[1]:
            lean = (self.left[rows] * PARTS) @ self.right.T
            lean *= self.sign[rows]
            at[0] += lean
        (p, variances), compiled = _curve(), native.library()
        if compiled is not None:
            events, variance = np.ascontiguousarray(self.events[:, rows]), np.empty_like(at)
            arrays = [native.pointer(array) for array in (p, variances, variance)]
            given = (native.pointer(at), native.pointer(events), c_int64(p.size), *arrays)
            compiled.maskpack_residuals(c_int64(at.size), *given)
            return at, variance
        found = np.rint(at, out=at).astype(np.intp)
        residual = np.take(p, found, mode="clip", out=at)
        return np.subtract(self.events[:, rows], residual, out=residual), np.take(variances, found, mode="clip")

    def _sums(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the slope and the curvature of the likelihood along each coefficient of some arrays."""
        sums = {name: np.zeros((2, self.values[name].size)) for name in names}
        for rows in self.blocks:
            for turn, weights in enumerate(self.residuals(rows)):
                for name in names:
                    total = sums[name][turn]
                    if name == "row":
                        total[rows] = weights.sum((0, 2))
                    elif name == "input":
                        total += weights.sum((0, 1))
                    elif name == "position":
                        total += weights.sum((1, 2))
                    elif name == "reference":
                        total += (weights * self.index[name][:, rows]).sum()
                    else:
                        total += np.bincount(self.index[name][:, rows].reshape(-1), weights.reshape(-1), total.size)
        return sums

    def better(self, names: Sequence[str], priors: Mapping[str, float] = PRIORS) -> Floats:
        """Improve the coefficients of arrays that hardly depend on each other by a step of Newton's.

        Returns:
            The curvature along each coefficient of the last array.
        """
        sums = self._sums(names)
        if names[0] != "reference":  # all weights are in the sums, and the offset comes first
            slope, curvature = sums[names[0]].sum(1)
            step = float(slope / curvature)
            self.offset = _moved(self.offset, step)
            for own in sums.values():
                own[0] -= step * own[1]
        for name, (slopes, curvatures) in sums.items():
            prior = priors[name]
            moved = (slopes - prior * self.values[name]) / (curvatures + prior)
            self.values[name] = _exact(self.values[name] + np.clip(moved, -BOLDEST, BOLDEST))
            self.worth[name] = float((curvatures * np.square(self.values[name])).sum()) / (2 * math.log(2))
        return np.asarray(sums[names[-1]][1], dtype=np.float64)

    def better_all(self) -> None:
        """Improve all coefficients but those of the low rank, a step each."""
        for names in (("magnitude",), ("before",), ("position",), ("reference",), ("row", "input")):
            if own := [name for name in names if name in self.values]:
                self.better(own)

    def forget(self) -> None:
        """Set arrays that are worth less than their bits to 0, for good: most of what is known tells nothing."""
        for name in [name for name in self.values if self.worth[name] < LEAST_WORTH]:
            del self.values[name]

    def better_offset(self) -> None:
        """Let the model expect as many events as there are."""
        slope, curvature = 0.0, 0.0
        for rows in self.blocks:
            residual, variance = self.residuals(rows)
            slope += float(residual.sum())
            curvature += float(variance.sum())
        self.offset = _moved(self.offset, slope / curvature)

    def better_lean(self) -> None:
        """Improve the rows' part of the low rank by a step of Newton's, then the inputs' part."""
        rank = self.left.shape[1]
        upper = np.triu_indices(rank)
        for turn in (0, 1):
            own, other = (self.left, self.right)[:: 1 - 2 * turn]
            slope, curvature = -LEAN_PRIOR * own, np.zeros((len(own), rank, rank))
            pairs = other[:, upper[0]] * other[:, upper[1]]
            for rows in self.blocks:
                residual, variance = (part[0] for part in self.residuals(rows))
                residual *= self.sign[rows]
                if turn:
                    slope += residual.T @ other[rows]
                    curvature[:, upper[0], upper[1]] += variance.T @ pairs[rows]
                else:
                    slope[rows] += residual @ other
                    curvature[rows, upper[0], upper[1]] += variance @ pairs
            curvature[:, upper[1], upper[0]] = curvature[:, upper[0], upper[1]]
            curvature[:, np.arange(rank), np.arange(rank)] += LEAN_PRIOR
            own[:] = _exact(np.clip(own + np.clip(solved(curvature, slope), -BOLDEST, BOLDEST), -7, 7))

    def search(self) -> None:
        """Find the directions of the low rank: what is left of the events, times signs, is nearly noise without."""
        rows, inputs, _ = self.grid
        sums = np.zeros(rows), np.zeros(inputs)
        for own in self.blocks:
            variance = self.residuals(own)[1][0]
            sums[0][own] = variance.sum(1)
            sums[1][:] += variance.sum(0)
        scales = [np.maximum(np.sqrt(one / math.sqrt(sums[0].sum())), 1e-3) for one in sums]

        def noise(own: slice) -> Floats:
            left = self.residuals(own)[0][0]
            left *= self.sign[own]
            left /= scales[0][own, None] * scales[1]
            return _exact(np.clip(left, -1000, 1000, out=left), 1024)

        kept = [noise(own) for own in self.blocks] if self.events.size <= SMALL else None
        odd = 2654435761 * (2 * np.arange(MAX_RANK + 2, dtype=np.uint64) + 3)
        right = np.where(np.arange(inputs, dtype=np.uint64)[:, None] * odd >> 13 & 1, 1.0, -1.0)  # whatever differs
        for _ in range(self.searches):
            right, left = orthonormal(right), list[Floats]()
            image = np.zeros_like(right)
            for number, own in enumerate(self.blocks):
                part = noise(own) if kept is None else kept[number]
                left.append(_exact(part @ right, 1024))
                image += part.T @ left[-1]
            along, right = right, image
        images = np.concatenate(left)
        strength = np.sqrt(np.square(images).sum(0))
        edge = math.sqrt(rows) + math.sqrt(inputs)
        best = [k for k in np.argsort(-strength, kind="stable")[:MAX_RANK] if strength[k] > EDGE * edge]
        strong = strength[best]
        clean = np.sqrt(np.sqrt((strong**2 - rows - inputs) ** 2 - 4 * rows * inputs) / strong)
        self.left = _exact(np.clip(images[:, best] / strong / scales[0][:, None] * clean, -3, 3))
        self.right = _exact(np.clip(along[:, best] / scales[1][:, None] * clean, -3, 3))

    def balance(self) -> None:
        """Give both parts of the low rank the same size."""
        for k in range(self.left.shape[1]):
            own, other = self.left[:, k], self.right[:, k]
            ratio = math.sqrt(math.sqrt((np.square(other).mean() + 1e-6) / (np.square(own).mean() + 1e-6)))
            own[:], other[:] = _exact(own * ratio), _exact(other / ratio)


def fitted(grid: Grid, known: Known, events: NDArray[np.bool_]) -> Model:
    """Return the model of events (positions, rows, inputs), of which there is one or more."""
    fit = Fit(grid, known, events)
    for number in range(fit.rounds):
        fit.better_all()
        if number == 1:
            fit.forget()
    fit.better_offset()
    if may_lean(grid, known):
        fit.search()
    rank, chosen = fit.left.shape[1], dict[str, Rounded]()
    if rank:
        fit.balance()
        for _ in range(fit.rounds):
            fit.better_lean()
            fit.better_all()
            fit.balance()
        chosen |= _rounded_lean(fit)
        fit.better_all()
    for name in ("magnitude", "before", "position", "reference", "input", "row"):
        if name in fit.values:
            curvature = fit.better([name], dict.fromkeys(PRIORS, LAST_PRIOR))
            chosen[name] = rounded(fit.values[name], curvature, TRIED, name == "magnitude")
            fit.values[name] = chosen[name].nats(name == "magnitude")
    for _ in range(2):
        fit.better_offset()
    return assembled(fit, chosen, rank)


def _rounded_lean(fit: Fit) -> dict[str, Rounded]:
    """Round the rows' part of the low rank, fit the inputs' part to that, and round it too."""
    variance, chosen = [np.square(one) for one in (fit.left, fit.right)], dict[str, Rounded]()
    for turn in (0, 1):
        own = (fit.left, fit.right)[turn]
        curvature = np.zeros_like(own)
        if turn:
            kept = fit.left.copy()
            for _ in range(2):
                fit.better_lean()
                fit.left[:] = kept
            variance[0] = np.square(kept)
        for rows in fit.blocks:
            weights = fit.residuals(rows)[1][0]
            if turn:
                curvature += weights.T @ variance[0][rows]
            else:
                curvature[rows] = weights @ variance[1]
        for k in range(own.shape[1]):
            one = rounded(own[:, k], curvature[:, k], LEAN_STEPS, False)
            own[:, k], chosen[f"{('left', 'right')[turn]} {k}"] = one.nats(), one
    return chosen


def rounded(values: Floats, curvature: Floats, steps: tuple[int, ...], differences: bool) -> Rounded:
    """Return the integers, step and table of the least cost: bits of the coefficients, and of the events by them."""
    lost = curvature / (2 * math.log(2))
    best = Rounded(np.zeros(values.size, dtype=np.int32), 0, 0, float((lost * values * values).sum()))
    candidates, prices = np.arange(-RANGE, RANGE + 1), _prices()
    for number in steps:
        step = STEPS[number] / 16
        if differences:
            integers = np.rint(values / step).astype(np.int32)
            integers = np.clip(np.diff(integers, prepend=0), -RANGE, RANGE)
            loss = float((lost * np.square(values - np.cumsum(integers) * step)).sum())
        else:
            error = lost[:, None] * np.square(values[:, None] - candidates * step)
            integers = np.clip(np.rint(values / step), -RANGE, RANGE).astype(np.int32)
            for _ in range(3):
                table = _cheapest(integers)[0]
                integers = ((error + prices[table]).argmin(1) - RANGE).astype(np.int32)
            loss = float(error[np.arange(values.size), integers + RANGE].sum())
        table, price = _cheapest(integers)
        if price + loss < best.cost:
            best = Rounded(integers, table + 1, number, price + loss)
    return best


def assembled(fit: Fit, chosen: dict[str, Rounded], rank: int) -> Model:
    """Return the model of rounded coefficients, without the arrays that are all zero, in the order of the payload."""
    names = {name: name for name in sizes(fit.grid, fit.known) if name in chosen and chosen[name].table}
    lean = [k for k in range(rank) if chosen[f"left {k}"].table and chosen[f"right {k}"].table]
    for number, k in enumerate(lean):
        names |= {f"{side} {number}": f"{side} {k}" for side in ("left", "right")}
    own = {name: chosen[old] for name, old in names.items()}
    steps, kinds = {name: one.step for name, one in own.items()}, {name: one.table for name, one in own.items()}
    offset = max(-LEVELS, min(HIGHEST, round(16 * fit.offset)))
    values = {name: one.integers for name, one in own.items()}
    return Model(fit.grid, fit.known, len(lean), offset, steps, kinds, values)


def contexts(grid: Grid, known: Known, events: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the context of every weight inside its kernel."""
    flat = events.reshape(grid.positions, -1)
    signs = None if known.classes is None else known.classes.reshape(flat.shape) >> 7
    before, found = Before(signs, flat.shape[1]), np.empty(flat.shape, dtype=np.uint8)
    for position, own in enumerate(flat):
        found[position] = before.context()
        before.add(own)
    return found.reshape(events.shape)


def orthonormal(columns: Floats) -> Floats:
    """Return columns that span the same and are nearly orthonormal."""
    made = columns / np.maximum(np.abs(columns).max(0), 1e-9)
    for k in range(made.shape[1]):
        own = _exact(made[:, k], EXACT)
        for before in made[:, :k].T:
            own = _exact(own - before * float(before @ own), EXACT)
        made[:, k] = _exact(own / max(math.sqrt(float(own @ own)), 1e-3), EXACT)
    return np.asarray(made, dtype=np.float64)


def solved(matrices: Floats, vectors: Floats) -> Floats:
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


def _moved(value: float, step: float, most: float = BOLDEST) -> float:
    return round(256 * (value + max(-most, min(most, step)))) / 256


def _exact(values: Floats, parts: int = 256) -> Floats:
    return np.asarray(np.rint(values * parts) / parts, dtype=np.float64)


@cache
def _curve() -> tuple[Floats, Floats]:
    """Return p and p (1 - p) of log-odds."""
    odds = np.arange(-EXTREME * PARTS, EXTREME * PARTS + 1) / PARTS
    p = np.clip(_exact(1 / (1 + np.exp(-odds)), EXACT), 1 / EXACT, 1 - 1 / EXACT)
    return p, _exact(p * (1 - p), EXACT)


@cache
def _prices() -> Floats:
    """Return for each table the bits of each coefficient."""
    return _exact(-np.log2(np.diff(tables().first, axis=1) / ONE))


def _cheapest(integers: NDArray[np.int32]) -> tuple[int, float]:
    """Return the table that takes the fewest bits for coefficients, and those bits."""
    bits = _prices() @ np.bincount(integers + RANGE, minlength=2 * RANGE + 1)
    return int(bits.argmin()), float(bits.min())
