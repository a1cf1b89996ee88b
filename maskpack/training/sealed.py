"""Safetensors files with facts as JSON, and a digest of every part: no changed bit of them is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ..errors import CorruptAdapterError, StateError
from ..tensorfile import Blob, Buffer, write_tensors
from ..tensorheader import DTYPES, SEAL, UNSEALED, check_seal, parse_header, strict_json

DIGESTS = "digests"  # key in __metadata__: the BLAKE3 of every tensor; the header has one of its own


def _digest(*pieces: Buffer) -> str:
    whole = blake3()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def damaged(path: Path, remedy: str, what: str) -> StateError:
    """Return the error for a damaged file."""
    return StateError(f"{path} is damaged: {what}; {remedy}")


def write_with_facts(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, JSON values as one more of them, and the digests of all; atomic."""
    text = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    blobs = [Blob.of(*item) for item in {**tensors, "facts": text}.items()]
    digests = {blob.name: _digest(*blob.data) for blob in blobs}
    write_tensors(path, blobs, {"format": "pt", DIGESTS: json.dumps(digests, sort_keys=True), SEAL: UNSEALED})


def read_with_facts(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_with_facts` wrote, every bit of it verified.

    Raises:
        StateError: if it is damaged; `remedy` says what to do then.
    """
    try:
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise damaged(path, remedy, f"its header should end at byte {start}, the file has {len(data)}")
        head = bytes(data[8:start])
        metadata, spans = parse_header(memoryview(head), len(data) - start)
        check_seal(head, metadata)
        digests = strict_json(metadata.get(DIGESTS, "{}"), DIGESTS)
    except CorruptAdapterError as error:
        raise damaged(path, remedy, str(error).partition(";")[0]) from None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    tensors = {}
    for name, (dtype, shape, first, last) in spans.items():
        part = memoryview(data)[start + first : start + last]
        if _digest(part) != digests.get(name):
            raise damaged(path, remedy, f"{name!r} has another digest than was stored")
        kind = DTYPES[dtype]
        tensors[name] = torch.frombuffer(part, dtype=kind).reshape(shape) if part else torch.empty(shape, dtype=kind)
    missing = digests.keys() - tensors.keys()
    if missing or "facts" not in tensors:
        raise damaged(path, remedy, f"{min(missing, default='facts')!r} is missing")
    try:
        facts = json.loads(tensors.pop("facts").numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, remedy, f"its facts are not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise damaged(path, remedy, f"its facts are no object but a {type(facts).__name__}")
    return tensors, facts
