"""Ways to spoil an adapter file: as damage does, and as a forger does who makes every digest good again."""

import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zstandard

from maskpack.tensorheader import DTYPES, SEAL, UNSEALED, _sealed_as, seal

INTEGERS = (0, 1, -1, 2, 7, 8, 9, 16, 17, 18, 255, 1 << 17, 1 << 31, 1 << 34, (1 << 34) + 1, 1 << 48, 1 << 63, 10**400)
TEXTS = ("", "x", "zero", "flip", "replace", "raw", "zstd", "default", "other", "\n", "a\nb", "\x00", "ö", "\u2028", "../x",
         "<!-- maskpack:end -->", "linear", "pooled-linear", "mean", "cls", "a" * 64, "0" * 64, "x" * 5000)  # fmt: skip
VALUES = (*INTEGERS, *TEXTS, None, True, False, 0.5, -0.0, 1e308, [], {}, [[]], [0], [0, 0], {"a": 1}, [1 << 17, 1 << 17])
KEYS = ("reference", "table", "tables", "level", "self", "cls", "id", "op", "codec", "head", "training", "preprocess",
        "kind", "metrics", "accuracy", "data", "task", "class_names", "more", "default", "other", "revision")  # fmt: skip


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
            for size in [*one.get("tables", []), *one["size"]]:
                found.append(joined[at : at + size])
                at += size
        dense = [n for n in sorted(self.data) if n.partition(".")[0] != "maskpack" and not n.endswith("/payloads")]
        return found + [self.data[name] for name in dense]

    def joined(self, offsets: bool = True) -> bytes:
        """Return the file with shapes of our own tensors, offsets, digests and the seal made good where possible."""
        try:
            made = b"".join(hashlib.sha256(piece).digest()[:16] for piece in self.pieces())
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
            self.inner["data_sha256"] = hashlib.sha256(section).hexdigest()
        text = json.dumps(self.inner, sort_keys=True, separators=(",", ":"))
        metadata = {**self.metadata, "maskpack": text, SEAL: UNSEALED}
        return sealed(json.dumps({"__metadata__": metadata, **self.entries}, sort_keys=True, separators=(",", ":")), section)


def width(entry: Any) -> int:
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    return DTYPES[dtype].itemsize if isinstance(dtype, str) and dtype in DTYPES else 1


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
    text = text.replace(_sealed_as(text[at : at + 64].decode()), _sealed_as(UNSEALED))
    others = [one[8 : 8 + struct.unpack("<Q", one[:8])[0]] for one in others]
    return sealed(damaged(text, rng, others).decode("utf-8", "replace"), raw[8 + length :])


def edit(value: Any, rng: random.Random) -> None:
    """Change one place somewhere inside a JSON value."""
    holders = [value]
    for holder in holders:
        holders += [one for one in (holder.values() if isinstance(holder, dict) else holder) if isinstance(one, dict | list)]
    holder = rng.choice(holders)
    keys: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys) if keys else None
    new = copy.deepcopy(rng.choice((rng.choice(VALUES), rng.choice(holders), rng.randrange(100))))
    if key is not None and rng.random() < 0.75:
        old = holder[key]
        if rng.random() < 0.2:
            del holder[key]
        elif type(old) is int and rng.random() < 0.6:
            holder[key] = old + rng.choice((1, -1, 8, -8, 1 << 20))
        elif isinstance(old, str) and rng.random() < 0.5:
            at = rng.randrange(len(old) + 1)
            holder[key] = old[:at] + rng.choice(TEXTS)[:40] + old[at + rng.randrange(3) :]
        else:
            holder[key] = new
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), new)
    else:
        holder[rng.choice(KEYS)] = new


def payload(old: bytes, need: int, rng: random.Random) -> bytes:
    """Return another payload for a mask of `need` bytes."""
    content = rng.choice((rng.randbytes(min(need, 1 << 16)), bytes(min(need, 1 << 20)), b"\xff" * min(need, 1 << 20)))
    frame = zstandard.ZstdCompressor(write_checksum=rng.random() < 0.1, write_content_size=rng.random() < 0.9)
    match rng.randrange(6):
        case 0:
            return rng.randbytes(rng.randrange(200))
        case 1:
            return damaged(old, rng, [old])[:4096]
        case 2:
            return content
        case 3:
            return frame.compress(content)
        case 4:  # a bomb: what it claims, then blocks of 128 KiB in 4 bytes each
            claim = rng.choice((need, need, need + 1, 1 << 40))
            blocks = rng.choice((0, 1, 3, 200))
            body = [struct.pack("<I", (i == blocks - 1) | 2 | (131072 << 3))[:3] + b"\0" for i in range(blocks)]
            return b"\x28\xb5\x2f\xfd" + rng.choice((b"\xe0", b"\xc0\x68", b"\xe4")) + struct.pack("<Q", claim) + b"".join(body)
        case _:
            return damaged(frame.compress(content), rng, [old])[:4096]


def forge_payload(file: File, rng: random.Random) -> None:
    """Replace a payload, now and then for a mask of another shape, whose size the payload then claims."""
    name = rng.choice(sorted(file.inner["sets"]))
    one = file.inner["sets"][name]
    index = rng.randrange(len(one["size"]))
    if rng.random() < 0.4:
        shape = rng.choice(([1 << 17, 1 << 17], [1 << 33], [8 << 20], [1 << 20, 0], [], [1], [3, 5], [1 << 26]))
        one["shapes"].append(shape)
        one["shape"][index] = len(one["shapes"]) - 1
    need, total = 1, 1
    for size in one["shapes"][one["shape"][index]]:
        total *= size
    need = (total + 7) // 8
    at = sum(one.get("tables", [])) + sum(one["size"][:index])
    joined = file.data[f"{name}/payloads"]
    made = payload(joined[at : at + one["size"][index]], need, rng)
    file.data[f"{name}/payloads"] = joined[:at] + made + joined[at + one["size"][index] :]
    one["size"][index] = len(made)
    if rng.random() < 0.5:
        one["kept"][index] = min(total, rng.choice((0, 1, total, one["kept"][index])))


def forge_table(file: File, rng: random.Random) -> None:
    """Put a table before the payloads of a set and let codings use it, or let codings refer to another set."""
    name = rng.choice(sorted(file.inner["sets"]))
    one = file.inner["sets"][name]
    if rng.random() < 0.5:
        rng.choice(one["codings"])["reference"] = rng.choice([*file.inner["sets"], "nobody"])
        return
    table = rng.randbytes(rng.randrange(300))
    one["tables"] = [len(table), *one.get("tables", [])]
    file.data[f"{name}/payloads"] = table + file.data[f"{name}/payloads"]
    rng.choice(one["codings"])["table"] = rng.randrange(len(one["tables"]))


def forge_tensor(file: File, rng: random.Random) -> None:
    """Change bytes, dtype, shape or name of a tensor, or add or drop one."""
    name = rng.choice(sorted(file.entries))
    entry, size = file.entries[name], len(file.data[name])
    match rng.randrange(5):
        case 0:
            special = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xbf", b"\0\0\0\x80", rng.randbytes(4)))
            file.data[name] = (special * (size // 4 + 1))[:size]
        case 1:
            entry["dtype"] = rng.choice((*DTYPES, "F8_E4M3", 3))
        case 2:
            entry["shape"] = rng.choice(([], [size], [0, 1 << 48], [0] + [1 << 48] * 15, [size // 4, 1], [1] * 17, [-1]))
            if 0 in entry["shape"]:
                file.data[name] = b""
        case 3:
            new = rng.choice(("default/parameters/x", "default/head/bias", "default/scale", "default/values/a.weight",
                              "default/statistics/b.running_var", "/", "default/", "maskpack.base", ""))  # fmt: skip
            file.entries[new], file.data[new] = file.entries.pop(name), file.data.pop(name)
        case _:
            new = rng.choice(("default/parameters/y", "default/statistics/c.running_mean", "other/payloads", "more"))
            file.entries[new], file.data[new] = {"dtype": "F32", "shape": [0, 1 << rng.randrange(49)]}, b""


FORGERIES: tuple[Callable[[File, random.Random], None], ...] = (
    lambda file, rng: edit(file.inner, rng), lambda file, rng: edit(file.inner["sets"], rng),
    lambda file, rng: edit(file.entries, rng), forge_payload, forge_payload, forge_table, forge_tensor,
)  # fmt: skip


def forged(raw: bytes, rng: random.Random) -> bytes:
    """Return a file changed by its meaning, with every digest recomputed."""
    file = File.of(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            rng.choice(FORGERIES)(file, rng)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, struct.error):
            break  # an earlier change took away what this one works on
    return file.joined(offsets=rng.random() < 0.95)


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """Return one spoiled file."""
    raw = rng.choice(seeds)
    match rng.randrange(10):
        case 0 | 1:
            return damaged(raw, rng, seeds)
        case 2 | 3:
            return edited_header(raw, rng, seeds)
        case _:
            return forged(raw, rng)
