"""Adapters through a file and back."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.errors import AdapterError, CorruptAdapterError, StateError
from maskpack.mask import MaskSet

from .fuzz.damage import File, taken
from .helpers_adapter import assert_same, base_of, full, random_masks, resnet50_shapes

SHAPES = {"layer1.0.weight": (4, 3, 3, 3), "layer2.weight": (5, 7), "layer3.weight": ()}
MASKS = random_masks(SHAPES)
BASE = base_of(SHAPES)
PREPROCESS = {"kind": "image", "mean": [0.485, 0.456, 0.406], "size": 224}


def test_everything_comes_back(tmp_path: Path) -> None:
    sets = full()
    about: dict[str, Any] = {
        "task": "image-classification",
        "class_names": ["cat", "größer 🐈", "x\ty".replace("\t", " ")],
    }
    record = {"seed": 0, "metrics": {"accuracy": 0.9}, "data": "uoft-cs/cifar100"}
    saved = save_adapter(tmp_path / "new/adapter", sets, base_of("ab"), preprocess=PREPROCESS, training=record, **about)
    adapter = read_adapter(tmp_path / "new/adapter")
    for one in (saved, adapter):
        assert_same(one, sets)
        assert one.base == base_of("ab")
        assert one.about.class_names == tuple(about["class_names"])
        assert (one.about.task, one.about.training, one.about.preprocess) == (about["task"], record, PREPROCESS)
    data = (tmp_path / "new/adapter/maskpack_model.safetensors").read_bytes()
    assert (adapter.digest, adapter.size) == (blake3(data).hexdigest(), len(data))
    assert adapter.shapes("expert-1") == {"a": (7,), "b": (2, 3)}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), codec=st.sampled_from([None, "raw", "zstd"]), profile=st.sampled_from(["fast", "default", "max"])
)
def test_any_masks_come_back(tmp_path: Path, data: st.DataObject, codec: str | None, profile: Any) -> None:
    name = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12)
    shape = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    shapes = data.draw(st.dictionaries(name, shape, min_size=1, max_size=4))
    density, scale = data.draw(st.sampled_from([0.0, 0.3, 1.0])), data.draw(st.booleans())
    masks = random_masks(shapes, density, scale=scale)
    path = tmp_path / "a.safetensors"
    save_adapter(path, masks, base_of(shapes), profile=profile, codec=codec)
    assert read_adapter(path).parts().masks == masks
    assert list(tmp_path.iterdir()) == [path]


def test_scale_may_be_on_for_some_parameters_only(tmp_path: Path) -> None:
    scaled = MaskSet({"a": random_masks({"a": (9,)}, scale=True)["a"], "b": random_masks({"b": (9,)})["b"]})
    adapter = save_adapter(tmp_path / "x.safetensors", scaled, base_of("ab"))
    assert adapter.parts().masks == scaled
    assert adapter.parts().masks["b"].alpha is None
    assert "default/scale" not in save_adapter(tmp_path, random_masks({"a": (9,)}), base_of("a")).spans


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0])
def test_impossible_scales_are_refused(tmp_path: Path, alpha: float) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(path, random_masks({"a": (9,)}, scale=True), base_of("a"))
    file = File.of(path.read_bytes())
    file.data["default/scale"] = struct.pack("<f", alpha)
    path.write_bytes(file.joined())
    with pytest.raises(CorruptAdapterError, match=f"the scale of 'a' is {alpha}, expected a positive number"):
        read_adapter(path).parts()


def test_same_input_gives_the_same_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"preprocess": PREPROCESS, "training": {"b": 1, "a": (2, 3)}, "class_names": iter("xyz")}
    torch.manual_seed(0)
    save_adapter(tmp_path / "1", full(), base_of("ab"), **options)
    torch.manual_seed(0)
    options["class_names"] = ["x", "y", "z"]
    save_adapter(tmp_path / "2", dict(reversed(full().items())), base_of("ba"), **options)
    for name in ("maskpack_model.safetensors", "maskpack_config.json", "README.md"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_bytes_are_canonical_and_the_official_library_reads_them(tmp_path: Path) -> None:
    save_adapter(tmp_path, full(), base_of("ab"), codec="raw")
    path = tmp_path / "maskpack_model.safetensors"
    data = path.read_bytes()
    tensor = load_file(path)["maskpack"]
    assert data == safetensors.torch.save({"maskpack": tensor}), "its bytes are those of the library"
    content = bytes(tensor.tolist())
    assert blake3(content[8:]).digest()[:8] == content[:8]
    text, section = taken(data)
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode()
    assert content.endswith(section)
    assert section.startswith(base_of("ab").tensors["a"] + base_of("ab").tensors["b"] + bytes([0x55, 0x33])), "raw"
    assert read_adapter(path).spans["default/head/bias"].shape == (3,)


def test_index_and_digests_are_lean(tmp_path: Path) -> None:
    shapes = resnet50_shapes()
    assert len(shapes) == 54
    adapter = save_adapter(tmp_path, random_masks(shapes, 0.97), base_of(shapes), profile="fast")
    described = inspect_adapter(adapter)
    assert described["index_bytes"] <= 700 + 12 * len(shapes)
    one = described["sets"]["default"]
    assert (one["parameters"], one["weights"]) == (54, sum(int(torch.Size(s).numel()) for s in shapes.values()))


def test_description_and_config(tmp_path: Path) -> None:
    sets = full()
    save_adapter(tmp_path, sets, base_of("ab"), class_names="xyz")
    described = inspect_adapter(tmp_path)
    assert json.loads(json.dumps(described)) == described
    assert described["sets"]["default"]["dense_bytes"] == {"head": 60, "parameters": 12, "scale": 8, "statistics": 32}
    assert [row["op"] for row in described["sets"]["default"]["payloads"]] == ["flip", "zero"]
    assert (described["weights"], described["sets"]["default"]["kept"]) == (20, 4)
    config = json.loads((tmp_path / "maskpack_config.json").read_text())
    assert (config["model_file"], config["size"]) == ("maskpack_model.safetensors", described["size"])
    assert config["blake3"] == described["blake3"]
    assert "payloads" not in config["sets"]["default"]


class TestFolder:
    def test_config_that_names_another_file_is_refused(self, tmp_path: Path) -> None:
        save_adapter(tmp_path / "a", MASKS, BASE)
        save_adapter(tmp_path / "b", random_masks(SHAPES, seed=1), BASE)
        (tmp_path / "b/maskpack_model.safetensors").replace(tmp_path / "a/maskpack_model.safetensors")
        with pytest.raises(CorruptAdapterError, match="one of them was replaced; fetch both again, tell their own"):
            read_adapter(tmp_path / "a")
        (tmp_path / "a/maskpack_config.json").write_text("{" + " " * (1 << 20))
        with pytest.raises(AdapterError, match="has 1048577 bytes; at most 1048576 are accepted; fetch it again"):
            read_adapter(tmp_path / "a")
        (tmp_path / "a/maskpack_config.json").write_text('{"size": 1, "size": 2}')
        with pytest.raises(CorruptAdapterError, match="the key 'size' comes twice"):
            read_adapter(tmp_path / "a")
        (tmp_path / "a/maskpack_config.json").unlink()
        assert read_adapter(tmp_path / "a").parts().masks == random_masks(SHAPES, seed=1)

    def test_saving_again_replaces_the_adapter_and_keeps_the_users_card(self, tmp_path: Path) -> None:
        save_adapter(tmp_path, MASKS, BASE)
        card = tmp_path / "README.md"
        card.write_text("My words.\n" + card.read_text().partition("---\n\n")[2])
        save_adapter(tmp_path, random_masks(SHAPES, 0.5), BASE)
        assert read_adapter(tmp_path).parts().masks == random_masks(SHAPES, 0.5)
        assert "My words." in card.read_text()
        assert card.read_text().count("maskpack:begin") == 1
        assert len(list(tmp_path.iterdir())) == 3

    def test_replacing_an_adapter_is_not_silent(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save_adapter(tmp_path / "a", MASKS, BASE, overwrite=False)
        with pytest.raises(StateError, match="overwrite=True"):
            save_adapter(tmp_path / "a", random_masks(SHAPES, 0.5), BASE, overwrite=False)
        assert read_adapter(tmp_path / "a").parts().masks == MASKS
        save_adapter(tmp_path / "a", MASKS, BASE, overwrite=True)
        assert not caplog.records
        save_adapter(tmp_path / "a", MASKS, BASE)
        assert [one.levelname for one in caplog.records] == ["WARNING"]

    def test_refused_adapter_leaves_the_old_one(self, tmp_path: Path) -> None:
        save_adapter(tmp_path, MASKS, BASE)
        with pytest.raises(AdapterError, match="class_names"):
            save_adapter(tmp_path, MASKS, BASE, class_names=["\n"])
        with pytest.raises(AdapterError, match=r"maskpack_config\.json would have \d+ bytes"):
            save_adapter(tmp_path, MASKS, BASE, class_names=["x" * 1000] * 1100)
        assert read_adapter(tmp_path).parts().masks == MASKS
        assert len(list(tmp_path.iterdir())) == 3
