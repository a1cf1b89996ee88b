"""Masks as packed bits."""

import json

import numpy as np
import pytest
import torch
from bitarray import bitarray
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from maskpack.errors import ConfigError, UnknownNameError
from maskpack.mask import MaskSet, PackedMask, mask_id

from .helpers_adapter import random_masks


@given(values=st.lists(st.booleans(), max_size=70))
def test_packs_and_unpacks(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    packed = PackedMask.from_tensor(mask)
    assert torch.equal(packed.tensor(), mask)
    assert packed.kept == sum(values)
    assert packed == PackedMask.from_tensor(mask.to(torch.uint8))
    assert packed == PackedMask.from_bytes(np.packbits(mask.numpy(), bitorder="little"), (len(values),))


def test_shape_order_and_stray_padding() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    packed = PackedMask.from_tensor(mask)
    assert packed.bits.tobytes().hex() == "0d01"
    assert torch.equal(packed.tensor(), mask)
    assert PackedMask.from_bytes(np.array([0x0D, 0xFF], np.uint8), (3, 3)) == packed
    assert torch.equal(PackedMask.from_tensor(mask.t()).tensor(), mask.t())
    assert PackedMask.from_tensor(torch.tensor(True)).shape == ()


def test_scale_is_the_root_of_the_density() -> None:
    mask = torch.tensor([1, 0, 0], dtype=torch.bool)
    assert PackedMask.from_tensor(mask, scale=True).alpha == float(np.float32(np.sqrt(1 / 3)))
    assert PackedMask.from_tensor(torch.zeros(4, dtype=torch.bool), scale=True).alpha == 0.5
    assert PackedMask.from_tensor(torch.zeros(0, dtype=torch.bool), scale=True).alpha == 1.0


def test_density_of_nothing_is_one() -> None:
    assert PackedMask.from_tensor(torch.zeros(0, 3, dtype=torch.bool)).density == 1.0
    assert MaskSet({}).density == 1.0


def test_refuses_what_is_no_mask() -> None:
    with pytest.raises(ConfigError, match=r"mask 'a': a mask must be bool.*got torch\.float32"):
        MaskSet.from_tensors({"a": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"uint8 of zeros and ones; got torch\.uint8"):
        PackedMask.from_tensor(torch.tensor([2], dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"shape \(3,\) needs 3 bits in little bit order, got 2 in little"):
        PackedMask(bitarray("01", endian="little"), (3,))
    with pytest.raises(ConfigError, match="needs 2 bits in little bit order, got 2 in big order"):
        PackedMask(bitarray("01", endian="big"), (2,))
    with pytest.raises(ConfigError, match="unknown op 'add'; known: flip, replace, zero"):
        PackedMask.from_tensor(torch.tensor([True]), op="add")  # type: ignore[arg-type]
    bits = bitarray("01", endian="little")
    with pytest.raises(ConfigError, match="only a mask with op 'zero' can have signs"):
        PackedMask(bits, (2,), "flip", signs=bits)


class TestMaskSet:
    masks = random_masks({"b": (3, 5), "a": (7,)}, 0.5)

    def test_is_a_sorted_mapping(self) -> None:
        assert list(self.masks) == ["a", "b"]
        assert len(self.masks) == 2
        assert self.masks.total == 22
        assert self.masks.kept == sum(int(mask.tensor().sum()) for mask in self.masks.values())
        assert self.masks.density == self.masks.kept / 22
        assert self.masks == MaskSet(dict(self.masks))
        assert "b" in self.masks
        assert "c" not in self.masks

    def test_get_has_a_default(self) -> None:
        assert self.masks.get("a") == self.masks["a"]
        assert self.masks.get("c") is None
        assert self.masks.get("c", 3) == 3

    def test_unknown_name(self) -> None:
        with pytest.raises(UnknownNameError, match="no mask for 'c'; the set has 2 parameters"):
            self.masks["c"]


def test_mask_id_is_what_the_format_page_says() -> None:
    bits, signs = bitarray("101", endian="little"), bitarray("110", endian="little")
    sets = {"x": MaskSet({"w": PackedMask(bits, (3,), signs=signs)}), "d": MaskSet({"w": PackedMask(bits, (3, 1))})}
    own, sign = blake3(b"\x05").hexdigest(), blake3(b"\x03").hexdigest()
    rows = [["d", "w", "zero", [3, 1], own], ["x", "w", "flip", [3], sign], ["x", "w", "zero", [3], own]]
    expected = blake3(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    assert mask_id(sets) == expected


def test_bools_that_are_neither_zero_nor_one_are_refused() -> None:
    odd = torch.tensor([0, 1, 2], dtype=torch.uint8).view(torch.bool)  # as a file may hold them
    with pytest.raises(ConfigError, match=r"mask 'w': a mask must be bool, .*; got torch.bool with the byte 2"):
        MaskSet.from_tensors({"w": odd})
