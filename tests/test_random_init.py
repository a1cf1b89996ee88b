"""Random backbones: seed and kind stand for the weights, the same everywhere."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from maskpack_cli.main import app
from maskpack_cli.options import Base
from torch import nn
from typer.testing import CliRunner

from maskpack import inspect_adapter, load_backbone, load_mask, save_adapter
from maskpack.adapter.card import render_card
from maskpack.adapter.content import Parts
from maskpack.adapter.read import read_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import Backbone, export_state, randomize
from maskpack.backbone.model import named_parameters, random_values
from maskpack.errors import BackboneError, ConfigError
from maskpack.mask import MaskSet

from .conftest import TinyNet


def by_the_format(name: str, shape: tuple[int, ...], kind: str, seed: int) -> list[float]:
    """docs/format.md section 3.1, word by word."""
    values, fan_in = [], math.prod(shape[1:])
    for i in range(math.prod(shape)):
        block = hashlib.shake_128(f"maskpack weight {seed} {name} {i // 65536}".encode()).digest(262144)
        at = 4 * (i % 65536)
        odd = 2 * (int.from_bytes(block[at : at + 4], "little") // 256) + 1 - 2**24
        value = odd / 2**24 * math.sqrt(6 / fan_in) if kind == "kaiming" else math.copysign(math.sqrt(2 / fan_in), odd)
        values.append(value)
    return values


@pytest.mark.parametrize("kind", ["kaiming", "signed-constant"])
def test_values_are_those_of_the_format(kind: str) -> None:
    for name, shape, seed in (("a.weight", (3, 2, 2, 1), 0), ("ä", (1, 7), 2**32 - 1)):
        expected = torch.tensor(by_the_format(name, shape, kind, seed), dtype=torch.float64).float()
        assert torch.equal(random_values(name, shape, kind, seed), expected.reshape(shape))


def test_values_do_not_change_from_one_release_to_the_next() -> None:
    digests = {
        kind: hashlib.sha256(
            random_values("layer1.0.conv1.weight", (64, 64, 20), kind, 7).numpy().tobytes()
        ).hexdigest()[:16]
        for kind in ("kaiming", "signed-constant")
    }
    assert digests == {"kaiming": "8ef5e3d20344005a", "signed-constant": "4da7dcfe5008a3c7"}


@pytest.mark.parametrize("kind", ["kaiming", "signed-constant"])
def test_moments(kind: str) -> None:
    values = random_values("w", (256, 300), kind, 1)
    assert abs(float(values.mean())) < 5e-4
    assert float(values.std()) == pytest.approx(math.sqrt(2 / 300), rel=0.01)
    if kind == "signed-constant":
        assert len(values.unique()) == 2
    else:
        assert float(values.abs().max()) == pytest.approx(math.sqrt(6 / 300), rel=1e-3)


def test_norms_biases_statistics_and_ties() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = TinyNet()
            self.b, self.a = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.weight = self.b.weight
            self.gamma = nn.Parameter(torch.full((3,), 0.25))

    net = Net()
    with torch.no_grad():
        for parameter in net.body.parameters():
            parameter.add_(5.0)
        net.body.bn1.running_mean.add_(3)
        net.body.bn1.running_var.add_(3)
    randomize(net, "kaiming", 4)
    assert torch.equal(net.a.weight, random_values("a.weight", (4, 4), "kaiming", 4))
    assert torch.equal(net.body.conv1.weight, random_values("body.conv1.weight", (8, 3, 3, 3), "kaiming", 4))
    assert all(bool((p == 0).all()) for name, p in named_parameters(net).items() if name.endswith("bias"))
    assert bool((net.body.bn1.weight == 1).all())
    assert (float(net.body.bn1.running_mean.sum()), float(net.body.bn1.running_var.mean())) == (0.0, 1.0)
    assert bool((net.gamma == 0.25).all())


def test_an_adapter_names_its_random_base_and_the_command_line_makes_it_again(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    made = load_backbone("timm/resnet10t", random_weights="signed-constant:3", image_size=32)
    assert (made.id, made.revision) == ("timm/resnet10t", "random:signed-constant:3")
    base = fingerprint(made.model, id=made.id, revision=made.revision, head=made.outside)
    name = "layer1.0.conv1.weight"
    masks = MaskSet.from_tensors({name: made.model.get_parameter(name) > 0})
    preprocess = {"kind": "image", "size": 32}
    path = tmp_path / "x.safetensors"
    adapter = save_adapter(path, Parts(masks), base, weights=made.model, preprocess=preprocess)
    again = Base().of(adapter)
    load_mask(again.model, adapter)  # verified against the fingerprint
    assert bool((again.model.get_parameter(name) >= 0).all())
    card = render_card(inspect_adapter(adapter))
    assert 'load_backbone("timm/resnet10t", random_weights="signed-constant:3").model' in card
    assert "base_model:" not in card
    other = load_backbone("timm/resnet10t", random_weights="signed-constant:4", image_size=32)
    with pytest.raises(Exception, match="made for the weights of timm/resnet10t at revision random:signed-constant:3"):
        load_mask(other.model, read_adapter(path))


def test_a_file_of_the_users_is_drawn_again_as_the_adapter_says(tmp_path: Path) -> None:
    """The adapter names kind and seed; the file comes from the command line only."""
    net = tmp_path / "nets.py"
    net.write_text(
        "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
    )
    made = load_backbone(f"{net}:net", random_weights="kaiming:3")
    base = fingerprint(made.model, id=made.id, revision=made.revision, head=made.outside)
    masks = MaskSet.from_tensors({"0.weight": made.model.get_parameter("0.weight") > 0})
    adapter = save_adapter(tmp_path / "x.safetensors", Parts(masks), base, weights=made.model)
    load_mask(Base(backbone=f"{net}:net").of(adapter).model, adapter)
    with pytest.raises(
        BackboneError, match="the adapter's base 'nets:net' cannot be fetched by its name; give it with"
    ):
        Base().of(adapter)
    other = Base(backbone=f"{net}:net", random_weights="kaiming:4").of(adapter)
    with pytest.raises(Exception, match="at revision random:kaiming:3, and the model has others"):
        load_mask(other.model, adapter)
    for words in (
        ["verify", str(adapter.path)],
        ["convert", str(adapter.path), str(tmp_path / "max"), "--profile", "max"],
    ):
        done = CliRunner().invoke(app, [*words, "--backbone", f"{net}:net"])
        assert done.exit_code == 0, done.stderr
    export_state(tmp_path / "w.safetensors", made.model)
    load_mask(Base(backbone=f"{net}:net", weights=tmp_path / "w.safetensors").of(adapter).model, adapter)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text("import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(2, 2))\n")
    for text in ("", "x", "-1", "1.5", "normal:1", "kaiming:", ":1", "kaiming:4294967296"):
        with pytest.raises(
            BackboneError, match=rf"must be SEED or KIND:SEED, .* kaiming, signed-constant; got '{text}'"
        ):
            load_backbone(f"{path}:net", random_weights=text)
    with pytest.raises(ConfigError, match=r"weights w\.safetensors and random_weights 1 are mutually exclusive"):
        load_backbone(f"{path}:net", random_weights=1, weights="w.safetensors")
    assert isinstance(load_backbone(f"{path}:net", random_weights="5"), Backbone)
