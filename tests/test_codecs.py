"""Every codec keeps the contract of `maskpack/codecs/base.py`; a new one is tested without a line here."""

import json
import math
import struct
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpack.codecs import native
from maskpack.codecs.base import CODECS, PROFILES, Bits, Codec, Side, words_of
from maskpack.codecs.choose import _hopeless, rivals, smallest
from maskpack.codecs.classes import weight_classes
from maskpack.codecs.logit import Logit
from maskpack.codecs.raw import Raw
from maskpack.codecs.zstd import Zstd
from maskpack.errors import ConfigError, CorruptAdapterError, UnknownNameError
from maskpack.mask import MaskSet

from .helpers_adapter import encode_smallest, random_bits

INSTANCES = [codec for cls in CODECS.all() for codec in rivals("max", cls.id, True)]


def side_of(count: int, codec: Codec, seed: int = 0) -> Side:
    words = np.random.default_rng(seed).integers(0, 1 << 16, count, dtype=np.uint16) if codec.needs_base else None
    return Side((count,), words)


def round_trip(codec: Codec, bits: Bits, side: Side) -> bytes:
    payload = codec.encode(bits, side)
    if payload is None:
        return b""
    decoder = type(codec)(**json.loads(json.dumps(codec.config())))
    again = decoder.decode(memoryview(payload), side)
    assert again.dtype == np.uint8
    assert np.array_equal(again, bits)
    return payload


@pytest.fixture(params=INSTANCES, ids=repr)
def codec(request: pytest.FixtureRequest) -> Codec:
    return request.param


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_gives_back_its_bits(codec: Codec, density: float) -> None:
    for count in [*range(18), 255, 4096, 100_003]:
        round_trip(codec, random_bits(count, density, count), side_of(count, codec))


def test_gives_back_structured_bits(codec: Codec) -> None:
    rows = np.random.default_rng(1).random((300, 1)) < 0.5
    bits = np.packbits(np.broadcast_to(rows, (300, 77)), bitorder="little")
    side = Side((300, 77), side_of(300 * 77, codec).weights)
    round_trip(codec, bits, side)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.booleans(), max_size=400), data=st.data())
def test_gives_back_any_bits(values: list[bool], data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(INSTANCES))
    round_trip(codec, np.packbits(np.array(values, dtype=bool), bitorder="little"), side_of(len(values), codec))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 0, 3), (40, 33), (16, 4, 3, 3), (2, 3, 4, 3, 5), (1, 1, 700)])
def test_gives_back_every_number_of_dimensions(codec: Codec, shape: tuple[int, ...]) -> None:
    for density in (0.0, 0.03, 0.5, 0.97, 1.0):
        round_trip_shaped(codec, shape, density, 0)


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from(INSTANCES),
    shape=st.lists(st.integers(0, 9), max_size=5),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_gives_back_any_shape_and_density(codec: Codec, shape: list[int], density: float, seed: int) -> None:
    round_trip_shaped(codec, tuple(shape), density, seed)


def round_trip_shaped(codec: Codec, shape: tuple[int, ...], density: float, seed: int) -> None:
    count = math.prod(shape)
    bits, words = random_bits(count, density, seed), side_of(count, codec, seed).weights
    round_trip(codec, bits, Side(shape, words))


def test_same_bits_give_the_same_payload(codec: Codec) -> None:
    bits, side = random_bits(5000, 0.9), side_of(5000, codec)
    assert codec.encode(bits, side) == codec.encode(bits.copy(), side)


@pytest.mark.parametrize("count", [9, 200, 1003])
def test_every_truncation_is_refused(codec: Codec, count: int) -> None:
    bits, side = random_bits(count, 0.8), side_of(count, codec)
    payload = codec.encode(bits, side) or b""
    for length in range(len(payload)):
        with pytest.raises(CorruptAdapterError, match=r"\w+ \w+"):
            codec.decode(payload[:length], side)
    with pytest.raises(CorruptAdapterError, match=r"\w+ \w+"):
        codec.decode(payload + b"\0", side)


def test_flipped_bits_are_refused_or_give_a_valid_mask(codec: Codec) -> None:
    bits, side = random_bits(1003, 0.8), side_of(1003, codec)
    payload = codec.encode(bits, side) or b""
    for place in range(8 * len(payload)):
        spoiled = bytearray(payload)
        spoiled[place // 8] ^= 1 << place % 8
        try:
            found = codec.decode(bytes(spoiled), side)
        except CorruptAdapterError:
            continue
        assert side.checked(found) is found


def test_payload_of_other_length_is_refused_or_gives_a_valid_mask(codec: Codec) -> None:
    payload = codec.encode(random_bits(1000, 0.8), side_of(1000, codec)) or b""
    for count in (0, 8, 992, 1008, 1 << 20):
        other = side_of(count, codec)
        try:
            other.checked(codec.decode(payload, other))
        except CorruptAdapterError:
            continue


@pytest.mark.parametrize("cls", CODECS.all(), ids=lambda cls: cls.id)
def test_class_is_a_plugin(cls: type[Codec]) -> None:
    assert cls.__doc__
    assert cls.__doc__.splitlines()[0].endswith((".", ":"))
    assert isinstance(cls.reference, str)
    assert CODECS[cls.id] is cls
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert any(cls.candidates(profile) for profile in PROFILES)
    for profile in PROFILES:
        for one in cls.candidates(profile):
            assert isinstance(one, cls)
            assert hash(one) == hash(type(one)(**{f.name: getattr(one, f.name) for f in fields(one)}))  # type: ignore[arg-type]
            assert json.loads(json.dumps(one.config())) == dict(one.config())
            assert not {"codec", "op", "reference", "table"} & set(one.config())
            assert not (profile == "default" and one.needs_base)
            assert not any("torch" in name for name in vars(sys.modules[cls.__module__]))


def test_packed_bits_of_the_format_page() -> None:
    for mask, packed in [([1], "01"), ([1, 0, 1, 1, 0, 0, 0, 0, 1], "0d01"), ([1] * 16, "ffff")]:
        (own,) = MaskSet.from_tensors({"w": torch.tensor(mask, dtype=torch.uint8)}).values()
        bits = np.frombuffer(own.bits.tobytes(), dtype=np.uint8)
        assert Raw().encode(bits, Side((len(mask),))).hex() == packed


class TestZstd:
    side = Side((8000,))
    data = bytes(1000)

    def refused(self, frame: bytes, match: str) -> None:
        with pytest.raises(CorruptAdapterError, match=match):
            Zstd().decode(frame, self.side)

    def test_refuses_what_the_format_does_not_allow(self) -> None:
        def made(**options: object) -> bytes:
            return zstandard.ZstdCompressor(**{"write_checksum": False, **options}).compress(self.data)  # type: ignore[arg-type]

        good = made()
        assert len(Zstd().decode(good, self.side)) == 1000
        self.refused(good + good, "unused data")
        self.refused(b"\x50\x2a\x4d\x18" + struct.pack("<I", 1000) + self.data, "begins with 502a4d18")
        self.refused(made(write_content_size=False), "declares nothing as its size, expected 1000")
        self.refused(made(write_checksum=True), "checksum True")
        dictionary = zstandard.train_dictionary(512, [bytes([i, i + 1, i + 2] * 20) for i in range(200)])
        self.refused(made(dict_data=dictionary), r"dictionary \d+|cannot be decoded")
        self.refused(b"", "begins with , expected 28b52ffd")

    def test_refuses_a_bomb_before_it_allocates(self) -> None:
        blocks = b"".join(struct.pack("<I", (i == 99) | 2 | (131072 << 3))[:3] + b"\0" for i in range(100))
        for claimed in (1 << 40, 131072 * 100):
            frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", claimed) + blocks
            self.refused(frame, f"declares {claimed} as its size, expected 1000 bytes")
        self.refused(b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1000) + blocks, "cannot be decoded")

    def test_refuses_a_great_window(self) -> None:
        side = Side((8 << 25,))
        frame = zstandard.ZstdCompressor(level=22, write_checksum=False).compress(bytes(1 << 25))
        with pytest.raises(CorruptAdapterError, match="window of 33554432 bytes"):
            Zstd().decode(frame, side)


class TestChoice:
    def test_takes_the_smallest_and_breaks_ties_by_id(self) -> None:
        noise = random_bits(80_000, 0.5)
        assert encode_smallest(noise, Side((80_000,)), "default")[0].id == "raw"
        codec, payload = encode_smallest(np.zeros(10_000, np.uint8), Side((80_000,)), "fast")
        assert (codec.id, len(payload) < 40) == ("gap", True)
        assert encode_smallest(np.zeros(0, np.uint8), Side((0,)), "max")[0].id == "raw"

    def test_takes_the_codec_asked_for(self) -> None:
        assert encode_smallest(np.zeros(100, np.uint8), Side((800,)), "max", "raw")[0].id == "raw"

    def test_refuses_what_is_unknown(self) -> None:
        with pytest.raises(ConfigError, match="profile must be one of fast, default, max, got 'best'"):
            rivals("best", None, False)  # type: ignore[arg-type]
        with pytest.raises(UnknownNameError, match=r"unknown codec 'zst'.*did you mean 'zstd'"):
            rivals("max", "zst", False)


class TestClasses:
    def test_are_monotone_equally_populated_and_equal_for_equal_values(self) -> None:
        weights = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).bfloat16()
        classes = weight_classes(weights.view(torch.int16).numpy().view(np.uint16))
        assert np.array_equal(classes >> 7, np.signbit(weights.float().numpy()))
        magnitudes = classes & 127
        order = weights.abs().float().argsort(stable=True).numpy()
        assert (np.diff(magnitudes[order].astype(int)) >= 0).all()
        assert np.bincount(magnitudes >> 3, minlength=16).min() > 0.8 * 50_000 / 16
        pairs = set(zip(weights.abs().tolist(), magnitudes.tolist(), strict=True))
        assert len(pairs) == len({value for value, _ in pairs})

    def test_formula(self) -> None:
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("nan"), float("-inf"), -float("nan")])
        bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16).copy()
        bits[-1] ^= 1  # another NaN
        signs = np.array([0, 1, 0, 1, 0, 0, 1, 0]) * 128
        assert weight_classes(bits).tolist() == (np.array([16, 16, 48, 48, 72, 112, 88, 112]) + signs).tolist()
        assert weight_classes(bits[:0]).size == 0


@pytest.mark.parametrize("shape", [(300, 400), (90_000,), (64, 700), (1, 5000), (700, 1), (0, 3)])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_a_codec_takes_hardly_less_than_it_says(shape: tuple[int, ...], spread: float) -> None:
    rng, rows = np.random.default_rng(4), shape[0] if len(shape) > 1 else 1
    by_row, by_input = (rng.standard_normal(one) for one in ((rows, 1), math.prod(shape) // max(rows, 1)))
    events = rng.random((rows, by_input.size)) < 0.05 * np.exp(spread * (by_row + by_input))
    bits, side = np.packbits(~events.reshape(-1), bitorder="little"), Side(shape)
    for codec in INSTANCES:
        if not codec.needs_base and (payload := codec.encode(bits, side)) is not None:
            assert codec.at_least(bits, side) <= len(payload)


@pytest.mark.parametrize("lean", [False, True])
def test_a_patch_is_not_coded_again_for_a_hundredth(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.packbits(np.random.default_rng(5).random(400_000) > 0.03, bitorder="little")
    asked, encode = list[str](), Logit.encode
    monkeypatch.setattr(Logit, "encode", lambda *given: asked.append("logit") or encode(*given))
    found = smallest(rivals("default", None, False), [(bits, Side((800, 500), lean=lean))])
    assert (found.codec.id, asked) == (("gap", []) if not lean else ("logit", ["logit"]))


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.02, 0.7])
def test_gaps_are_the_same_without_the_library(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.packbits(np.random.default_rng(3).random(70_003) < density, bitorder="little")
    payload = CODECS["gap"]().encode(bits, Side((70_003,)))
    monkeypatch.setattr(native, "library", lambda: None)
    assert CODECS["gap"]().encode(bits, Side((70_003,))) == payload


@pytest.mark.parametrize("kind", ["logit", "zstd", "gap"])
def test_of_large_masks_only_what_may_win_is_tried(kind: str) -> None:
    """Pieces of a mask tell which codecs cannot win, and those that can are not left out."""
    rng = np.random.default_rng(0)
    rows = {"logit": rng.random((512, 1)) ** 3, "zstd": np.tile(rng.random(512) < 0.5, (512, 1)), "gap": 0.002}[kind]
    bits = np.packbits((rng.random((512, 512)) < rows).reshape(-1), bitorder="little")
    codecs, side = rivals("default", None, False), Side((512, 512))
    found = smallest(codecs, [(bits, side)])
    assert len(found.payload) == min(len(made) for one in codecs if (made := one.encode(bits, side)) is not None)
    assert found.codec.id == (kind if kind != "gap" else "logit")
    # of the others it is the best, or takes a fifth more than it
    assert _hopeless(CODECS["gap"](), bits, side.shape, len(found.payload)) == (kind == "logit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_words_of_one_number_that_was_expanded(dtype: torch.dtype) -> None:
    one = torch.full((), 1.5, dtype=dtype)
    assert words_of(one.expand(1)).tolist() == words_of(one.reshape(1)).tolist()
