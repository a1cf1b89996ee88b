"""Safetensors files: read, and written in canonical bytes. The only importer of safetensors.

Files are written under a temporary name in the same folder, synced and renamed, so that a reader sees the old file
or the new one and never a part. The official writer is not used: it permutes the metadata from one process to the next
and leaves files that other users cannot read.
"""

import json
import math
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .errors import ConfigError, DataError, MaskpackError, StateError
from .leftovers import clear_leftovers, lock
from .shards import check_shard, checkpoint_files
from .tensorheader import DTYPES, MAX_HEADER, NAMES, SEAL, UNSEALED, seal

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor to write: its dtype as safetensors names it, its shape, its bytes in pieces (walked several times)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Iterable[Buffer]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Blob":
        """Make the blob of a tensor; a contiguous tensor in main memory is not copied.

        Raises:
            ConfigError: if safetensors files here have no such dtype.
        """
        if tensor.dtype not in NAMES:
            raise ConfigError(
                f"tensor {name!r} is {tensor.dtype}, expected one of {', '.join(map(str, NAMES))}; convert it"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = [flat.view(torch.uint8).numpy().data] if flat.numel() else []
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape), data)

    @property
    def size(self) -> int:
        """Bytes that dtype and shape ask for."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for and not kept; see `open_tensors`.

    Attributes:
        path: the file, index or folder.
        shapes: name -> shape, known without reading a tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for shard, names in checkpoint_files(path).items():
            with _reading(shard), safe_open(shard, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            check_shard(shard, found, names)
            shapes |= found
            self._files |= dict.fromkeys(found, shard)
        self.shapes = dict(sorted(shapes.items()))

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        # opened anew each time: what is read stays mapped, and so resident, until the file is closed
        with _reading(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_tensors(path: str | Path) -> TensorFile:
    """Open a checkpoint that the user names, to read it tensor by tensor; memory holds those in use only.

    Args:
        path: a safetensors file, the index of one in several files (`*.safetensors.index.json`), or a folder of either.

    Raises:
        DataError: if it is not there, or cannot be used; the message says why. Reading a tensor raises it as well.
    """
    return TensorFile(Path(path))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint of weights, masks or scores that the user names, all of it. As `open_tensors`."""
    tensors: dict[str, Tensor] = {}
    for shard, names in checkpoint_files(Path(path)).items():
        with _reading(shard):
            found = load_file(shard)
        check_shard(shard, found, names)
        tensors |= found
    return tensors


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the official reader raises into a DataError."""
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}; expected a .safetensors file, the index of several, or a folder of either")
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot read {path} as a safetensors file: {error}; "
            f"if it is a pickle (.pt, .bin), convert it with safetensors.torch.save_file"
        ) from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor] | Iterable[Blob], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file in canonical bytes: the same tensors and metadata give the same file.

    Args:
        path: the file; its folder must exist. It is replaced as a whole or not at all.
        tensors: tensors by name, or blobs (whose bytes are not joined in memory).
        metadata: strings for `__metadata__`.

    Raises:
        StateError: if the file cannot be written, for instance because the disk is full.
        ConfigError: if a name comes twice, or bytes and shape disagree.
    """
    blobs = [Blob.of(*item) for item in tensors.items()] if isinstance(tensors, Mapping) else list(tensors)
    with replacing(path) as (temporary,):
        write_blobs(temporary, blobs, metadata)


def write_blobs(path: Path, blobs: Iterable[Blob], metadata: Mapping[str, str]) -> None:
    """Write the bytes of a safetensors file to `path`, without a temporary file of its own.

    A metadata entry `SEAL` with the value `UNSEALED` becomes the header's own digest.
    """
    blobs = in_order(blobs)
    with path.open("wb") as file:
        file.write(_header(blobs, metadata))
        for blob in blobs:
            for piece in blob.data:
                file.write(piece)


def in_order(blobs: Iterable[Blob]) -> list[Blob]:
    """Return blobs as they lie in a file: wider elements first, so that each is aligned, then by name."""
    return sorted(blobs, key=lambda blob: (-DTYPES[blob.dtype].itemsize, blob.name))


def _header(blobs: Sequence[Blob], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for blob in blobs:
        given = sum(memoryview(piece).nbytes for piece in blob.data)
        if given != blob.size or blob.name in entries:
            raise ConfigError(
                f"tensor {blob.name!r} comes twice, or has {given} bytes where its {blob.dtype} of shape "
                f"{blob.shape} needs {blob.size}"
            )
        entries[blob.name] = {"data_offsets": [start, start + given], "dtype": blob.dtype, "shape": list(blob.shape)}
        start += given
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ConfigError(
            f"the header would have {len(text)} bytes, at most {MAX_HEADER} are allowed; store less in it"
        )
    if metadata.get(SEAL) == UNSEALED:
        text = seal(text)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """Give an empty temporary file beside each path; when the block ends well they replace the paths, in order.

    Whatever goes wrong before that, the interrupt key included, the paths stay as they are and the temporary files go.
    Those of a process that was killed go when the path is written the next time.

    Raises:
        StateError: in place of an OSError, such as a full disk or a folder that may not be written.
    """
    targets = [Path(path) for path in paths]
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp") for path in targets]
    renamed = False
    locked: list[int] = []
    try:
        for path, target in zip(temporary, targets, strict=True):
            clear_leftovers(target)
            # mode 0666 less the umask, as for any new file: a shared folder stays readable for its users
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            if lock(descriptor):
                locked.append(descriptor)
            else:
                os.close(descriptor)
        yield temporary
        for path in temporary:
            _sync(path)
        for path, target in zip(temporary, targets, strict=True):
            path.replace(target)
            renamed = True
        for folder in {path.parent for path in targets}:
            with suppress(OSError):  # some file systems cannot sync a folder; the files themselves are safe
                _sync(folder)
    except MaskpackError:
        raise
    except OSError as error:
        raise StateError(
            f"cannot write {', '.join(map(str, targets))}: {error.strerror or error}; "
            f"{'' if renamed else 'nothing was changed there; '}free space, or choose a folder that exists and that "
            f"you may write to"
        ) from error
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for descriptor in locked:
            os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
