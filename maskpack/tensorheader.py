"""The header of a safetensors file, parsed strictly: nothing that two readers could understand differently passes."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from blake3 import blake3

from .errors import CorruptAdapterError

MAX_HEADER = 8 << 20  # bytes; a header of this size already names 100,000 tensors
MAX_DIMENSION = 1 << 48
MAX_DEPTH = 32  # nested JSON arrays and objects
SEAL = "header_blake3"  # key in __metadata__
UNSEALED = "0" * 64
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Span(NamedTuple):
    """Where a tensor lies in the data section: bytes `start` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def strict_json(text: str | bytes | memoryview, what: str) -> Any:
    """Parse JSON, refusing what parsers disagree about: duplicate keys, NaN, infinities, deep nesting.

    Raises:
        CorruptAdapterError: if the text is not such JSON; `what` names it in the message.
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


def seal(text: bytes) -> bytes:
    """Fill in the header's own digest: the BLAKE3 of its bytes with zeros for the digest."""
    empty = _sealed_as(UNSEALED)
    return text.replace(empty, _sealed_as(blake3(text).hexdigest()), 1)


def check_seal(text: bytes, metadata: Mapping[str, str]) -> None:
    """Check the digest that `seal` filled in.

    Raises:
        CorruptAdapterError: if it is missing or another; the header was changed then.
    """
    stated = metadata.get(SEAL, "")
    found = blake3(text.replace(_sealed_as(stated), _sealed_as(UNSEALED))).hexdigest()
    if found != stated:
        raise CorruptAdapterError(
            f"the header has the digest {found}, but states {stated[:64] or 'none'}; it was changed or damaged, fetch "
            f"the file again"
        )


def _sealed_as(digest: str) -> bytes:
    # quotes inside the adapter header are escaped, so that these bytes stand once in the safetensors header
    return f'"{SEAL}":"{digest}"'.encode()


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


def parse_header(text: memoryview, data_size: int) -> tuple[dict[str, str], dict[str, Span]]:
    """Parse the JSON header of a safetensors file, refusing all that the format does not allow.

    Args:
        text: the header without its 8 length bytes. data_size: bytes that follow it in the file.

    Returns:
        The strings of `__metadata__`, and where each tensor lies, sorted by name.

    Raises:
        CorruptAdapterError: if tensors overlap, leave gaps, do not end with the file, or disagree with their shape.
    """
    if bytes(text[:1]) != b"{":
        raise CorruptAdapterError(f"the safetensors header begins with {bytes(text[:1])!r}, expected b'{{'")
    entries = strict_json(text, "the safetensors header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptAdapterError("__metadata__ of the safetensors header must map strings to strings")
    spans = {name: _span(name, entries[name]) for name in sorted(entries)}
    at = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.start != at:
            kind = "overlaps the tensor before it" if span.start < at else "leaves a gap before it"
            raise CorruptAdapterError(
                f"tensor {name!r} starts at byte {span.start} of the data, expected {at}: it {kind}"
            )
        at = span.end
    if at != data_size:
        raise CorruptAdapterError(
            f"the file has {data_size} bytes of data, its header describes {at}; "
            "it was cut off or added to, fetch it again"
        )
    return metadata, spans


def _span(name: str, entry: Any) -> Span:
    def refuse(what: str) -> CorruptAdapterError:
        return CorruptAdapterError(f"tensor {name!r} of the safetensors header: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"expected dtype, shape and data_offsets, got {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"unknown dtype {str(dtype)[:80]!r}; known: {', '.join(DTYPES)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or len(value) > 16 or any(type(n) is not int or n < 0 for n in value):
            raise refuse(f"{key} must be a list of at most 16 integers >= 0, got {str(value)[:80]}")
    if any(size > MAX_DIMENSION for size in shape) or len(offsets) != 2:
        raise refuse(f"a dimension is over {MAX_DIMENSION} or data_offsets are not two: {str(entry)[:120]}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise refuse(
            f"{dtype} of shape {shape} needs {size} bytes, its offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return Span(dtype, tuple(shape), offsets[0], offsets[1])
