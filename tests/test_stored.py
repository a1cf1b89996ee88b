"""Norms and heads as whole numbers of steps: what is loaded is what was measured, to the bit."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskpack.adapter.content import Parts
from maskpack.adapter.describe import inspect_adapter
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import read_adapter
from maskpack.adapter.steps import (
    FACTORS,
    MOST_SCALE,
    OCTAVE,
    SHIFT,
    Norm,
    integers_from_frame,
    integers_to_frame,
    norms_from_frame,
    norms_to_frame,
    rounded_rows,
    row_steps,
    rows_from_frame,
    rows_to_frame,
)
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Embedding, Head, same_size_int
from maskpack.codecs.base import to_frame
from maskpack.errors import AdapterError, BackboneMismatchError, CorruptAdapterError
from maskpack.mask import MaskSet
from maskpack.runtime.bank import MaskBank
from maskpack.runtime.load import load_mask, unload_mask
from maskpack.runtime.stream import load_masked
from maskpack.safetensors_io import write_tensors
from maskpack.training import TrainConfig, attach_scores, extract_parts, load_data, train_mask
from maskpack.training import settle as settle_values
from maskpack.training.data.base import Data
from maskpack.training.stored import batchnorm_statistics, beside_masks, settle, shortened
from maskpack.training.trainer import ObjectiveRun

from .fuzz.damage import File
from .helpers_adapter import base_of, random_masks, with_header, write
from .helpers_loops import adapter_accuracy

INTEGERS = st.lists(st.integers(-(2**23) + 1, 2**23 - 1), min_size=1, max_size=300)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(same_size_int(one), same_size_int(other))


# --- steps -----------------------------------------------------------------------------------------------------------


@given(INTEGERS)
def test_integers_come_back(values: list[int]) -> None:
    given_ = np.array(values, np.int32)
    frame = integers_to_frame([given_[:1], given_[1:]])
    assert integers_from_frame(frame, len(values)).tolist() == values
    for wrong in (4 * len(values) + 1, len(values) // 4):
        with pytest.raises(CorruptAdapterError):
            integers_from_frame(frame, max(wrong, 4 * len(values) + 1))


def test_small_integers_take_a_byte_or_less() -> None:
    values = np.random.default_rng(0).integers(-3, 4, 4096).astype(np.int32)
    assert len(integers_to_frame([values])) < 4096 * 3.2 / 8


def test_factors_are_the_nearest_whatever_computes_them() -> None:
    getcontext().prec = 60
    for k, factor in enumerate(FACTORS.tolist()):
        exact = Decimal(2) ** (Decimal(k) / OCTAVE) * 2**23
        assert Decimal(factor) * 2**23 == exact.to_integral_value()
        assert abs(exact % 1 - Decimal("0.5")) > Decimal("0.001"), "another rounding of the power could change it"
    assert Decimal(SHIFT) == Decimal(float(np.float32(Decimal(2).ln() / OCTAVE)))


finite = st.floats(0.0009765625, 1024, width=32)
signed = st.floats(-64, 64, width=32).map(lambda x: 0.0 if abs(x) < 1e-4 else x)
channel = st.tuples(finite, signed, finite, signed, st.booleans())


@given(st.lists(channel, min_size=1, max_size=20))
def test_the_nearest_steps_are_near_and_stay(rows: list[tuple[float, float, float, float, bool]]) -> None:
    columns = list(zip(*rows, strict=True))
    sign = torch.tensor([-1.0 if flip else 1.0 for flip in columns[4]])
    old, new = sign * torch.tensor(columns[0]), torch.tensor(columns[2])
    bias, shifted = torch.tensor(columns[1]), torch.tensor(columns[3])
    norm = Norm.nearest(old, bias, new, shifted)
    if norm is None:  # a shift of millions of steps
        assert (shifted.double() - bias.double() * (new / old).double()).abs().max() / (SHIFT * old.abs().min()) > 2**20
        return
    weight, moved = norm.values(old, bias)
    assert moved is not None
    assert (weight * new > 0).all()
    assert ((weight / new).log2().abs() <= 0.5 / OCTAVE + 1e-5).all()
    assert ((moved - shifted).abs() <= SHIFT * old.abs() * 0.5001 + 1e-5 * (bias.abs() * (new / old).abs() + 1)).all()
    again = Norm.nearest(old, bias, weight, moved)
    assert again is not None
    values = again.values(old, bias)
    assert values[1] is not None
    assert same(values[0], weight)
    assert same(values[1], moved)
    back = norms_from_frame(norms_to_frame({"a": norm}), {"a": (len(rows), True)})["a"].values(old, bias)
    assert same(back[0], weight)


@pytest.mark.parametrize(("old", "new"), [(0.0, 1.0), (1.0, 0.0), (1.0, np.nan), (1.0, np.inf), (1e-38, 1e38)])
def test_what_has_no_steps(old: float, new: float) -> None:
    weight, bias = torch.tensor([1.0, old]), torch.zeros(2)
    assert Norm.nearest(weight, bias, torch.tensor([1.0, new]), bias) is None
    assert Norm.nearest(weight, None, torch.tensor([1.0, new]), None) is None
    assert Norm.nearest(torch.ones(1), torch.zeros(1), torch.ones(1), torch.tensor([1e9])) is None


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=50)
def test_rows_come_back(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 4)
    weight[0] = 0
    steps, rounded = row_steps(weight), rounded_rows(weight)
    assert ((rounded - weight).abs() <= 0.5001 * steps.unsqueeze(1)).all()
    assert same(rounded_rows(rounded), rounded)
    assert np.array_equal(rows_from_frame(rows_to_frame(rounded, steps), steps.numpy(), columns), rounded.numpy())
    with pytest.raises(AdapterError, match="no multiple of its `steps`"):
        rows_to_frame(rounded + steps.unsqueeze(1) / 3, steps)


# --- a network -------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A network with every kind of normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.batch = nn.BatchNorm2d(8)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.plain(self.batch(self.conv(x)))).mean((2, 3))
        return self.fc(self.rms(self.layer(x)))


@pytest.fixture
def normed() -> nn.Module:
    torch.manual_seed(0)
    model = Normed()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model(torch.randn(32, 3, 8, 8) + 1)
    return model.eval()


def moved(model: nn.Module) -> None:
    """Change all norms, and statistics, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("conv", "fc")):
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter)).add_(0.01)
    model.train()
    for _ in range(5):
        model(2 * torch.randn(32, 3, 8, 8) - 1)
    model.eval()


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not name.startswith(("conv", "fc"))}


def kept(model: nn.Module, before: dict[str, Tensor]) -> Parts:
    """Return what is stored of a model, of which all norms and statistics may have changed."""
    whole = {name: one.detach().clone() for name, one in learned(model).items()}
    return shortened(Parts(MaskSet({}), None, batchnorm_statistics(model), whole), model, before)


@pytest.mark.parametrize("store", ["coded", "float16", "float32"])
def test_what_is_put_in_is_what_is_loaded(normed: nn.Module, tmp_path: Path, store: Any) -> None:
    base, x = {n: t.clone() for n, t in normed.state_dict().items()}, torch.randn(16, 3, 8, 8)
    before = beside_masks(normed)
    moved(normed)
    exact = normed(x).detach()
    assert settle(normed, before, learned(normed), store) == (store != "float32")
    stored = normed(x).detach()
    error = float((stored - exact).abs().max() / exact.abs().max())
    assert error <= {"coded": 0.1, "float16": 0.005, "float32": 0.0}[store]
    assert not settle(normed, before, learned(normed), store), "settled values stay"
    parts = replace(kept(normed, before), masks=random_masks({"conv.weight": (8, 3, 3, 3)}, 1.0))
    normed.load_state_dict(base)
    mark = fingerprint(normed, id="tests:normed", head=["fc"])
    adapter = save_adapter(tmp_path / "a.safetensors", parts, mark)
    found = read_adapter(tmp_path / "a.safetensors").parts(stream=True)
    assert sorted(found.norms) == (["batch", "group", "layer", "rms"] if store == "coded" else [])
    assert set(found.statistics) == {
        f"{name}.running_{what}"
        for name in (("plain",) if store != "float32" else ("plain", "batch"))
        for what in ("mean", "var")
    }
    dtypes = {str(one.dtype) for one in found.parameters.values()}
    assert dtypes == {"coded": set(), "float16": {"torch.float16"}, "float32": {"torch.float32"}}[store]
    load_mask(normed, adapter)
    assert same(normed(x).detach(), stored)
    again = convert_adapter(adapter, tmp_path / "b.safetensors")
    assert again.content == adapter.content
    unload_mask(normed)
    assert all(torch.equal(t, base[n]) for n, t in normed.state_dict().items())
    with MaskBank(normed) as bank:
        bank.add(adapter, "a")
        with bank.using("a"):
            assert same(normed(x).detach(), stored)
    assert all(torch.equal(t, base[n]) for n, t in normed.state_dict().items())
    write_tensors(tmp_path / "base.safetensors", {n: t for n, t in base.items() if "num" not in n}, {"format": "pt"})
    with torch.device("meta"):
        empty = Normed().eval()
    whole = load_masked(empty, tmp_path / "base.safetensors", adapter, device="cpu")
    assert same(whole(x).detach(), stored)


def test_nothing_is_stored_of_what_did_not_change(normed: nn.Module) -> None:
    before = beside_masks(normed)
    assert not settle(normed, before, {}, "coded")
    parts = kept(normed, before)
    assert [*parts.norms, *parts.parameters, *parts.statistics] == []
    with torch.no_grad():
        normed.layer.bias[3] += 1  # type: ignore[union-attr,operator]
        normed.layer.weight[5] *= -1  # type: ignore[union-attr,operator]
    settle(normed, before, {}, "coded")
    parts = kept(normed, before)
    assert (list(parts.norms), list(parts.parameters)) == (["layer"], [])
    assert parts.norms["layer"].scale.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("value", [0.0, 1e30, float("nan")])
def test_what_steps_cannot_say_is_stored_as_it_is(normed: nn.Module, value: float) -> None:
    before = beside_masks(normed)
    moved(normed)
    with torch.no_grad():
        normed.batch.weight[2] = value  # type: ignore[union-attr,operator]
    settle(normed, before, learned(normed), "coded")
    parts = kept(normed, before)
    assert sorted(parts.norms) == ["group", "layer", "rms"]
    held = abs(value) < 60000
    assert ("batch.running_mean" in parts.statistics) == (not held)
    assert parts.parameters["batch.weight"].dtype == (torch.float16 if held else torch.float32)
    found = parts.parameters["batch.weight"].float()
    assert torch.equal(found.nan_to_num(), normed.batch.weight.nan_to_num())  # type: ignore[union-attr,operator]


def test_norms_of_another_model_are_refused(normed: nn.Module, tiny: nn.Module) -> None:
    norm = Norm(np.zeros(8, np.int32), np.zeros(8, np.int32))
    for name, match in (("batch", "the model has no normalisation layer 'batch'"), ("bn2", "has not 8 channels")):
        with pytest.raises(BackboneMismatchError, match=match):
            Parts(MaskSet({}), norms={name: norm}).resolved(tiny.state_dict())
    with pytest.raises(BackboneMismatchError, match="no normalisation layer 'rms'"):
        Parts(MaskSet({}), norms={"rms": norm}).resolved(normed.state_dict())


@pytest.mark.parametrize("store", ["coded", "float32"])
def test_own_loops_store_what_was_put_in(tiny: nn.Module, tmp_path: Path, store: Any) -> None:
    """Norms whose statistics moved, a head, and a bias that learned; the base comes back."""
    base = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    attach_scores(tiny, select=["conv2.weight"], train=["conv2.bias", "bn2.*"], head="fc")
    tiny.train()(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for name, parameter in tiny.named_parameters():
            if parameter.requires_grad and "scores" not in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    settle_values(tiny.eval(), store)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    wanted = tiny(x).detach()
    adapter = save_adapter(tmp_path, tiny)
    parts = adapter.parts()
    coded = store == "coded"
    assert sorted(parts.norms) == (["bn1", "bn2"] if coded else [])
    assert bool(parts.statistics) == (not coded)
    assert parts.head is not None
    assert (parts.head.steps is not None) == coded
    assert parts.parameters["conv2.bias"].dtype == (torch.float16 if coded else torch.float32)
    extract_parts(tiny)
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny.state_dict().items() if "fc" not in name)
    assert torch.equal(load_mask(tiny, tmp_path)(x), wanted)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.5)


@pytest.mark.parametrize("bn", ["adapt", "freeze"])
@pytest.mark.parametrize("store", ["coded", "float16", "float32"])
def test_the_accuracy_is_that_of_what_is_loaded(
    tiny_backbone: Backbone, digits: Data, tmp_path: Path, store: Any, bn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = list[dict[str, Tensor]]()
    finish = ObjectiveRun.finish

    def seen(self: ObjectiveRun, at: Any) -> dict[str, float]:
        metrics = finish(self, at)
        state = tiny_backbone.model.state_dict()
        ended.append({name: one.clone() for name, one in state.items() if name.startswith(("bn", "fc"))})
        return metrics

    monkeypatch.setattr(ObjectiveRun, "finish", seen)
    config = TrainConfig(steps=30, batch_size=32, augment="none", bn=bn, store=store)
    result = train_mask(tiny_backbone, digits, config)
    adapter = save_adapter(tmp_path / "a.safetensors", result.parts, result.base, result.about)
    model = load_mask(tiny_backbone.model, adapter)
    for name, one in ended[0].items():
        assert not one.is_floating_point() or same(model.state_dict()[name], one), name
    for split in ("validation", "test"):
        if f"{split}_accuracy" in result.metrics:
            found = adapter_accuracy(model, adapter, digits.splits[split])
            assert found["accuracy"] == result.metrics[f"{split}_accuracy"]
    head = adapter.parts(stream=True).head
    assert head is not None
    assert (head.steps is not None, head.weight.dtype) == {
        "coded": (True, torch.float32),
        "float16": (False, torch.float16),
        "float32": (False, torch.float32),
    }[store]


# --- files -----------------------------------------------------------------------------------------------------------

LAYERS = {"bn1": (3, True), "ln": (2, False)}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    norms = {"bn1": Norm(np.array([1, -2, 3], np.int32), np.array([300, 0, -70000], np.int32))}
    norms["ln"] = Norm(np.array([-25, 24], np.int32))
    weight = rounded_rows(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    head = Head(Embedding("fc"), weight, torch.zeros(3), steps=row_steps(weight))
    path = tmp_path_factory.mktemp("valid") / "x.safetensors"
    save_adapter(path, Parts(random_masks({"a": (9,)}), head, norms=norms), base_of("a"))
    return path.read_bytes()


def test_they_are_read_as_written(valid: bytes, tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, valid))
    parts = adapter.parts()
    assert parts.norms["bn1"].scale.tolist() == [1, -2, 3]
    assert parts.norms["bn1"].shift is not None
    assert parts.norms["bn1"].shift.tolist() == [300, 0, -70000]
    assert (parts.norms["ln"].scale.tolist(), parts.norms["ln"].shift) == ([-25, 24], None)
    described = inspect_adapter(adapter)
    assert sum(described["bytes"].values()) == adapter.size == len(valid)
    assert described["bytes"]["default/norms"] == len(adapter.bytes_of("default/norms"))
    assert list(described["bytes"])[:4] == ["container", "index", "digests of the base", "default/payloads"]


def norms_of(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["sets"]["default"]["norms"]
    return found


FIELDS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda h: h["sets"]["default"].update(norms=3), "norms is 3, expected an object"),
    (lambda h: h["sets"]["default"].pop("norms"), "'default/norms' is U8 .*expected no such tensor"),
    (lambda h: norms_of(h).update(names="bn1"), r"norms.names .*as there are `channels` \(2\)"),
    (lambda h: norms_of(h).update(names="ln\nbn1"), "norms.names .*expected names sorted and once each"),
    (lambda h: norms_of(h).update(names="ln\nln"), "norms.names .*expected names sorted and once each"),
    (lambda h: norms_of(h).update(names="bn1\n\x00"), "norms.names .*plain names"),
    (lambda h: norms_of(h).update(channels=[3, 0]), "norms.channels is 0, expected numbers from 1, at most 16777216"),
    (lambda h: norms_of(h).update(channels=[1 << 24, 1]), "norms.channels is 0, expected numbers from 1, at most"),
    (lambda h: norms_of(h).update(channels=[1 << 28, 1]), "norms.channels is list, expected an array of 2 integers"),
    (lambda h: norms_of(h).update(channels=[-3, 2]), "norms.channels is list, expected an array of 2 integers"),
    (lambda h: norms_of(h).update(channels=[], names=""), "norms.names .*at least 1"),
    (lambda h: norms_of(h).update(channels=[300, 2]), "a zstd payload declares 24 as its size, expected 602 to 1806"),
    (lambda h: norms_of(h).update(channels=[1 << 23, 2]), r"a frame of \d+ bytes is too short for 16777218 integers"),
    (lambda h: norms_of(h).update(channels=[3, 4]), "a frame of 24 bytes holds no whole number of bytes for 10"),
    (lambda h: norms_of(h).update(shifts=[2, 0]), "norms.shifts is list, expected an array of 2 integers from 0 to 1"),
    (lambda h: norms_of(h).update(shifts=[1]), "norms.shifts is list, expected an array of 2 integers"),
    (lambda h: h["sets"]["default"]["head"].pop("features"), r"'default/head/bias' is F32 .*shape \(\);"),
    (lambda h: h["sets"]["default"]["head"].update(features=0), "features is 0, expected an integer from 1"),
    (lambda h: h["sets"]["default"]["head"].update(features=1 << 27), "numbers above 0, and at most 134217728"),
    (lambda h: h["sets"]["default"]["head"].update(features=1 << 20), "payload declares 15 as its size, expected"),
    (lambda h: h["sets"]["default"]["head"].update(features=1 << 22), "is too short for 12582912 integers"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), FIELDS, ids=[match[:40] for _, match in FIELDS])
def test_every_field_is_checked(change: Callable[[Any], Any], match: str, valid: bytes, tmp_path: Path) -> None:
    with pytest.raises(CorruptAdapterError, match=match) as caught:
        read_adapter(write(tmp_path, with_header(valid, change))).verify()
    assert "spoiled.safetensors" in str(caught.value)


def spoil(file: File) -> Iterator[tuple[str, bytes, str]]:
    yield (
        "default/norms",
        integers_to_frame([np.full(8, MOST_SCALE, np.int32)]),
        "'bn1' has more steps than 4096 or 4194304 allow",
    )
    shifts = np.array([0] * 7 + [-(1 << 22)], np.int32)
    yield "default/norms", integers_to_frame([shifts]), "'bn1' has more steps than 4096 or 4194304 allow"
    yield "default/norms", to_frame(bytes(32), 1), "declares 32 as its size, expected 8 to 24 bytes"
    yield "default/norms", b"", "a zstd payload begins with"
    yield "default/head/integers", to_frame(bytes(14), 1), "declares 14 as its size, expected 15 to 45 bytes"
    steps = np.array([1, 0, 1], "<f4")
    yield "default/head/steps", steps.tobytes(), "expected numbers above 0"
    steps[1] = np.nan
    yield "default/head/steps", steps.tobytes(), "expected numbers above 0"


def test_every_frame_is_checked(valid: bytes, tmp_path: Path) -> None:
    for name, data, match in spoil(File.of(valid)):
        file = File.of(valid)
        file.data[name] = data
        if name != "default/head/steps":
            file.entries[name]["shape"] = [len(data)]
        adapter = read_adapter(write(tmp_path, file.joined()))
        for use in (adapter.parts, adapter.verify):
            with pytest.raises(CorruptAdapterError, match=match):
                use()


def test_a_norm_is_not_stored_twice(valid: bytes, tmp_path: Path) -> None:
    file = File.of(valid)
    file.entries["default/parameters/bn1.bias"] = {"dtype": "F32", "shape": [3]}
    file.data["default/parameters/bn1.bias"] = bytes(12)
    with pytest.raises(CorruptAdapterError, match=r"parameters/bn1\.bias' is F32 .*expected no such tensor"):
        read_adapter(write(tmp_path, file.joined()))


def test_the_second_reader_has_the_same_values(valid: bytes, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("second_reader", Path(__file__).parent.parent / "docs" / "reader.py")
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(size, generator=generator) for name, size in (("bn1.weight", 3), ("bn1.bias", 3))}
    base |= {"ln.weight": torch.randn(2, generator=generator)}
    write_tensors(tmp_path / "base.safetensors", base, {"format": "pt"})
    path = write(tmp_path, valid)
    parts = read_adapter(path).parts(stream=True).resolved(base)
    found = reader.dense(path, tmp_path / "base.safetensors")
    assert parts.head is not None
    wanted = {f"default/parameters/{name}": tensor for name, tensor in parts.parameters.items()}
    wanted |= {"default/head/weight": parts.head.weight, "default/head/bias": parts.head.bias}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.numpy().dtype
        assert found[name].tobytes() == tensor.numpy().tobytes(), name


def test_a_head_that_is_no_multiple_is_refused(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    head = Head(Embedding("fc"), weight, steps=torch.ones(2))
    with pytest.raises(AdapterError, match="no multiple of its `steps`"):
        save_adapter(tmp_path / "x.safetensors", Parts(random_masks({"a": (9,)}), head), base_of("a"))
    head = replace(Head(Embedding("fc"), rounded_rows(weight)), steps=row_steps(weight))
    adapter = save_adapter(tmp_path / "x.safetensors", Parts(random_masks({"a": (9,)}), head), base_of("a"))
    found = adapter.parts(stream=True).head
    assert found is not None
    assert same(found.weight, head.weight)
