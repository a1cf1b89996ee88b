"""Rate-aware training: an estimate of the coded size, and masks that fit into a budget of bytes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from maskpack_cli.options import read_size
from torch import nn
from typer.testing import CliRunner

from maskpack import inspect_adapter, save_adapter
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding
from maskpack.errors import ConfigError
from maskpack.mask import MaskSet, PackedMask, mask_id
from maskpack.preprocess import ImagePreprocess
from maskpack.training import attach_scores, extract_masks
from maskpack.training.budget import RateControl, coded_bits, coded_bytes
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import Data, load_data
from maskpack.training.scores import scored_weights
from maskpack.training.trainer import train_mask

QUICK = TrainConfig(optimizer="sgd", lr=60.0, epochs=4, batch_size=32, augment="none", top=1.0, train=(), bn="adapt")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.5)


def backbone_of(model: nn.Module) -> Backbone:
    return Backbone(model, "tests:tiny", embedding=Embedding("fc"), preprocess=ImagePreprocess(8, 8))


def entropy(p: float) -> float:
    return 0.0 if p in (0.0, 1.0) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_estimate_is_the_entropy_of_rows_and_columns() -> None:
    torch.manual_seed(0)
    mask = (torch.rand(6, 3, 2, 2) > 0.2).float()
    rows = mask.reshape(6, 12).tolist()
    columns = list(zip(*rows, strict=True))
    expected = sum(12 * entropy(1 - sum(row) / 12) for row in rows)
    expected += sum(6 * entropy(1 - sum(column) / 6) for column in columns)
    expected -= 72 * entropy(1 - float(mask.mean()))
    assert float(coded_bits(mask)) == pytest.approx(max(expected, 0.0), rel=1e-5)
    flat = (torch.rand(100) > 0.1).float()
    assert float(coded_bits(flat)) == pytest.approx(100 * entropy(1 - float(flat.mean())), rel=1e-5)


def test_removing_costs_more_where_little_is_removed() -> None:
    mask = torch.ones(32, 64)
    mask[:4, ::3] = 0  # rows of which a third is gone
    mask[20, 5] = 0
    mask.requires_grad_(True)
    coded_bits(mask).backward()
    assert mask.grad is not None
    assert bool((mask.grad[4:] < 0).all()), "keeping a weight more makes the mask smaller"
    assert float(mask.grad[0].mean()) > float(mask.grad[25].mean()), "removing is cheaper in a row with many holes"
    assert float(mask.grad[25, ::3].mean()) > float(mask.grad[25, 1::3].mean()), "and in such a column"
    assert bool(torch.isfinite(mask.grad).all())
    whole = torch.ones(4, 4, requires_grad=True)
    coded_bits(whole).backward()
    assert whole.grad is not None
    assert bool(torch.isfinite(whole.grad).all())


@pytest.mark.parametrize("density", [0.99, 0.95, 0.8])
def test_estimate_is_near_what_codecs_take(density: float) -> None:
    torch.manual_seed(1)
    odds = torch.rand(256, 1) * torch.rand(1, 512) * 4 * (1 - density)
    mask = torch.rand(256, 512) > odds.clamp(max=0.5)
    size = coded_bytes([PackedMask.from_tensor(mask)])
    assert 0.85 * size < float(coded_bits(mask.float())) / 8 < size


def test_bytes_are_those_of_the_file(tiny: nn.Module, tmp_path: Path) -> None:
    from maskpack.adapter.content import Parts
    from maskpack.backbone.fingerprint import fingerprint

    torch.manual_seed(2)
    names = ("conv1.weight", "conv2.weight")
    masks = MaskSet.from_tensors({name: torch.rand(tiny.get_parameter(name).shape) > 0.1 for name in names})
    base = fingerprint(tiny, id="tests:tiny", head=("fc",))
    adapter = save_adapter(tmp_path / "x.safetensors", Parts(masks), base, weights=tiny)
    assert inspect_adapter(adapter)["sets"]["default"]["payload_bytes"] == coded_bytes(masks.values())


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["threshold", "gumbel", "flip"])
def test_masks_fit_into_the_budget(tiny: nn.Module, digits: Data, method: str) -> None:
    config = replace(QUICK, method=method, lr=60.0 if method == "threshold" else 600.0)
    free = train_mask(backbone_of(tiny), digits, config)
    size = coded_bytes(free.parts.masks.values())
    budget = size // 2
    assert size > 60, "or there is nothing to save"
    events: list[dict[str, Any]] = []
    bound = train_mask(
        backbone_of(tiny), digits, replace(config, bytes_budget=budget), report=lambda e: events.append(dict(e))
    )
    assert bound.metrics["mask_bytes"] == coded_bytes(bound.parts.masks.values()) <= budget
    assert bound.metrics["density"] == pytest.approx(bound.parts.masks.density)
    assert bound.parts.masks.density < 1, "and use it"
    epochs = [event for event in events if event["event"] == "epoch"]
    assert all(event["mask_bytes"] > 0 for event in epochs)
    weights = free.parts.masks.total
    same = train_mask(backbone_of(tiny), digits, replace(config, rate=8 * budget / weights))
    assert mask_id({"x": same.parts.masks}) == mask_id({"x": bound.parts.masks})


def test_pressure_looks_ahead(tiny: nn.Module) -> None:
    attach_scores(tiny, "threshold", ["conv*.weight"])
    control = RateControl(list(scored_weights(tiny).values()), 100.0)

    def moved(sizes: list[float]) -> float:
        """How the pressure changes over the last of these sizes."""
        control.trend, control.before, control.pressure = 0.0, 0.0, 1.0
        for control.size in sizes:
            last = control.pressure
            control.follow()
        return control.pressure / last

    assert moved([90.0] * 9) < 1 < moved([110.0] * 9)
    assert moved([70.0, 75.0, 80.0, 85.0, 90.0]) > 1, "in a few steps it will be too large"
    assert moved([150.0, 140.0, 130.0, 120.0, 110.0]) < 1, "and here within the budget"
    assert moved([1e-3] * 30) == pytest.approx(math.exp(-0.15)), "at most so much in a step"


def test_pressure_follows_the_size(tiny: nn.Module) -> None:
    attach_scores(tiny, "threshold", ["conv*.weight"])
    scored = list(scored_weights(tiny).values())
    control = RateControl(scored, 100.0)
    least, control.pressure = control.pressure, 1.0
    for _ in range(5):
        penalty = control.penalty()
        control.follow()
    assert control.pressure < 1, "nothing is removed yet"
    assert penalty.requires_grad
    with torch.no_grad():
        for one in scored:
            one.scores[torch.rand(one.scores.shape) < 0.5] = -1.0
    low = control.pressure = least
    for _ in range(99):
        control.follow()
    assert control.pressure == least
    control.penalty()
    control.follow()
    assert control.pressure > low
    penalty = control.penalty()
    masks = [one.binary().float().requires_grad_() for one in scored]
    bits = torch.stack([coded_bits(mask) for mask in masks]).sum()
    share = control.pressure / sum(mask.numel() for mask in masks)
    assert float(penalty.detach()) == pytest.approx(share * float(bits.detach()), rel=1e-5)
    found = torch.autograd.grad(penalty, [one.scores for one in scored])
    for own, expected in zip(found, torch.autograd.grad(bits, masks), strict=True):
        assert torch.allclose(own, share * expected, rtol=1e-4)
    before = [one.scores.detach().clone() for one in scored]
    assert control.fit() <= 100
    moves = [one.scores.detach() - old for one, old in zip(scored, before, strict=True)]
    assert all(torch.allclose(move, moves[0].flatten()[0].expand_as(move)) for move in moves), "all by the same number"
    assert float(moves[0].min()) > 0
    masks = extract_masks(tiny)
    assert coded_bytes(masks.values()) <= 100


def test_rows_that_are_gone_whole_fit_as_well() -> None:
    """The estimate of such a mask is 0; what the codecs take decides."""
    layer = nn.Linear(64, 64, bias=False)
    attach_scores(layer, "threshold")
    [one] = scored_weights(layer).values()
    with torch.no_grad():
        one.scores.fill_(60.0)
        one.scores[::3] = -40 - torch.rand(22, 64)
    control = RateControl([one], 14.0)
    assert control._estimate(0.0) < 1
    assert coded_bytes([one.mask()]) > 14
    assert control.fit() <= 14
    assert 0 < one.mask().density < 1
    assert coded_bytes([one.mask()]) <= 14


@pytest.mark.parametrize("extra", [{"scale": True}, {"selective": "random:0.5"}, {"head_kind": "masked"}])
def test_the_file_keeps_the_budget(tiny: nn.Module, digits: Data, tmp_path: Path, extra: dict[str, Any]) -> None:
    config = replace(QUICK, rate=0.4, **extra)
    result = train_mask(backbone_of(tiny), digits, config)
    for profile in ("default", "max"):
        path = tmp_path / f"{profile}.safetensors"
        adapter = save_adapter(path, result.parts, result.base, result.about, profile=profile, weights=tiny)
        one = inspect_adapter(adapter)["sets"]["default"]
        assert one["payload_bytes"] <= 0.4 * one["weights"] / 8
        assert one["density"] < 1
    assert result.parts.masks["conv2.weight"].alpha == (None if "scale" not in extra else pytest.approx(
        math.sqrt(result.parts.masks["conv2.weight"].density)
    ))  # fmt: skip


def test_statistics_are_taken_with_the_masks_that_are_stored(
    tiny: nn.Module, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(RateControl, "fit", lambda self: order.append("fit") or 1)
    monkeypatch.setattr(
        "maskpack.training.objectives.base.Objective.recalibrate", lambda self: order.append("recalibrate")
    )
    train_mask(backbone_of(tiny), digits, replace(QUICK, epochs=1, bytes_budget=200))
    assert order == ["fit", "recalibrate"]


@pytest.mark.slow
def test_resumed_is_the_same_to_the_bit(tiny: nn.Module, digits: Data, tmp_path: Path) -> None:
    config = replace(QUICK, bytes_budget=60)
    whole = train_mask(backbone_of(tiny), digits, config)

    def stop(event: Any) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mask(backbone_of(tiny), digits, config, output=tmp_path, report=stop)
    again = train_mask(backbone_of(tiny), digits, config, output=tmp_path, resume=True)
    assert mask_id({"x": again.parts.masks}) == mask_id({"x": whole.parts.masks})


@pytest.mark.parametrize("method", ["topk", "naive", "edit", "ternary", "nm"])
def test_methods_without_a_budget(tiny: nn.Module, digits: Data, method: str) -> None:
    config = replace(QUICK, method=method, include=("conv2.weight",), rate=0.5)
    with pytest.raises(ConfigError, match=rf"those of the method '{method}' are others; take flip, gumbel or thresh"):
        train_mask(backbone_of(tiny), digits, config)


def test_budgets_that_there_are_not(tiny: nn.Module, digits: Data) -> None:
    with pytest.raises(ConfigError, match=r"bytes_budget 100 and rate 0\.1 both limit the size of the masks; give one"):
        TrainConfig(bytes_budget=100, rate=0.1)
    for name, value in (("bytes_budget", 0), ("rate", -0.1), ("rate", math.nan)):
        with pytest.raises(ConfigError, match=f"{name} must be .*above 0, got {value}"):
            TrainConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"a budget of 1 bytes is less than the \d+ bytes that masks of these 2 param"
    ):
        train_mask(backbone_of(tiny), digits, replace(QUICK, bytes_budget=1))


def test_sizes_on_the_command_line(tmp_path: Path) -> None:
    given = ["train", "--backbone", "x", "--data", "digits", "--output", str(tmp_path / "a")]
    for text in ("0", "12 GB", "-5", "1e3", "kB"):
        done = CliRunner().invoke(app, [*given, f"--bytes-budget={text}"])
        assert done.exit_code == 2
        assert f"got '{text}'" in done.stderr
    for more in (["--bytes-budget", "200"], ["--rate", "0.1"]):
        done = CliRunner().invoke(app, [*given, *more, "--profile", "fast"])
        assert done.exit_code == 2
        assert "--bytes-budget and --rate are for the profiles default and max" in " ".join(done.stderr.split())
    sizes = {"200kB": 200_000, "1.5MB": 1_500_000, "1234": 1234, "12 B": 12, 300: 300}
    assert {text: read_size(text) for text in sizes} == sizes
    assert json.dumps(TrainConfig(bytes_budget=300).to_json())
