"""An adapter packed anew is the same adapter in other bytes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack import fingerprint, load_mask, save_adapter
from maskpack.adapter.card import CARD_FILE
from maskpack.adapter.content import Parts
from maskpack.adapter.decode import Decoder
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import MODEL_FILE, Adapter, read_adapter
from maskpack.codecs.base import CODECS
from maskpack.errors import AdapterError, BackboneMismatchError, CorruptAdapterError, UnknownNameError
from maskpack.mask import MaskSet

from .helpers_adapter import Mixed, assert_same, base_of, full, random_masks, with_payload

ABOUT: dict[str, Any] = {
    "task": "image-classification",
    "class_names": ["cat", "größer 🐈", "dog"],
    "preprocess": {"kind": "image", "mean": [0.485, 0.456, 0.406], "size": 224},
    "training": {"seed": 7, "metrics": {"test_accuracy": 0.5}},
}


@pytest.fixture
def sets() -> dict[str, Parts]:
    """Two sets with everything that a set may hold."""
    return full()


@pytest.fixture
def rich(sets: dict[str, Parts], tmp_path: Path) -> Adapter:
    """Their adapter, with everything that may travel."""
    return save_adapter(tmp_path / "rich", sets, base_of(["a", "b"]), codec="raw", **ABOUT)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that uses the base's weights."""
    CODECS.all()
    monkeypatch.setitem(CODECS._classes, "test-mixed", Mixed)  # type: ignore[arg-type]


def assert_unchanged(found: Adapter, earlier: Adapter) -> None:
    assert found.mask_id == earlier.mask_id
    assert found.base == earlier.base
    for name in ("about", "sets"):
        assert getattr(found, name) == getattr(earlier, name), name
    coding = {"default/payloads", "expert-1/payloads"}
    assert found.spans.keys() == earlier.spans.keys()
    for name in found.spans.keys() - coding:
        assert bytes(found.bytes_of(name)) == bytes(earlier.bytes_of(name)), name
        assert found.spans[name].dtype == earlier.spans[name].dtype


def codecs_of(adapter: Adapter) -> set[str]:
    return {payload.coding.codec for one in adapter.header.sets.values() for payload in one.payloads}


def test_everything_but_the_coding_stays(rich: Adapter, sets: dict[str, Parts], tmp_path: Path) -> None:
    found = convert_adapter(tmp_path / "rich", tmp_path / "new", codec="zstd")
    assert_unchanged(found, rich)
    assert (codecs_of(rich), codecs_of(found)) == ({"raw"}, {"zstd"})
    assert_same(read_adapter(tmp_path / "new"), sets)
    back = convert_adapter(found, tmp_path / "back.safetensors", codec="raw")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "rich" / MODEL_FILE).read_bytes()
    assert back.digest == rich.digest


def test_masks_are_decoded_when_the_writer_asks(rich: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []
    original = Decoder.decode
    monkeypatch.setattr(
        Decoder, "decode", lambda *given, **more: decoded.append(given[1:3]) or original(*given, **more)
    )
    streams = {name: rich.parts(name, stream=True).masks for name in rich.sets}
    assert {name: one.shapes for name, one in streams.items()} == {name: rich.shapes(name) for name in rich.sets}
    assert decoded == []
    for name, one in streams.items():
        assert dict(one) == dict(one)
        assert one == rich.parts(name).masks
    with pytest.raises(UnknownNameError, match="has no mask set 'x'"):
        rich.parts("x", stream=True)
    seen: list[tuple[int, int]] = []
    many = random_masks({f"{i}": (i + 3, 5) for i in range(6)})
    save_adapter(tmp_path / "many", many, base_of(many))
    decoded.clear()

    def step(done: int, total: int) -> None:
        seen.append((done, total))
        assert len(decoded) == len(seen), "small payloads are coded in the caller's thread: none is ahead"

    convert_adapter(tmp_path / "many", tmp_path / "new", profile="fast", progress=step)
    assert (len(seen), seen[-1]) == (6, (many.total, many.total))


@pytest.mark.parametrize("single", [False, True])
def test_in_place(rich: Adapter, tmp_path: Path, single: bool) -> None:
    path = tmp_path / ("one.safetensors" if single else "rich")
    convert_adapter(rich, path, codec="raw")
    before = sorted(entry.name for entry in tmp_path.rglob("*"))
    found = convert_adapter(path, path, codec="zstd")
    assert_unchanged(found, rich)
    assert read_adapter(path).digest == found.digest != rich.digest
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == before


def test_scale_is_kept_to_the_bit(tmp_path: Path) -> None:
    """A trained alpha need not be what the mask's density gives."""
    masks = MaskSet({name: replace(mask, alpha=0.8125) for name, mask in random_masks({"a": (7, 9)}).items()})
    save_adapter(tmp_path / "a.safetensors", masks, base_of(["a"]))
    found = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", profile="max")
    assert found.parts().masks == masks
    assert found.parts().masks["a"].alpha == 0.8125


def test_the_owners_words_of_the_card_travel(rich: Adapter, tmp_path: Path) -> None:
    card = tmp_path / "rich" / CARD_FILE
    card.write_text(card.read_text().replace("---\n\n", "license: mit\n---\n\nMy own words.\n\n", 1))
    convert_adapter(tmp_path / "rich", tmp_path / "new", codec="zstd")
    text = (tmp_path / "new" / CARD_FILE).read_text()
    assert "license: mit" in text
    assert "My own words." in text
    assert text != card.read_text()  # the figures are the new ones
    (tmp_path / "new" / CARD_FILE).write_text("Other words.\n")
    convert_adapter(tmp_path / "rich", tmp_path / "new")
    assert "Other words." in (tmp_path / "new" / CARD_FILE).read_text()


@pytest.mark.usefixtures("mixed")
def test_codecs_that_use_the_base(tiny: nn.Module, tmp_path: Path) -> None:
    masks = MaskSet.from_tensors({"conv2.weight": tiny.get_parameter("conv2.weight") > 0})
    plain = save_adapter(tmp_path / "plain", masks, fingerprint(tiny, id="timm/tiny", head=["fc"]))
    packed = convert_adapter(plain, tmp_path / "packed", codec="test-mixed", base=tiny)
    assert codecs_of(packed) == {"test-mixed"}
    assert packed.mask_id == plain.mask_id
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match="packed with the weights of timm/tiny .* --backbone on the command line"):
        convert_adapter(packed, tmp_path / "again")
    with torch.no_grad():
        tiny.get_parameter("conv2.bias")[0] += 1
    with pytest.raises(BackboneMismatchError, match="made for the weights of timm/tiny, and the model has others"):
        convert_adapter(packed, tmp_path / "again", base=tiny)
    assert sorted(tmp_path.rglob("*")) == before
    with torch.no_grad():
        tiny.get_parameter("conv2.bias")[0] -= 1
    again = convert_adapter(packed, tmp_path / "packed", base=tiny.bfloat16())
    assert (again.mask_id, codecs_of(again) <= {"raw", "zstd"}) == (plain.mask_id, True)
    load_mask(tiny, tmp_path / "packed")


def test_masks_that_are_not_those_stated(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(path, MaskSet.from_tensors({"a": torch.tensor([True, False] * 4)}), base_of(["a"]), codec="raw")
    path.write_bytes(spoiled := with_payload(path.read_bytes(), b"\xaa"))
    for target in (tmp_path / "b.safetensors", tmp_path / "b", path):
        with pytest.raises(CorruptAdapterError, match="the decoded masks have the mask_id .*, the header states"):
            convert_adapter(path, target)
    assert path.read_bytes() == spoiled
    save_adapter(path, random_masks({"a": (3, 3)}), base_of(["a"]))
    with pytest.raises(UnknownNameError, match="unknown codec 'zip'"):
        convert_adapter(path, tmp_path / "b", codec="zip")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
