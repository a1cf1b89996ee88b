"""Classes of the base's weights, which a codec may be conditioned on (docs/format.md section 5)."""

from ctypes import c_int64

import numpy as np
from numpy.typing import NDArray

from . import native
from .base import CHUNK, Bits

MAGNITUDES = 128
INFINITY = 0x7F80  # in bfloat16


def weight_classes(bf16_bits: NDArray[np.uint16]) -> Bits:
    """Sort weights into 128 classes of equal population by |weight|; the negative ones are 128 to 255.

    Equal values are always in the same class. Integers only, so that every platform gives the same classes. With H[v]
    weights of magnitude v among n, and B[v] of smaller magnitude, the class of v is floor(128 (2 B[v] + H[v]) / (2 n)).
    All NaN count as one magnitude above infinity. The sign is the sign bit, also of zeros; NaN have none, because casts
    change theirs.

    Args:
        bf16_bits: the weights rounded to bfloat16 (to nearest, ties to even), as 16-bit patterns, any shape.

    Returns:
        The class of every weight, row-major, uint8, flat.
    """
    flat = bf16_bits.reshape(-1)
    classes = np.empty(flat.size, dtype=np.uint8)
    if not flat.size:
        return classes
    compiled = native.library()
    if compiled is not None and flat.size < 1 << 32:
        weights, have = np.ascontiguousarray(flat), np.zeros(1 << 15, dtype=np.uint32)
        table = np.empty(1 << 16, dtype=np.uint8)
        given = (native.pointer(array) for array in (weights, have, table, classes))
        compiled.maskpack_classes(c_int64(flat.size), *given)
        return classes
    histogram = np.zeros(1 << 15, dtype=np.int64)
    for start in range(0, flat.size, CHUNK):
        histogram += np.bincount(flat[start : start + CHUNK] & 0x7FFF, minlength=1 << 15)
    histogram[INFINITY + 1] = histogram[INFINITY + 1 :].sum()
    histogram[INFINITY + 2 :] = 0
    below = np.cumsum(histogram) - histogram
    # values that do not occur may come out as 128; they are never looked up
    look_up = np.minimum(MAGNITUDES * (2 * below + histogram) // (2 * flat.size), MAGNITUDES - 1).astype(np.uint8)
    look_up[INFINITY + 2 :] = look_up[INFINITY + 1]
    negative = look_up + MAGNITUDES * (np.arange(look_up.size) <= INFINITY)
    look_up = np.concatenate([look_up, negative.astype(np.uint8)])
    for start in range(0, flat.size, CHUNK):
        classes[start : start + CHUNK] = look_up[flat[start : start + CHUNK]]
    return classes
