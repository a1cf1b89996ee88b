"""The compiled inner loops of coding, where they were built; numpy does the same, more slowly."""

import ctypes
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_uint8, c_uint16
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .build import SUFFIX

LARGE = 1 << 24  # weights from which it is worth a word that there is no library
KINDS: dict[str, Any] = {"i4": c_int32, "i8": c_int64, "f4": c_float, "u1": c_uint8, "u2": c_uint16}


def _pointers(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, POINTER(kind)) for name in names.split()]


class Tables(Structure):
    _fields_ = _pointers("hazard survival reach", c_uint16)


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "inputs", "positions", "rank", "offset")),
        *_pointers("row input position before magnitude reference", c_int32),
        *_pointers("left right", c_float),
        *_pointers("classes referenced", c_uint8),
    ]


class Lanes(Structure):
    _fields_ = [*_pointers("state at end", c_int64), *_pointers("words", c_uint16)]


def pointer(array: NDArray[Any] | None) -> Any:
    """Return a pointer to the elements of a contiguous array, which must outlive it; a null pointer for None."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data_as(POINTER(KINDS[array.dtype.str[1:]]))


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built or does not load."""
    try:
        found = ctypes.CDLL(str(Path(__file__).with_name(f"loops{SUFFIX}")))
    except OSError:
        return None
    found.maskpack_words.restype = c_int64
    return found


@cache
def say_what_is_lost() -> None:
    """Say, once, that decoding would be many times as fast with the library."""
    logging.getLogger("maskpack").warning(
        "maskpack was installed without its compiled loops, so that masks decode ten to a hundred times more slowly; "
        "install a wheel, or install again where there is a C compiler"
    )
