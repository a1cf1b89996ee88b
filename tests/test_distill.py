"""Distillation: the loss, who teaches, and the teacher that is trained first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from maskpack.backbone.load import Backbone, export_state, load_backbone, load_weights
from maskpack.errors import BackboneError, ConfigError
from maskpack.runtime.apply import masked
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import Data, load_data, loader, readable
from maskpack.training.objectives.supervised import HEAD, Distill, teacher, train_teacher
from maskpack.training.trainer import train_mask

from .helpers_cli import TRAIN
from .helpers_models import bits, clip, same, tiny_net

__all__ = ["clip"]
CONFIG = TrainConfig(steps=60, batch_size=32, augment="none", objective="distill")


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("digits:5-9", labels_fraction=0.5)


@pytest.fixture(scope="module")
def path(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a teacher of the tiny net."""
    backbone = tiny_net()
    before = bits(backbone.model)
    found = train_teacher(backbone, data, replace(CONFIG, steps=200, bn="adapt"), tmp_path_factory.mktemp("teacher"))
    assert same(bits(backbone.model), before), "a copy is fine-tuned"
    return found


def batch_of(backbone: Backbone, data: Data) -> tuple[Tensor, Tensor]:
    assert data.test is not None
    inputs, labels = next(iter(readable(loader(data.test, backbone.preprocess, batch_size=150))))
    assert isinstance(inputs, Tensor)
    return inputs, labels


@torch.no_grad()
def outputs(path: Path, inputs: Tensor) -> Tensor:
    """Return the logits of the network in a file, loaded as anybody would."""
    model = tiny_net().model
    load_weights(model, path, "fc")
    found: Tensor = model.eval()(inputs)
    return found


def with_teacher(path: object, **options: Any) -> TrainConfig:
    return replace(CONFIG, objective_options={"teacher": str(path), **options})


def test_the_teacher_knows_the_data(path: Path, data: Data) -> None:
    inputs, labels = batch_of(tiny_net(), data)
    assert float((outputs(path, inputs).argmax(1) == labels).float().mean()) > 0.7


@pytest.mark.parametrize(("strength", "temperature"), [(0.0, 2.0), (0.3, 1.0), (1.0, 4.0)])
def test_the_loss(path: Path, data: Data, strength: float, temperature: float) -> None:
    backbone = tiny_net()
    inputs, labels = batch_of(backbone, data)
    objective = Distill(backbone, data, with_teacher(path, strength=strength, temperature=temperature))
    objective.module.eval()
    logits = objective.module(inputs).detach().double()
    p = (outputs(path, inputs).double() / temperature).softmax(1)
    q = (logits / temperature).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    entropy = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    expected = (1 - strength) * entropy + strength * temperature**2 * divergence
    loss = objective.loss(objective.module, (inputs, labels))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_a_network_learns_what_its_teacher_says(path: Path, data: Data) -> None:
    backbone = tiny_net()
    inputs, _ = batch_of(backbone, data)
    wanted, away = outputs(path, inputs).log_softmax(1), []
    for strength in (0.0, 1.0):
        result = train_mask(backbone, data, with_teacher(path, strength=strength))
        assert result.about.training is not None
        assert result.about.training["settings"]["train"] == ["norms"], "its defaults are those for labels"
        with masked(backbone.model, result.parts), torch.no_grad():
            found = backbone.model(inputs).log_softmax(1)
        away.append(float(nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)))
    assert away[1] < away[0]


def test_teachers_that_do_not_fit(path: Path, data: Data, tmp_path: Path) -> None:
    backbone, fewer = tiny_net(), load_data("digits:5-7", labels_fraction=0.2)
    for config, given, said in (
        (
            CONFIG,
            data,
            r"the objective 'distill' needs a teacher, .* option teacher=FILE, or make one by train_teacher",
        ),
        (with_teacher(path), fewer, r"the teacher in .* has a head for 5 classes, and the data have 3 classes"),
    ):
        with pytest.raises(ConfigError, match=said):
            train_mask(backbone, given, config)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="do not fit the model"):
        train_mask(backbone, data, with_teacher(tmp_path / "other.safetensors"))


def test_an_encoder_has_its_head_beside_it(clip: Path, tmp_path: Path) -> None:
    backbone, data = load_backbone(f"hf/{clip}"), load_data("digits:5-9", labels_fraction=0.1)
    config = replace(CONFIG, steps=1, batch_size=4)
    path = train_teacher(backbone, data, config, tmp_path)
    found = teacher(backbone, load_backbone(f"hf/{clip}").model, str(path), 5)
    assert found.linear.weight.shape == (5, 12)
    result = train_mask(backbone, data, replace(config, objective_options={"teacher": str(path)}))
    assert result.parts.head is not None
    bare = load_backbone(f"hf/{clip}").model
    export_state(tmp_path / "bare.safetensors", bare)
    with pytest.raises(ConfigError, match="has no head, and the data have 5 classes"):
        teacher(backbone, bare, str(tmp_path / "bare.safetensors"), 5)
    assert not any(HEAD in name for name, _ in backbone.model.named_parameters())


def test_the_verb_trains_a_teacher_first_and_goes_on(tmp_path: Path) -> None:
    words = [*map(str, TRAIN), "--objective", "distill", "--steps", "6", "--checkpoint-every", "1steps"]
    words += ["--output", str(tmp_path / "a"), "--json"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, [*words, *more])

    planned = run("--dry-run")
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["teacher_steps"] == 6
    assert not (tmp_path / "a").exists()
    done = run()
    assert done.exit_code == 0, done.stderr
    folder = tmp_path / "a/training"
    assert (folder / "teacher.safetensors").exists()
    record = json.loads((tmp_path / "a/maskpack_config.json").read_text())
    assert "distill" in json.dumps(record)
    whole = (tmp_path / "a/maskpack_model.safetensors").read_bytes()
    # killed after the teacher, and in it
    for gone in (["checkpoint.safetensors"], ["checkpoint.safetensors", "teacher.safetensors"]):
        for name in gone:
            next(folder.glob(name)).unlink()
        again = run("--resume")
        assert again.exit_code == 0, again.stderr
        assert (tmp_path / "a/maskpack_model.safetensors").read_bytes() == whole
