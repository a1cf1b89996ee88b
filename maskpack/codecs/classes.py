"""Classes of the base's weights, which a codec may be conditioned on (docs/format.md section 5)."""

from ctypes import byref, c_int32, c_int64

import numpy as np

from . import native
from .base import Bits, Numbers, Words

MAGNITUDES = 128
PIECE = 1 << 15  # weights whose words stay in the core's cache
INFINITY = 0x7F80  # in bfloat16


def ranks(words: Words, parts: int) -> Bits | None:
    """Return the class of each magnitude, of equally populous classes; None without compiled loops."""
    compiled = native.library()
    if compiled is None or not 0 < words.size < 1 << 32:
        return None
    found, given = np.zeros(INFINITY + 2, np.uint8), native.Given(width=words.itemsize, weights=native.address(words))
    if not compiled.maskpack_ranks(byref(given), c_int64(words.size), c_int32(parts), native.pointer(found)):
        raise MemoryError
    return found


def weight_classes(words: Words, parts: int = MAGNITUDES, known: Bits | None = None) -> Bits:
    """Sort weights into classes of equal population by |weight|; those of negative weights are 128 higher.

    Equal values are always in the same class. Integers only, so that every platform gives the same classes. With H[v]
    weights of magnitude v among n, and B[v] of smaller magnitude, the class of v is floor(parts (2 B[v] + H[v]) /
    (2 n)). All NaN count as one magnitude above infinity. The sign is the sign bit, also of zeros; NaN have none,
    because casts change theirs.

    Args:
        words: the weights, flat, as their 32-bit (float32) or 16-bit (bfloat16) patterns. parts: at most 128.
        known: their `ranks`, if these were asked for.

    Returns:
        The class of every weight, uint8.
    """
    classes = np.empty(words.size, dtype=np.uint8)
    compiled = native.library()
    if not words.size:
        return classes
    if compiled is not None and words.size < 1 << 32:
        given = native.Given(0, 0, 0, words.itemsize, *map(native.address, (words, None, known)))
        if not compiled.maskpack_classes(byref(given), c_int64(words.size), c_int32(parts), native.pointer(classes)):
            raise MemoryError
        return classes
    histogram, found = np.zeros(INFINITY + 2, dtype=np.int64), np.empty(words.size, dtype=np.uint16)
    pieces = [slice(start, start + PIECE) for start in range(0, words.size, PIECE)]
    for piece in pieces:
        found[piece] = _magnitudes(words[piece])
        histogram += np.bincount(found[piece], minlength=histogram.size)
    below = np.cumsum(histogram) - histogram
    # values that do not occur may come out as `parts`; they are never looked up
    look_up = np.minimum(parts * (2 * below + histogram) // (2 * words.size), parts - 1).astype(np.uint8)
    for piece in pieces:
        look_up.take(found[piece], out=classes[piece], mode="clip")
        classes[piece] |= weight_signs(words[piece])
    return classes


def weight_signs(words: Words) -> Bits:
    """Return 128 for each weight that is negative, else 0."""
    low, signs = 8 * words.itemsize - 16, np.empty(words.size, dtype=np.uint8)
    for start in range(0, words.size, PIECE):
        piece = slice(start, start + PIECE)
        # from the least negative to minus infinity; what is below that is a NaN, or above zero
        signs[piece] = (words[piece] - words.dtype.type(0x8000 << low)) <= INFINITY << low
    signs <<= np.uint8(7)
    return signs


def _magnitudes(words: Words) -> Numbers:
    """Return |weights| rounded to bfloat16 (to nearest, ties to even), all NaN as one."""
    if words.itemsize == 2:
        short: Numbers = np.minimum(words & 0x7FFF, INFINITY + 1)
        return short
    found: Numbers = words & np.uint32(0x7FFFFFFF)
    nan = found > INFINITY << 16
    odd = found >> 16
    odd &= 1
    found += odd
    found += 0x7FFF
    found >>= 16
    found[nan] = INFINITY + 1
    return found
