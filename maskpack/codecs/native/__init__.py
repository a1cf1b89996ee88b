"""The compiled inner loops of coding, where they were built; numpy does the same, more slowly."""

import ctypes
import logging
from ctypes import Structure, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .build import SUFFIX

VERSION = 1  # of the loops
LARGE = 1 << 18  # weights from which it is worth a word that there is no library


def _pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names.split()]


class Tables(Structure):
    _fields_ = _pointers("hazard survival reach")


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "inputs", "positions", "rank", "offset")),
        *_pointers("row input position before magnitude reference left right classes referenced"),
    ]


class Lanes(Structure):
    _fields_ = _pointers("state at end words")


def pointer(array: NDArray[Any] | None) -> c_void_p:
    """Return a pointer to the elements of a contiguous array, which must outlive it; a null pointer for None."""
    assert array is None or array.flags.c_contiguous
    return c_void_p(None if array is None else array.__array_interface__["data"][0])


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built, does not load, or was built from another source."""
    return opened(Path(__file__).with_name(f"loops{SUFFIX}"))


def opened(path: Path) -> ctypes.CDLL | None:
    """Return the library at a path, or None."""
    try:
        found = ctypes.CDLL(str(path))
        found.maskpack_loops.restype = found.maskpack_words.restype = c_int64
        return found if found.maskpack_loops() == VERSION else None
    except (OSError, AttributeError):
        return None


@cache
def say_what_is_lost() -> None:
    """Say, once, that decoding would be many times as fast with the library."""
    logging.getLogger("maskpack").warning(
        "the compiled loops of maskpack are missing, so that masks decode ten to a hundred times more slowly; "
        "install a wheel, or install again where there is a C compiler"
    )
