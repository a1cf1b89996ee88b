"""Safetensors files: canonical bytes, seals, shards, and files that are written whole or not at all.

torch is imported where tensors are made, so that a header is read without it.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from blake3 import blake3
from safetensors import SafetensorError, safe_open

from .errors import ConfigError, CorruptAdapterError, DataError, MaskpackError, StateError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

MAX_HEADER = 8 << 20  # bytes; a header of this size already names 100,000 tensors
MAX_DIMENSION = 1 << 48
MAX_DEPTH = 32  # nested JSON arrays and objects
SEAL = "header_blake3"  # key in __metadata__
UNSEALED = "0" * 64
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

DTYPES = {  # name in the file -> name in torch, bytes of an element
    "BF16": ("bfloat16", 2),
    "BOOL": ("bool", 1),
    "F16": ("float16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
}
NAMES = {f"torch.{dtype}": name for name, (dtype, _) in DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that a safetensors file calls by this name."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name][0])
    return found


def tensor_of(raw: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of these bytes, copied if they are read-only; `dtype` as safetensors names it."""
    import torch

    kind = torch_dtype(dtype)
    flat = torch.frombuffer(bytearray(raw) if raw.readonly else raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
    return flat.reshape(shape)


class Span(NamedTuple):
    """Where a tensor lies in the data section: bytes `start` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def strict_json(text: str | bytes | memoryview, what: str) -> Any:
    """Parse JSON, refusing what parsers disagree about: duplicate keys, NaN, infinities, deep nesting.

    What is refused is a CorruptAdapterError, which calls it `what`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice[:80]!r} comes twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"the number {number} is not finite")
        return value

    try:
        decoded = text if isinstance(text, str) else bytes(text).decode("utf-8")
        value = json.loads(decoded, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
        _refuse_deep(value)
        if SURROGATE.search(decoded):  # half a surrogate pair is no text: printing or storing it would fail much later
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(f"{what} is not valid JSON: {error}; fetch the file again") from None


def _refuse_deep(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index.json"
MAX_INDEX = 64 << 20  # bytes; names of 500,000 tensors


def _checkpoint_files(path: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files that a path stands for, with the tensors that each must have (None: any)."""
    if path.is_dir():
        indexes, files = sorted(path.glob(f"*{INDEX}")), sorted(path.glob(f"*{SUFFIX}"))
        # beside an index, its shards do not count, but a whole file of the same name does
        whole = [file for file in files if not indexes or path / f"{file.name}.index.json" in indexes]
        found = [*indexes, *whole]
        if len(found) != 1:
            names = ", ".join(one.name for one in found[:5])
            raise DataError(
                f"{path} has {len(found)} checkpoints{f' ({names})' if found else ''}, expected one {SUFFIX} file or "
                f"one index (*{INDEX}); give the file or the index"
            )
        path = found[0]
    if not path.name.endswith(INDEX):
        return {path: None}
    shards: dict[Path, set[str]] = {}
    for tensor, shard in sorted(_weight_map(path).items(), key=lambda item: item[1]):
        shards.setdefault(path.parent / shard, set()).add(tensor)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(
            f"{path} names {len(shards)} files, of which {len(missing)} are missing, first {missing[0]!r}; fetch the "
            f"checkpoint again, all of it"
        )
    return dict(shards)


def _weight_map(path: Path) -> dict[str, str]:
    """Return which shard each tensor is in, by an index; names of shards are plain."""
    if not path.is_file():
        raise DataError(f"no file {path}; expected the index of a checkpoint")
    if (size := path.stat().st_size) > MAX_INDEX:
        raise DataError(f"{path} has {size} bytes, an index has at most {MAX_INDEX}; fetch it again")
    try:
        index: Any = strict_json(path.read_bytes(), str(path))
    except (CorruptAdapterError, OSError) as error:
        raise DataError(f"cannot read the index of a checkpoint: {error}") from None
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise DataError(f"{path} has no 'weight_map' from names of tensors to names of files; fetch it again")
    for tensor, shard in found.items():
        # anything but a plain name could be a file elsewhere on this disk
        if shard in ("", ".", "..") or any(mark in shard for mark in "/\\:\0"):
            raise DataError(
                f"{path} places {tensor!r} in {shard!r}, expected the name of a file beside the index; it is not as "
                f"Hugging Face writes it, do not use it"
            )
    return found


def _walk(path: Path, read: Callable[[Any, str], T]) -> Iterator[tuple[Path, str, T]]:
    """Yield file, name and what `read` makes of each tensor of a checkpoint, which has those that its index says."""
    for shard, expected in _checkpoint_files(path).items():
        with _opened(shard) as file:
            found = {name: read(file, name) for name in file.keys()}
        differing = sorted(expected ^ found.keys()) if expected is not None else []
        if expected is not None and differing:
            own = differing[0] in expected
            what = "has no such tensor" if own else "has that tensor, which the index does not place there"
            raise DataError(
                f"{shard} and the index of its checkpoint disagree on {len(differing)} tensors, first "
                f"{differing[0]!r}: the file {what}; fetch the checkpoint again, all of it"
            )
        for name, tensor in found.items():
            yield shard, name, tensor


Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor to write: its dtype as safetensors names it, its shape, its bytes in pieces (walked several times)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Iterable[Buffer]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Blob:
        """Make the blob of a tensor; a contiguous tensor in main memory is not copied."""
        import torch

        if str(tensor.dtype) not in NAMES:
            raise ConfigError(f"tensor {name!r} is {tensor.dtype}, expected one of {', '.join(NAMES)}; convert it")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel() == 1:  # expanded, it counts as contiguous
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = [flat.view(torch.uint8).numpy().data] if flat.numel() else []
        return cls(name, NAMES[str(tensor.dtype)], tuple(tensor.shape), data)

    @property
    def size(self) -> int:
        """Bytes that dtype and shape ask for."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


class TensorFile(Mapping[str, "Tensor"]):
    """The tensors of a checkpoint that the user names, each read when it is asked for and not kept.

    `shapes`, by name, are known without reading a tensor.

    Args:
        path: a safetensors file, the index of one in several files (`*.safetensors.index.json`), or a folder with one
            of either. What is missing, damaged or ambiguous is a DataError, also when a tensor is read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for shard, name, shape in _walk(self.path, lambda file, name: tuple(file.get_slice(name).get_shape())):
            self._files[name], self.shapes[name] = shard, shape
        self.shapes = dict(sorted(self.shapes.items()))

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that a checkpoint of one file has beside its tensors."""
        with _opened(self.path) as file:
            return dict(file.metadata() or {})

    def __getitem__(self, name: str) -> Tensor:
        # opened anew each time: what is read stays mapped, and so resident, until the file is closed
        with _opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Made(Mapping[str, "Tensor"]):
    """Tensors by name, made when they are asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint of weights, masks or scores that the user names, all of it. As `TensorFile`."""
    return {name: tensor for _, name, tensor in _walk(Path(path), lambda file, name: file.get_tensor(name))}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Give the official reader of a file, and turn its errors into DataError."""
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}; expected a .safetensors file, the index of several, or a folder of either")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot read {path} as a safetensors file: {error}; "
            f"if it is a pickle (.pt, .bin), convert it with safetensors.torch.save_file"
        ) from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in canonical bytes: the same tensors and metadata give the same file.

    It is replaced as a whole or not at all, and its folder must exist. A metadata entry `SEAL`: `UNSEALED` becomes the
    header's own digest.
    """
    blobs = _in_order(tensors)
    with replacing(path) as (temporary,), temporary.open("wb") as file:
        file.write(_header(blobs, metadata))
        for blob in blobs:
            for piece in blob.data:
                file.write(piece)


def read_with_seal(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file that `write_tensors` wrote with a seal.

    Of what was read the header is made anew, so that names, shapes, dtypes and metadata are compared, but not values.
    CorruptAdapterError: if it has another seal. Others: as `TensorFile`.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    if _sealed_as(metadata.get(SEAL, "")) not in _header(_in_order(tensors), {**metadata, SEAL: UNSEALED}):
        raise CorruptAdapterError("the header has another digest than it states; fetch the file again")
    return tensors, metadata


def _in_order(tensors: Mapping[str, Tensor]) -> list[Blob]:
    # wider elements first, so that each is aligned
    return sorted((Blob.of(*one) for one in tensors.items()), key=lambda blob: (-DTYPES[blob.dtype][1], blob.name))


def _header(blobs: Sequence[Blob], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for blob in blobs:
        end = start + blob.size
        entries[blob.name] = {"data_offsets": [start, end], "dtype": blob.dtype, "shape": list(blob.shape)}
        start = end
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ConfigError(
            f"the header would have {len(text)} bytes, at most {MAX_HEADER} are allowed; store less in it"
        )
    if metadata.get(SEAL) == UNSEALED:
        text = text.replace(_sealed_as(UNSEALED), _sealed_as(blake3(text).hexdigest()), 1)
    return struct.pack("<Q", len(text)) + text


def _sealed_as(digest: str) -> bytes:
    # quotes inside of strings are escaped, so that these bytes stand once in the header
    return f'"{SEAL}":"{digest}"'.encode()


def lock(descriptor: int, wait: float = 0.0) -> bool | None:
    """Lock an open file against other processes, for as long as this process has it open; wait so many seconds.

    Returns:
        True; False if another process holds it; None where there are no such locks (Windows, some network disks).
    """
    try:
        import fcntl
    except ImportError:
        return None
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:
            return None


def is_leftover(path: Path, name: str) -> bool:
    """Return True for a temporary file of a file of that name."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.tmp", path.name) is not None


def _clear_leftovers(target: Path) -> None:
    """Remove the temporary files of a path whose writers are gone."""
    with suppress(OSError):
        for path in [one for one in target.parent.iterdir() if is_leftover(one, target.name)]:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                status = os.fstat(descriptor)
                # a file that is new and empty may not have its lock yet
                if (status.st_size or status.st_mtime < time.time() - 10) and lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


@contextmanager
def writing(*paths: Path, unchanged: bool = True) -> Iterator[None]:
    """Raise StateError in place of an OSError, such as a full disk or a folder that may not be written."""
    try:
        yield
    except MaskpackError:
        raise
    except OSError as error:
        raise StateError(
            f"cannot write {', '.join(map(str, paths))}: {error.strerror or error}; "
            f"{'nothing was changed there; ' if unchanged else ''}free space, or choose a folder that exists and that "
            f"you may write to"
        ) from error


@contextmanager
def replacing(*paths: str | Path) -> Iterator[list[Path]]:
    """Give an empty temporary file beside each path; when the block ends well they replace the paths, in order.

    Whatever goes wrong before that, the interrupt key included, the paths stay as they are and the temporary files go.
    Those of a process that was killed go when the path is written the next time. Errors are those of `writing`.
    """
    targets = [Path(path) for path in paths]
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp") for path in targets]
    locked: list[int] = []
    try:
        with writing(*targets):
            for path, target in zip(temporary, targets, strict=True):
                _clear_leftovers(target)
                # mode 0666 less the umask, as for any new file: a shared folder stays readable for its users
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                locked.append(descriptor)
                if not lock(descriptor):
                    os.close(locked.pop())  # Windows renames no open file
            yield temporary
            for path in temporary:
                _sync(path)
        for i, (path, target) in enumerate(zip(temporary, targets, strict=True)):
            with writing(target, unchanged=not i):
                path.replace(target)
        for folder in {path.parent for path in targets}:
            with suppress(OSError):  # some file systems cannot sync a folder; the files themselves are safe
                _sync(folder)
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for descriptor in locked:
            os.close(descriptor)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file, whole or not at all, and its folder if there is none; text is UTF-8. Errors as of `writing`."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as (temporary,):
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
