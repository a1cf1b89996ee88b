"""Access to the compiled inner loops of the codecs; without them numpy gives the same bits, more slowly."""

import ctypes
import logging
from ctypes import Structure, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .build import SUFFIX

VERSION = 16  # of the loops
LARGE = 1 << 18  # weights from which it is worth a word that there is no library
ARRAYS = 6


class Tables(Structure):
    _fields_ = [(name, c_void_p) for name in ("hazard", "survival", "reach", "first")]


class Given(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "inputs", "positions", "width")),
        *((name, c_void_p) for name in ("weights", "reference", "ranks")),
    ]


class Probes(Structure):
    _fields_ = [("count", c_int64), *((name, c_void_p) for name in ("along", "across", "factors", "images", "others"))]


class Fit(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "inputs", "positions", "rank", "offset")),
        ("kinds", c_int64),
        *((name, c_void_p) for name in ("by_row", "by_input", "events")),
        *(("index", c_void_p * ARRAYS), ("array", c_void_p * ARRAYS)),
        *((name, c_void_p) for name in ("left", "right", "signs", "curve")),
        *(("residuals", Probes), ("variances", Probes)),
    ]


class Fitting(Structure):
    _fields_ = [
        *(("fit", Fit), ("number", c_int64), ("sizes", c_int64 * ARRAYS)),
        *(("counts", c_void_p * ARRAYS), ("prices", c_void_p), ("offset", c_double), ("left_over", c_double)),
        *(("values", c_void_p * ARRAYS), ("worth", c_double * ARRAYS)),
        *(("integers", c_void_p * ARRAYS), ("codes", c_int32 * ARRAYS)),
    ]


class Steps(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("count", "lanes", "contexts", "top", "width", "mantissa")),
        *((name, c_void_p) for name in ("base", "table")),
    ]


def address(array: NDArray[Any] | None) -> int | None:
    """Return where the elements of a contiguous array lie, which must outlive its use; None for None."""
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.__array_interface__["data"][0]  # quicker than .ctypes


def pointer(array: NDArray[Any] | None) -> c_void_p:
    """Return a pointer to the elements of a contiguous array, which must outlive it; a null pointer for None."""
    return c_void_p(address(array))


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built, does not load, or was built from another source."""
    return opened(Path(__file__).with_name(f"loops{SUFFIX}"))


def opened(path: Path) -> ctypes.CDLL | None:
    """Return the library at a path, or None."""
    try:
        found = ctypes.CDLL(str(path))
        found.maskpack_loops.restype, found.maskpack_encode.restype = c_int64, c_void_p
        found.maskpack_decode.restype = found.maskpack_classes.restype = found.maskpack_ranks.restype = c_int32
        found.maskpack_where.restype, found.maskpack_in_steps.restype = c_int64, c_int32
        found.maskpack_fit.restype = found.maskpack_cells.restype = c_int32
        found.maskpack_gaps.restype = c_int64
        found.maskpack_steps_count.restype = found.maskpack_steps_encode.restype = c_int64
        found.maskpack_steps_choose.restype, found.maskpack_steps_decode.restype = c_int64, c_int32
        return found if found.maskpack_loops() == VERSION else None
    except (OSError, AttributeError):
        return None


@cache
def say_what_is_lost() -> None:
    """Warn once that decoding would be many times as fast with the compiled library."""
    logging.getLogger("maskpack").warning(
        "the compiled loops of maskpack are missing, so that masks decode about ten times more slowly; "
        "install a wheel, or install again where there is a C compiler"
    )
