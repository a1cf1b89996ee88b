"""Adapter files taken apart and put together with good digests, and bytes spoiled without regard to their meaning."""

import json
import random
import struct
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from maskpack.safetensors_io import DTYPES, SEAL, UNSEALED, seal


@dataclass
class File:
    """An adapter file taken apart."""

    metadata: dict[str, Any]
    inner: dict[str, Any]
    entries: dict[str, dict[str, Any]]
    data: dict[str, bytes]

    @classmethod
    def of(cls, raw: bytes) -> "File":
        length = struct.unpack("<Q", raw[:8])[0]
        entries, section = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        metadata = entries.pop("__metadata__")
        data = {name: section[slice(*entry["data_offsets"])] for name, entry in entries.items()}
        return cls(metadata, json.loads(metadata["maskpack"]), entries, data)

    def pieces(self) -> list[bytes]:
        """Return what the digests are of, as far as the header still says it."""
        found = []
        for name, one in sorted(self.inner["sets"].items()):
            joined, at = self.data[f"{name}/payloads"], 0
            for size in one["size"]:
                found.append(joined[at : at + size])
                at += size
        own = ("maskpack.base", "maskpack.digests")
        dense = [n for n in sorted(self.data) if n not in own and not n.endswith("/payloads")]
        return found + [self.data[name] for name in dense]

    def joined(self, offsets: bool = True) -> bytes:
        """Return the file with shapes of our own tensors, offsets, digests and the seal made good where possible."""
        try:
            made = b"".join(blake3(piece).digest()[:16] for piece in self.pieces())
            if len(made) == len(self.data["maskpack.digests"]) or offsets:
                self.data["maskpack.digests"] = made
                self.entries["maskpack.digests"]["shape"] = [len(made) // 16, 16]
        except (KeyError, TypeError, ValueError, AttributeError):
            pass  # the header no longer says where the pieces are
        section = b""
        for name, entry in sorted(self.entries.items(), key=lambda item: (-width(item[1]), item[0])):
            data = self.data.get(name, b"")
            if isinstance(entry, dict) and name.endswith("/payloads"):
                entry["shape"] = [len(data)]
            if isinstance(entry, dict) and offsets:
                entry["data_offsets"] = [len(section), len(section) + len(data)]
            section += data
        if isinstance(self.inner, dict):
            self.inner["data_blake3"] = blake3(section).hexdigest()
        text = json.dumps(self.inner, sort_keys=True, separators=(",", ":"))
        metadata = {**self.metadata, "maskpack": text, SEAL: UNSEALED}
        return sealed(
            json.dumps({"__metadata__": metadata, **self.entries}, sort_keys=True, separators=(",", ":")), section
        )


def width(entry: Any) -> int:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    return DTYPES[dtype][1] if isinstance(dtype, str) and dtype in DTYPES else 1


def sealed(header: str, section: bytes) -> bytes:
    """Return a file of an unsealed header and a data section."""
    text = header.encode()
    text = seal(text + b" " * (-len(text) % 8))
    return struct.pack("<Q", len(text)) + text + section


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
    """Return a file whose header text is damaged, with its length and seal made good."""
    length = struct.unpack("<Q", raw[:8])[0]
    text = raw[8 : 8 + length]
    at = text.find(f'"{SEAL}":"'.encode()) + len(SEAL) + 4
    text = text[:at] + UNSEALED.encode() + text[at + 64 :]
    others = [one[8 : 8 + struct.unpack("<Q", one[:8])[0]] for one in others]
    return sealed(damaged(text, rng, others).decode("utf-8", "replace"), raw[8 + length :])
