"""Which mask set of a file the others are coded against."""

import itertools
import math
from collections.abc import Mapping

from bitarray import bitarray
from bitarray.util import count_xor

from ..mask import MaskSet, Op, PackedMask

COMPARED = 64 << 20  # bytes compared for one parameter, over all pairs of sets
CANDIDATES = 64  # sets, beyond which as many of them, evenly spaced, are compared: pairs are not linear


def choose_reference(sets: Mapping[str, MaskSet]) -> str | None:
    """Return the set whose masks the others are most like, or None if that would make no set smaller.

    A set gains, for each mask of the same parameter, op and shape, what its difference from the reference has fewer
    rare bits than itself. The middle part of large masks stands for the whole, the more sets the shorter. Of more than
    64 sets some stand for all.

    Args:
        sets: by name. Where there are several, those of one parameter are in memory at one time.
    """
    gains = dict.fromkeys(sorted(sets)[:: math.ceil(len(sets) / CANDIDATES)], 0)
    having: dict[str, list[str]] = {}
    for key in gains:
        for name in sets[key]:
            having.setdefault(name, []).append(key)
    for name, holders in sorted(having.items()):
        alike: dict[tuple[Op, tuple[int, ...]], list[tuple[str, bitarray]]] = {}
        if len(holders) < 2:
            continue
        for key in holders:
            mask = sets[key][name]
            for op, bits in mask.payloads():
                alike.setdefault((op, mask.shape), []).append((key, _middle(bits, len(gains))))
        for samples in alike.values():
            for (one, own), (other, others) in itertools.combinations(samples, 2):
                difference = _rare(count_xor(own, others), len(own))
                gains[one] += max(0, _rare(others.count(), len(own)) - difference)
                gains[other] += max(0, _rare(own.count(), len(own)) - difference)
    best = max(gains, key=lambda key: gains[key])
    return best if gains[best] else None


def counterpart(masks: MaskSet | None, name: str, shape: tuple[int, ...], op: Op) -> bitarray | None:
    """Return the bits that a payload may be coded against: of the same parameter, shape and op in the reference."""
    mask: PackedMask | None = None if masks is None else masks.get(name)
    return None if mask is None or mask.shape != shape else dict(mask.payloads()).get(op)


def is_nearer(bits: bitarray, other: bitarray) -> bool:
    """Tell whether the difference from other bits has fewer rare bits than the bits themselves."""
    return _rare(count_xor(bits, other), len(bits)) < _rare(bits.count(), len(bits))


def _middle(bits: bitarray, sets: int) -> bitarray:
    length = max(8 * COMPARED // sets**2, 1)
    start = max(0, len(bits) - length) // 16 * 8  # whole bytes are copied faster
    return bits[start : start + length]


def _rare(ones: int, count: int) -> int:
    return min(ones, count - ones)
