"""load_masked: the bits of load_mask on a loaded model, one tensor at a time, and no weights after an error."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskpack import MaskSet, fingerprint, load_mask, load_masked, save_adapter, unload_mask
from maskpack.adapter.content import Parts
from maskpack.backbone.load import export_state, load_weights
from maskpack.errors import AdapterError, BackboneError, BackboneMismatchError, ConfigError, DataError, StateError
from maskpack.mask import PackedMask
from maskpack.runtime import stream
from maskpack.runtime.apply import applied
from maskpack.runtime.load import MaskpackWarning
from maskpack.safetensors_io import TensorFile, read_tensors, write_tensors

from .conftest import TinyNet
from .helpers_models import bits, make_adapter, random_masks, same, shard


def empty(make: Callable[[], nn.Module] = TinyNet) -> Any:
    """A model on the meta device."""
    with torch.device("meta"):
        return make().eval()


@pytest.fixture
def weights(tiny: nn.Module, tmp_path: Path) -> Path:
    export_state(tmp_path / "base.safetensors", tiny)
    return tmp_path / "base.safetensors"


def expected(weights: Path, ref: Any, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The long way: weights, then mask."""
    model = TinyNet().eval().to(dtype)
    load_weights(model, weights)
    return load_mask(model, ref, restorable=False, **options)


def kinds(model: nn.Module) -> dict[str, Any]:
    """Masks of every kind that goes onto weights."""
    masks = random_masks(model)
    signs = random_masks(model, 1)
    ternary = {n: PackedMask(m.bits, m.shape, signs=signs[n].bits) for n, m in masks.items()}
    replace = MaskSet({name: PackedMask(mask.bits, mask.shape, "replace") for name, mask in masks.items()})
    values = {name: torch.randn(len(mask.bits) - mask.kept) for name, mask in masks.items()}
    return {
        "zero": masks,
        "scale": random_masks(model, scale=True),
        "flip": MaskSet({name: PackedMask(mask.bits, mask.shape, "flip") for name, mask in masks.items()}),
        "ternary": MaskSet(ternary),
        "replace": Parts(replace, values=values, parameters={"bn1.bias": torch.ones(8)}),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["zero", "scale", "flip", "ternary", "replace"])
def test_same_bits_as_the_long_way(
    tmp_path: Path, tiny: nn.Module, weights: Path, kind: str, dtype: torch.dtype
) -> None:
    save_adapter(tmp_path / "a", kinds(tiny)[kind], fingerprint(tiny, id="tests:tiny", head=["fc"]))
    model = empty().to(dtype)
    assert load_masked(model, weights, tmp_path / "a") is model
    assert same(bits(model), bits(expected(weights, tmp_path / "a", dtype)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is TinyNet


@pytest.mark.parametrize("head", ["replace", "keep"])
def test_head_statistics_and_what_is_recorded(tmp_path: Path, tiny: nn.Module, weights: Path, head: Any) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    model = empty()
    model.conv1.weight.requires_grad_(False)
    load_masked(model, weights, adapter, head=head)
    assert same(bits(model), bits(expected(weights, adapter, head=head)))
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7 if head == "replace" else 5)
    assert not model.conv1.weight.requires_grad
    record = applied(model)
    assert record is not None
    assert (record.mask_id, record.restorable) == (adapter.mask_id, False)
    with pytest.raises(StateError, match="loaded with restorable=False and cannot be undone"):
        unload_mask(model)
    with pytest.raises(StateError, match="this model has a mask already; load_masked is for a model without one"):
        load_masked(model, weights, adapter)


def test_sharded_and_source_mode(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    adapter = save_adapter(tmp_path / "a", kinds(tiny)["replace"], fingerprint(tiny, id="tests:tiny", head=["fc"]))
    folder = shard(tmp_path / "sharded", tiny.state_dict())
    model = load_masked(empty(), folder, adapter, mode="source")
    assert same(bits(model), bits(expected(weights, adapter, mode="source")))
    zeros = make_adapter(tmp_path / "b", tiny)
    with pytest.raises(AdapterError, match="replaces no weights; mode='source'"):
        load_masked(empty(), weights, zeros, mode="source")
    with pytest.raises(ConfigError, match="verify must be one of strict, warn, off, got "):
        load_masked(empty(), weights, zeros, verify="never")  # type: ignore[arg-type]


def test_a_cast_after_the_mask(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny, scale=True)
    model = load_masked(empty(), weights, adapter, dtype=torch.bfloat16)
    assert same(bits(model), bits(expected(weights, adapter).to(torch.bfloat16)))
    assert model.bn1.num_batches_tracked.dtype is torch.int64


def test_masks_packed_with_the_base(tmp_path: Path, tiny: nn.Module, weights: Path, reads: list[str]) -> None:
    masks = MaskSet.from_tensors({n: tiny.get_parameter(n).abs() > 0.05 for n in ("conv1.weight", "conv2.weight")})
    base = fingerprint(tiny, id="tests:tiny", head=["fc"])
    adapter = save_adapter(tmp_path / "a", masks, base, codec="logit-base", weights=tiny)
    reads.clear()
    model = load_masked(empty(), weights, adapter, dtype=torch.float16)
    assert sorted(reads) == sorted(tiny.state_dict())  # each tensor once
    assert same(bits(model), bits(expected(weights, adapter).to(torch.float16)))
    with pytest.raises(BackboneMismatchError, match="load the adapter before casting the model"):
        load_masked(empty().to(torch.float16), weights, adapter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were read, in order."""
    found: list[str] = []
    read = TensorFile.__getitem__

    def noted(self: TensorFile, name: str) -> Tensor:
        found.append(name)
        return read(self, name)

    monkeypatch.setattr(TensorFile, "__getitem__", noted)
    return found


def test_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Linear(8, 50, bias=False), nn.Linear(8, 50, bias=False)
            self.middle = nn.Linear(8, 8)
            self.output.weight = self.embedding.weight

    model = Tied()
    masks = MaskSet.from_tensors({"embedding.weight": torch.rand(50, 8) < 0.5})
    adapter = save_adapter(tmp_path / "a", masks, fingerprint(model, id="tests:tied"))
    folder = shard(tmp_path / "tied", model.state_dict(), "1KB")
    made = load_masked(empty(Tied), folder, adapter)
    assert made.output.weight is made.embedding.weight
    assert same(bits(made), bits(load_mask(model, adapter)))


def test_a_model_with_weights_gets_others(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    model = TinyNet().eval()
    load_masked(model, weights, adapter)
    assert same(bits(model), bits(expected(weights, adapter)))
    wrapped = nn.DataParallel(empty())
    assert load_masked(wrapped, weights, adapter) is wrapped
    assert same(bits(wrapped.module), bits(model))


def test_a_head_of_other_classes_in_the_file(tmp_path: Path, tiny: nn.Module) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    tiny.fc = nn.Linear(16, 11)
    export_state(tmp_path / "eleven.safetensors", tiny)
    model = load_masked(empty(), tmp_path / "eleven.safetensors", adapter, head="keep")
    assert torch.equal(model.fc.weight, tiny.fc.weight)
    assert load_masked(empty(), tmp_path / "eleven.safetensors", adapter).fc.out_features == 7


def on_meta(model: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in model.state_dict().values()) and applied(model) is None


def test_counters_of_batchnorm_may_be_missing(tmp_path: Path, tiny: nn.Module) -> None:
    """As in files of old PyTorch, also where the model has no values yet."""
    state = {name: tensor for name, tensor in tiny.state_dict().items() if "num_batches_tracked" not in name}
    write_tensors(tmp_path / "base.safetensors", state, {})
    adapter = make_adapter(tmp_path / "a", tiny)
    model = load_masked(empty(), tmp_path / "base.safetensors", adapter)
    assert same(bits(model), bits(expected(tmp_path / "base.safetensors", adapter)))
    assert model.bn1.num_batches_tracked == 0
    del state["bn1.running_mean"]
    write_tensors(tmp_path / "base.safetensors", state, {})
    with pytest.raises(BackboneError, match=r"do not fit the model: 1 missing \['bn1.running_mean'\]"):
        load_masked(empty(), tmp_path / "base.safetensors", adapter)


def test_a_wrong_base_leaves_no_weights(tmp_path: Path, tiny: nn.Module, weights: Path, reads: list[str]) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    state = read_tensors(weights)
    state["conv1.weight"][0, 0, 0, 0] += 1
    write_tensors(tmp_path / "other.safetensors", state, {})
    model = TinyNet().eval()
    said = (
        r"made for the weights of tests:tiny, .*: the masked tensor 'conv1\.weight' differs, and nothing behind it was"
    )
    with pytest.raises(BackboneMismatchError, match=said):
        load_masked(model, tmp_path / "other.safetensors", adapter)
    assert on_meta(model)
    assert "conv2.weight" not in reads
    with pytest.warns(MaskpackWarning, match="1 of 2 masked tensors differ, first 'conv1.weight'"):
        load_masked(model, tmp_path / "other.safetensors", adapter, verify="warn")
    assert model.conv1.weight.count_nonzero()
    other = load_masked(empty(), tmp_path / "other.safetensors", adapter, verify="off")
    assert same(bits(other), bits(model))
    state = read_tensors(weights)
    state["bn2.bias"] += 1
    write_tensors(tmp_path / "other.safetensors", state, {})
    model = empty()
    with pytest.raises(BackboneMismatchError, match="all 2 masked tensors agree, but other parameters or buffers"):
        load_masked(model, tmp_path / "other.safetensors", adapter)
    assert on_meta(model)


def test_a_failure_midway_leaves_no_weights(
    tmp_path: Path, tiny: nn.Module, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    model, calls = empty(), []

    def fails(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        apply_parts(*arguments, **options)

    apply_parts = stream.apply_parts
    monkeypatch.setattr(stream, "apply_parts", fails)
    with pytest.raises(KeyboardInterrupt):
        load_masked(model, weights, adapter)
    assert on_meta(model)
    monkeypatch.undo()
    load_masked(model, weights, adapter)
    assert same(bits(model), bits(expected(weights, adapter)))


def test_statistics_without_a_place_leave_no_weights(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    parts = Parts(random_masks(tiny), statistics={"bn9.running_mean": torch.ones(3)})
    adapter = save_adapter(tmp_path / "a", parts, fingerprint(tiny, id="tests:tiny", head=["fc"]))
    model = empty()
    with pytest.raises(BackboneMismatchError, match=r"the model has no 'bn9\.running_mean' of shape"):
        load_masked(model, weights, adapter)
    assert on_meta(model)


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    model = copy.deepcopy(tiny)
    before = bits(model)
    state = read_tensors(weights)
    del state["bn1.running_mean"]
    write_tensors(tmp_path / "less.safetensors", state, {})
    with pytest.raises(BackboneError, match=r"do not fit the model: 1 missing \['bn1\.running_mean'\], 0 unexpected"):
        load_masked(model, tmp_path / "less.safetensors", adapter)
    with pytest.raises(DataError, match="no file"):
        load_masked(model, tmp_path / "none.safetensors", adapter)
    other = MaskSet.from_tensors({"conv9.weight": torch.ones(3, dtype=torch.bool)})
    foreign = save_adapter(tmp_path / "b", other, fingerprint(nn.ParameterDict({"conv9": nn.ParameterDict(
        {"weight": torch.ones(3)})}), id="tests:other"))  # fmt: skip
    with pytest.raises(
        BackboneMismatchError, match="the model lacks 1 of the 1 masked parameters, first 'conv9.weight'"
    ):
        load_masked(model, weights, foreign, verify="off")
    assert same(bits(model), before)
    two = {name: random_masks(tiny) for name in ("x", "y")}
    several = save_adapter(tmp_path / "c", two, fingerprint(tiny, id="tests:tiny", head=["fc"]))
    with pytest.raises(StateError, match="holds 2 mask sets"):
        load_masked(model, weights, several)
    assert same(bits(model), before)


class Buffered(TinyNet):
    """A TinyNet with a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(3.0), persistent=False)


def test_buffers_that_no_file_holds(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    model = empty(Buffered)
    said = r"1 buffers on the meta device that no file of weights holds, first 'positions'; give them values before"
    with pytest.raises(StateError, match=said):
        load_masked(model, weights, adapter)
    model.positions = torch.arange(3.0)
    load_masked(model, weights, adapter, dtype=torch.bfloat16)
    assert torch.equal(model.positions, torch.arange(3.0).to(torch.bfloat16))
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = Buffered().eval()
    assert torch.equal(load_masked(model, weights, adapter).positions, torch.arange(3.0))


def test_quantised_parameters_are_refused(tmp_path: Path, tiny: nn.Module, weights: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    model = empty()
    model.conv1.weight = nn.Parameter(torch.empty(8, 3, 3, 3, dtype=torch.int8, device="meta"), False)
    with pytest.raises(
        BackboneMismatchError, match=r"'conv1\.weight' is of torch\.int8 and cannot be masked; load float"
    ):
        load_masked(model, weights, adapter)


def test_load_mask_refuses_what_has_no_weights(tmp_path: Path, tiny: nn.Module) -> None:
    adapter = make_adapter(tmp_path / "a", tiny)
    with pytest.raises(BackboneMismatchError, match=r"'conv1\.weight' is on the meta device and has no data"):
        load_mask(empty(), adapter)
    model = copy.deepcopy(tiny)
    model.bn2 = empty().bn2
    said = r"the base cannot be compared: 'bn2\.bias' is on the meta device and has no data; load"
    with pytest.raises(BackboneMismatchError, match=said):
        load_mask(model, adapter)
    with pytest.raises(BackboneMismatchError, match=said):
        fingerprint(model, id="tests:tiny", head=["fc"])
    tiny.conv1.weight = nn.Parameter(torch.zeros(8, 3, 3, 3, dtype=torch.int8), False)
    with pytest.raises(BackboneMismatchError, match=r"'conv1\.weight' is of torch\.int8 and cannot be masked"):
        load_mask(tiny, adapter)


LAYERS, SIDE = 12, 2048  # 12 tensors of 16 MiB
PEAKS = f"""
import os, sys, torch
from maskpack import load_mask, load_masked
from maskpack.backbone.load import load_weights
from maskpack.safetensors_io import TensorFile

def model():
    return torch.nn.Sequential(*(torch.nn.Linear({SIDE}, {SIDE}, bias=False) for _ in range({LAYERS})))

def on_meta():
    with torch.device("meta"):
        return model()

def base_alone():
    files = TensorFile(base)
    whole = on_meta()
    whole.load_state_dict({{n: files[n].clone() for n in files}}, assign=True)
    return whole

def afterwards():
    return load_mask(base_alone(), adapter, restorable=False, verify="off")

def together():
    return load_masked(on_meta(), base, adapter)

def value(key):
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith(key))

base, adapter = sys.argv[1:]
import maskpack.runtime.stream  # in memory before the first way is measured
for way in (base_alone, together, afterwards):
    if (child := os.fork()) == 0:
        before = value("VmRSS")
        made = way()
        print(way.__name__, value("VmHWM") - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_base_and_mask_take_hardly_more_memory_than_the_base(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    state = {f"{i}.weight": torch.full((SIDE, SIDE), i + 1.0) for i in range(LAYERS)}
    model.load_state_dict(state, assign=True)
    write_tensors(tmp_path / "base.safetensors", state, {})
    drawn = torch.rand(SIDE, SIDE) < 0.9
    masks = MaskSet.from_tensors(dict.fromkeys(state, drawn))
    base = fingerprint(model, id="tests:linears")
    adapter = save_adapter(tmp_path / "a.safetensors", masks, base, codec="raw")
    command = [sys.executable, "-c", PEAKS, str(tmp_path / "base.safetensors"), str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    peaks = {way: int(mebibytes) for way, mebibytes in (line.split() for line in done.stdout.splitlines())}
    whole, tensor = LAYERS * SIDE * SIDE * 4 >> 20, SIDE * SIDE * 4 >> 20
    assert peaks["base_alone"] > 0.9 * whole
    assert peaks["together"] < 1.05 * peaks["base_alone"] + 4 * tensor + (adapter.size >> 20), peaks
    assert peaks["together"] < peaks["afterwards"] + 2 * tensor, peaks
