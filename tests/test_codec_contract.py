"""A codec that uses all that the contract offers, through a file and back; and one from another distribution."""

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch

from maskpack.adapter.file import read_adapter, save_adapter
from maskpack.codecs.base import CODECS, Bits, Bytes, Codec, Profile, Side
from maskpack.codecs.choose import encode_set
from maskpack.errors import AdapterError, BackboneMismatchError, ConfigError
from maskpack.mask import MaskSet

from .helpers_adapter import base_of, random_bits, random_masks, split_file


@dataclass(frozen=True, slots=True)
class Mixed(Codec):
    """Uses all that a codec may use: bits XOR (class above the median), XOR a byte of the table, XOR the reference."""

    id = "test-mixed"
    needs_base = True
    salt: int = 3

    def _mask(self, side: Side) -> Bits:
        assert side.classes is not None
        assert side.table is not None
        mask = np.packbits(side.classes >= 128, bitorder="little")
        whole = np.full(side.size, side.table[0] ^ self.salt, np.uint8)
        if side.count % 8:
            whole[-1] &= (1 << side.count % 8) - 1
        return mask ^ whole ^ (0 if side.reference is None else side.reference)

    def encode(self, bits: Bits, side: Side) -> bytes:
        return (bits ^ self._mask(side)).tobytes()

    def decode(self, data: Bytes, side: Side) -> Bits:
        found = side.checked(np.frombuffer(data, np.uint8))
        return found ^ self._mask(side)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()] if profile == "max" else []

    def config(self) -> dict[str, int]:
        return {"salt": self.salt}

    def table(self, masks: object) -> bytes | None:
        return b"\x55table"


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "test-mixed" not in CODECS
    monkeypatch.setitem(CODECS._classes, "test-mixed", Mixed)  # type: ignore[arg-type]


@pytest.mark.usefixtures("mixed")
class TestContract:
    shapes = {"a.weight": (33, 7), "b.weight": (5,)}  # noqa: RUF012

    def saved(self, path: Path) -> tuple[MaskSet, dict[str, torch.Tensor]]:
        weights = {name: torch.randn(shape) for name, shape in self.shapes.items()}
        masks = random_masks(self.shapes)
        save_adapter(path, masks, base_of(self.shapes), codec="test-mixed", weights=weights)
        return masks, weights

    def test_classes_table_and_config_reach_the_codec(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        masks, weights = self.saved(path)
        adapter = read_adapter(path)
        header = json.loads(split_file(path.read_bytes())[0]["__metadata__"]["maskpack"])["sets"]["default"]
        assert header["codings"] == [{"codec": "test-mixed", "op": "zero", "salt": 3, "table": 0}]
        assert header["tables"] == [6]
        assert adapter.masks(weights) == masks
        assert adapter.masks({name: w.bfloat16() for name, w in weights.items()}) == masks
        report = adapter.verify()
        assert report == {
            "payloads": 2, "decoded": 0, "needs_base": ["default/a.weight", "default/b.weight"], "mask_id": None,
        }  # fmt: skip

    def test_base_is_asked_for_and_checked(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        _, weights = self.saved(path)
        adapter = read_adapter(path)
        with pytest.raises(AdapterError, match=r"'a.weight' is packed with the weights of timm/.*pass that model"):
            adapter.masks()
        with pytest.raises(BackboneMismatchError, match=r"torch\.float16.*load the adapter before casting"):
            adapter.masks({name: w.half() for name, w in weights.items()})
        with pytest.raises(BackboneMismatchError, match="the base given has no such parameter"):
            adapter.masks({})
        with pytest.raises(BackboneMismatchError, match=r"the base given has one of shape \(2,\)"):
            adapter.masks({"a.weight": torch.zeros(2)})
        with pytest.raises(BackboneMismatchError, match="packed with other weights than those of the base given"):
            adapter.masks({name: -w.flip(0) + 1 for name, w in weights.items()})

    def test_needs_the_weights_to_write(self) -> None:
        with pytest.raises(ConfigError, match="'test-mixed' needs the weights of the base; pass weights="):
            save_adapter("x.safetensors", random_masks(self.shapes), base_of(self.shapes), codec="test-mixed")

    def test_tables_that_cost_more_than_they_gain_are_given_up(self) -> None:
        masks = [(random_bits(800, 0.5, seed), Side((800,), np.zeros(800, np.uint8))) for seed in range(3)]
        coded, tables = encode_set(masks, "max", None, base=True)
        assert tables == []
        assert {one.codec.id for one in coded} == {"raw"}
        constant = [(np.full(1000, 0x56, np.uint8), Side((8000,), np.zeros(8000, np.uint8))) for _ in range(2)]
        coded, tables = encode_set(constant, "max", "test-mixed", base=True)
        assert (len(tables), [one.table for one in coded]) == (1, [0, 0])


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
