"""Ways to spoil an adapter file: as damage does, and as a forger does who makes every digest good again."""

import copy
import random
import struct
from collections.abc import Callable
from typing import Any

import zstandard

from maskpack.safetensors_io import DTYPES

from .damage import File, damaged, edited_header

INTEGERS = (0, 1, -1, 2, 7, 8, 9, 16, 17, 18, 255, 1 << 17, 1 << 31, 1 << 34, (1 << 34) + 1, 1 << 48, 1 << 63, 10**400)
TEXTS = (
    *"zero flip replace raw zstd default other linear pooled-linear mean cls x ../x ö <!--maskpack:end-->".split(),
    *("conditional", "", "\n", "a\nb", "\x00", "\u2028", "<!-- maskpack:end -->", "a" * 64, "0" * 64, "x" * 5000),
)
# text that would act on a terminal, in rich's markup, in Markdown, HTML or a formula if it were not escaped
ACTING = (
    *(
        "\x1b]0;pwned\x07",
        "\x1b[32m✓ signature valid",
        "\x1b[2J\x1b[1A",
        "\x9b31m",
        "\x9d0;x\x9c",
        "\b\b",
        "\r",
        "\x7f",
        "\x00",
    ),
    *(
        "\u202e",
        "\u2066x\u2069",
        "\u200f",
        "\u200b",
        "\ufeff",
        "\u2060",
        "\U000e0041",
        "\u2028",
        "\u2029",
        "\x85",
        "\n",
        "\xa0",
    ),
    *(
        "[red]",
        "[/b]",
        r"\[/b]",
        "[link=http://x.org]",
        ":cat:",
        "www.x.org",
        "a@x.org",
        "<script>",
        "| a |",
        "`",
        "$x$",
        "{x}",
        "%s",
    ),
)
ODD = (None, True, False, 0.5, -0.0, 1e308, [], {}, [[]], [0], [0, 0], {"a": 1}, [1 << 17, 1 << 17])
VALUES = (*INTEGERS, *TEXTS, *ACTING, *ODD)
KEYS = (
    "reference level self cls id op codec head training preprocess kind metrics accuracy data task "
    "class_names more default other revision cascade dispatcher experts combine embedding "
    "norms names channels shifts features tensors"
).split()
SHAPES = ([], [0, 1 << 48], [0] + [1 << 48] * 15, [1] * 17, [-1], [3])


def edit(value: Any, rng: random.Random) -> None:
    """Change one place somewhere inside a JSON value."""
    holders = [value]
    for holder in holders:
        holders += [
            one for one in (holder.values() if isinstance(holder, dict) else holder) if isinstance(one, dict | list)
        ]
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
            return (
                b"\x28\xb5\x2f\xfd"
                + rng.choice((b"\xe0", b"\xc0\x68", b"\xe4"))
                + struct.pack("<Q", claim)
                + b"".join(body)
            )
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
    at = sum(one["size"][:index])
    joined = file.data[f"{name}/payloads"]
    made = payload(joined[at : at + one["size"][index]], need, rng)
    file.data[f"{name}/payloads"] = joined[:at] + made + joined[at + one["size"][index] :]
    one["size"][index] = len(made)
    if rng.random() < 0.5:
        one["kept"][index] = min(total, rng.choice((0, 1, total, one["kept"][index])))


def forge_frame(file: File, rng: random.Random) -> None:
    """Replace the frame of norms or of a head, now and then for another number of integers."""
    name = rng.choice([one for one in sorted(file.data) if one.endswith(("/norms", "/integers"))])
    one = file.inner["sets"][name.split("/")[0]]
    if rng.random() < 0.4:
        size = rng.choice((0, 1, 2, 5, 1 << 20, 1 << 22, 1 << 26))
        if name.endswith("norms"):
            one["norms"]["channels"][0] = size
        else:
            one["head"]["features"] = size
    file.data[name] = payload(file.data[name], rng.choice((5, 8, 10, 16, 3 << 22)), rng)
    file.entries[name]["shape"] = [len(file.data[name])]


def forge_reference(file: File, rng: random.Random) -> None:
    """Let codings of a set refer to another set."""
    one = file.inner["sets"][rng.choice(sorted(file.inner["sets"]))]
    rng.choice(one["codings"])["reference"] = rng.choice([*file.inner["sets"], "nobody"])


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
            entry["shape"] = [*rng.choice((*SHAPES, [size], [size // 4, 1]))]
            if 0 in entry["shape"]:
                file.data[name] = b""
        case 3:
            new = rng.choice(("default/parameters/x", "default/head/bias", "default/scale", "default/values/a.weight",
                              "default/statistics/b.running_var", "/", "default/", "maskpack.base", "",
                              "default/norms", "default/head/steps"))  # fmt: skip
            file.entries[new], file.data[new] = file.entries.pop(name), file.data.pop(name)
        case _:
            new = rng.choice(("default/parameters/y", "default/statistics/c.running_mean", "other/payloads", "more",
                              "maskpack.cascade/reduction/mean", "maskpack.cascade/head/bias"))  # fmt: skip
            file.entries[new], file.data[new] = {"dtype": "F32", "shape": [0, 1 << rng.randrange(49)]}, b""


FORGERIES: tuple[Callable[[File, random.Random], None], ...] = (
    lambda file, rng: edit(file.inner, rng), lambda file, rng: edit(file.inner["sets"], rng),
    lambda file, rng: edit(file.entries, rng), forge_payload, forge_payload, forge_reference, forge_tensor, forge_frame,
)  # fmt: skip


def forged(raw: bytes, rng: random.Random) -> bytes:
    """Return a file changed by its meaning, with every digest recomputed."""
    file = File.of(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            rng.choice(FORGERIES)(file, rng)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, struct.error):
            break  # an earlier change took away what this one works on
    try:
        return file.joined()
    except TypeError:  # changes have put an integer among an object's keys
        return raw


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """Return one spoiled file."""
    raw = rng.choice(seeds)
    match rng.randrange(10):
        case 0:
            return damaged(raw, rng, seeds)
        case 1 | 2:
            return edited_header(raw, rng, seeds)
        case _:
            return forged(raw, rng)
