"""Reading adapter files: opened once, read once, verified before anything is used."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import ParamSpec, TypeVar

from blake3 import blake3

from ..errors import AdapterError, CorruptAdapterError
from ..tensorheader import MAX_HEADER, Span, check_seal, parse_header, strict_json
from .adapter import Adapter
from .fields import Fields
from .header import Header
from .layout import DIGEST_BYTES, DIGESTS, check_layout, dense_names

T = TypeVar("T")
P = ParamSpec("P")

MODEL_FILE = "maskpack_model.safetensors"
CONFIG_FILE = "maskpack_config.json"
MAX_MODEL = 16 << 30  # bytes; masks of 10^11 weights fit
MAX_CONFIG = 1 << 20  # bytes; class names of 20,000 classes fit


def read_adapter(path: str | Path) -> Adapter:
    """Read and verify an adapter: a folder, or a `.safetensors` file alone. Masks are decoded when asked for.

    Each file is opened and read once; what is verified are the bytes that are used. A config beside the model file
    must name its digest.

    Raises:
        AdapterError: if there is no adapter; the message lists what is there.
        UnsupportedVersionError: if a newer format version wrote it.
        CorruptAdapterError: if its bytes are not what format, digests or config say.
    """
    return parse_files(read_files(Path(path)))


def read_files(path: Path, look: bool = True) -> dict[str, tuple[Path, bytes | memoryview]]:
    """Read an adapter folder's model file and config, if it has one, or a model file alone; nothing is verified.

    Args:
        look: as of `read_model`.

    Returns:
        Path and bytes of each file, by the name that the format gives it.
    """
    if not path.is_dir():
        return {MODEL_FILE: (path, read_model(path, path, look))}
    model, config = path / MODEL_FILE, path / CONFIG_FILE
    if not model.exists():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise AdapterError(f"{path} has no {MODEL_FILE}, it has: {there}; expected the folder of an adapter")
    files: dict[str, tuple[Path, bytes | memoryview]] = {MODEL_FILE: (model, read_model(model, model, look))}
    if config.exists():
        files[CONFIG_FILE] = config, read_bytes(config, config, MAX_CONFIG)
    return files


def parse_files(files: Mapping[str, tuple[Path, bytes | memoryview]]) -> Adapter:
    """Verify what `read_files` gives. Raises as `read_adapter`."""
    path, content = files[MODEL_FILE]
    adapter = parse_adapter(memoryview(content), path)
    if CONFIG_FILE in files:
        config, text = files[CONFIG_FILE]
        check_config(bytes(text), config, adapter)
    return adapter


def read_file(path: Path, name: Path) -> Adapter:
    """Read and verify one model file; `name` is what messages call it."""
    return parse_adapter(read_model(path, name), name)


def read_model(path: Path, name: Path, look: bool = True) -> memoryview:
    """Return the bytes of a model file; one that does not begin like an adapter's is refused before it is read whole.

    Args:
        look: False where a signature has to be verified before even the beginning is parsed.

    Raises:
        AdapterError, CorruptAdapterError: as `read_adapter`; `name` is what messages call the file.
    """
    if not look:
        return memoryview(read_bytes(path, name, MAX_MODEL))
    with _opened(path, name, MAX_MODEL) as (file, size):
        start = file.read(8)
        length = _header_length(start, size, name)
        head = file.read(length)
        if b'"maskpack"' not in head:
            _parse_header(memoryview(head), size - 8 - length, name)  # says what is wrong
        content = bytearray(size)
        content[: 8 + len(head)] = start + head
        read = 8 + len(head) + file.readinto(memoryview(content)[8 + len(head) :])
    return memoryview(content)[:read].toreadonly()


def read_bytes(path: Path, name: Path, limit: int) -> bytes:
    """Return all bytes of a file of at most `limit`; `name` is what messages call it.

    Raises:
        AdapterError: if it is missing, no regular file, too large or unreadable.
    """
    with _opened(path, name, limit) as (file, size):
        return file.read(size)


def parse_adapter(content: memoryview, name: Path) -> Adapter:
    """Verify the bytes of a model file; `name` is what messages call it. Raises as `read_adapter`."""
    start = 8 + _header_length(content[:8], len(content), name)
    head, data = content[8:start], content[start:]
    metadata, spans = _parse_header(head, len(data), name)
    _located(name, check_seal, bytes(head), metadata)
    header = _located(name, Header.from_json, metadata["maskpack"])
    _located(name, check_layout, header, spans)
    adapter = Adapter(str(name), header, spans, content, start)
    _check_digests(adapter, data)
    return adapter


def _header_length(start: bytes | memoryview, size: int, name: Path) -> int:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CorruptAdapterError(
            f"{name} has {size} bytes and states a header of {length}, expected 2 to {MAX_HEADER} "
            f"within the file; it was cut off or is no safetensors file"
        )
    return length


def _parse_header(head: memoryview, data_size: int, name: Path) -> tuple[dict[str, str], dict[str, Span]]:
    metadata, spans = _located(name, parse_header, head, data_size)
    if "maskpack" not in metadata:
        raise AdapterError(f"{name} is a safetensors file, but no adapter: its metadata has no 'maskpack'")
    return metadata, spans


@contextmanager
def _opened(path: Path, name: Path, limit: int) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file of at most `limit` bytes and give it with its size; errors are ours."""
    try:
        # not blocking, so that a named pipe is refused and not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{name} is not a regular file; delete it, or fetch the adapter again")
            if status.st_size > limit:
                raise AdapterError(f"{name} has {status.st_size} bytes; at most {limit} are accepted; fetch it again")
            yield file, status.st_size
    except IsADirectoryError:
        raise AdapterError(f"{name} is not a regular file; delete it, or fetch the adapter again") from None
    except FileNotFoundError:
        there = sorted(p.name for p in name.parent.iterdir()) if name.parent.is_dir() else []
        raise AdapterError(
            f"there is no {name}; {name.parent} has: {', '.join(there[:10]) or 'nothing'}; "
            f"expected a folder with {MODEL_FILE}, or a .safetensors file"
        ) from None
    except OSError as error:
        raise AdapterError(
            f"cannot read {name}: {error.strerror or error}; check the path and its permissions"
        ) from error


def _located(name: Path, step: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Run a step of reading; its errors get the file's name."""
    try:
        return step(*arguments, **named)
    except AdapterError as error:
        raise type(error)(f"{name}: {error}") from None


def _digested(adapter: Adapter) -> Iterator[tuple[str, memoryview]]:
    """What the digests are of, in their order: tables and payloads of each set, then the dense tensors."""
    for name, one in adapter.header.sets.items():
        labels = [f"table {i} of set {name!r}" for i in range(len(one.tables))]
        labels += [f"the mask of {payload.name!r} in set {name!r}" for payload in one.payloads]
        yield from zip(labels, adapter.pieces[name], strict=True)
    for name in dense_names(adapter.spans):
        yield f"tensor {name!r}", adapter.bytes_of(name)


def _check_digests(adapter: Adapter, data: memoryview) -> None:
    stored = bytes(adapter.bytes_of(DIGESTS))
    for index, (what, piece) in enumerate(_digested(adapter)):
        if blake3(piece).digest()[:DIGEST_BYTES] != stored[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
            raise CorruptAdapterError(
                f"{adapter.path}: {what} has not the digest that was stored; fetch the file again"
            )
    if (found := blake3(data).hexdigest()) != adapter.header.data_digest:
        raise CorruptAdapterError(
            f"{adapter.path}: the digest of its data is {found}, the header states {adapter.header.data_digest}; fetch "
            f"the file again"
        )


def check_config(text: bytes, name: Path, adapter: Adapter) -> None:
    """Compare size and digest in the text of a config file with the model file.

    Raises:
        CorruptAdapterError: if the config is no such record, or records another file.
    """
    fields = Fields.of(strict_json(text, str(name)), str(name))
    digest, size = fields.digest("blake3"), fields.get("size")
    if (digest, size) != (adapter.digest, adapter.size):
        raise CorruptAdapterError(
            f"{name} names a model file of {size} bytes with digest {digest}, and {MODEL_FILE} has {adapter.size} "
            f"bytes and {adapter.digest}: one of them was replaced; fetch both again, tell their "
            f"owner, or delete {CONFIG_FILE}"
        )
