"""What learns beside all scores or in place of them: some of the scores, and parameters that are stored whole."""

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
from maskpack.training import attach_scores, extract_masks
from maskpack.training.config import TrainConfig, learning_rate
from maskpack.training.data.base import Data, load_data
from maskpack.training.features import embed, fit_probe, worth_warnings
from maskpack.training.learn import learn_scores, learning_names, learning_weights, model_stages, resolved
from maskpack.training.trainer import plan_training, train_mask

from .conftest import TinyNet

LANGUAGE = "text-generation"  # the task of a language model
QUICK = TrainConfig(optimizer="sgd", lr=20.0, steps=8, batch_size=32, augment="none", top=1.0, train=(), bn="adapt")


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
    whole = result.parts.resolved(tiny.state_dict()).parameters
    assert sorted(whole) == names  # the head's bias is the head's
    assert all(not torch.equal(one, tiny.state_dict()[name]) for name, one in whole.items())
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
    config = replace(QUICK, train=("bn1.weight",), steps=None, epochs=3, store="float32")
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


def test_norms_and_biases_by_word(tiny: nn.Module) -> None:
    norms = ["bn1.bias", "bn1.weight", "bn2.bias", "bn2.weight"]
    assert learning_names(tiny, ["norms"]) == norms
    assert learning_names(tiny, ["norms"], ["bn1"]) == norms[2:]
    assert learning_names(tiny, ["biases", "conv1.*"], ["fc"]) == ["bn1.bias", "bn2.bias", "conv1.weight", "conv2.bias"]
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    names = ["norm1.bias", "norm1.weight", "norm2.bias", "norm2.weight"]
    assert learning_names(encoder, ["norms"]) == names
    assert learning_names(nn.Linear(2, 2), ["norms"]) == [], "a backbone may have none"


def test_rates_of_scores_head_and_norms(tiny: nn.Module, digits: Data) -> None:
    config = TrainConfig(steps=2, batch_size=32, distance=3.0, head_lr=0.25, train=("norms",), train_lr=0.125)
    record = train_mask(backbone_of(tiny), digits, config).about.training
    assert record is not None
    assert record["rates"] == {"scores": config.score_lr(2, 0), "head": 0.25, "train": 0.125}
    assert replace(config, train_lr=None).beside_lr == 0.25


@pytest.mark.parametrize("steps", [1, 7, 200, 10_000])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_score_can_move_far_enough_in_any_number_of_steps(
    steps: int, schedule: Literal["cosine", "constant"]
) -> None:
    config = TrainConfig(schedule=schedule)
    rate, small = config.score_lr(steps, 1_000_001), config.score_lr(steps, 1_000_000)
    moved = sum(rate * learning_rate(config, step, steps) for step in range(steps))
    assert moved == pytest.approx(2.0) if steps <= 7 else moved >= 2.0
    assert (rate, small) == ((0.05, 0.1) if steps > 7 else (rate, rate)), "a longer run has no lower rate"
    assert rate >= 0.05
    assert replace(config, lr=0.5).score_lr(steps, 0) == 0.5
    for given, task, distance in ((1.1, None, 1.1), (1.1, LANGUAGE, 1.1), (None, LANGUAGE, math.sqrt(steps / 15))):
        exact = replace(config, distance=given).score_lr(steps, 0, task)
        assert sum(exact * learning_rate(config, step, steps) for step in range(steps)) == pytest.approx(distance)


def test_a_head_that_starts_as_the_probe(tiny: nn.Module, digits: Data) -> None:
    config = replace(QUICK, head_start="probe", steps=1, lr=1e-9, head_lr=1e-9, bn="freeze", store="float32")
    backbone = backbone_of(tiny.eval())
    assert digits.train is not None
    assert digits.test is not None
    x, y = embed(backbone, digits.train, cache=False)
    probe = fit_probe(x, y, 5)
    result = train_mask(backbone, digits, config)
    assert result.parts.head is not None
    assert torch.allclose(result.parts.head.weight, probe.weight, atol=1e-5)
    x, y = embed(backbone, digits.test, cache=False)
    right = float((probe.logits(x).argmax(1) == y).double().mean())
    assert result.metrics["test_accuracy"] == result.metrics["test_probe_accuracy"] == pytest.approx(right)


def test_a_plan_fits_no_probe(tiny: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskpack.training.objectives.supervised.fit_probe", lambda *_: pytest.fail("fitted"))
    assert plan_training(backbone_of(tiny), digits, replace(QUICK, head_start="probe"))["steps"] == 8


def test_the_end_says_what_it_was_worth(tiny: nn.Module, digits: Data) -> None:
    backbone, events = backbone_of(tiny), list[dict[str, object]]()
    config = replace(QUICK, steps=1, lr=1e-9, head_lr=1e-9, bn="freeze")
    result = train_mask(backbone, digits, config, report=lambda event: events.append(dict(event)))
    found = result.metrics
    for split in ("test", "validation"):
        over = found[f"{split}_accuracy"] - found[f"{split}_probe_accuracy"]
        assert found[f"{split}_over_probe"] == over < 0
    assert found["test_accuracy_without_masks"] == found["test_accuracy"]
    warnings = [event["warning"] for event in events if event["event"] == "warning"]
    assert result.about.training is not None
    assert result.about.training["warnings"] == warnings
    assert [str(one).split(",")[0] for one in warnings] == [
        "the masks keep every weight",
        f"the test accuracy is {100 * found['test_accuracy']:.2f} %",
    ]
    # 4 bits: (8 + 27) + (16 + 72) numbers a rank
    assert result.about.training["lora_bytes"] == {"rank_1_4bit": 17 + 44, "rank_8_4bit": 8 * 123 // 2}
    assert worth_warnings({"density": 0.9, "test_over_probe": 0.1, "validation_over_probe": -0.1}) == []
    longer = train_mask(backbone, digits, replace(QUICK, lr=60.0, head_lr=0.5, steps=60))
    assert longer.metrics["test_accuracy_without_masks"] < longer.metrics["test_accuracy"]


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


@pytest.mark.parametrize("method", ["threshold", "flip", "gumbel", "topk"])
def test_scores_of_the_largest_weights_take_no_more_memory_than_these(tiny: nn.Module, method: str) -> None:
    scores = attach_scores(tiny, method, ["conv*.weight"], top=0.25)
    assert {name: tuple(one.shape) for name, one in scores.items()} == {"conv1.weight": (54,), "conv2.weight": (288,)}
    torch.optim.Adam(scores.values(), lr=1.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for one in scores.values():
            one.sub_(10.0 * torch.rand(one.shape))
    inputs = torch.randn(2, 3, 8, 8)
    masked = tiny.eval()(inputs)
    masked.square().sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in scores.values())
    masks = extract_masks(tiny)
    for name, mask in masks.items():
        size = tiny.get_parameter(name).detach().abs()
        off = ~mask.tensor()
        assert 0 < off.sum() <= scores[name].numel()
        assert size[off].min() >= size.flatten().kthvalue(size.numel() - scores[name].numel() + 1).values
        with torch.no_grad():
            weight = tiny.get_parameter(name)
            weight[off] = -weight[off] if method == "flip" else 0.0
    assert torch.equal(tiny(inputs), masked)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_top_is_selective_largest_without_the_memory(
    tiny: nn.Module, digits: Data, optimizer: Literal["sgd", "adam"]
) -> None:
    config = replace(QUICK, optimizer=optimizer, lr={"sgd": 500.0, "adam": 0.5}[optimizer])
    found = [
        train_mask(backbone_of(tiny), digits, replace(config, **chosen)).parts.masks
        for chosen in ({"top": 0.3}, {"selective": "largest:0.3"})
    ]
    assert found[0].density < 1
    assert all(found[0][name].bits == found[1][name].bits for name in found[0])


def test_a_run_with_scores_of_some_weights_goes_on(tiny: nn.Module, digits: Data, tmp_path: Path) -> None:
    config = replace(QUICK, top=0.3, lr=500.0, bytes_budget=80, steps=None, epochs=3)
    whole = train_mask(backbone_of(tiny), digits, config)

    def stop(event: object) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:  # type: ignore[index]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mask(backbone_of(tiny), digits, config, output=tmp_path, report=stop)
    again = train_mask(backbone_of(tiny), digits, config, output=tmp_path, resume=True)
    assert again.parts.masks == whole.parts.masks
    assert whole.metrics["mask_bytes"] <= 80
    assert whole.parts.masks.density < 1


def test_defaults_that_follow_from_the_backbone() -> None:
    def resolved(weights: int, convolutional: int, **given: Any) -> tuple[Any, ...]:
        found = TrainConfig(**given).resolved(weights, convolutional)
        return found.top, found.bn

    small, large = (1.0, "adapt"), (0.1, "freeze")
    assert resolved(1_000_000, 0) == resolved(1_000_000, 1_000_000) == small
    assert resolved(1_000_001, 0) == resolved(1_000_001, 500_000) == resolved(1_000_001, 0, method="flip") == large
    assert resolved(1_000_001, 500_001) == (1.0, "freeze")
    for given in ({"scale": True}, {"method": "topk"}, {"selective": "first:1"}):
        assert resolved(2_000_000, 0, **given) == (1.0, "freeze")
    assert resolved(2_000_000, 0, objective="self-supervised") == (1.0, "adapt")
    assert resolved(7, 7, top=0.5, bn="freeze") == (0.5, "freeze")
    assert TrainConfig().resolved(1_000_001, 0, LANGUAGE).top == 0.02
    assert TrainConfig(method="topk").resolved(1_000_001, 0, LANGUAGE).top == 1.0


def test_weights_of_convolutions_are_counted() -> None:
    linear, convolution = nn.Linear(1000, 1100), nn.Conv2d(1000, 10, 11)
    for layers, top in (([linear], 0.1), ([convolution], 1.0), ([convolution, nn.Linear(1000, 1300)], 0.1)):
        assert resolved(TrainConfig(), backbone_of(nn.Sequential(*layers))).top == top


def test_top_is_for_one_score_a_weight(tiny: nn.Module) -> None:
    for method in ("nm", "ternary", "edit", "naive"):
        with pytest.raises(ConfigError, match=rf"top 0\.1 .* gumbel, threshold or topk without scale; got '{method}'"):
            attach_scores(tiny, method, ["conv2.weight"], top=0.1)
    with pytest.raises(ConfigError, match="got 'threshold' with scale"):
        attach_scores(tiny, "threshold", top=0.1, scale=True)
    for wrong in ({"scale": True}, {"selective": "random:0.5"}):
        with pytest.raises(ConfigError, match=r"top 0\.1 gives scores to some weights only; leave out"):
            TrainConfig(top=0.1, **wrong)
    with pytest.raises(ConfigError, match=r"top must be .* at most 1, got 1\.5"):
        TrainConfig(top=1.5)
    with pytest.raises(ConfigError, match=r"top must be .* at least 0 .*, got -0\.1"):
        TrainConfig(top=-0.1)


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
