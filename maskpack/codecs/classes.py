"""Classes of the base's weights, which a codec may be conditioned on (docs/format.md section 5)."""

from ctypes import byref, c_int32, c_int64

import numpy as np
from numpy.typing import NDArray

from . import native
from .base import CHUNK, Bits, Words

MAGNITUDES = 128
INFINITY = 0x7F80  # in bfloat16


def weight_classes(words: Words, parts: int = MAGNITUDES) -> Bits:
    """Sort weights into classes of equal population by |weight|; those of negative weights are 128 higher.

    Equal values are always in the same class. Integers only, so that every platform gives the same classes. With H[v]
    weights of magnitude v among n, and B[v] of smaller magnitude, the class of v is floor(parts (2 B[v] + H[v]) /
    (2 n)). All NaN count as one magnitude above infinity. The sign is the sign bit, also of zeros; NaN have none,
    because casts change theirs.

    Args:
        words: the weights, flat, as their 32-bit (float32) or 16-bit (bfloat16) patterns. parts: at most 128.

    Returns:
        The class of every weight, uint8.
    """
    classes = np.empty(words.size, dtype=np.uint8)
    compiled = native.library()
    if not words.size:
        return classes
    if compiled is not None and words.size < 1 << 32:
        given = native.Given(width=words.itemsize, weights=native.address(words))
        if not compiled.maskpack_classes(byref(given), c_int64(words.size), c_int32(parts), native.pointer(classes)):
            raise MemoryError
        return classes
    histogram = np.zeros(INFINITY + 2, dtype=np.int64)
    pieces = [slice(start, start + CHUNK) for start in range(0, words.size, CHUNK)]
    for piece in pieces:
        histogram += np.bincount(_magnitudes(words[piece]), minlength=histogram.size)
    below = np.cumsum(histogram) - histogram
    # values that do not occur may come out as `parts`; they are never looked up
    look_up = np.minimum(parts * (2 * below + histogram) // (2 * words.size), parts - 1).astype(np.uint8)
    for piece in pieces:
        classes[piece] = look_up[_magnitudes(words[piece])] | weight_signs(words[piece])
    return classes


def weight_signs(words: Words) -> Bits:
    """Return 128 for each weight that is negative, else 0."""
    low = 8 * words.itemsize - 16
    found = (words >> low >= 0x8000) & (words <= (0x8000 | INFINITY) << low)
    return found.view(np.uint8) << np.uint8(7)


def _magnitudes(words: Words) -> NDArray[np.uint16]:
    """Return |weights| rounded to bfloat16 (to nearest, ties to even), all NaN as one."""
    if words.itemsize == 4:
        words = words & np.uint32(0x7FFFFFFF)
        nan = words > INFINITY << 16
        words = np.where(nan, np.uint32(INFINITY + 1), words + (0x7FFF + (words >> 16 & 1)) >> 16)
    found: NDArray[np.uint16] = np.minimum(words & 0x7FFF, INFINITY + 1).astype(np.uint16)
    return found
