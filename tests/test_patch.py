"""Patches: exact changes from one checkpoint to another, and the codec of stored values."""

import copy
import hashlib
import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from bitarray import bitarray
from maskpack_cli.main import app
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from maskpack import MaskBank, Parts, fingerprint, load_mask, load_masked, save_adapter, unload_mask
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import read_adapter
from maskpack.adapter.values import Steps
from maskpack.codecs import native, ulps
from maskpack.codecs.base import where_ones
from maskpack.errors import BackboneMismatchError, CorruptAdapterError, DataError
from maskpack.importers.base import Imported, exact, import_file
from maskpack.importers.checkpoint import Largest
from maskpack.mask import MaskSet
from maskpack.safetensors_io import Made, TensorFile

from .conftest import TinyNet
from .helpers_cli import BACKBONE
from .helpers_models import bits, same

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMPILED = native.library() is not None


def words_like(generator: np.random.Generator, name: str, count: int, kind: str) -> tuple[Any, Any]:
    """Return words of a base and of values: every pattern of bits, neighbours, equal ones, other signs."""
    width = 32 if name == "F32" else 16
    dtype: Any = f"u{width // 8}"
    base = generator.integers(0, 1 << width, count, dtype=dtype)
    if kind == "any":
        return base, generator.integers(0, 1 << width, count, dtype=dtype)
    if kind == "near":
        weights = (generator.standard_normal(count) * 0.02).astype(np.float32).view(np.uint32)
        base = (weights >> (32 - width)).astype(dtype)
        return base, (base + generator.integers(-1, 2, count).astype(dtype)).astype(dtype)
    return base, base if kind == "same" else base ^ base.dtype.type(1 << (width - 1))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["any", "near", "same", "signs"])
@pytest.mark.parametrize("count", [0, 1, 2, 33, 4097, 9000, 40_000])
def test_values_come_back_and_both_ways_of_coding_agree(
    name: str, kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, values = words_like(np.random.default_rng(count), name, count, kind)
    made = ulps.encode(name, base, values)
    assert np.array_equal(ulps.decode(made, base), values)
    if kind == "near" and name == "BF16" and count > 4000:
        assert len(made) < 0.35 * values.nbytes
    monkeypatch.setattr(native, "library", lambda: None)
    assert np.array_equal(ulps.decode(made, base), values)
    assert ulps.encode(name, base, values) == made


def test_steps_of_several_units_take_their_entropy() -> None:
    generator = np.random.default_rng(0)
    base = np.full(100_000, 0x3C00, np.uint16)
    sizes = generator.geometric(0.4, base.size)
    values = (base + sizes * generator.choice([-1, 1], base.size)).astype(np.uint16)
    share = np.bincount(sizes) / base.size
    entropy = 1 - sum(p * np.log2(p) for p in share.tolist() if p)
    assert len(ulps.encode("BF16", base, values)) < 1.012 * entropy * base.size / 8


@pytest.mark.parametrize("compiled", [True, False] if COMPILED else [False])
@pytest.mark.parametrize(("dtype", "count"), [("u2", 1003), ("u4", 64), ("u2", 0), ("u4", 5)])
def test_words_at_zeros(compiled: bool, dtype: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    generator = np.random.default_rng(0)
    kept, words = generator.random(count) < 0.7, generator.integers(0, 1 << 16, count).astype(dtype)
    bits = np.packbits(kept, bitorder="little")
    assert np.array_equal(ulps.at_zeros(words, bits), words[~kept])
    assert np.array_equal(where_ones(bits), np.flatnonzero(kept))
    others = words.copy()
    ulps.put_at_zeros(others, bits, ~words[~kept])
    assert np.array_equal(others, np.where(kept, words, ~words))
    with pytest.raises(ValueError, match=f"{count + 1} values"):
        ulps.put_at_zeros(others, bits, np.zeros(count + 1, dtype))
    with pytest.raises(ValueError, match="bytes of bits"):
        ulps.at_zeros(words, np.append(bits, bits[:1] * 0 if count else np.uint8(0)))


def test_a_step_is_a_neighbour_in_the_order_of_values() -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    finite = words.view(torch.bfloat16)
    finite = finite[finite.isfinite()]
    order = np.argsort(
        np.where(finite.view(torch.int16).numpy() < 0, -1, 1) * 0 + finite.double().numpy(), kind="stable"
    )
    rising = finite[torch.from_numpy(order)]
    # +0 and -0 are equal as floats and two words
    rising = rising[rising != 0]
    own, other = rising[:-1], rising[1:]
    crossing = (own < 0) & (other > 0)
    made = ulps._steps(ulps.FLOATS[1], *(x[~crossing].view(torch.int16).numpy().view(np.uint16) for x in (own, other)))
    assert set(made.tolist()) == {2, 3}  # one step up: away from zero for positive ones, else towards it


@pytest.mark.parametrize("compiled", [True, False] if COMPILED else [False])
def test_spoiled_payloads_are_refused_or_become_other_values(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    generator = np.random.default_rng(0)
    base, values = words_like(generator, "BF16", 9000, "near")
    made = ulps.encode("BF16", base, values)
    refused, tries = 0, 300 if compiled else 30
    for _ in range(tries):
        spoiled = bytearray(made)
        at = int(generator.integers(len(spoiled)))
        how = generator.integers(3)
        if how == 0:
            spoiled[at] ^= 1 << int(generator.integers(8))
        elif how == 1:
            del spoiled[at : at + int(generator.integers(1, 9))]
        else:
            spoiled[at:at] = generator.bytes(2)
        try:
            found = ulps.decode(bytes(spoiled), base)
            assert found.shape == values.shape
        except CorruptAdapterError:
            refused += 1
    assert refused > tries / 2


def test_steps_refuse_another_base() -> None:
    base = torch.randn(500).bfloat16()
    values = (base.float() * 1.004).bfloat16()
    steps = Steps.of(values, base)
    assert steps is not None
    assert torch.equal(steps.values(base.float()), values)  # the same numbers in another dtype
    other = base.clone()
    other[3] = 7
    for wrong in (other, base.float() * 1.0001):
        with pytest.raises(BackboneMismatchError, match="stored values"):
            steps.values(wrong)
    assert Steps.of(values, base.float() * 1.0001) is None


# --- checkpoints -----------------------------------------------------------------------------------------------------


def tuned_of(model: nn.Module, dtype: torch.dtype, dense: bool = True) -> nn.Module:
    """Return a copy after a step in float32, rounded: few weights change, of one layer nearly all."""
    torch.manual_seed(5)
    tuned = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            step = 0.3 if dense and name == "fc.weight" else 2e-4
            parameter.add_(step * torch.randn_like(parameter))
        tuned.bn1.running_mean.add_(0.5)  # type: ignore[union-attr]
    return tuned.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("profile", ["default", "max"])
def test_a_patch_gives_the_tuned_checkpoint_and_the_base_back(
    tiny: nn.Module, tmp_path: Path, dtype: torch.dtype, profile: Any
) -> None:
    base = tiny.to(dtype)
    base.bn1.running_mean.data = base.bn1.running_mean.float()  # type: ignore[union-attr, operator]
    tuned = tuned_of(base, dtype)
    for model in (base, tuned):
        model.bn1.running_mean.data = model.bn1.running_mean.float()  # type: ignore[union-attr, operator]
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    before, wanted = bits(base), bits(tuned)
    found = import_file(tmp_path / "tuned.safetensors", base, "checkpoint")
    assert same(bits(base), before)
    assert found.masks["fc.weight"].kept == 0
    assert set(found.statistics) == {"bn1.running_mean"}
    parts = Parts(found.masks, statistics=found.statistics, values=found.values)
    own = fingerprint(base, id="tests:tiny")
    adapter = save_adapter(tmp_path / "patch", parts, own, weights=base, profile=profile)
    load_mask(base, tmp_path / "patch")
    assert same(bits(base), wanted)
    unload_mask(base)
    assert same(bits(base), before)
    other = TinyNet().to(dtype).eval()
    other.bn1.running_mean.data = other.bn1.running_mean.float()  # type: ignore[union-attr, operator]
    load_masked(other, tmp_path / "base.safetensors", tmp_path / "patch")
    assert same(bits(other), wanted)
    with MaskBank(base) as bank:
        bank.add(adapter, name="patch")
        for _ in range(2):
            bank.use("patch")
            assert same(bits(base), wanted)
            bank.disable()
            assert same(bits(base), before)
    again = convert_adapter(adapter, tmp_path / "again", base=base, profile="fast")
    load_mask(base, again)
    assert same(bits(base), wanted)


def test_bfloat16_patches_store_steps_and_refuse_other_bases(tiny: nn.Module, tmp_path: Path) -> None:
    base = tiny.bfloat16()
    tuned = tuned_of(base, torch.bfloat16, dense=False)
    tuned.bn1.running_mean.data = base.bn1.running_mean.data.clone()  # type: ignore[union-attr, operator]
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    found = import_file(tmp_path / "tuned.safetensors", base, "checkpoint")
    parts = Parts(found.masks, values=found.values)
    adapter = save_adapter(tmp_path / "patch", parts, fingerprint(base, id="tests:tiny"), weights=base)
    stored = adapter.parts(base=base).values
    assert isinstance(stored["conv2.weight"], Steps)
    wide = copy.deepcopy(base).float()
    load_mask(wide, adapter)
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(wide.state_dict()[name], tensor.to(wide.state_dict()[name].dtype))
    wrong = copy.deepcopy(base)
    with torch.no_grad():
        wrong.get_parameter("conv2.weight").mul_(1.1)
    before = bits(wrong)
    for verify in ("strict", "off"):
        with pytest.raises(BackboneMismatchError):
            load_mask(wrong, adapter, verify=verify)
        assert same(bits(wrong), before)


def test_the_second_reader_reads_stored_values(tiny: nn.Module, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("reader", Path(__file__).parent.parent / "docs" / "reader.py")
    assert spec is not None
    assert spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    base = nn.Sequential(nn.Linear(100, 90), nn.Linear(90, 3)).bfloat16()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(parameter.float() * 1.003 + 1e-4)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    found = import_file(tmp_path / "tuned.safetensors", base, "checkpoint")
    path = tmp_path / "patch.safetensors"
    own = fingerprint(base, id="tests:linear")
    save_adapter(path, Parts(found.masks, values=found.values), own, weights=base, profile="max")
    dense = reader.dense(path, tmp_path / "base.safetensors")
    for name, mask in found.masks.items():
        expected = tuned.get_parameter(name).detach()[~mask.tensor()].float().numpy()
        assert np.array_equal(dense[f"default/values/{name}"], expected)


def test_a_patch_needs_the_same_tensors(tiny: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    state = tuned_of(tiny, torch.float32).state_dict()
    wrong: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "conv1.weight: missing in the file": lambda s: s.pop("conv1.weight"),
        "extra: new, of shape [2]": lambda s: s.update(extra=torch.ones(2)),
        r"fc.weight: of shape [6, 16], [5, 16] in the backbone": lambda s: s.update({"fc.weight": torch.ones(6, 16)}),
        "conv2.bias: of torch.float64, expected": lambda s: s.update({"conv2.bias": s["conv2.bias"].double()}),
        "bn2.weight: of torch.bfloat16, which does not hold": lambda s: s.update(
            {"bn2.weight": s["bn2.weight"].bfloat16()}
        ),
    }
    both = dict(state)
    with torch.no_grad():
        tiny.get_parameter("bn2.weight").mul_(1.001)
    for expected, change in wrong.items():
        one = dict(state)
        change(one)
        change(both)
        save_file(one, file)
        with pytest.raises(DataError) as caught:
            import_file(file, tiny, "checkpoint")
        assert f"1 tensors do not fit: {expected}" in str(caught.value)
    save_file({"maskpack": torch.zeros(9, dtype=torch.uint8)}, file)
    with pytest.raises(DataError, match="is an adapter"):
        import_file(file, tiny, "checkpoint")
    save_file(both, file)
    with pytest.raises(DataError) as caught:
        import_file(file, tiny, "checkpoint")
    assert "5 tensors do not fit" in str(caught.value)
    assert all(expected in str(caught.value) for expected in wrong)
    save_file(tiny.state_dict(), file)
    with pytest.raises(DataError, match="has the weights of the backbone"):
        import_file(file, tiny, "checkpoint")


def test_tied_tensors_are_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 4, bias=False)
            self.decode = nn.Linear(8, 4, bias=False)
            self.decode.weight = self.embed.weight

    model = Tied()
    new = model.embed.weight.detach() + 1
    save_file({"embed.weight": new}, tmp_path / "one.safetensors")
    found = import_file(tmp_path / "one.safetensors", model, "checkpoint")
    assert list(found.masks) == ["decode.weight"]
    assert found.masks["decode.weight"].bits == bitarray(32, endian="little")
    save_file({"embed.weight": new, "decode.weight": new + 1}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match="one tensor with decode.weight in the backbone, and another in the file"):
        import_file(tmp_path / "two.safetensors", model, "checkpoint")


def test_command_line(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(one) for one in arguments])

    from maskpack.backbone.load import load_backbone

    model = load_backbone(BACKBONE[1], random_weights=0).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * (torch.rand_like(parameter) < 0.1))
    tuned, out, dense = (tmp_path / name for name in ("tuned.safetensors", "patch", "dense.safetensors"))
    save_file(model.state_dict(), tuned)
    made = run("pack", tuned, "--from", "checkpoint", *BACKBONE, "--output", out, "--json")
    assert made.exit_code == 0, made.output
    verified = run("verify", out, *BACKBONE)
    assert verified.exit_code == 0, verified.output
    assert run("export", out, *BACKBONE, "--output", dense).exit_code == 0
    exported = TensorFile(dense)
    for name, tensor in TensorFile(tuned).items():
        assert torch.equal(exported[name], tensor)
    refused = run("pack", dense, "--from", "checkpoint", "--backbone", BACKBONE[1], "--output", tmp_path / "x")
    assert refused.exit_code in (0, 1)
    assert read_adapter(out).header.base.head == ()


def test_only_the_largest_changes(tmp_path: Path) -> None:
    def packed(*options: object) -> dict[str, Any]:
        out = tmp_path / "-".join(map(str, options)) if options else tmp_path / "all"
        words = ["pack", tuned, "--from", "checkpoint", *BACKBONE, *options, "--output", out, "--json"]
        done = CliRunner().invoke(app, [str(one) for one in words])
        assert done.exit_code == 0, done.output
        return {**json.loads(done.stdout), "adapter": read_adapter(out)}

    from maskpack.backbone.load import load_backbone

    model = load_backbone(BACKBONE[1], random_weights=0).model
    before, tuned = dict(copy.deepcopy(model).named_parameters()), tmp_path / "tuned.safetensors"
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    save_file(model.state_dict(), tuned)
    whole, few = packed(), packed("--keep", 0.1)
    changes = torch.cat([(p - before[n]).abs().flatten() for n, p in model.named_parameters()]).detach()
    assert whole["adapter"].about.result is not None
    assert few["adapter"].about.result is None
    assert few["changes"] == int((changes > 0).sum())
    assert 0.09 * few["changes"] < few["kept_changes"] <= 0.1 * few["changes"]
    largest = changes.sort().values[: -few["kept_changes"]]
    assert abs(few["error"] - float(largest.norm() / changes.norm())) < 1e-3
    base = load_backbone(BACKBONE[1], random_weights=0).model
    load_mask(base, few["adapter"])
    for name, parameter in base.named_parameters():
        wanted, now = model.get_parameter(name), parameter.detach()
        assert bool(((now == wanted) | (now == before[name])).all())
    signs = packed("--ternary", "--keep", 0.1)
    base = load_backbone(BACKBONE[1], random_weights=0).model
    load_mask(base, signs["adapter"])
    missed = 0.0
    for name, parameter in base.named_parameters():
        old, now, wanted = (one.detach().double() for one in (before[name], parameter, model.get_parameter(name)))
        rows, moved, change = (one.reshape(len(now), -1) for one in (now - old, now != old, wanted - old))
        if now.ndim < 2:
            rows, moved, change = (one.reshape(1, -1) for one in (rows, moved, change))
        scale = (change.abs() * moved).sum(1, keepdim=True) / moved.sum(1, keepdim=True).clamp(min=1)
        assert torch.allclose(rows, change.sign() * scale * moved, atol=1e-6)
        missed += float((now - wanted).square().sum())
    assert abs(signs["error"] - missed**0.5 / float(changes.norm())) < 1e-3
    assert signs["kept_changes"] == few["kept_changes"]
    assert few["error"] < signs["error"] < few["error"] + 0.1
    budget = whole["file_bytes"] // 4
    limited = packed("--budget", budget)
    assert 0.8 * budget < limited["file_bytes"] <= budget
    assert few["error"] != limited["error"]
    for wrong in (["--keep", "0"], ["--keep", "1.5"], ["--budget", "200"]):
        words = ["pack", str(tuned), "--from", "checkpoint", *BACKBONE, *wrong, "--output", str(tmp_path / "no")]
        assert CliRunner().invoke(app, words).exit_code in (1, 2)
        assert not (tmp_path / "no").exists()


def test_of_changes_of_one_size_a_part_is_kept() -> None:
    """As many changes of bfloat16 weights are."""
    base = {name: torch.zeros(40, 50).bfloat16() for name in "ab"}
    tuned = {"a": base["a"] + 2.0**-10, "b": base["b"].clone()}
    tuned["b"][:, ::2] = 2.0**-9
    change = exact(Path("tuned"), base, tuned.__getitem__, base)
    assert change.values is not None
    masks = MaskSet.streamed(change.shapes, change.make, change.shapes)
    largest = Largest(Imported(masks, Made(change.shapes, change.values), {}, {}), base)
    for share, of in ((0.1, {"b": 300}), (0.5, {"a": 500, "b": 1000})):
        found, error, kept = largest.take(share)
        assert kept == sum(of.values()) == share * largest.changed
        assert {name: mask.total - mask.kept for name, mask in found.masks.items()} == {"a": 0, "b": 0} | of
        left = torch.cat([tuned[n].flatten()[found.masks[n].tensor().flatten()].float() for n in base])
        every = torch.cat([tuned[n].float().flatten() for n in base])
        assert abs(error - float(left.norm() / every.norm())) < 1e-6
        assert all(len(found.values[name]) == number for name, number in of.items())


def wsp(path: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], **changes: Any) -> Path:
    """Write a patch as weightscope 0.4.3 lays it out."""
    blob, rows = b"", []
    for name, old in base.items():
        flat, new = (bits_of(one) for one in (old, tuned[name]))
        at = np.flatnonzero(flat != new).astype("<u4")
        row = {"kind": "delta", "name": name, "shape": list(old.shape), "dtype": str(old.dtype).removeprefix("torch.")}
        row |= {"blob_offset": len(blob), "n_changed": len(at), "index_width": 4}
        row["base_sha256"] = hashlib.sha256(flat.tobytes()).hexdigest()
        data = at.tobytes() + new[at].tobytes()
        blob += data
        rows.append({**row, "blob_size": len(data)})
    header = {"version": "0.2", "model_a": "a", "model_b": "b", "threshold": 0.0, "codec": "csr-zstd"}
    text = json.dumps({**header, "tensors": rows, "only_in_a": [], **changes}, separators=(",", ":")).encode()
    path.write_bytes(b"WSP2" + struct.pack("<I", len(text)) + text + zstandard.ZstdCompressor(10).compress(blob))
    return path


def bits_of(one: Tensor) -> Any:
    return one.detach().reshape(-1).view(torch.int16 if one.element_size() == 2 else torch.int32).numpy()


def test_patches_of_weightscope_are_applied_to_the_digit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)).bfloat16()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight.copy_(tuned[0].weight.float() * 1.004)
    base, after = model.state_dict(), tuned.state_dict()
    file = wsp(tmp_path / "a.wsp", base, after)
    found = import_file(file, copy.deepcopy(model).float(), "wsp")  # loaded in float32, as transformers' are
    assert set(found.masks) == {"0.weight"}
    assert torch.equal(found.after["0.weight"], after["0.weight"])
    parts = Parts(found.masks, values=found.values)
    save_adapter(tmp_path / "patch", parts, fingerprint(model, id="tests:linear"), weights=model, profile="max")
    load_mask(model, tmp_path / "patch")
    assert same(bits(model), bits(tuned))
    unload_mask(model)
    with torch.no_grad():
        other = copy.deepcopy(model)
        other[1].bias.add_(1)
    with pytest.raises(BackboneMismatchError, match=r"'1.bias' of the backbone has the SHA-256"):
        import_file(file, other, "wsp")
    whole = file.read_bytes()
    for data, message in {
        whole[:-9]: "does not unpack|states",
        b"WSP1" + whole[4:]: "does not begin with WSP2",
        whole[:6]: "does not begin with",
        whole[:8] + b"[" + whole[9:]: "no header as weightscope writes it",
        whole.replace(b'"version":"0.2"', b'"version":"0.9"'): 'has the version "0.9"',
        whole.replace(b'"n_changed":6', b'"n_changed":7'): "expected",
        whole.replace(b'"only_in_a":[]', b'"only_in_a":5'): "header|int",
    }.items():
        file.write_bytes(data)
        with pytest.raises((DataError, BackboneMismatchError), match=message):
            import_file(file, copy.deepcopy(model), "wsp")
    with pytest.raises(DataError, match="adds, removes or resizes 1 tensors, first 'gone'"):
        import_file(wsp(file, base, after, only_in_a=["gone"]), copy.deepcopy(model), "wsp")
