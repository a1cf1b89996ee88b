"""What is said when an adapter cannot be saved or found."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from maskpack.adapter.content import Parts
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import AdapterError, BackboneMismatchError, ConfigError, StateError, UnknownNameError
from maskpack.mask import MaskSet, PackedMask

from .helpers_adapter import base_of, random_masks

SHAPES = {"layer1.0.weight": (4, 3, 3, 3), "layer2.weight": (5, 7), "layer3.weight": ()}
MASKS = random_masks(SHAPES)
BASE = base_of(SHAPES)


class TestErrors:
    def save(self, path: Path, masks: Any = MASKS, base: Any = BASE, **options: Any) -> None:
        before = sorted(path.iterdir())
        try:
            save_adapter(path / "x.safetensors", masks, base, **options)
        finally:
            assert sorted(path.iterdir()) == before, "something was left behind"

    @pytest.mark.parametrize(
        "id",
        ["/home/me/x", "./x", "../x", "~/x", "hf//models/x", "hf/./x", "C:\\x", "a\\b", "a/../b", "my/net.py:make"],
    )
    def test_local_paths_are_refused(self, tmp_path: Path, id: str) -> None:
        with pytest.raises(AdapterError, match=r"cannot be saved.*base\.id .*never a local path"):
            self.save(tmp_path, base=base_of(SHAPES, id))

    def test_empty_sets_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="the mask set 'default' is empty, expected at least one mask"):
            self.save(tmp_path, MaskSet({}))
        with pytest.raises(AdapterError, match="there is no mask set to save"):
            self.save(tmp_path, {})

    def test_names_must_be_in_the_fingerprint(self, tmp_path: Path) -> None:
        expected = "masks 'layer1.0.wieght', which is not among the 3 tensors of timm/.*nearest: layer1.0.weight"
        with pytest.raises(BackboneMismatchError, match=expected):
            self.save(tmp_path, random_masks({"layer1.0.wieght": (3,)}))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"class_names": ["a", ""]}, r"class_names .*non-empty texts"),
            ({"class_names": [1]}, r"class_names .*non-empty texts"),
            ({"task": "a\nb"}, r"task .*is 'a\\nb', expected text without control characters"),
            ({"preprocess": {"size": 3}}, r"preprocess\.kind .*is missing"),
            ({"training": {"loss": float("nan")}}, "training cannot be stored as JSON.*give finite numbers"),
            ({"training": {"path": Path("x")}}, "training cannot be stored as JSON: Object of type PosixPath"),
            ({"training": {"text": "\ud800"}}, "not valid JSON.*surrogates not allowed"),
        ],
    )
    def test_what_is_said_about_it(self, tmp_path: Path, options: dict[str, Any], match: str) -> None:
        with pytest.raises(AdapterError, match=match):
            self.save(tmp_path, **options)

    @pytest.mark.parametrize(
        ("parts", "match"),
        [
            ({"statistics": {"bn.num_batches_tracked": torch.zeros(1)}}, "tracked.*expected no such tensor"),
            ({"statistics": {"bn.running_mean": torch.zeros(1, dtype=torch.int64)}}, r"is torch\.int64"),
            ({"parameters": {"x": torch.zeros(1).double()}}, r"default/parameters/x is torch\.float64.*convert it"),
            ({"values": {"layer2.weight": torch.zeros(1)}}, r"values.*'layer2\.weight'.*expected no such tensor"),
            ({"head": Head(Embedding(), torch.zeros(2, 2))}, r"head\.pooling .*is None, expected one of"),
            ({"head": Head(Embedding("fc"), torch.zeros(2, 2), torch.zeros(3))}, r"head/bias.*of shape \(2,\)"),
            ({"masks": MaskSet({"layer3.weight": PackedMask.from_tensor(torch.tensor(True), "replace")})},
             r"'layer3.weight' replaces 0 weights and none are given, expected a flat tensor of 0"),
            ({"masks": MaskSet({"layer3.weight": PackedMask(MASKS["layer3.weight"].bits, (), alpha=0.1)})},
             "alpha 0.1, expected a positive float32"),
        ],
    )  # fmt: skip
    def test_what_is_said_about_parts(self, tmp_path: Path, parts: dict[str, Any], match: str) -> None:
        with pytest.raises(AdapterError, match=match):
            self.save(tmp_path, Parts(**{"masks": MASKS, **parts}))

    def test_profile_codec_and_set_names(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="profile must be one of .*, got 'small'"):
            self.save(tmp_path, profile="small")
        with pytest.raises(UnknownNameError, match="unknown codec 'zip'; known: "):
            self.save(tmp_path, codec="zip")
        with pytest.raises(AdapterError, match=r"name of a mask set .* is 'My Set', expected \[a-z0-9\]"):
            self.save(tmp_path, {"My Set": MASKS})

    def test_where_nothing_is(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(AdapterError, match=r"has no maskpack_model\.safetensors, it has: notes\.txt"):
            read_adapter(tmp_path)
        with pytest.raises(AdapterError, match=r"there is no .*x\.safetensors; .* has: notes\.txt"):
            read_adapter(tmp_path / "x.safetensors")
        with pytest.raises(StateError, match=r"cannot write .*notes\.txt: File exists"):
            save_adapter(tmp_path / "notes.txt", MASKS, BASE)
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(AdapterError, match="is not a regular file"):
            read_adapter(tmp_path / "pipe.safetensors")

    def test_unknown_set(self, tmp_path: Path) -> None:
        adapter = save_adapter(tmp_path, MASKS, BASE)
        for use in (adapter.parts, adapter.shapes, lambda set: next(adapter.iter_masks(set))):
            with pytest.raises(UnknownNameError, match="has no mask set 'expert'; it has: default"):
                use("expert")
