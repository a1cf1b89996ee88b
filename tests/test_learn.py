"""What learns beside all scores or in place of them: some of the scores, and parameters that are stored whole."""

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from maskpack import save_adapter
from maskpack.adapter.read import read_adapter
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding, same_size_int
from maskpack.errors import ConfigError, SelectionError
from maskpack.mask import PackedMask
from maskpack.preprocess import ImagePreprocess
from maskpack.runtime.load import load_mask, unload_mask
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import Data
from maskpack.training.data.load import load_data
from maskpack.training.learn import learn_scores, learning_weights, model_stages
from maskpack.training.trainer import train_mask

from .conftest import TinyNet

QUICK = TrainConfig(optimizer="sgd", lr=20.0, steps=8, batch_size=32, augment="none")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.5)


def backbone_of(model: nn.Module) -> Backbone:
    return Backbone(model, "tests:tiny", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: same_size_int(t.clone()) if t.is_floating_point() else t.clone() for n, t in model.state_dict().items()}


# --- parameters that learn themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_norms_and_biases_learn_travel_and_leave_the_backbone_as_it_was(
    tiny: nn.Module, digits: Data, tmp_path: Path, seed: int
) -> None:
    before = bits(tiny)
    config = replace(QUICK, train=("bn*.weight", "*.bias"), head_lr=0.5, seed=seed)
    inputs = torch.randn(4, 3, 8, 8)
    ended: list[torch.Tensor] = []

    def report(event: object) -> None:
        if event["event"] == "end":  # type: ignore[index]
            with torch.no_grad():
                ended.append(tiny.eval()(inputs))

    result = train_mask(backbone_of(tiny), digits, config, report=report)
    names = ["bn1.bias", "bn1.weight", "bn2.bias", "bn2.weight", "conv2.bias"]
    assert sorted(result.parts.parameters) == names  # the head's bias is the head's
    assert all(not torch.equal(one, tiny.state_dict()[name]) for name, one in result.parts.parameters.items())
    after = bits(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = save_adapter(tmp_path / "x.safetensors", result.parts, result.base, result.about, weights=tiny)
    load_mask(tiny, read_adapter(adapter.path))
    with torch.no_grad():
        assert torch.equal(tiny.eval()(inputs), ended[-1])
    unload_mask(tiny)
    after = bits(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_learns_itself_is_in_the_checkpoint(tiny: nn.Module, digits: Data, tmp_path: Path) -> None:
    config = replace(QUICK, train=("bn1.weight",), steps=None, epochs=3)
    backbone = backbone_of(tiny)
    whole = train_mask(backbone, digits, config).parts.parameters["bn1.weight"]

    def stop(event: object) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:  # type: ignore[index]
            raise KeyboardInterrupt

    before = bits(tiny)
    with pytest.raises(KeyboardInterrupt):
        train_mask(backbone, digits, config, output=tmp_path, report=stop)
    after = bits(tiny)
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = train_mask(backbone, digits, config, output=tmp_path, resume=True)
    assert torch.equal(again.parts.parameters["bn1.weight"], whole)


def test_a_parameter_is_masked_or_learns(tiny: nn.Module, digits: Data) -> None:
    backbone = backbone_of(tiny)
    with pytest.raises(ConfigError, match=r"would train 2 parameters that are masked, first 'conv1.weight'; a mask"):
        train_mask(backbone, digits, replace(QUICK, train=("conv*.weight",)))
    with pytest.raises(SelectionError, match=r"train 'fc\.\*' matches none of 7 parameters"):
        train_mask(backbone, digits, replace(QUICK, train=("fc.*",)))
    config = replace(QUICK, objective="distribution", bn="freeze", train=("bn1.weight",))
    with pytest.raises(ConfigError, match=r"train would change bn1\.weight; leave out train"):
        train_mask(backbone, digits, config)


# --- what methods are told -------------------------------------------------------------------------------------------


def test_methods_are_told_where_training_stands(tiny: nn.Module, digits: Data) -> None:
    events: list[dict[str, float]] = []
    options = {"progressive": True, "share": 0.25}
    config = replace(QUICK, method="topk", method_options=options, steps=None, epochs=3)
    result = train_mask(backbone_of(tiny), digits, config, report=lambda event: events.append(dict(event)))
    first, second, last = [event["density"] for event in events if event["event"] == "epoch"]  # type: ignore[comparison-overlap]
    assert first == pytest.approx(0.75, abs=0.05)
    assert second == pytest.approx(0.5, abs=0.05)
    assert last == result.parts.masks.density == 0.25


def test_what_a_method_adds_to_the_loss_is_of_an_optimiser_step(tiny: nn.Module, digits: Data) -> None:
    losses = []
    for accumulate, strength in ((1, 0.0), (1, 0.1), (2, 0.1)):
        config = replace(QUICK, method="gumbel", method_options={"strength": strength}, steps=1, lr=1e-9, head_lr=1e-9)
        torch.manual_seed(0)
        config = replace(config, batch_size=32 // accumulate, accumulate=accumulate, bn="freeze")
        losses.append(train_mask(backbone_of(tiny), digits, config).metrics["train_loss"])
    # 1368 logits of 2, and 32 examples a step however they are accumulated
    assert losses[1] - losses[0] == pytest.approx(0.1 / 32 * 2 * 1368, rel=1e-3)
    assert losses[2] == pytest.approx(losses[1], rel=0.1)


# --- scores that learn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["first:1", "random:0.3", "largest:0.3"])
@pytest.mark.parametrize("method", ["threshold", "gumbel", "flip", "ternary", "edit"])
def test_weights_whose_scores_do_not_learn_are_kept(tiny: nn.Module, digits: Data, rule: str, method: str) -> None:
    lr = {"gumbel": 1e5, "edit": 1.0}.get(method, 500.0)
    config = replace(QUICK, method=method, selective=rule, lr=lr, seed=3)
    masks = train_mask(backbone_of(tiny), digits, config).parts.masks
    weights = {name: tiny.get_parameter(name) for name in ("conv1.weight", "conv2.weight")}
    learning = learning_weights(rule, weights, seed=3)
    removed = {name: ~masks[name].tensor() for name in masks}
    if method == "ternary":
        inverted = {name: ~PackedMask(mask.signs, mask.shape).tensor() for name, mask in masks.items() if mask.signs}
        removed = {name: one | inverted[name] for name, one in removed.items()}
    assert not any((removed[name] & ~learning[name]).any() for name in masks)
    assert any(one.any() for one in removed.values())


def test_which_scores_learn(tiny: nn.Module) -> None:
    weights = {name: tiny.get_parameter(name) for name in ("conv1.weight", "conv2.weight")}
    first = learning_weights("first:1", weights, seed=0)
    assert (bool(first["conv1.weight"].all()), bool(first["conv2.weight"].any())) == (True, False)
    largest = learning_weights("largest:0.25", weights, seed=0)
    for name, weight in weights.items():
        size = weight.detach().abs()
        assert int(largest[name].sum()) == round(0.25 * weight.numel())
        assert size[largest[name]].min() >= size[~largest[name]].max()
    drawn, other = (learning_weights("random:0.3", weights, seed=s)["conv2.weight"] for s in (0, 1))
    assert torch.equal(drawn, learning_weights("random:0.3", weights, seed=0)["conv2.weight"])
    assert not torch.equal(drawn, other)
    assert abs(float(drawn.float().mean()) - 0.3) < 4 * math.sqrt(0.21 / drawn.numel())
    assert all(one.all() for one in learning_weights("all", weights, seed=0).values())


def test_stages_are_the_modules_of_the_highest_level_that_are_not_nearly_all_of_it() -> None:
    resnet = {
        "conv1.weight": 9,
        "layer1.0.conv1.weight": 100,
        "layer1.1.conv1.weight": 100,
        "layer2.0.conv1.weight": 400,
    }
    assert list(model_stages(resnet)) == ["conv1", "layer1", "layer2"]
    vit = {
        "patch_embed.proj.weight": 10,
        "blocks.0.attn.weight": 400,
        "blocks.0.mlp.weight": 400,
        "blocks.1.mlp.weight": 400,
    }
    assert model_stages(vit) == {
        "patch_embed": ["patch_embed.proj.weight"],
        "blocks.0": ["blocks.0.attn.weight", "blocks.0.mlp.weight"],
        "blocks.1": ["blocks.1.mlp.weight"],
    }
    bert = {f"bert.encoder.layer.{i}.query.weight": 10 for i in range(3)}
    assert list(model_stages(bert)) == [f"bert.encoder.layer.{i}" for i in range(3)]
    assert model_stages({"weight": 5}) == {"weight": ["weight"]}


def test_the_first_stage_is_the_models_first() -> None:
    model = nn.Sequential(OrderedDict(z=nn.Linear(4, 4), a=nn.Linear(4, 4), fc=nn.Linear(4, 2)))
    scores = learn_scores(Backbone(model, "x", embedding=Embedding("fc")), TrainConfig(selective="first:1"))
    model(torch.randn(3, 4)).square().sum().backward()
    assert {name: bool((one.grad != 0).any()) for name, one in scores.items()} == {"a.weight": False, "z.weight": True}


def test_rules_that_there_are_not(tiny: nn.Module, digits: Data) -> None:
    for rule in (
        "half",
        "random:0",
        "random:1.5",
        "first:0",
        "first:1.5",
        "largest:",
        "all:1",
        "random:nan",
        "first:inf",
    ):
        with pytest.raises(ConfigError, match=rf"selective must be all, first:STAGES .* got '{rule}'"):
            TrainConfig(selective=rule)
    weights = {name: tiny.get_parameter(name) for name in ("conv1.weight", "conv2.weight")}
    with pytest.raises(ConfigError, match=r"'first:3' asks for 3 stages, the masked weights have 2: conv1, conv2"):
        learning_weights("first:3", weights, seed=0)
    for method in ("topk", "nm", "naive"):
        only = ("conv2.weight",)  # conv1 has no groups of four inputs
        config = replace(QUICK, method=method, selective="random:0.5", include=only)
        with pytest.raises(ConfigError, match=rf"those of the method '{method}' do not begin with every weight kept"):
            train_mask(backbone_of(TinyNet()), digits, config)
