"""Adapter files taken apart and put together with good digests, and bytes spoiled without regard to their meaning."""

import json
import math
import random
import struct
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from maskpack.adapter.header import DICTIONARY
from maskpack.adapter.read import DIGEST_BYTES, opening
from maskpack.codecs.base import from_frame, to_frame
from maskpack.safetensors_io import DTYPES, MAX_HEADER


def taken(raw: bytes) -> tuple[bytes, bytes]:
    """Return the text of a file's header, and its data."""
    start = 8 + struct.unpack("<Q", raw[:8])[0] + DIGEST_BYTES
    size = struct.unpack("<I", raw[start : start + 4])[0]
    frame = raw[start + 4 : start + 4 + size]
    return from_frame(frame, 0, MAX_HEADER, DICTIONARY), raw[start + 4 + size :]


def sealed(text: bytes, section: bytes, frame: bytes | None = None) -> bytes:
    """Return a file of a header's text, or of the frame that holds it, and data, with a good digest."""
    index = to_frame(text, 1, DICTIONARY) if frame is None else frame
    rest = struct.pack("<I", len(index)) + index + section
    return opening(DIGEST_BYTES + len(rest)) + blake3(rest).digest()[:DIGEST_BYTES] + rest


@dataclass
class File:
    """An adapter file taken apart: its header without `tensors`, these, and the bytes of all tensors by name."""

    inner: dict[str, Any]
    entries: dict[str, Any]
    data: dict[str, bytes]

    @classmethod
    def of(cls, raw: bytes) -> "File":
        text, section = taken(raw)
        inner = json.loads(text)
        listed = inner.pop("tensors", {})
        entries = {name: {"dtype": dtype, "shape": shape} for name, (dtype, *shape) in listed.items()}
        names = {name for one in inner["sets"].values() for name in one["names"].split("\n")}
        sizes = {"maskpack.base": 6 * len(names)}
        sizes |= {f"{name}/payloads": sum(one["size"]) for name, one in sorted(inner["sets"].items())}
        sizes |= {name: DTYPES[one["dtype"]][1] * math.prod(one["shape"]) for name, one in sorted(entries.items())}
        data, at = {}, 0
        for name, size in sizes.items():
            data[name], at = section[at : at + size], at + size
        return cls(inner, entries, data)

    def joined(self) -> bytes:
        """Return the file with a good digest."""
        inner = self.inner
        if self.entries and isinstance(inner, dict):
            listed = {name: stated(entry) for name, entry in self.entries.items()}
            inner = {**inner, "tensors": listed}
        own = sorted(name for name in self.data if name.endswith("/payloads") and name not in self.entries)
        rest = (self.data.get(name, b"") for name in sorted(self.entries))
        section = b"".join([self.data.get("maskpack.base", b""), *(self.data[name] for name in own), *rest])
        return sealed(json.dumps(inner, sort_keys=True, separators=(",", ":")).encode(), section)


def stated(entry: Any) -> Any:
    """Return what the header says of a tensor, whatever was made of it."""
    if not isinstance(entry, dict):
        return entry
    shape = entry.get("shape")
    return [entry.get("dtype"), *(shape if isinstance(shape, list) else [shape])]


def damaged(raw: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Return bytes spoiled without regard to what they mean."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(data)) if data else 0
        span = rng.choice((1, 2, 8, 100, len(data)))
        other = rng.choice(others)
        start = rng.randrange(max(len(other), 1))
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + span]
            case 3:
                data[at:at] = data[at : at + span]
            case 4:
                data[at:at] = rng.randbytes(min(span, 100))
            case _:
                data[at : at + span] = other[start : start + span]
        del data[1 << 18 :]
    return bytes(data)


def edited_header(raw: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Return a file whose header, or the frame that holds it, is damaged, with a good digest."""
    text, section = taken(raw)
    if rng.random() < 0.3:
        return sealed(b"", section, damaged(to_frame(text, 1, DICTIONARY), rng, others))
    return sealed(damaged(text, rng, [taken(one)[0] for one in others]), section)
