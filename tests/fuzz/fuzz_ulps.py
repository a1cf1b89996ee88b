"""Fuzz the codec of stored values, compiled against numpy: `python -m tests.fuzz.fuzz_ulps --seconds 120`.

Spoils payloads: dtype, exponent, number and sizes of tables, lengths, rest bits, words, or any byte. The library is
built anew, with the flags in CFLAGS (the sanitizers'), and must give the words that numpy gives, or refuse what numpy
refuses; so it is with payloads of random values.
"""

import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskpack.codecs import native, ulps

from . import fuzz_logit
from .fuzz_logit import agreed, built_anew, by_byte, with_library
from .fuzz_reader import fuzz

COUNTS = (0, 1, 2, 31, 33, 700, 4097, 9000)
CASES = 4 * len(COUNTS) * len(ulps.FLOATS)
KINDS = ("any", "near", "same", "far")


def words_of(case: int) -> tuple[str, Any, Any]:
    """Return the dtype of a case, words of a base there, and of values."""
    rng, kind = np.random.default_rng(case), KINDS[case % 4]
    own = ulps.FLOATS[case // 4 % len(ulps.FLOATS)]
    count = COUNTS[case // 4 // len(ulps.FLOATS) % len(COUNTS)]
    base = rng.integers(0, 2 * own.sign, count, dtype=np.uint64).astype(own.words)
    if kind == "any":
        return own.name, base, rng.permutation(base)
    most = {"near": 2, "same": 1, "far": 5000}[kind]
    return own.name, base, base + rng.integers(0, most, count).astype(own.words)


def spoiled(seeds: list[bytes], rng: random.Random) -> bytes:
    """Return a payload, behind the number of its case, with one or a few things changed."""
    data = rng.choice(seeds)
    case = data[0] if rng.random() < 0.9 else rng.randrange(CASES)
    payload = data[1:]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.4 and len(payload) > 3:  # the head and the tables, which say what the rest is
            at = rng.randrange(min(len(payload), 40))
            payload = (
                payload[:at]
                + bytes([rng.choice((0, 1, 15, 16, 127, 128, 255, rng.randrange(256)))])
                + payload[at + 1 :]
            )
        else:
            payload = by_byte(payload, case, rng)
    return bytes([case]) + payload


def run(data: bytes, path: Path, rng: random.Random) -> None:
    """Decode a payload both ways; now and then code other words of its case both ways."""
    name, base, values = words_of(data[0] % CASES)
    payload = np.array([*data[1:]], dtype=np.uint8).data  # memory of its own, of just its size
    agreed(lambda: ulps.decode(payload, base.astype(ulps.kind_of(payload).words)))  # as whoever reads it casts the base
    if rng.random() < 0.02:
        rng_words = np.random.default_rng(rng.randrange(1 << 30))
        other = rng_words.permutation(values)
        made = agreed(lambda: np.frombuffer(ulps.encode(name, base, other), np.uint8))
        assert np.array_equal(agreed(lambda: ulps.decode(made.data, base)), other)


def main() -> int:
    native.say_what_is_lost = lambda: None  # type: ignore[assignment]
    fuzz_logit.COMPILED = built_anew()
    if fuzz_logit.COMPILED is None:
        sys.stdout.write("no C compiler was found that takes loops.c\n")
        return 1
    seeds = [bytes([case]) + with_library(None, partial(ulps.encode, *words_of(case))) for case in range(CASES)]
    return fuzz(__doc__, seeds, spoiled, run)


if __name__ == "__main__":
    sys.exit(main())
