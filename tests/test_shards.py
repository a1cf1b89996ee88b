"""Checkpoints in several files, as Hugging Face writes them, wherever weights are given; and indexes that lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner

from maskpack.backbone.load import load_backbone, load_weights
from maskpack.errors import BackboneError, DataError
from maskpack.importers.base import import_masks
from maskpack.safetensors_io import MAX_INDEX, TensorFile, read_tensors, write_tensors

from .conftest import TinyNet
from .helpers_models import shard

INDEX = "model.safetensors.index.json"
FACTORY = Path(__file__).parent.parent / "cli/maskpack_cli/digits_backbone.py"


@pytest.fixture
def folder(tiny: nn.Module, tmp_path: Path) -> Path:
    return shard(tmp_path / "sharded", tiny.state_dict())


def changed(folder: Path, **members: Any) -> Path:
    """Change members of the weight map (None: take it out); return the index."""
    index = json.loads((folder / INDEX).read_text())
    for name, where in members.items():
        name = name.replace("__", ".")
        index["weight_map"][name] = where
        if where is None:
            del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    return folder / INDEX


def test_read_by_folder_and_by_index(folder: Path, tiny: nn.Module) -> None:
    for path in (folder, folder / INDEX):
        for found in (read_tensors(path), TensorFile(path)):
            assert found.keys() == tiny.state_dict().keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in tiny.state_dict().items())
    assert list(TensorFile(folder)) == sorted(tiny.state_dict())
    assert TensorFile(folder).shapes["conv2.weight"] == (16, 8, 3, 3)


def test_a_model_loads_them(folder: Path, tiny: nn.Module) -> None:
    other = TinyNet()
    load_weights(other, folder)
    assert all(torch.equal(tensor, tiny.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_tied_tensor_is_under_one_of_its_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle, self.output = (
                nn.Embedding(50, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 50, bias=False),
            )
            self.output.weight = self.embedding.weight

    model = Tied()
    written = shard(tmp_path / "tied", model.state_dict(), "1KB")
    assert len(TensorFile(written)) == 3
    other = Tied()
    load_weights(other, written)
    assert torch.equal(other.output.weight, model.output.weight)
    assert other.output.weight is other.embedding.weight
    first = sorted(written.glob("*.safetensors"))[0]
    with pytest.raises(BackboneError, match=r"do not fit the model: \d missing"):
        load_weights(other, first)


def test_the_command_line_takes_them(tmp_path: Path) -> None:
    backbone = load_backbone(f"{FACTORY}:digits_cnn", random_weights=0)
    written = shard(tmp_path / "base", backbone.model.state_dict(), "100KB")
    name, weight = next((name, p) for name, p in backbone.model.named_parameters() if p.ndim == 4)
    masks = {name: weight > 0}
    write_tensors(tmp_path / "masks.safetensors", masks, {})
    packed = []
    for path in (written, written / INDEX):
        words = ["pack", tmp_path / "masks.safetensors", "--backbone", f"{FACTORY}:digits_cnn", "--weights", path,
                 "--output", tmp_path / "out", "--overwrite"]  # fmt: skip
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.stderr
        packed.append((tmp_path / "out" / "maskpack_model.safetensors").read_bytes())
    assert packed[0] == packed[1]


def test_masks_are_imported_from_them(folder: Path, tiny: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    for name in ("conv1.weight", "conv2.weight"):
        state[name][:, 0] = 0
    written = shard(tmp_path / "pruned", state)
    masks = import_masks(written, tiny, "zeros")
    assert list(masks) == ["conv1.weight", "conv2.weight"]
    assert torch.equal(masks["conv2.weight"].tensor(), state["conv2.weight"] != 0)


def test_one_file_in_a_folder(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)}, {})
    (tmp_path / "config.json").write_text("{}")
    assert read_tensors(tmp_path).keys() == {"a"}


def test_folders_that_have_none_or_several(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has 0 checkpoints, expected one \.safetensors file or one index \(\*"):
        read_tensors(tmp_path / "empty")
    for name in "ab":
        write_tensors(tmp_path / f"{name}.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(
        DataError, match=r"has 2 checkpoints \(a\.safetensors, b\.safetensors\), .* give the file or the"
    ):
        TensorFile(tmp_path)
    write_tensors(folder / "consolidated.safetensors", {"a": torch.ones(2)}, {})
    assert "a" not in TensorFile(folder)
    write_tensors(folder / "model.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(DataError, match=r"has 2 checkpoints \(model\.safetensors\.index\.json, model\.safetensors\)"):
        TensorFile(folder)
    assert "a" not in TensorFile(folder / INDEX)


@pytest.mark.parametrize("read", [read_tensors, TensorFile], ids=["whole", "tensor by tensor"])
def test_missing_shards_and_tensors(folder: Path, read: Any) -> None:
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    places = list(where.values())
    first = next(one for one in places if places.count(one) > 1)
    last = next(one for one in places if one != first)
    inside = sorted(name for name, one in where.items() if one == first)[0]
    with pytest.raises(DataError, match=r"disagree on 1 tensors, first 'zzz': the file has no such tensor; fetch"):
        read(changed(folder, zzz=first))
    said = rf"disagree on 1 tensors, first '{inside}': the file has that tensor, which the index does not place there"
    with pytest.raises(DataError, match=said):
        read(changed(folder, zzz=None, **{inside.replace(".", "__"): None}))
    changed(folder, **{inside.replace(".", "__"): first})
    (folder / last).unlink()
    with pytest.raises(
        DataError, match=rf"names \d files, of which 1 are missing, first '{last}'; fetch the checkpoint"
    ):
        read(folder)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "C:x", "..", "", "x\0"]
)
def test_an_index_cannot_lead_elsewhere(folder: Path, shard: str) -> None:
    write_tensors(folder.parent / "x.safetensors", {"conv1.weight": torch.ones(2)}, {})
    with pytest.raises(
        DataError, match=r"places 'conv1\.weight' in '.*', expected the name of a file beside the index"
    ):
        read_tensors(changed(folder, conv1__weight=shard))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "cannot read the index of a checkpoint: .*index.json is not valid JSON"),
        (b"\xff", "cannot read the index of a checkpoint: .*index.json is not valid JSON"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' comes twice"),
        (b"[]", "index.json has no 'weight_map' from names of tensors to names of files; fetch it again"),
        (b"{}", "has no 'weight_map'"),
        (b'{"weight_map": {}}', "has no 'weight_map'"),
        (b'{"weight_map": {"a": 3}}', "has no 'weight_map'"),
    ],
)
def test_damaged_indexes(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(DataError, match=said):
        read_tensors(tmp_path)


def test_an_index_that_is_absent_or_huge(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*index\.json; expected the index of a checkpoint"):
        read_tensors(tmp_path / INDEX)
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(MAX_INDEX + 1)
    with pytest.raises(DataError, match=r"has 67108865 bytes, an index has at most 67108864; fetch it again"):
        read_tensors(tmp_path / INDEX)


def test_an_index_of_the_greatest_size_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (folder / INDEX).stat().st_size
    monkeypatch.setattr("maskpack.safetensors_io.MAX_INDEX", size)
    assert "conv1.weight" in TensorFile(folder)
    monkeypatch.setattr("maskpack.safetensors_io.MAX_INDEX", size - 1)
    with pytest.raises(DataError, match=f"{size} bytes"):
        TensorFile(folder)


def test_the_first_tensor_by_name_is_named(folder: Path) -> None:
    first, *_ = json.loads((folder / INDEX).read_text())["weight_map"].values()
    with pytest.raises(DataError, match=r"on 9 tensors, first 'zz1'"):
        read_tensors(changed(folder, **{f"zz{number}": first for number in range(9, 0, -1)}))


def test_a_damaged_shard_is_named(folder: Path) -> None:
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(DataError, match=f"cannot read .*{victim.name} as a safetensors file"):
        TensorFile(folder)
