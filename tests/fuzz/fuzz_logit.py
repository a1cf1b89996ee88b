"""Fuzz the codec logit, compiled against numpy: `python -m tests.fuzz.fuzz_logit --seconds 120`; `make sanitize`.

Spoils payloads by what they say: arrays, offset, low rank, tables and steps of coefficients, number and lengths of
lanes, words, or any byte. The library is built anew from its source, with the flags in CFLAGS (the sanitizers'), and
must give the bits that numpy gives, or refuse what numpy refuses; so it is with classes, and payloads of random masks.
"""

import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskpack.codecs import logit, native
from maskpack.codecs.base import Bits, Reader, Side, varint
from maskpack.codecs.classes import weight_classes
from maskpack.codecs.logit_model import Grid, may_lean
from maskpack.codecs.native.build import build
from maskpack.errors import CorruptAdapterError

from .fuzz_reader import fuzz

SHAPES = (
    (1,),
    (33,),
    (700,),
    (40, 33),
    (16, 16),
    (17, 3, 5),
    (4, 1, 9),
    (16, 4, 3, 3),
    (2, 3, 2, 3, 5),
    (1, 64),
    (64, 1),
)
LARGE = (1 << 7, 0, 1, 127, 128, 255, 1 << 14, 1 << 18, (1 << 31) - 1, 1 << 32, (1 << 63) - 1)
SPECIAL = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 1], dtype=np.uint32)
COMPILED: Any = None


def side_of(case: int) -> tuple[Side, bool, Bits]:
    """Return what is known in a case, whether its weights are, and bits that follow it."""
    rng = np.random.default_rng(case)
    shape, base, referenced = SHAPES[case % len(SHAPES)], bool(case & 16), bool(case & 32)
    count = int(np.prod(shape))
    weights = rng.normal(size=count).astype(np.float32)
    words = np.where(rng.random(count) < 0.05, rng.choice(SPECIAL, count), weights.view(np.uint32)).astype(np.uint32)
    odds = np.nan_to_num(weights) + 2 * np.sin(np.arange(count) / 9) - 2
    bits = np.packbits(rng.random(count) > 1 / (1 + np.exp(-odds)), bitorder="little")
    reference = np.packbits(rng.random(count) < 0.5, bitorder="little") if referenced else None
    return Side(shape, words if case & 64 else (words >> 16).astype(np.uint16), reference), base, bits


def with_library(library: Any, act: Callable[[], Any]) -> Any:
    """Return what a call gives with a library, or with None; "refused" if it is refused."""
    native.library = lambda: library  # type: ignore[assignment]
    try:
        return act()
    except CorruptAdapterError:
        return "refused"


def agreed(act: Callable[[], Any]) -> Any:
    """Return what both ways give."""
    first, second = with_library(COMPILED, act), with_library(None, act)
    assert type(first) is type(second)
    assert np.array_equal(first, second), "the compiled loops and numpy differ"
    return first


def spoiled(seeds: list[bytes], rng: random.Random) -> bytes:
    """Return a payload, behind the number of its case, with one or a few things changed."""
    data = rng.choice(seeds)
    case = data[0] if rng.random() < 0.9 else rng.randrange(128)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = data[:1] + (by_meaning if rng.random() < 0.7 else by_byte)(data[1:], data[0], rng)
    return bytes([case]) + data[1:]


def by_byte(payload: bytes, case: int, rng: random.Random) -> bytes:
    """Return a payload that is changed anywhere."""
    place, kind = rng.randrange(len(payload) + 1), rng.randrange(4)
    if kind == 0:
        return payload[:place]
    if kind == 1:
        return payload[:place] + rng.randbytes(rng.randrange(1, 9)) + payload[place:]
    if kind == 2:
        return payload[:place] + payload[place + rng.randrange(1, 9) :]
    return payload[:place] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + payload[place + 1 :]


def by_meaning(payload: bytes, case: int, rng: random.Random) -> bytes:
    """Return a payload one of whose fields is another, if it can be taken apart."""
    side, base, _ = side_of(case)
    grid, reader = Grid.of(side.shape), Reader(payload)
    try:
        first, offset = reader.byte(), reader.varint()
        rank = reader.byte() if may_lean(grid, base) else -1
        codes = bytearray(reader.take(min(32, (first >> 1 & 63).bit_count() + 2 * max(rank, 0))).tobytes())
        count = reader.varint()
        lengths = [reader.varint() for _ in range(min(count, 64) - 1)]
        words = bytearray(reader.rest().tobytes())
    except CorruptAdapterError:
        return by_byte(payload, case, rng)
    kind = rng.randrange(7)
    if kind == 0:
        first ^= 1 << rng.randrange(8)
    elif kind == 1:
        offset = rng.choice((*LARGE, max(0, offset + rng.randrange(-40, 40))))
    elif kind == 2 and rank >= 0:
        rank = rng.choice((0, 1, 7, 8, 9, 255))
        codes += rng.randbytes(rng.randrange(17))
    elif kind == 3 and codes:
        codes[rng.randrange(len(codes))] = rng.randrange(256)
    elif kind == 4:
        count = rng.choice((*LARGE, count + 1, max(0, count - 1)))
        lengths += [rng.choice(LARGE) for _ in range(rng.randrange(3))]
    elif kind == 5 and lengths:
        lengths[rng.randrange(len(lengths))] = rng.choice((*LARGE, rng.randrange(64)))
    elif words:
        place = rng.randrange(len(words))
        words[place : place + 8] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8)))
    head = bytes([first]) + varint(offset) + (bytes([rank]) if rank >= 0 else b"") + bytes(codes) + varint(count)
    return head + b"".join(map(varint, lengths)) + bytes(words)


def run(data: bytes, path: Path, rng: random.Random) -> None:
    """Decode a payload both ways; now and then, code and class random masks and weights both ways."""
    side, base, bits = side_of(data[0])
    payload = np.array([*data[1:]], dtype=np.uint8).data  # memory of its own, of just its size
    agreed(lambda: logit.decode(payload, side, base))
    if rng.random() < 0.02:
        count = rng.choice((1, 7, 300, 5000))
        words = np.frombuffer(rng.randbytes(4 * count), dtype=np.uint32)
        for own in (words, words.view(np.uint16)):
            for parts in (16, 128):
                agreed(lambda own=own, parts=parts: weight_classes(own, parts))
        shuffled = np.frombuffer(rng.randbytes(side.size), np.uint8) | np.frombuffer(rng.randbytes(side.size), np.uint8)
        shuffled = shuffled | (bits if rng.random() < 0.5 else 0)
        if side.count % 8:
            shuffled[-1] &= (1 << side.count % 8) - 1
        made = agreed(lambda: np.frombuffer(logit.encode(shuffled, side, base), np.uint8)).data
        assert np.array_equal(agreed(lambda: logit.decode(made, side, base)), shuffled)


def built_anew() -> Any:
    """Return the library, compiled now; None where there is no compiler that can."""
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder), "-g")
        return None if built is None else native.opened(built)


def main() -> int:
    global COMPILED
    native.say_what_is_lost = lambda: None  # type: ignore[assignment]
    COMPILED = built_anew()
    if COMPILED is None:
        sys.stdout.write("no C compiler was found that takes loops.c\n")
        return 1
    logit.LANE_BYTES = 40  # several lanes
    seeds = []
    for case in range(128):
        side, base, bits = side_of(case)
        seeds.append(bytes([case]) + with_library(None, partial(logit.encode, bits, side, base)))
    return fuzz(__doc__, seeds, spoiled, run)


if __name__ == "__main__":
    sys.exit(main())
