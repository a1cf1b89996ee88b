"""Votes on packed bits: sums of many bits at once, as binary digits that are packed themselves."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

from .errors import ConfigError
from .mask import PackedMask, packed_bits

CHUNK = 1 << 18  # bytes of a mask that are counted at a time, so that the digits stay in the processor's cache
MOST_VOTES = 1 << 64


def whole_votes(weights: Sequence[float], count: int) -> list[int]:
    """Return the weights of `count` votes as whole numbers in the same ratios, as small as can be.

    A weight counts as the decimal number that it is printed as.

    Raises:
        ConfigError: if they are not as many, not finite, negative, all 0, or would need more than 64 binary digits.
    """
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
    """Return where the votes of the true bits sum up to `least` or more.

    Args:
        votes: whole numbers, one for each of `bits`. least: from 1 to their sum.
    """
    columns = [packed_bits(one) for one in bits]
    kept = np.empty_like(columns[0])
    for start in range(0, len(kept), CHUNK):
        part = slice(start, start + CHUNK)
        kept[part] = _at_least(_sums(votes, [column[part] for column in columns]), least)
    return PackedMask.from_bytes(kept, (len(bits[0]),)).bits


def _sums(votes: Sequence[int], columns: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Add up votes: one packed array for each binary digit of the sums, the lowest first."""
    digits = [np.zeros_like(columns[0]) for _ in range(sum(votes).bit_length())]
    for vote, column in zip(votes, columns, strict=True):
        for place in range(vote.bit_length()):
            carry, at = (column if vote >> place & 1 else None), place
            while carry is not None and carry.any():
                digits[at], carry = digits[at] ^ carry, digits[at] & carry
                at += 1
    return digits


def _at_least(digits: Sequence[NDArray[np.uint8]], least: int) -> NDArray[np.uint8]:
    """Return where numbers, given by their binary digits, are `least` or more; it has no more digits than they."""
    greater, equal = np.zeros_like(digits[0]), np.full_like(digits[0], 0xFF)
    for place in reversed(range(len(digits))):
        if least >> place & 1:
            equal &= digits[place]
        else:
            greater |= equal & digits[place]
            equal &= ~digits[place]
    return greater | equal
