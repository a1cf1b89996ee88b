"""The heads of a training run: trained, random under a mask, made of text embeddings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner

from maskpack.adapter.read import read_adapter
from maskpack.adapter.steps import rounded_rows
from maskpack.adapter.write import save_adapter
from maskpack.backbone.classifier import encode
from maskpack.backbone.load import Backbone, load_backbone
from maskpack.backbone.model import MAX_WEIGHTS, Embedding, random_weight
from maskpack.errors import BackboneError, ConfigError
from maskpack.mask import masked_weight
from maskpack.runtime.load import load_mask, unload_mask
from maskpack.training.config import TrainConfig, config_from
from maskpack.training.data.base import Data, load_data
from maskpack.training.objectives.supervised import new_classifier
from maskpack.training.trainer import plan_training, train_mask

from .helpers_loops import adapter_accuracy
from .helpers_models import bits
from .helpers_models import clip as clip
from .helpers_models import same as same_bits

MASKED = TrainConfig(
    head_kind="masked",
    optimizer="sgd",
    lr=20.0,
    epochs=4,
    batch_size=32,
    augment="none",
    scale=True,
    bn="adapt",
    train=(),
    seed=3,
)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.5)


# --- masked ----------------------------------------------------------------------------------------------------------


def test_a_masked_head_learns_and_is_stored_as_seed_and_mask(
    tiny_backbone: Backbone, digits: Data, tmp_path: Path
) -> None:
    model = tiny_backbone.model
    before, fc = bits(model), model.fc
    result = train_mask(tiny_backbone, digits, replace(MASKED, optimizer="adam", lr=0.1, epochs=6, batch_size=16))
    assert same_bits(bits(model), before)
    assert model.fc is fc
    assert sorted(result.parts.masks) == ["conv1.weight", "conv2.weight"], "the head's mask is none of the body's"
    assert result.metrics["density"] == pytest.approx(result.parts.masks.density)
    assert result.metrics["test_accuracy"] > 0.35
    head = result.parts.head
    assert head is not None
    assert head.random is not None
    assert (head.embedding, head.bias, head.random.seed) == (Embedding("fc"), None, 3)
    mask = head.random.mask
    assert 0 < mask.kept < len(mask.bits), "its scores have learned"
    assert mask.alpha == mask.scaled().alpha
    values = random_weight(3, 5, 16)
    assert torch.equal(head.weight, masked_weight(values, mask.tensor(), torch.tensor(mask.alpha)))

    adapter = save_adapter(tmp_path, result.parts, result.base, result.about)
    assert "default/head/weight" not in adapter.spans
    assert adapter.about.training is not None
    assert (adapter.about.training["settings"]["head_kind"], adapter.about.training["settings"]["seed"]) == (
        "masked",
        3,
    )
    load_mask(model, adapter)
    assert digits.test is not None
    found = adapter_accuracy(model, adapter, digits.test)
    assert found["accuracy"] == result.metrics["test_accuracy"], "what is loaded is what was trained"
    unload_mask(model)
    assert same_bits(bits(model), before)


def test_scores_of_the_head_learn_at_the_bodys_rate_and_the_method_is_the_bodys(
    tiny_backbone: Backbone, digits: Data
) -> None:
    from maskpack.training.trainer import ObjectiveRun

    config = replace(MASKED, method_options={"init": "2"}, lr=7.0, scale=False)
    run = ObjectiveRun(tiny_backbone, digits, config)
    (scores,) = run.objective.scores()
    assert scores.shape == (5, 16)
    assert scores.unique().tolist() == [2.0]
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates[id(scores)] == 7.0
    assert len(rates) == 3
    assert [name for name, p in run.module.named_parameters() if p.requires_grad and p is scores] != []
    assert len(run.scored) == 2


def test_resuming_gives_the_same_masks(tiny_backbone: Backbone, digits: Data, tmp_path: Path) -> None:
    whole = train_mask(tiny_backbone, digits, MASKED)

    def stop(event: Any) -> None:
        if event["event"] == "step" and event["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mask(tiny_backbone, digits, MASKED, output=tmp_path, report=stop)
    assert isinstance(tiny_backbone.model.fc, torch.nn.Linear)
    again = train_mask(tiny_backbone, digits, MASKED, output=tmp_path, resume=True)
    assert again.parts.masks == whole.parts.masks
    for result in (whole, again):
        assert result.parts.head is not None
        assert result.parts.head.random is not None
    assert again.parts.head.random.mask == whole.parts.head.random.mask  # type: ignore[union-attr]


def test_behind_an_encoder_the_embedding_is_not_normalised(clip: Path) -> None:
    backbone = load_backbone(f"hf/{clip}")
    masked = new_classifier(backbone, ["a", "b"], MASKED)
    assert (masked.embedding, masked.linear.bias) == (Embedding(None, "projection"), None)
    assert new_classifier(backbone, ["a", "b"], TrainConfig()).embedding.normalize
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        x = encode(masked.model, images, masked.embedding)
        assert x.norm(dim=-1).max() != pytest.approx(1.0)
        assert torch.allclose(masked(images), x @ random_weight(3, 2, 12).T, atol=1e-5)


def test_a_head_too_large_to_be_read_is_refused_before_training(tiny_backbone: Backbone) -> None:
    class Wide:
        def __len__(self) -> int:
            return MAX_WEIGHTS // 16 + 1

    with pytest.raises(ConfigError, match="would have 134217744 weights, at most 134217728 are allowed; take a linear"):
        new_classifier(tiny_backbone, Wide(), MASKED)  # type: ignore[arg-type]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, told apart by brightness."""
    from PIL import Image

    root = tmp_path_factory.mktemp("flowers")
    for split, count in (("train", 12), ("test", 4)):
        for name, start in (("rose", 10), ("tulip", 160)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (start + 5 * i, start, start)).save(folder / f"{i}.png")
    return root


def test_a_text_head_is_frozen_and_travels_whole(clip: Path, flowers: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    backbone, data = load_backbone(f"hf/{clip}"), load_data(str(flowers))
    before = bits(backbone.model)
    config = TrainConfig(head_kind="text", head_template="a {label}", epochs=2, batch_size=8, augment="none")
    result = train_mask(backbone, data, config)
    assert same_bits(bits(backbone.model), before)
    head = result.parts.head
    assert head is not None
    assert (head.embedding, head.bias) == (Embedding(None, "projection", True), None)
    stored = rounded_rows(new_classifier(backbone, data.class_names, config).linear.weight)
    assert torch.equal(head.weight, stored), "not trained"
    assert len(result.parts.masks) == 14
    adapter = save_adapter(tmp_path, result.parts, result.base, result.about)
    model = load_mask(CLIPVisionModelWithProjection.from_pretrained(clip), adapter)
    assert data.test is not None
    assert adapter_accuracy(model, adapter, data.test)["accuracy"] == result.metrics["test_accuracy"]
    assert adapter.predict(model, [str(flowers / "test/rose/0.png")])[0].label in ("rose", "tulip")


def test_only_objectives_with_labels_have_a_head(tiny_backbone: Backbone, digits: Data) -> None:
    config = TrainConfig(head_kind="masked", objective="self-supervised")
    with pytest.raises(
        ConfigError, match="head_kind 'masked' is for a head, and the objective 'self-supervised' trains"
    ):
        plan_training(tiny_backbone, digits, config)


def test_views_of_other_sizes_pass_a_projection(clip: Path, flowers: Path) -> None:
    data = load_data(str(flowers), labelled=False)
    backbone = load_backbone(f"hf/{clip}", image_size=24)
    options = {"prototypes": 3, "dimension": 4, "queue": 4, "small_size": 16}
    plan = plan_training(
        backbone, data, TrainConfig(objective="self-supervised", objective_options=options, batch_size=4)
    )
    assert plan["loss"] > 0


@pytest.mark.parametrize("method", ["edit", "flip", "ternary"])
def test_masks_that_a_masked_head_cannot_be_stored_with(
    tiny_backbone: Backbone, digits: Data, method: str, tmp_path: Path
) -> None:
    config = TrainConfig(head_kind="masked", method=method)
    with pytest.raises(ConfigError, match=f"whose zeros remove weights, and the method '{method}' makes others; take "):
        train_mask(tiny_backbone, digits, config, output=tmp_path / "x")
    groups = TrainConfig(head_kind="masked", method="nm", method_options={"kept": 1, "group": 3})
    with pytest.raises(
        ConfigError, match=r"the masked head's weight: .* \(5, 16\) has no whole .* or take a linear head"
    ):
        plan_training(tiny_backbone, digits, groups)


def test_something_has_to_learn(tiny_backbone: Backbone, digits: Data) -> None:
    config = TrainConfig(method="naive", head_kind="own", train=())
    said = "nothing would learn: the method 'naive' follows from the weights, and no head is trained beside it; take"
    with pytest.raises(ConfigError, match=said):
        plan_training(tiny_backbone, digits, config)
    plan_training(tiny_backbone, digits, replace(config, head_kind="linear"))


@pytest.mark.parametrize("kind", ["linear", "masked"])
def test_the_other_heads_behind_a_projection(kind: Any, clip: Path, flowers: Path, tmp_path: Path) -> None:
    backbone, data = load_backbone(f"hf/{clip}"), load_data(str(flowers))
    result = train_mask(backbone, data, TrainConfig(head_kind=kind, epochs=2, batch_size=8, augment="none"))
    adapter = save_adapter(tmp_path, result.parts, result.base, result.about)
    head = read_adapter(tmp_path).parts(stream=True).head
    assert head is not None
    assert head.embedding == Embedding(None, "projection", kind == "linear")
    load_mask(backbone.model, adapter)
    assert data.test is not None
    assert adapter_accuracy(backbone.model, adapter, data.test)["accuracy"] == result.metrics["test_accuracy"]


# --- settings and the command line -----------------------------------------------------------------------------------


def test_settings(tiny_backbone: Backbone, digits: Data) -> None:
    with pytest.raises(ConfigError, match="head_kind must be one of linear, masked, text, own, got 'random'"):
        config_from({"head_kind": "random"})
    with pytest.raises(ConfigError, match=r"head_template must have \{label\} in it for the class, got 'a photo'"):
        config_from({"head_template": "a photo"})
    with pytest.raises(BackboneError, match="a text head needs a backbone of type .*tests:tiny is not"):
        plan_training(tiny_backbone, digits, TrainConfig(head_kind="text"))


def test_own_head_stays_as_it_is(tiny_backbone: Backbone, digits: Data) -> None:
    before = {name: one.clone() for name, one in tiny_backbone.model.state_dict().items()}
    config = TrainConfig(head_kind="own", epochs=1, batch_size=32, augment="none")
    head = train_mask(tiny_backbone, digits, config).parts.head
    assert head is not None
    assert torch.equal(head.weight, before["fc.weight"])
    assert all(torch.equal(one, before[name]) for name, one in tiny_backbone.model.state_dict().items())
    tiny_backbone.model.fc = nn.Linear(16, 7)
    with pytest.raises(
        ConfigError, match="'own' keeps the model's head, and tests:tiny has a head for 7 classes, the data have 5"
    ):
        train_mask(tiny_backbone, digits, config)


def test_command_line(clip: Path, flowers: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    train = ["train", "--backbone", f"hf/{clip}", "--data", flowers, "--steps", 2, "--batch-size", 8]
    made = run(*train, "--output", tmp_path / "t", "--head-kind", "text", "--head-template", "one {label}", "--quiet")
    assert made.exit_code == 0, made.stderr
    found = run("predict", tmp_path / "t", flowers / "test/rose/0.png", "--backbone", f"hf/{clip}", "--json")
    assert found.exit_code == 0, found.stderr
    found = run("eval", tmp_path / "t", "--data", flowers, "--backbone", f"hf/{clip}", "--knn", "--json")
    assert found.exit_code == 0, found.stderr
    made = run(*train, "--output", tmp_path / "m", "--head-kind", "masked", "--quiet")
    assert made.exit_code == 0, made.stderr
    assert "  head bytes: 3\n" in run("inspect", tmp_path / "m").stdout
    refused = run(*train, "--output", tmp_path / "x", "--head-kind", "dense")
    assert refused.exit_code == 2
    assert "'dense' is not one of" in refused.stderr
