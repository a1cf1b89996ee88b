"""Fuzz the reader and every codec, guided by coverage: `python -m tests.fuzz.fuzz_atheris --seconds 600`.

Needs atheris (`pip install 'maskpack[fuzz]'`: CPython on Linux) and says so where it is missing; `fuzz_reader.py` needs
nothing. An input's first byte says what the rest is:

- 0: a file, read as it is;
- 1: a file whose digests and offsets are made good first, so that what lies behind them is reached;
- 2: a payload with its codec, settings, shape, weights and reference, for one call of `decode`.

Files are changed as `mutations.py` does it half the time: random bytes alone hardly ever give a header that parses.
Only our errors may come out, within SLOW seconds and the memory named below. What else comes out ends the run
and is kept in a file that `--repeat FILE` runs again.
"""

import argparse
import math
import random
import resource
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None
else:
    atheris.enabled_hooks.add("str")
    with atheris.instrument_imports(include=["maskpack"]):
        from maskpack.codecs.base import CODECS

        CODECS.all()  # imports the codecs' files
        from . import fuzz_reader  # noqa: F401 - imports all that reads a file

import numpy as np

from maskpack.codecs.base import CODECS, Bits, Codec, Side
from maskpack.codecs.choose import rivals
from maskpack.errors import AdapterError, BackboneMismatchError

from ..helpers_adapter import random_bits
from .damage import File
from .fuzz_reader import address_space, use, valid_files
from .mutations import mutated

GOLDEN = Path(__file__).parent.parent / "golden" / "v1"
SLOW = 10
LONGEST = 1 << 13  # bytes of an input; a zstd frame of that length may rightly hold 256 MiB of packed bits
ROOM = 1 << 30  # address space beyond that of the start: three copies of those, and the fuzzer's corpus
MOST = 1 << 20  # weights of a mask whose payload is decoded
ALLOWED, ALLOWED_EACH = 8 << 20, 64  # bytes of memory for one payload, and for each of its weights
RAW, SEALED, PAYLOAD = range(3)
# codec, change of its settings, number of dimensions, dimensions, seed of weights and reference
FIELDS = struct.Struct("<BBB5HB")
INSTANCES = [codec for cls in CODECS.all() for codec in rivals("max", cls.id, True)]
SHAPES = ((), (0,), (1,), (9,), (4, 0, 3), (40, 33), (16, 4, 3, 3), (2, 3, 2, 3, 5))


def side_of(codec: Codec, shape: tuple[int, ...], seed: int) -> Side:
    """Return side data that follow from the seed; an odd one has a reference."""
    rng = np.random.default_rng(seed)
    count = math.prod(shape)
    words = rng.integers(0, 1 << 16, count, dtype=np.uint16) if codec.needs_base else None
    return Side(shape, words, random_bits(count, 0.8, seed) if seed % 2 else None)


def packed_input(index: int, shape: tuple[int, ...], seed: int, payload: bytes) -> bytes:
    """Return the input that `decode` reads back."""
    head = FIELDS.pack(index, 0, len(shape), *shape, *(0,) * (5 - len(shape)), seed)
    return bytes([PAYLOAD]) + head + payload


def decode(data: bytes) -> None:
    """Decode one payload as `packed_input` lays it out."""
    if len(data) < FIELDS.size:
        return
    index, change, dimensions, *shape, seed = FIELDS.unpack_from(data)
    shape = tuple(shape[: dimensions % 6])
    if math.prod(shape) > MOST:
        return
    codec = INSTANCES[index % len(INSTANCES)]
    payload = data[FIELDS.size :]
    config = dict(codec.config())
    if config and change:
        key = sorted(config)[change % len(config)]
        config[key] = (change, -change, 1 << change % 70, str(change), None)[change % 5]
    try:
        codec = type(codec)(**config)
    except (TypeError, ValueError):  # what a codec may say to settings that make no sense
        return
    side = side_of(codec, shape, seed)
    tracemalloc.start()
    try:
        side.checked(codec.decode(memoryview(payload), side))
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if peak > ALLOWED + ALLOWED_EACH * side.count:
            raise MemoryError(f"{codec!r} took {peak} bytes for a payload of {len(payload)} and {side.count} weights")


def run(data: bytes, path: Path) -> None:
    """Run one input; whatever is not our error comes out."""
    kind, rest = data[:1], data[1:]
    try:
        if kind == bytes([PAYLOAD]):
            decode(rest)
            return
        if kind == bytes([SEALED]):
            rest = good_digests(rest)
        path.write_bytes(rest)
        use(path)
    except (AdapterError, BackboneMismatchError):
        pass


def good_digests(data: bytes) -> bytes:
    """Return a file with digests, seal and offsets made good, or as it is if it cannot be taken apart."""
    try:
        return File.of(data).joined()
    except Exception:
        return data


def changed(data: bytes, longest: int, seed: int) -> bytes:
    """Return another input; a file is changed by its meaning half the time."""
    rng = random.Random(seed)
    if data[:1] in (bytes([RAW]), bytes([SEALED])) and rng.random() < 0.5:
        try:
            return data[:1] + mutated([data[1:]], rng)[: longest - 1]
        except Exception:  # it was no file that can be taken apart
            pass
    found: bytes = atheris.Mutate(data, longest)
    return found


def corpus(folder: Path) -> list[bytes]:
    """Return inputs that are valid: golden files, small adapters of every kind, payloads of every codec and shape."""
    files = [path.read_bytes() for path in sorted(GOLDEN.glob("*.safetensors"))] + valid_files(folder)
    made = [bytes([kind]) + file for kind in (RAW, SEALED) for file in files]
    for index, codec in enumerate(INSTANCES):
        for seed, shape in enumerate(SHAPES):
            for density in (0.0, 0.5, 0.95, 1.0):
                bits: Bits = random_bits(math.prod(shape), density, seed)
                payload = codec.encode(bits, side_of(codec, shape, seed))
                if payload is None:  # not every codec takes every mask
                    continue
                made.append(packed_input(index, shape, seed, payload))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--corpus", type=Path, help="folder in which inputs that reach new code are kept")
    parser.add_argument("--repeat", type=Path, help="run this input only")
    options = parser.parse_args()
    if atheris is None:
        sys.stdout.write(
            "atheris is not installed, so that only the mutation fuzzer ran; it comes with "
            "pip install 'maskpack[fuzz]' (wheels for CPython on Linux)\n"
        )
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        seeds = corpus(Path(folder))
        for data in seeds:
            run(data, path)
        limit = address_space() + ROOM
        kept = options.corpus or Path(folder) / "corpus"
        kept.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(seeds):
            (kept / f"seed-{index:04}").write_bytes(data)
        inputs = [str(options.repeat)] if options.repeat else [f"-max_total_time={options.seconds}", str(kept)]
        found = f"{tempfile.gettempdir()}/maskpack-fuzz-"
        settings = [f"-timeout={SLOW}", f"-max_len={LONGEST}", "-rss_limit_mb=4096", f"-artifact_prefix={found}"]
        atheris.Setup(
            [sys.argv[0], *settings, "-print_final_stats=1", *inputs],
            lambda data: run(data, path),
            custom_mutator=changed,
        )
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
