"""Reading adapter files: opened once, read once, verified before anything is used."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..errors import AdapterError, CorruptAdapterError
from ..tensorheader import MAX_HEADER, check_seal, parse_header, strict_json
from .adapter import Adapter
from .fields import Fields
from .header import Header
from .layout import DIGEST_BYTES, DIGESTS, check_layout, dense_names

T = TypeVar("T")
P = ParamSpec("P")

MODEL_FILE = "maskpack_model.safetensors"
CONFIG_FILE = "maskpack_config.json"
MAX_CONFIG = 1 << 20  # bytes; class names of 20,000 classes fit


def read_adapter(path: str | Path) -> Adapter:
    """Read and verify an adapter: a folder, or a `.safetensors` file alone. Masks are decoded when asked for.

    The file is read once; what is verified are the bytes that are used. A config beside it must name its sha256.

    Raises:
        AdapterError: if there is no adapter; the message lists what is there.
        UnsupportedVersionError: if a newer format version wrote it.
        CorruptAdapterError: if its bytes are not what format, digests or config say.
    """
    path = Path(path)
    if not path.is_dir():
        return read_file(path, path)
    model, config = path / MODEL_FILE, path / CONFIG_FILE
    if not model.exists():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise AdapterError(f"{path} has no {MODEL_FILE}, it has: {there}; expected the folder of an adapter")
    adapter = read_file(model, model)
    if config.exists():
        _check_config(config, adapter)
    return adapter


def read_file(path: Path, name: Path) -> Adapter:
    """Read and verify one file; `name` is what messages call it."""
    try:
        # not blocking, so that a named pipe is refused and not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{name} is not a regular file; expected a .safetensors file")
            length = int.from_bytes(start := file.read(8), "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, status.st_size - 8):
                raise CorruptAdapterError(
                    f"{name} has {status.st_size} bytes and states a header of {length}, expected 2 to {MAX_HEADER} "
                    f"within the file; it was cut off or is no safetensors file"
                )
            head = file.read(length)
            metadata, spans = _located(name, parse_header, memoryview(head), status.st_size - 8 - length)
            if "maskpack" not in metadata:
                raise AdapterError(f"{name} is a safetensors file, but no adapter: its metadata has no 'maskpack'")
            _located(name, check_seal, head, metadata)
            data = file.read(status.st_size - 8 - length)
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
    header = _located(name, Header.from_json, metadata["maskpack"])
    _located(name, check_layout, header, spans)
    adapter = Adapter(str(name), header, spans, start + head, memoryview(data))
    _check_digests(adapter, memoryview(data))
    return adapter


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
        if hashlib.sha256(piece).digest()[:DIGEST_BYTES] != stored[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
            raise CorruptAdapterError(
                f"{adapter.path}: {what} has not the digest that was stored; fetch the file again"
            )
    if (found := hashlib.sha256(data).hexdigest()) != adapter.header.data_sha256:
        raise CorruptAdapterError(
            f"{adapter.path}: the sha256 of its data is {found}, the header states {adapter.header.data_sha256}; fetch "
            f"the file again"
        )


def _check_config(path: Path, adapter: Adapter) -> None:
    """Compare size and sha256 in a folder's config with the model file."""
    if not path.is_file():
        raise AdapterError(f"{path} is not a regular file; delete it, or fetch the adapter again")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    if len(text) > MAX_CONFIG:
        raise CorruptAdapterError(f"{path} has over {MAX_CONFIG} bytes; fetch it again, or delete it")
    fields = Fields.of(strict_json(text, str(path)), str(path))
    sha256, size = fields.digest("sha256"), fields.get("size")
    if (sha256, size) != (adapter.sha256, adapter.size):
        raise CorruptAdapterError(
            f"{path} names a model file of {size} bytes with sha256 {sha256}, and {MODEL_FILE} has {adapter.size} "
            f"bytes and {adapter.sha256}: one of them was replaced; fetch both again, or delete {CONFIG_FILE}"
        )
