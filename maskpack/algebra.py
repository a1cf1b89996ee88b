"""Sets of masks combined bit by bit, by votes and other operations, and what two of them have in common."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from fractions import Fraction
from functools import partial, reduce
from typing import Literal

import numpy as np
from bitarray import bitarray
from bitarray.util import count_and, ones

from .errors import ConfigError, UnknownNameError, check_argument, check_choice
from .mask import MaskSet, PackedMask, Shape, packed_bits

CHUNK = 1 << 15  # bytes of a mask whose votes are summed at a time, so that the sums stay in the processor's cache
MOST_VOTES = 1 << 64


def whole_votes(weights: Sequence[float], count: int) -> list[int]:
    """Return the weights of `count` votes, decimal numbers, as whole numbers in the same ratios, as small as can be."""
    try:
        exact = [Fraction(str(weight)) for weight in weights]
    except (ValueError, ZeroDivisionError):
        exact = [Fraction(-1)]
    if len(exact) != count or min(exact) < 0 or not any(exact):
        raise ConfigError(
            f"a weighted vote needs a finite weight from 0 for each of the {count} mask sets, not all of them 0; got "
            f"{', '.join(map(str, weights)) or 'none'}"
        )
    whole = [int(one * math.lcm(*(other.denominator for other in exact))) for one in exact]
    votes = [one // math.gcd(*whole) for one in whole]
    if sum(votes) >= MOST_VOTES:
        raise ConfigError(
            f"the weights {', '.join(map(str, weights))} are in the ratios of whole numbers with a sum of over 2^64; "
            f"round them"
        )
    return votes


def count_votes(votes: Sequence[int], least: int, bits: list[bitarray]) -> bitarray:
    """Return the packed bits at which the weighted votes of true bits reach `least`, at least 1."""
    columns = [packed_bits(one) for one in bits]
    kept = np.empty_like(columns[0])
    for start in range(0, len(kept), CHUNK):
        part = slice(start, start + CHUNK)
        sums = np.zeros(8 * len(kept[part]), np.uint64)
        for vote, column in zip(votes, columns, strict=True):
            sums += np.unpackbits(column[part]) * np.uint64(vote)
        kept[part] = np.packbits(sums >= np.uint64(least))
    return PackedMask.from_bytes(kept, (len(bits[0]),)).bits


Missing = Literal["error", "keep"]
OPERATIONS = ("and", "difference", "k-of-n", "majority", "not", "or", "weighted", "xor")

Join = Callable[[list[bitarray]], bitarray]


def combine(
    how: str,
    masks: Sequence[MaskSet],
    *,
    weights: Sequence[float] | None = None,
    k: int | None = None,
    missing: Missing = "error",
) -> MaskSet:
    """Combine mask sets bit by bit, by an operation such as a union, an intersection or a vote.

    | `how` | of | a weight is kept if it is kept by |
    | --- | --- | --- |
    | "and", "or" | 2 or more | every set; at least one |
    | "xor" | 2 or more | an odd number of sets |
    | "not" | 1 | not this set |
    | "difference" | 2 | the first set and not the second |
    | "majority" | 2 or more | more than half of the sets; an even split removes it |
    | "k-of-n" | 2 or more | at least `k` sets |
    | "weighted" | 2 or more | sets that have more than half of the sum of `weights` |

    Masks with a scale must have the same alpha for a parameter, and the result has that alpha, whatever its density:
    so a weight that is kept has exactly the value that it had in every set that keeps it. The result is in memory if
    all sets are; else it is streamed, and its masks are made, and checked, when they are asked for.

    Args:
        weights: of the votes, one for each set, from 0; they count as the decimal numbers that they are printed as,
            so that 0.1 and 0.2 are as much as 0.3.
        missing: "error" refuses sets over different parameters; with "keep" a set without a mask for a parameter
            counts as keeping every weight of it.

    Raises:
        UnknownNameError: if there is no such operation.
        ConfigError: if `weights`, `k` or the number of sets do not fit it, or the sets differ in parameters, shapes, op
            or alpha, or have signs (ternary masks).

    Example:
        voted = combine("majority", [first, second, third])
    """
    check_argument("how", how, str, f"one of {', '.join(OPERATIONS)}", "it comes before the masks")
    check_argument("masks", masks, Sequence, "a list of mask sets", "give [first, second]")
    for one in masks:
        check_argument("one of the masks", one, MaskSet, "a MaskSet", "of an adapter it is adapter.parts().masks")
    join = operation(how, len(masks), weights, k)
    shapes = common_shapes(masks, missing)

    def make(name: str) -> PackedMask:
        found, own = _masks_of(name, masks)
        if len({None if mask is None else mask.alpha for mask in found}) > 1:
            raise ConfigError(
                f"the masks of {name!r} scale the kept weights differently, by the alphas "
                f"{', '.join('none' if mask is None or mask.alpha is None else str(mask.alpha) for mask in found)}; "
                f"masks can be combined where their alphas are equal, as without a scale"
            )
        every = ones(len(own[0].bits), endian="little")
        return replace(own[0], bits=join([every if mask is None else mask.bits for mask in found]))

    combined = MaskSet.streamed(shapes, make, shapes)
    return combined if any(one.is_streamed for one in masks) else MaskSet(dict(combined))


def operation(how: str, count: int, weights: Sequence[float] | None = None, k: int | None = None) -> Join:
    """Return the function that joins the bits of `count` masks; arguments and errors are those of `combine`."""
    if how not in OPERATIONS:
        raise UnknownNameError(f"unknown operation {how!r}; known: {', '.join(OPERATIONS)}")
    exactly = {"not": 1, "difference": 2}.get(how)
    if count < 2 if exactly is None else count != exactly:
        needed = "2 or more mask sets" if exactly is None else f"exactly {exactly} mask set{'s' * (exactly > 1)}"
        raise ConfigError(f"{how!r} takes {needed}, got {count}")
    if (weights is None) == (how == "weighted"):
        given = "none" if weights is None else ", ".join(map(str, weights))
        raise ConfigError(f"weights go with 'weighted' and with no other operation, got {given} for {how!r}")
    if (k is None) == (how == "k-of-n"):
        given = "none" if k is None else str(k)
        raise ConfigError(f"k goes with 'k-of-n' and with no other operation, got {given} for {how!r}")
    if weights is not None:
        votes = whole_votes(weights, count)
        return partial(count_votes, votes, sum(votes) // 2 + 1)
    if k is not None and not 1 <= k <= count:
        raise ConfigError(f"k must be from 1 to {count}, the number of mask sets; got {k}")
    if how in ("k-of-n", "majority"):
        return partial(count_votes, [1] * count, count // 2 + 1 if k is None else k)
    if how in ("not", "difference"):
        return lambda bits: bits[0] & ~bits[1] if how == "difference" else ~bits[0]
    one = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[how]
    return lambda bits: reduce(one, bits)


def common_shapes(masks: Sequence[MaskSet], missing: Missing) -> dict[str, Shape]:
    """Return the shapes of all parameters of mask sets; see `combine` for `missing` and the errors."""
    check_choice("missing", missing, Missing)
    every = [one.shapes for one in masks]
    shapes = {name: shape for one in reversed(every) for name, shape in one.items()}
    partly = sorted(name for name in shapes if not all(name in one for one in every))
    if partly and missing == "error":
        lacking = [str(number) for number, one in enumerate(every, 1) if partly[0] not in one]
        raise ConfigError(
            f"the mask sets are over different parameters: {len(partly)} of {len(shapes)} are not in all of them, "
            f"first {partly[0]!r}, which number {', '.join(lacking)} of {len(every)} lacks; with missing='keep' "
            f"(--missing keep) a set keeps every weight of a parameter that it does not mask"
        )
    for name, shape in shapes.items():
        other = next((one[name] for one in every if one.get(name, shape) != shape), shape)
        if other != shape:
            raise ConfigError(f"the masks of {name!r} have the shapes {shape} and {other}; give masks of one backbone")
    return dict(sorted(shapes.items()))


def _masks_of(name: str, sets: Sequence[MaskSet]) -> tuple[list[PackedMask | None], list[PackedMask]]:
    """Return the masks of a parameter by set, and those that there are, whose bits must all mean the same."""
    found = [one.get(name) for one in sets]
    own = [mask for mask in found if mask is not None]
    ops = sorted({mask.op for mask in own})
    if len(ops) > 1 or any(mask.signs is not None for mask in own):
        what = f"the ops {' and '.join(ops)}" if len(ops) > 1 else "signs, as ternary masks do"
        raise ConfigError(f"the masks of {name!r} have {what}; give masks whose bits mean the same, without signs")
    return found, own


@dataclass(frozen=True, slots=True)
class Overlap:
    """Counts of what two masks have in common, on one parameter or on several together.

    Attributes:
        weights: in all. both: kept by both masks. first_only, second_only: kept by that mask alone.
        expected: of the weights that both remove: how many it would be on average, were they drawn independently with
            the same counts for each parameter.
        rescaled: parameters whose alphas differ, which the bits do not show.
    """

    weights: int = 0
    both: int = 0
    first_only: int = 0
    second_only: int = 0
    expected: float = 0.0
    rescaled: int = 0

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(*map(operator.add, astuple(self), astuple(other)))

    @property
    def neither(self) -> int:
        """Weights that both masks remove."""
        return self.weights - self.both - self.hamming

    @property
    def hamming(self) -> int:
        """Number of bits that differ."""
        return self.first_only + self.second_only

    @property
    def share(self) -> float:
        """Share of bits that differ; 0 if there are none."""
        return self.hamming / self.weights if self.weights else 0.0

    @property
    def jaccard(self) -> float | None:
        """Of the weights that at least one mask removes, the share that both remove; None if none is removed."""
        return self.neither / (self.neither + self.hamming) if self.neither + self.hamming else None

    @property
    def chance(self) -> float | None:
        """Value of `jaccard` if `expected` of the weights that each mask removes were removed by both."""
        removed = 2 * self.neither + self.hamming
        return self.expected / (removed - self.expected) if removed else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa of the bits: (share of equal bits - chance) / (1 - chance); None where chance explains all."""
        disagreed = 2 * self.neither + self.hamming - 2 * self.expected  # bits that would differ by chance
        return 1 - self.hamming / disagreed if disagreed > 1e-9 * self.weights else None


def overlaps(first: MaskSet, second: MaskSet, *, missing: Missing = "error") -> Iterator[tuple[str, Overlap]]:
    """Yield what two mask sets have in common, by parameter name; `sum(…, Overlap())` of them is that of the sets.

    `missing` and errors are those of `combine`, but alphas may differ.
    """
    for name, shape in common_shapes([first, second], missing).items():
        every = PackedMask(ones(math.prod(shape), endian="little"), shape)
        a, b = (mask or every for mask in _masks_of(name, [first, second])[0])
        both, removed = count_and(a.bits, b.bits), (len(a.bits) - a.kept) * (len(b.bits) - b.kept)
        expected, rescaled = removed / max(len(a.bits), 1), int(a.alpha != b.alpha)
        yield name, Overlap(len(a.bits), both, a.kept - both, b.kept - both, expected, rescaled)
