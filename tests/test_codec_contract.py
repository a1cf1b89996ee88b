"""A codec that uses all that the contract offers, through a file and back; and one from another distribution."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.codecs.base import CODECS, Bits, Bytes, Codec, Profile, Side
from maskpack.codecs.choose import smallest
from maskpack.errors import AdapterError, BackboneMismatchError, ConfigError, CorruptAdapterError
from maskpack.mask import MaskSet

from .helpers_adapter import Mixed, base_of, random_masks, split_file, with_header
from .helpers_adapter import mixed as mixed


@pytest.mark.usefixtures("mixed")
class TestContract:
    shapes = {"a.weight": (33, 7), "b.weight": (5,)}  # noqa: RUF012

    def saved(self, path: Path) -> tuple[MaskSet, dict[str, torch.Tensor]]:
        weights = {name: torch.randn(shape) for name, shape in self.shapes.items()}
        masks = random_masks(self.shapes)
        save_adapter(path, masks, base_of(self.shapes, weights=weights), codec="test-mixed", weights=weights)
        return masks, weights

    def test_classes_and_config_reach_the_codec(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        masks, weights = self.saved(path)
        adapter = read_adapter(path)
        header = split_file(path.read_bytes())[0]["sets"]["default"]
        assert header["codings"] == [{"codec": "test-mixed", "op": "zero", "salt": 3}]
        assert adapter.parts(base=weights).masks == masks
        assert adapter.parts(base={name: w.bfloat16() for name, w in weights.items()}).masks == masks
        report = adapter.verify()
        assert report == {
            "payloads": 2, "decoded": 0, "needs_base": ["default/a.weight", "default/b.weight"], "mask_id": None,
        }  # fmt: skip

    def test_base_is_asked_for_and_checked(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        _, weights = self.saved(path)
        adapter = read_adapter(path)
        with pytest.raises(AdapterError, match=r"'a.weight' is packed with the weights of timm/.*pass that model"):
            adapter.parts()
        with pytest.raises(BackboneMismatchError, match=r"torch\.float16.*load the adapter before casting"):
            adapter.parts(base={name: w.half() for name, w in weights.items()})
        with pytest.raises(BackboneMismatchError, match="the base given has no such parameter"):
            adapter.parts(base={})
        with pytest.raises(BackboneMismatchError, match=r"the base given has one of shape \(2,\)"):
            adapter.parts(base={"a.weight": torch.zeros(2)})
        with pytest.raises(BackboneMismatchError, match="packed with other weights than those of the base given"):
            adapter.parts(base={name: -w.flip(0) + 1 for name, w in weights.items()})

    def test_needs_the_weights_to_write(self) -> None:
        with pytest.raises(ConfigError, match="'test-mixed' needs the weights of the base; pass weights="):
            save_adapter("x.safetensors", random_masks(self.shapes), base_of(self.shapes), codec="test-mixed")


class Declining(Mixed):
    """Takes no mask."""

    def encode(self, bits: Bits, side: Side) -> bytes | None:  # type: ignore[override]
        return None


def test_a_codec_may_decline() -> None:
    mask = (np.array([5], np.uint8), Side((3,)))
    offer = smallest([Declining(), CODECS["raw"]()], [mask])
    assert (offer.codec.id, offer.payload, offer.variant) == ("raw", b"\x05", 0)
    with pytest.raises(ConfigError, match=r"'test-mixed' is not made for this mask of shape \(3,\)"):
        smallest([Declining()], [mask])


@dataclass(frozen=True, slots=True)
class Context(Codec):
    """Sees that the reference reaches the codec: bits XOR the reference once more."""

    id = "test-context"

    def encode(self, bits: Bits, side: Side) -> bytes:
        raise NotImplementedError

    def decode(self, data: Bytes, side: Side) -> Bits:
        assert side.reference is not None
        return side.checked(np.frombuffer(data, np.uint8)) ^ side.reference

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return []


def test_a_set_may_be_coded_against_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS._classes, "test-context", Context)  # type: ignore[arg-type]
    shapes = {"a.weight": (33, 7), "b.weight": (5,)}
    dispatcher, expert = random_masks(shapes, 0.9, 1), random_masks(shapes, 0.8, 2)
    path = tmp_path / "x.safetensors"
    save_adapter(path, {"dispatcher": dispatcher, "expert": expert}, base_of(shapes), codec="raw")

    def refer(header: dict[str, Any]) -> None:
        one = header["sets"]["expert"]
        one["codings"] = [{"codec": "test-context", "op": "zero", "reference": "dispatcher"}]

    path.write_bytes(with_header(path.read_bytes(), refer))
    adapter = read_adapter(path)
    assert adapter.parts("expert").masks == expert
    assert adapter.parts("dispatcher").masks == dispatcher
    assert adapter.verify() == {"payloads": 4, "decoded": 4, "needs_base": [], "mask_id": True}


class Failing(Context):
    """Fails as only a stranger's codec can."""

    id = "test-failing"

    def decode(self, data: Bytes, side: Side) -> Bits:
        raise IndexError("list index out of range")


def test_whatever_a_codec_raises_becomes_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS._classes, "test-failing", Failing)  # type: ignore[arg-type]
    path = tmp_path / "x.safetensors"
    save_adapter(path, random_masks({"a": (9,)}), base_of("a"), codec="raw")

    def fail(header: dict[str, Any]) -> None:
        header["sets"]["default"]["codings"][0]["codec"] = "test-failing"

    path.write_bytes(with_header(path.read_bytes(), fail))
    with pytest.raises(CorruptAdapterError, match="'a' in set 'default' does not decode: list index out of range"):
        read_adapter(path).parts()


@dataclass(frozen=True, slots=True)
class Forgetful(Context):
    """Gives back other bits than it got."""

    id = "test-forgetful"

    def encode(self, bits: Bits, side: Side) -> bytes:
        return b""

    def decode(self, data: Bytes, side: Side) -> Bits:
        return np.zeros(side.size, np.uint8)


def test_a_codec_that_loses_bits_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS._classes, "test-forgetful", Forgetful)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="the codec 'test-forgetful' does not give back the mask that it coded"):
        save_adapter(tmp_path / "x", random_masks({"a": (9,)}), base_of("a"), codec="test-forgetful")
    assert not list(tmp_path.glob("x/*"))


def test_a_codec_from_another_distribution_is_found(tmp_path: Path) -> None:
    (tmp_path / "their_codec.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from maskpack.codecs.base import Codec
        from maskpack.codecs.raw import Raw

        @dataclass(frozen=True)
        class Theirs(Raw):
            '''Raw under another name.'''
            id = "theirs"
        """)
    )
    info = tmp_path / "their_codec-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[maskpack.codecs]\ntheirs = their_codec:Theirs\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from maskpack.codecs.base import CODECS\n"
        "print([cls.id for cls in CODECS.all()], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'theirs'" in result.stdout
    assert result.stdout.strip().endswith("False"), "codecs import torch"
