"""What single codecs promise beside the contract: how small they are, what they decline, what they refuse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from maskpack.adapter.write import save_adapter
from maskpack.codecs.base import Bits, Codec, Profile, Reader, Side, to_frame, varint
from maskpack.codecs.gap import Gap
from maskpack.codecs.logit import Logit, LogitBase
from maskpack.codecs.nm import NM
from maskpack.errors import ConfigError, CorruptAdapterError
from maskpack.mask import MaskSet

from .helpers_adapter import base_of, encode_smallest

RNG = np.random.default_rng


def entropy(mask: np.ndarray) -> float:
    """Return the bytes that independent bits of this density need."""
    p = float(mask.mean())
    return 0.0 if p in (0, 1) else -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) * mask.size / 8


def packed(mask: np.ndarray) -> Bits:
    return np.packbits(mask.reshape(-1), bitorder="little")


def by_rows_and_columns(seed: int = 0) -> np.ndarray:
    """Return a mask whose rows and columns differ, as those of masks trained with Adam do."""
    rng = RNG(seed)
    rate = 0.03 * np.exp(rng.normal(0, 1.0, (300, 1)) + rng.normal(0, 0.6, (1, 400)))
    return rng.random((300, 400)) >= np.minimum(rate, 0.9)


def size(codec: Codec, mask: np.ndarray, side: Side | None = None) -> int:
    side = side or Side(mask.shape)
    payload = codec.encode(packed(mask), side)
    assert payload is not None
    assert np.array_equal(codec.decode(payload, side), packed(mask))
    return len(payload)


class TestHowSmall:
    @pytest.mark.parametrize("share", [0.002, 0.01, 0.03, 0.06, 0.1, 0.2, 0.27, 0.35, 0.45, 0.5])
    @pytest.mark.parametrize("profile", ["default", "max"])
    def test_without_structure_never_over_1_02_of_entropy(self, share: float, profile: Profile) -> None:
        mask = RNG(1).random((256, 1024)) >= share
        _, payload = encode_smallest(packed(mask), Side(mask.shape), profile)
        assert len(payload) < 1.02 * entropy(mask) + 16

    @pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
    def test_beside_a_range_coder_from_elsewhere(self, share: float) -> None:
        stream = pytest.importorskip("constriction").stream
        mask = RNG(8).random((300, 1000)) >= share
        encoder = stream.queue.RangeEncoder()
        encoder.encode(mask.reshape(-1).astype(np.int32), stream.model.Bernoulli(float(mask.mean()), perfect=False))
        reference = 4 * len(encoder.get_compressed())
        assert size(Logit(), mask) < 1.01 * reference + 16
        _, payload = encode_smallest(packed(mask), Side(mask.shape), "default")
        assert len(payload) < 1.02 * reference

    def test_rows_and_columns_help(self) -> None:
        mask = by_rows_and_columns()
        assert size(Logit(), mask) < 0.93 * entropy(mask)

    def test_magnitude_helps_where_scores_move_with_it(self) -> None:
        weights = RNG(0).normal(size=(64, 288)).astype(np.float32)
        mask = RNG(1).random(weights.shape) >= 0.4 * (np.abs(weights) / 2) ** 2
        side = Side(mask.shape, weights.reshape(-1).view(np.uint32))
        assert size(LogitBase(), mask, side) < 0.93 * size(Logit(), mask)

    def test_signs_help_where_gradients_have_low_rank(self) -> None:
        rng = RNG(2)
        weights = rng.normal(size=(300, 400)).astype(np.float32)
        lean = np.sign(rng.normal(size=(300, 1)) * rng.normal(size=(1, 400))) * np.sign(weights)
        mask = rng.random(weights.shape) >= 0.06 * (1 + 0.9 * lean)
        assert size(LogitBase(), mask, Side(mask.shape, weights.reshape(-1).view(np.uint32))) < 0.93 * size(
            Logit(), mask
        )

    def test_events_in_a_kernel_attract_each_other(self) -> None:
        rate = np.where(RNG(3).random((64, 32, 1)) < 0.2, 0.4, 0.02)
        mask = (RNG(4).random((64, 32, 9)) >= rate).reshape(64, 32, 3, 3)
        assert size(Logit(), mask) < 0.9 * entropy(mask)

    def test_a_reference_is_context(self) -> None:
        reference = RNG(3).random((100, 200)) >= 0.2
        flipped = RNG(4).random(reference.shape) < np.where(reference, 0.01, 0.3)  # most of what changes comes back
        side = Side(reference.shape, None, packed(reference))
        assert size(Logit(), flipped, side) < 0.75 * size(Logit(), flipped)

    def test_two_of_four_takes_at_most_066_bits(self) -> None:
        mask = RNG(5).random((64 * 1024, 4)).argsort(1) < 2
        codec, payload = encode_smallest(packed(mask), Side((256, 1024)), "default")
        assert (codec.id, 8 * len(payload) / mask.size <= 0.66) == ("nm", True)
        for kept, group in ((1, 2), (1, 4), (3, 4), (4, 8), (1, 8), (2, 16), (15, 16)):
            mask = RNG(6).random((1003, group)).argsort(1) < kept
            ideal = math.log2(math.comb(group, kept)) / 8 * len(mask)
            assert size(NM(), mask) < 1.02 * ideal + 80

    def test_small_masks_cost_few_bytes(self) -> None:
        ones = np.ones((64, 64), dtype=bool)
        assert size(Logit(), ones) == 1
        ones[3, 4] = False
        assert size(Logit(), ones) <= 12


class TestDeclining:
    def test_nm_declines_other_masks(self) -> None:
        for mask in (
            RNG(0).random((100, 4)) < 0.5,
            np.ones((4, 4), bool),
            np.zeros((0, 4), bool),
            np.ones((3, 3), bool),
        ):
            assert NM().encode(packed(mask), Side(mask.shape)) is None
        late = RNG(5).random((2000, 4)).argsort(1) < 2
        late[-1] = True
        assert NM().encode(packed(late), Side(late.shape)) is None
        wide = RNG(5).random((10, 16)).argsort(1) < 8  # 12,870 patterns
        assert NM().encode(packed(wide), Side(wide.shape)) is None

    def test_asked_for_by_name_it_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"the codec 'nm' is not made for this mask of shape \(80,\); choose another"
        ):
            encode_smallest(packed(np.ones(80, bool)), Side((80,)), "max", "nm")
        masks = MaskSet.from_tensors({"a.weight": torch.ones(8, 10, dtype=torch.bool)})
        with pytest.raises(ConfigError, match=r"the mask of 'a.weight': the codec 'nm' is not made for"):
            save_adapter(tmp_path / "x.safetensors", masks, base_of(["a.weight"]), codec="nm")
        assert not list(tmp_path.iterdir())


def refused(codec: Codec, payload: bytes, side: Side, match: str) -> None:
    with pytest.raises(CorruptAdapterError, match=match):
        codec.decode(payload, side)


class TestStreams:
    @pytest.mark.parametrize("value", [0, 127, 128, 1 << 20, (1 << 63) - 1])
    def test_varints(self, value: int) -> None:
        assert Reader(varint(value)).varint() == value

    def test_reader_refuses_what_is_not_there(self) -> None:
        for payload, match in (
            (b"\x80" * 12, "more than 9 bytes"),
            (b"\x80", "a piece of 1 bytes is stated at byte 1"),
        ):
            with pytest.raises(CorruptAdapterError, match=match):
                Reader(payload).varint()


class TestGap:
    side = Side((1000,))

    def test_refuses(self) -> None:
        refused(Gap(), b"\x02" + to_frame(b"", 1), self.side, "a gap payload begins with 2, expected 0 or 1")
        refused(Gap(), b"\x01" + to_frame(bytes(1001), 1), self.side, "declares 1001 as its size, expected 0 to 1000")
        refused(Gap(), b"\x01" + to_frame(b"\xfe" * 4, 1), self.side, "end at weight 1020 of 1000")
        refused(Gap(), b"\x01" + to_frame(b"\x05\xff", 1), self.side, "end at weight 261 of 1000")
        refused(Gap(), b"\x01" + to_frame(b"\x05", 1) + b"x", self.side, "cannot be decoded")


class TestNM:
    side = Side((10, 4))

    def test_refuses(self) -> None:
        for head in ((3, 1), (4, 0), (4, 4), (16, 8), (8, 4)):
            side = Side((12,)) if head[0] == 8 else self.side
            refused(NM(), bytes(head) + to_frame(bytes(5), 1), side, f"states {head[1]} of {head[0]} for")
        refused(NM(), b"\x04\x02" + to_frame(bytes(4), 1), self.side, "declares 4 as its size, expected 5")
        refused(NM(), b"\x04\x02" + to_frame(b"\x24" + bytes(4), 1), self.side, "bytes up to 36 for 6 patterns")
        refused(NM(), b"\x04\x02" + to_frame(b"\x24\x06", 1), Side((3, 4)), "bytes up to 36 for 6 patterns")
        refused(NM(), b"\x04\x02" + to_frame(b"\x01\x06", 1), Side((3, 4)), "bytes up to 6 for 6 patterns")
