"""Baselines: few numbers learn, what is measured is what is stored, bytes are those of a code, the base stays."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskpack import load_backbone
from maskpack.adapter.steps import OCTAVE
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding
from maskpack.errors import ConfigError
from maskpack.lab.baselines.base import Fitted, Trial, find_baseline
from maskpack.lab.baselines.dense import Dense, quantized
from maskpack.lab.baselines.layers import Reweighted
from maskpack.lab.comparison import markdown, summaries
from maskpack.training import TrainConfig
from maskpack.training.data.base import load_data

from .helpers_models import bits as bits_of
from .helpers_models import same

SMALL = ("bitfit", "norms", "ia3", "lora:2", "lora-xs:3", "vera:4")
CONFIG = TrainConfig(bn="adapt", steps=12, batch_size=32, lr=0.05, warmup=0.0, augment="none")

# two plain layers, one in groups, one with biases
NETS = """
from torch import nn

def net():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False))
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), end, nn.Linear(12, 10))
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    return model

def grouped():
    return nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factory") / "nets.py"
    path.write_text(NETS)
    return path


def backbone_of(nets: Path, name: str = "net") -> Backbone:
    return load_backbone(f"{nets}:{name}", random_weights=0, image_size=8)


def fitted(name: str, backbone: Backbone, folder: Path, config: TrainConfig = CONFIG) -> Fitted:
    data = replace(load_data("digits:0-4"), test=None)
    return find_baseline(name).fit(Trial(backbone, data, data, config, folder, lambda _: None))


# --- numbers of few bits ----------------------------------------------------------------------------------------------


def slow_bits(rows: Tensor, bits: int) -> float:
    """Bits of rounded rows: a step each, and their levels as the coder meets them, or as they are."""
    symbols = []
    for row in rows:
        # the odd multiples of half a step: all differences of two are whole steps
        sizes = [abs(float(value)) for value in row if value]
        half_step = next(h for n in range(1, 256, 2) if fits(h := min(sizes) / n, sizes)) if sizes else 1.0
        symbols += [math.floor(float(value) / (2 * half_step) + 1e-4) for value in row]
    seen: Counter[int] = Counter()
    length = 0.0
    for number, symbol in enumerate(symbols):
        length -= math.log2((seen[symbol] + 0.5) / (number + 2**bits / 2))
        seen[symbol] += 1
    return 16 * len(rows) + 1 + min(length, bits * rows.numel())


def fits(half_step: float, sizes: list[float]) -> bool:
    ratios = [size / half_step for size in sizes]
    return all(abs(ratio - round(ratio)) < 1e-3 and round(ratio) % 2 == 1 for ratio in ratios)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_numbers_of_few_bits(bits: int) -> None:
    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(bits)) * torch.tensor([[1e-2], [1.0], [30.0]])
    values, size = quantized(rows, bits)
    for row, rounded in zip(rows, values, strict=True):
        levels = rounded.unique()
        assert len(levels) <= 2**bits
        error = float((row - rounded).square().mean() / row.square().mean())
        # Max (1960): errors of the best even steps for normal values; at 8 bits 1e-4
        assert error < {1: 0.38, 2: 0.13, 4: 0.013, 8: 2e-4}[bits]
    assert size == pytest.approx(slow_bits(values, bits), rel=1e-6)
    assert size <= 3 * 16 + 1 + 1500 * bits


def test_one_bit_is_a_sign_and_a_mean() -> None:
    rows = torch.tensor([[1.0, -2.0, 3.0, -6.0]])
    values, size = quantized(rows, 1)
    assert torch.equal(values, torch.tensor([[3.0, -3.0, 3.0, -3.0]]))
    assert size == 16 + 1 + 4


def test_uneven_levels_take_fewer_bits() -> None:
    rows = torch.full((1, 1000), 0.01)
    rows[0, ::100] = 1.0
    assert quantized(rows, 4)[1] < 16 + 1 + 300
    values, size = quantized(torch.zeros(2, 50), 4)
    assert not values.any()
    assert size < 2 * 16 + 1 + 50


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_what_is_measured_is_what_is_stored(name: str, nets: Path, tmp_path: Path) -> None:
    backbone, fresh = backbone_of(nets), backbone_of(nets)
    body = {key: one for key, one in bits_of(fresh.model).items() if not key.startswith("5.")}
    row = find_baseline(name)
    assert isinstance(row, Dense)
    row.check(backbone, CONFIG)
    starts = {key: one.detach().clone() for key, one in row.learn(backbone_of(nets), CONFIG).items()}
    found = fitted(name, backbone, tmp_path, replace(CONFIG, bn="freeze"))
    model = backbone.model

    def learned() -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        return {key: parameters[key if key in parameters else inner_name(key)].detach().clone() for key in starts}

    whole = learned()
    assert all(torch.equal(one, one.half().float()) for one in whole.values())
    assert found.sizes["weights"] == 2 * sum(one.numel() for one in whole.values())
    assert any(not torch.equal(one, starts[key]) for key, one in whole.items()), "something was learned"
    x = torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        before = found.predict(x)
        for control, few in found.controls.items():
            if control == "in steps":
                few.predict(x)
                scales = {key: one for key, one in learned().items() if key.endswith("weight")}
                assert name in ("norms", "bitfit")
                assert bool(scales) == (name == "norms")
                for key, one in scales.items():
                    steps = OCTAVE * torch.log2(one / starts[key])
                    assert torch.allclose(steps, steps.round(), atol=1e-3)
                continue
            width, total = int(control.split()[0]), 0.0
            assert few.sizes == {**found.sizes, "weights": few.sizes["weights"]}
            few.predict(x)
            for key, one in learned().items():
                change = one - starts[key] if row.relative else one
                rows = row.rows(key, change.contiguous())
                assert all(len(torch.unique((one * 1e5).round())) <= 2**width for one in rows)
                total += slow_bits(rows, width) if width < 8 else 0
            assert width == 8 or few.sizes["weights"] == math.ceil(total / 8)
            assert few.sizes["weights"] < found.sizes["weights"] or width == 8
        assert torch.equal(found.predict(x), before), "16 bits again"
    for module in model.modules():
        while parametrize.is_parametrized(module):
            leaf = next(iter(module.parametrizations))  # type: ignore[arg-type,union-attr]
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    left = {key.replace(".base_layer", ""): one for key, one in bits_of(model).items() if ".lora_" not in key}
    for key, one in body.items():
        if key not in starts and "running" not in key and "tracked" not in key:
            assert torch.equal(left[key], one), f"{key} is the base's"


@pytest.mark.parametrize("name", ["norms", "bitfit", "lora:2"])
def test_adapted_statistics_are_one_scale_and_one_shift_a_channel(name: str, nets: Path, tmp_path: Path) -> None:
    backbone, fresh = backbone_of(nets), backbone_of(nets)
    frozen = fitted(name, backbone_of(nets), tmp_path / "frozen", replace(CONFIG, bn="freeze"))
    found = fitted(name, backbone, tmp_path / "adapted")
    before, after = bits_of(fresh.model), bits_of(backbone.model)
    running = [key for key in before if "running" in key]
    assert running
    assert all(torch.equal(after[key], before[key]) for key in running), "what is loaded has the base's statistics"
    norms = [module for module in backbone.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert any(not (one.weight == 1).all() for one in norms)
    assert frozen.sizes["statistics"] == 0 < found.sizes["statistics"] <= 64 + 4 * sum(len(one.weight) for one in norms)
    own = sum(2 * (len(one.weight) + len(one.bias)) for one in norms) if name == "norms" else None
    assert (found.sizes["weights"], frozen.sizes["weights"]) == (0, own) if own else found.sizes["weights"] > 0
    assert found.sizes["head"] == frozen.sizes["head"] < 4 * (found.trained - 1)


def test_a_search_that_was_interrupted_goes_on(nets: Path, tmp_path: Path) -> None:
    backbone, config = backbone_of(nets), replace(CONFIG, bn="freeze", lr=None, train_lr=0.01, steps=10)
    data = replace(load_data("digits:0-4", labels_fraction=0.3), test=None)
    ended: list[Mapping[str, Any]] = []

    def report(event: Mapping[str, Any]) -> None:
        ended.append(event)
        if sum(one["event"] == "trial" for one in ended) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_baseline("auto:200").fit(Trial(backbone, data, data, config, tmp_path, report))
    found = find_baseline("auto:200").fit(Trial(backbone_of(nets), data, data, config, tmp_path, lambda _: None))
    assert found.note == "200 more steps to choose settings"
    assert (found.steps, found.sizes["masks"] > 0) == (10, True)
    assert len((tmp_path / "training/search/trials.jsonl").read_text().splitlines()) > 4


def inner_name(key: str) -> str:
    """Where a number that is learned of a weight is in the model."""
    place, _, own = key.rpartition(".")
    layer, _, leaf = place.rpartition(".")
    return f"{layer}.parametrizations.{leaf}.0.learned.{own}"


@pytest.mark.parametrize("name", SMALL)
def test_training_helps(name: str, nets: Path, tmp_path: Path) -> None:
    data = replace(load_data("digits:0-4", labels_fraction=0.3), test=None)
    events: list[Mapping[str, Any]] = []
    # the head hardly learns, so that it is the baseline that does
    config = replace(CONFIG, steps=40, bn="freeze", head_lr=1e-6)
    found = find_baseline(name).fit(Trial(backbone_of(nets), data, data, config, tmp_path, events.append))
    losses = [event["train_loss"] for event in events if event["event"] == "epoch"]
    assert losses[-1] < losses[0] - 0.01
    assert found.sizes["statistics"] == 0


def test_layers_in_groups_are_left_out_and_the_row_says_so(nets: Path, tmp_path: Path) -> None:
    assert fitted("ia3", backbone_of(nets), tmp_path / "ia3", replace(CONFIG, steps=1)).note == ""
    for name in ("lora:4", "vera:4"):
        found = fitted(name, backbone_of(nets), tmp_path / name.replace(":", "-"), replace(CONFIG, steps=1))
        assert found.note == "without 1 convolution in groups"
        assert {one.note for one in found.controls.values()} == {found.note}
        result: dict[str, Any] = {"accuracy": 0.5, "trained": 1, "bytes": 1, "steps": 1, "sizes": {}, "controls": {}}
        table = markdown(summaries(name, 1.0, 0.1, [0], [{**result, "note": found.note}]))
        assert f"| {name} (without 1 convolution in groups) |" in table
        with pytest.raises(ConfigError, match="chosen of the backbone .* are convolutions in groups, so there is no"):
            find_baseline(name).check(backbone_of(nets, "grouped"), CONFIG)


@pytest.mark.parametrize("name", ["ia3", "lora-xs:2", "vera:8"])
def test_linear_layers_of_both_kinds(name: str) -> None:
    class Conv1D(nn.Module):  # that of transformers' GPT-2 keeps its weight transposed
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Conv1D(), nn.Linear(10, 3))
    model.requires_grad_(False)
    plain, x = bits_of(model), torch.randn(5, 4)
    before = model(x)
    baseline = find_baseline(name)
    assert isinstance(baseline, Reweighted)
    learned = baseline.learn(Backbone(model, "m", embedding=Embedding("2")), TrainConfig())
    assert torch.equal(model(x), before), "nothing is changed yet"
    learned = dict(learned)
    torch.manual_seed(1)
    for one in learned.values():
        one.data.add_(torch.randn(one.shape))
    for place, (layer, transposed) in {"0.weight": (model[0], False), "1.weight": (model[1], True)}.items():
        own = {key.rpartition(".")[2]: one for key, one in learned.items() if key.startswith(place)}
        base = layer.parametrizations.weight.original.double()  # type: ignore[union-attr,operator]
        rows = base.T if transposed else base
        found = layer.weight.double()  # type: ignore[operator]
        assert torch.allclose((found.T if transposed else found), formula(name, rows, own), atol=1e-4)
    model(x).sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in learned.values())
    for index in (0, 1):
        parametrize.remove_parametrizations(model[index], "weight", leave_parametrized=False)
    assert same(bits_of(model), plain)


def formula(name: str, rows: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """The changed weight as the papers write it."""
    if name == "ia3":
        return torch.diag(own["factors"].flatten().double()) @ rows
    if name == "lora-xs:2":
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        return rows + u[:, :2] @ torch.diag(s[:2]) @ own["square"].double() @ v[:2]
    random = torch.Generator().manual_seed(0)
    left = (2 * torch.rand(len(rows), 8, generator=random).double() - 1) * math.sqrt(6 / 8)
    right = (2 * torch.rand(8, rows.shape[1], generator=random).double() - 1) * math.sqrt(6 / rows.shape[1])
    outer, inner = (torch.diag(own[key].flatten().double()) for key in ("outer", "inner"))
    return rows + outer @ left @ inner @ right
