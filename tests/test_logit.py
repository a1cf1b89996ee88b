"""The codec logit: its compiled loops and numpy give the same bits, and refuse the same payloads."""

import ctypes
import logging
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpack.codecs import logit, logit_fit, native
from maskpack.codecs.base import Bits, Side, varint
from maskpack.codecs.classes import weight_classes
from maskpack.codecs.lanes import NEVER, ONE, UNIT, WINDOW, tables
from maskpack.codecs.logit_model import CLASSES, Grid
from maskpack.codecs.native.build import COMPILERS, build
from maskpack.errors import CorruptAdapterError
from maskpack.threads import once

PAGE = Path(__file__).parent.parent / "docs" / "format.md"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library, built from the source that is here."""
    path = build(tmp_path_factory.mktemp("native"), "-Wall", "-Wextra", "-Werror")
    if path is None:
        assert not any(map(shutil.which, COMPILERS)), "there is a compiler, and it does not take the source"
        pytest.skip("there is no C compiler")
    library = native.opened(path)
    assert library is not None
    return library


def with_library(library: ctypes.CDLL | None, act: Callable[[], Any]) -> Any:
    """Return what a call gives with the library, or without any; of CorruptAdapterError its words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: library)
        try:
            return act()
        except CorruptAdapterError as error:
            return str(error)


def agreed(compiled: ctypes.CDLL, payload: bytes, side: Side, base: bool) -> Any:
    """Return what both ways of decoding give."""
    first, second = (with_library(one, lambda: logit.decode(payload, side, base)) for one in (compiled, None))
    assert type(first) is type(second)
    assert np.array_equal(first, second)
    return first


def made(shape: tuple[int, ...], density: float, seed: int, base: bool, referenced: bool) -> tuple[Bits, Side]:
    """Return bits that follow rows, columns, classes and signs, and what is known of them."""
    rng, count = np.random.default_rng(seed), math.prod(shape)
    rows = shape[0] if len(shape) > 1 else 1
    weights = rng.normal(size=count).astype(np.float32)
    odds = rng.normal(0, 1, (rows, 1)) + rng.normal(0, 1, (1, count // max(rows, 1)))
    odds = odds.reshape(-1) + (-weights if base else 0)
    reference = rng.random(count) < 0.5
    odds += 3 * reference if referenced else 0
    events = rng.random(count) < 1 / (1 + np.exp(-odds - math.log((1 - density + 1e-9) / (density + 1e-9))))
    known = np.packbits(reference, bitorder="little") if referenced else None
    words = weights.view(np.uint32) if seed % 2 else (weights.view(np.uint32) >> 16).astype(np.uint16)
    return np.packbits(~events, bitorder="little"), Side(shape, words if base else None, known)


SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
    st.tuples(st.integers(16, 60), st.integers(16, 60)),
    st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 5000)),
)


@settings(max_examples=120, deadline=None)
@given(SHAPES, st.floats(0, 1), st.integers(0, 99), st.booleans(), st.booleans(), st.data())
def test_both_ways_agree(
    compiled: ctypes.CDLL, shape: Any, density: float, seed: int, base: bool, referenced: bool, data: st.DataObject
) -> None:
    bits, side = made(shape, density, seed, base, referenced)
    payloads = [with_library(one, lambda: logit.encode(bits, side, base)) for one in (compiled, None)]
    assert payloads[0] == payloads[1]
    assert np.array_equal(agreed(compiled, payloads[0], side, base), bits)
    place = data.draw(st.integers(0, 8 * len(payloads[0]) - 1))
    spoiled = bytearray(payloads[0])
    spoiled[place // 8] ^= 1 << place % 8
    agreed(compiled, bytes(spoiled), side, base)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.binary(max_size=200), st.booleans(), st.booleans())
def test_both_ways_agree_on_any_bytes(
    compiled: ctypes.CDLL, shape: Any, payload: bytes, base: bool, referenced: bool
) -> None:
    _, side = made(shape, 0.5, 0, base, referenced)
    agreed(compiled, payload, side, base)


@pytest.mark.parametrize("shape", [(700, 900), (64, 1, 7, 7), (96, 48, 3, 3), (3000,), (40_000, 8)])
@pytest.mark.parametrize("base", [False, True])
def test_many_lanes(compiled: ctypes.CDLL, shape: tuple[int, ...], base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit, "LANE_BYTES", 50)
    bits, side = made(shape, 0.9, 1, base, False)
    payload = logit.encode(bits, side, base)
    assert np.array_equal(agreed(compiled, payload, side, base), bits)
    assert with_library(None, lambda: logit.encode(bits, side, base)) == payload


@pytest.mark.parametrize("density", [0.2, 0.97])
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("referenced", [False, True])
def test_a_fit_to_cells_takes_hardly_more_bytes(
    compiled: ctypes.CDLL, density: float, base: bool, referenced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, side = made((512, 640), density, 2, base, referenced)
    side = replace(side, lean=False)
    cells = with_library(compiled, lambda: logit.encode(bits, side, base))
    assert with_library(None, lambda: logit.encode(bits, side, base)) == cells
    monkeypatch.setattr(logit_fit, "CELLS", 1 << 30)
    assert len(cells) < (1.06 if referenced else 1.003) * len(
        with_library(compiled, lambda: logit.encode(bits, side, base))
    )


def test_a_large_mask_without_structure(compiled: ctypes.CDLL) -> None:
    """All arrays of coefficients are forgotten in the fit, which looks at a part of the weights."""
    bits = np.packbits(np.random.default_rng(0).random((900, 1100)) < 0.93, bitorder="little")
    payloads = {with_library(one, lambda: logit.encode(bits, Side((900, 1100)), False)) for one in (compiled, None)}
    assert len(payloads) == 1


def test_constants_are_made_once() -> None:
    """Compiled loops get addresses of constants: of two copies, one would be freed."""
    gate, found = threading.Barrier(4), list[object]()

    @once
    def constant() -> object:
        time.sleep(0.01)
        return object()

    def ask() -> None:
        gate.wait()
        found.append(constant())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 4
    assert all(one is constant() for one in found)


FIRST_CALLS = """
import sys, threading
import numpy as np
from maskpack.codecs import logit
from maskpack.codecs.base import Side
sys.setswitchinterval(1e-6)
drawn = np.random.default_rng(0)
bits = np.packbits(drawn.random(64 * 4096) < 0.1, bitorder="little")
words = drawn.standard_normal(64 * 4096).astype(np.float32).view(np.uint32)
gate, found = threading.Barrier(8), []
def work():
    side = Side((64, 4096), words, lean=False)
    gate.wait()
    found.append(logit.encode(bits, side, True))
threads = [threading.Thread(target=work) for _ in range(8)]
for one in threads: one.start()
for one in threads: one.join()
print(len(found), len({*found, logit.encode(bits, Side((64, 4096), words, lean=False), True)}))
"""


def test_first_calls_in_threads() -> None:
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", FIRST_CALLS], capture_output=True, text=True)
    assert done.stdout.split() == ["8", "1"], done.stderr


@pytest.mark.parametrize("base", [False, True])
def test_payloads_that_are_decoded_together(compiled: ctypes.CDLL, base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By numpy: those of different shapes, empty ones, and spoiled ones among good ones; in several groups."""
    monkeypatch.setattr(logit, "LANE_BYTES", 60)
    monkeypatch.setattr(logit, "TOGETHER", 8000)
    shapes = [(90, 200), (48, 1, 5, 5), (30, 20, 3, 3), (700,), (0, 3), (16, 16), (24, 4, 3, 1), (64, 300)]
    made_ = [made(shape, 0.9, seed, base, False) for seed, shape in enumerate(shapes)]
    payloads = [with_library(compiled, lambda one=one: logit.encode(*one, base)) for one in made_]
    for place in (0, 2, 9, -1):
        spoiled = bytearray(payloads[2])
        spoiled[place] ^= 5
        payloads.append(bytes(spoiled))
        made_.append(made_[2])
    sides = [side for _, side in made_]
    found = logit.decode_together(payloads, sides, base)
    for payload, side, bits in zip(payloads, sides, found, strict=True):
        alone = with_library(compiled, lambda payload=payload, side=side: logit.decode(payload, side, base))
        assert (bits is None) == (isinstance(alone, str) or not side.count)
        assert bits is None or np.array_equal(bits, alone)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 50_000])
@pytest.mark.parametrize("spread", [0, 3, 1 << 15])
@pytest.mark.parametrize("parts", [16, 128])
def test_both_ways_give_the_same_classes(compiled: ctypes.CDLL, count: int, spread: int, parts: int) -> None:
    """Also of infinities and of NaN with any payload and sign, and of float32 that is rounded to the same."""
    rng = np.random.default_rng(count)
    weights = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    near = rng.choice(np.array([0, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF], dtype=np.uint16), count)
    weights = np.where(rng.integers(0, 1 << 15, count) < spread, weights, near | weights & 0x8000)
    below = rng.choice(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32), count)
    exact = weights.astype(np.uint32) << 16
    for words in (weights, exact, exact + below):
        first, second = (
            with_library(one, lambda words=words: weight_classes(words, parts)) for one in (compiled, None)
        )
        assert np.array_equal(first, second)
        rounded = torch.from_numpy(words.astype(np.uint32).view(np.float32)).bfloat16() if words.itemsize == 4 else None
        if rounded is not None:
            assert np.array_equal(first, weight_classes(rounded.view(torch.int16).numpy().view(np.uint16), parts))
    assert np.array_equal(weight_classes(weights, parts), weight_classes(exact, parts))


def test_tables_are_those_of_the_page() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines if line.count("|") == 10]
    halves = np.diff(tables().first, axis=1)[:, 7:]
    assert [[int(cell) for cell in row[1:]] for row in rows[-len(halves) :]] == halves.tolist()
    assert (tables().first[:, -1] == ONE).all()


def test_no_entry_of_a_table_depends_on_the_rounding_of_logarithms() -> None:
    odds = 4096 * np.log2(1 + np.exp((np.arange(1024) - 512) / 16))
    assert np.abs(odds - np.floor(odds) - 0.5).min() > 1e-7
    survival = ONE * np.exp2(-np.arange(10 * UNIT) / UNIT)
    assert np.abs(survival - np.floor(survival) - 0.5).min() > 1e-7


def test_every_symbol_has_a_slot() -> None:
    """Whatever a payload says: an event and the end of a window always have one, and hazards stay in the table."""
    fixed = tables()
    assert fixed.hazard.min() >= 1
    assert WINDOW - 1 + int(fixed.hazard.max()) < fixed.survival.size
    assert fixed.survival.min() >= 1
    assert (np.diff(fixed.survival[: WINDOW + 1].astype(int)) <= -1).all()
    assert (fixed.reach[: fixed.survival[-1]] == NEVER).all()
    assert fixed.first.min() >= 0
    assert (np.diff(fixed.first, axis=1) > 0).all()


class TestRefuses:
    """A payload of one lane: the first byte says that rows and columns have coefficients."""

    bits, side = made((40, 30), 0.8, 0, False, False)
    good = logit.encode(bits, side, False)

    def refused(self, payload: bytes, words: str, side: Side | None = None, base: bool = False) -> None:
        with pytest.raises(CorruptAdapterError, match=words):
            logit.decode(payload, side or self.side, base)

    def test_what_does_not_go_together(self) -> None:
        assert self.good[0] == 0b110, "zeros are the events"
        self.refused(bytes([0b1110]) + self.good[1:], r"of shape \(40, 30\) states the arrays 000111, a low rank of 0")
        self.refused(b"\x86" + self.good[1:], r"states the arrays 1000011, a low rank of 0")
        self.refused(self.good[:1] + varint(1 << 20) + self.good[2:], "an offset of -1048544, which do not")
        words = np.zeros(self.side.count, dtype=np.uint16)
        self.refused(self.good[:2] + b"\x09" + self.good[2:], "a low rank of 9", Side((40, 30), words), True)
        self.refused(self.good[:2] + b"\x00" + self.good[3:], "states table 0 for an array")

    def test_what_does_not_add_up(self) -> None:
        lanes = 1 + 1 + 2  # where their number stands: behind the first byte, the offset, two arrays
        self.refused(self.good[:lanes] + b"\x00" + self.good[lanes + 1 :], "1200 units states 0 lanes")
        self.refused(self.good[:lanes] + varint(1 << 40), "1200 units states 1099511627776 lanes")
        self.refused(self.good[:lanes] + varint(2) + varint(2), "do not add up to its 0 bytes of words")
        self.refused(self.good[:lanes] + varint(2) + varint(1), "do not add up to its 0 bytes of words")
        self.refused(self.good[:lanes] + varint(2) + varint(2 << 50) + bytes(8), "do not add up to its 8 bytes")
        self.refused(self.good + b"\0", "do not add up")
        self.refused(self.good + b"\0\1", "say more, or less, than its weights")

    def test_few_lanes_for_many_weights(self) -> None:
        side = Side((1 << 13, 1 << 13))
        self.refused(b"\x01" + varint(32) + varint(1), "67108864 units states 1 lanes", side)

    def test_no_weights(self) -> None:
        self.refused(b"\0" + varint(32) + varint(1) + b"\1\0", "0 units states 1 lanes", Side((40, 0)))


def test_says_once_what_is_lost_without_the_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "LARGE", 100)
    native.say_what_is_lost.cache_clear()
    bits, side = made((40, 30), 0.8, 0, False, False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            logit.decode(logit.encode(bits, side, False), side, False)
    native.say_what_is_lost.cache_clear()
    assert [record.message for record in caplog.records if "compiled loops" in record.message] == caplog.messages
    assert len(caplog.messages) == 1


def test_a_library_of_another_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path)
    if path is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native.opened(path) is None
    assert native.opened(tmp_path / "none.so") is None
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    assert native.opened(other) is None


def test_builds_nothing_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_grids() -> None:
    assert Grid.of((8, 4, 3, 3)) == (8, 4, 9)
    assert Grid.of((8, 1, 5)) == (8, 1, 5)
    assert Grid.of((8, 4)) == (8, 4, 1)
    assert Grid.of((7,)) == (1, 7, 1)
    assert Grid.of(()) == (1, 1, 1)
    assert CLASSES == 16
