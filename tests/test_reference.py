"""Sets of one file that are coded against another of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maskpack.adapter.read import Adapter, read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.codecs.base import Bits, Side
from maskpack.codecs.zstd import Zstd
from maskpack.errors import AdapterError, CorruptAdapterError
from maskpack.mask import MaskSet, PackedMask, mask_id

from .helpers_adapter import base_of, random_masks, with_header

SHAPES = {"a.weight": (200, 300), "b.weight": (50, 70)}
BASE = base_of([*SHAPES, "c.weight"])
DISPATCHER = random_masks(SHAPES, 0.8)


def near(masks: MaskSet, seed: int, share: float = 0.01) -> MaskSet:
    """Return masks that differ in a share of their bits."""
    generator = torch.Generator().manual_seed(seed)

    def changed(bits: Any) -> Any:
        flips = PackedMask.from_tensor(torch.rand(len(bits), generator=generator) < share)
        return bits ^ flips.bits

    return MaskSet(
        {
            name: PackedMask(
                changed(mask.bits), mask.shape, mask.op, signs=None if mask.signs is None else changed(mask.signs)
            )
            for name, mask in masks.items()
        }
    )


def family(masks: MaskSet = DISPATCHER) -> dict[str, MaskSet]:
    return {"dispatcher": masks, **{f"expert-{i}": near(masks, i) for i in range(4)}}


def codings(adapter: Adapter, name: str) -> list[tuple[str, str, str | None]]:
    return [(p.name, p.coding.op, p.coding.reference) for p in adapter.header.sets[name].payloads]


def assert_comes_back(adapter: Adapter, sets: dict[str, MaskSet]) -> None:
    for name, masks in sets.items():
        assert adapter.parts(name).masks == masks
    assert adapter.verify()["mask_id"] is True
    assert adapter.mask_id == mask_id(sets), "as if there were no reference"


def test_experts_near_a_dispatcher_become_several_times_smaller(tmp_path: Path) -> None:
    sets = family()
    alone = sum(save_adapter(tmp_path / "x.safetensors", one, BASE).size for one in sets.values())
    adapter = save_adapter(tmp_path / "y.safetensors", sets, BASE)
    assert_comes_back(read_adapter(tmp_path / "y.safetensors"), sets)
    for name in sets:
        expected = None if name == "dispatcher" else "dispatcher"
        assert codings(adapter, name) == [("a.weight", "zero", expected), ("b.weight", "zero", expected)]
    sizes = {name: sum(p.size for p in one.payloads) for name, one in adapter.header.sets.items()}
    assert 5 * sizes["expert-0"] < sizes["dispatcher"]
    assert 2.5 * adapter.size < alone


def test_of_ternary_masks(tmp_path: Path) -> None:
    signs = near(DISPATCHER, 9, 0.4)
    ternary = {name: PackedMask(mask.bits, mask.shape, signs=signs[name].bits) for name, mask in DISPATCHER.items()}
    sets = family(MaskSet(ternary))
    adapter = save_adapter(tmp_path, sets, BASE)
    assert_comes_back(adapter, sets)
    assert {coding[1:] for coding in codings(adapter, "expert-1")} == {("flip", "dispatcher"), ("zero", "dispatcher")}


def test_only_where_the_reference_has_the_parameter_with_op_and_shape(tmp_path: Path) -> None:
    own = {**random_masks({"b.weight": (70, 50)}, 0.8), **random_masks({"c.weight": (9, 99)})}
    sets = {
        "dispatcher": DISPATCHER,
        "near": near(DISPATCHER, 2),
        "other": MaskSet({"a.weight": near(DISPATCHER, 1)["a.weight"], **own}),
        "flips": MaskSet({"a.weight": PackedMask(DISPATCHER["a.weight"].bits, (200, 300), "flip")}),
    }
    adapter = save_adapter(tmp_path, sets, BASE)
    assert_comes_back(adapter, sets)
    found = {name: [coding[2] for coding in codings(adapter, name)] for name in sets}
    assert found == {
        "dispatcher": [None, None], "near": ["dispatcher"] * 2, "other": ["dispatcher", None, None], "flips": [None],
    }  # fmt: skip


def test_the_smaller_payload_is_taken_one_by_one(tmp_path: Path) -> None:
    empty = PackedMask.from_tensor(torch.zeros(50, 70, dtype=torch.bool))
    sets = family()
    sets["expert-0"] = MaskSet({"a.weight": sets["expert-0"]["a.weight"], "b.weight": empty})
    adapter = save_adapter(tmp_path, sets, BASE)
    assert_comes_back(adapter, sets)
    assert [coding[2] for coding in codings(adapter, "expert-0")] == ["dispatcher", None]


def test_unrelated_sets_are_coded_alone_and_equal_ones_cost_nothing(tmp_path: Path) -> None:
    unrelated = {"x": DISPATCHER, "y": random_masks(SHAPES, 0.8, seed=5)}
    assert {coding[2] for coding in codings(save_adapter(tmp_path, unrelated, BASE), "y")} == {None}
    equal = save_adapter(tmp_path, {"x": DISPATCHER, "y": DISPATCHER}, BASE)
    assert sum(payload.size for payload in equal.header.sets["y"].payloads) < 100


def test_the_first_by_name_is_the_reference_in_whatever_order_sets_are_given(tmp_path: Path) -> None:
    sets = {"b": DISPATCHER, "a": near(DISPATCHER, 0), "c": near(DISPATCHER, 1)}
    adapter = save_adapter(tmp_path / "x.safetensors", sets, BASE)
    found = {name: {coding[2] for coding in codings(adapter, name)} for name in sets}
    assert found == {"a": {None}, "b": {"a"}, "c": {"a"}}
    save_adapter(tmp_path / "y.safetensors", dict(reversed(sets.items())), BASE)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_streamed_sets_are_asked_again(tmp_path: Path) -> None:
    sets = family()
    save_adapter(tmp_path / "x.safetensors", sets, BASE)
    streamed = {name: MaskSet.streamed(masks, masks.__getitem__) for name, masks in sets.items()}
    save_adapter(tmp_path / "y.safetensors", streamed, BASE)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_source_that_gives_another_mask_when_asked_again_is_found_out(tmp_path: Path) -> None:
    asked = []

    def make(name: str) -> PackedMask:
        asked.append(name)
        return near(DISPATCHER, 0)[name] if asked.count(name) > 1 else DISPATCHER[name]

    sets = {**family(), "dispatcher": MaskSet.streamed(SHAPES, make)}
    with pytest.raises(AdapterError, match="'a.weight' is another one when it is asked for again; what MaskSet"):
        save_adapter(tmp_path / "x.safetensors", sets, BASE)
    assert not list(tmp_path.iterdir())


def test_decoding_reads_the_referenced_payload(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sets = {"dispatcher": DISPATCHER, "expert": near(DISPATCHER, 1)}
    adapter = save_adapter(path, sets, BASE, codec="raw")
    assert {coding[2] for coding in codings(adapter, "expert")} == {None}, "raw gains nothing by a difference"
    assert adapter.parts("dispatcher").masks == DISPATCHER

    def refer(header: dict[str, Any]) -> None:
        header["sets"]["expert"]["codings"][0]["reference"] = "dispatcher"

    path.write_bytes(with_header(path.read_bytes(), refer))
    with pytest.raises(CorruptAdapterError, match=r"'a.weight' in set '\w+' does not decode: it has \d+ true bits"):
        read_adapter(path).parts("expert")


def test_the_codec_gets_the_difference_and_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets, seen = family(), list[tuple[bytes, bytes]]()
    original = Zstd.encode

    def encode(self: Zstd, bits: Bits, side: Side) -> bytes:
        if side.reference is not None:
            seen.append((bits.tobytes(), side.reference.tobytes()))
        return original(self, bits, side)

    monkeypatch.setattr(Zstd, "encode", encode)
    save_adapter(tmp_path, sets, BASE, profile="fast")
    for name in ("a.weight", "b.weight"):
        mask, other = sets["expert-0"][name].bits, sets["dispatcher"][name].bits
        assert ((mask ^ other).tobytes(), other.tobytes()) in seen
