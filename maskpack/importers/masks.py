"""Masks themselves: plain tensors, which `maskpack pack` takes without --from, and the bits that MaskLLM released."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from bitarray import bitarray
from torch import Tensor

from ..errors import BackboneMismatchError, ConfigError, DataError
from ..mask import PackedMask
from ..safetensors_io import open_tensors
from .base import IMPORTERS, Found, known


@IMPORTERS.register
class Masks:
    """Safetensors file of bool tensors, or uint8 zeros and ones, named as the parameters; True = weight kept."""

    id: ClassVar[str] = "masks"
    reference: ClassVar[str] = ""

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)

        def make(name: str) -> PackedMask:
            try:
                return PackedMask.from_tensor(tensors[name])
            except ConfigError as error:
                raise ConfigError(
                    f"mask {name!r}: {error}; if another tool wrote {path}, name its format with --from"
                ) from None

        return Found(tensors.shapes, make)


LONGEST_HEADER = 1 << 12  # bytes that numpy writes before the data of a flat array; it writes 128
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others may ask for any memory


@IMPORTERS.register
class MaskllmNpz:
    """NumPy .npz of `X.mask`: the bits of each mask, big-endian, row-major, without its shape."""

    id: ClassVar[str] = "maskllm-npz"
    reference: ClassVar[str] = "https://github.com/NVlabs/MaskLLM"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        with _archive(path) as archive:
            entries = archive.infolist()
        stems = {entry.filename.removesuffix(".npy").removesuffix(".mask"): entry for entry in entries}
        strange = [entry.filename for entry in entries if not entry.filename.endswith(".npy")]
        if not entries or strange or len(stems) != len(entries):
            what = f"{strange[0]!r}" if strange else "no entry" if not entries else "a name that comes twice"
            raise DataError(f"{path} has {what}, expected an .npz of arrays, each under its own name; fetch it again")
        masked = {parameter: stems[stem] for stem, parameter in known(path, stems, base).items()}
        shapes = {name: tuple(base[name].shape) for name in masked}
        for name, entry in masked.items():
            size, shape = (base[name].numel() + 7) // 8, shapes[name]
            if not size < entry.file_size <= size + LONGEST_HEADER:
                raise BackboneMismatchError(
                    f"{path}: the mask of {name!r} has {entry.file_size} bytes, expected {size} and a short header for "
                    f"the shape {shape}; give the backbone that the masks were made for"
                )
            if entry.compress_type not in COMPRESSIONS:
                raise DataError(
                    f"{path}: {entry.filename!r} has the compression {entry.compress_type}; save it with "
                    "numpy.savez_compressed"
                )
        return Found(shapes, lambda name: _read(path, name, masked[name], shapes[name]))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}; expected the .npz of masks that MaskLLM releases")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read {path} as an .npz file: {error}; fetch it again") from error


def _read(path: Path, name: str, entry: zipfile.ZipInfo, shape: tuple[int, ...]) -> PackedMask:
    count = math.prod(shape)
    size = (count + 7) // 8
    with _archive(path) as archive, archive.open(entry) as file:
        # what numpy writes for these bits, compared as text: a header that is not this one need not be understood
        start = file.read(10)
        header = file.read(int.from_bytes(start[8:], "little")).strip()
        data = file.read(size + 1)
    bits = bitarray(endian="little")
    bits.frombytes(data)
    bits.bytereverse()
    described = header == f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".encode()
    if start[:8] != b"\x93NUMPY\1\0" or not described or len(data) != size or bits[count:].any():
        raise DataError(
            f"{path}: the mask of {name!r} is an array {header[:80]!r} of {len(data)} bytes, expected uint8 of shape "
            f"({size},) without bits beyond {count}; fetch it again"
        )
    del bits[count:]
    return PackedMask(bits, shape)
