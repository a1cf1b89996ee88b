"""Files of BitDelta, EMR-Merging, SHiRA and TALL-masks, laid out as their code writes them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maskpack_cli.main import app
from torch import Tensor, nn
from typer.testing import CliRunner

from maskpack import Parts, fingerprint, load_backbone, load_mask, save_adapter, unload_mask
from maskpack.errors import BackboneMismatchError, DataError, MaskpackError
from maskpack.importers.base import import_file
from maskpack.importers.merged import saved, tensor

Made = tuple[Path, str, dict[str, Tensor]]  # file, format, the tensors that their code computes


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(64, 32, bias=False), nn.LayerNorm(32), nn.Linear(32, 5)
        self.to(dtype)


def tuned(model: nn.Module, seed: int) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {name: p + (0.01 * torch.randn(p.shape, generator=noise)).to(p) for name, p in model.state_dict().items()}


def bitdelta(folder: Path, model: nn.Module) -> Made:
    """As `BinaryDiff` and `save_diff`: signs packed along the inputs, the scale a parameter, all that learns beside."""
    base, after, kept = model.state_dict(), tuned(model, 1), dict[str, Any]()
    for name in ("one", "two"):
        if base[f"{name}.weight"].shape[1] % 32:
            continue
        diff = after[f"{name}.weight"] - base[f"{name}.weight"]
        bits = (diff >= 0).T.reshape(-1, 32, diff.shape[0])
        kept[f"{name}.mask"] = (bits.long() << torch.arange(32)[None, :, None]).sum(1).to(torch.int32)
        kept[f"{name}.coeff"] = coeff = nn.Parameter(diff.float().abs().mean())
        signs = torch.where(diff >= 0, 1.0, -1.0)
        after[f"{name}.weight"] = base[f"{name}.weight"] + (signs * coeff.detach()).to(diff.dtype)
    kept |= {name: nn.Parameter(after[name]) for name in ("norm.weight", "two.bias")}
    after["norm.bias"] = base["norm.bias"]
    torch.save(kept, folder / "diff.pt")
    return folder / "diff.pt", "bitdelta", after


def emr(folder: Path, model: nn.Module) -> Made:
    """As `emr_merge` returns it."""
    base = model.state_dict()
    vectors = [{name: one - base[name] for name, one in tuned(model, seed).items()} for seed in (1, 2, 3)]
    unified, masks = dict[str, Tensor](), dict[str, list[Tensor]]()
    scales, rescaled = torch.zeros(3), torch.zeros(3)
    for name in base:
        flag = (torch.stack([own[name] for own in vectors]).mean(0) > 0) * 2 - 1
        masks[name] = [(own[name] * flag) > 0 for own in vectors]
        largest = torch.stack([(own[name] * mask).abs() for own, mask in zip(vectors, masks[name], strict=True)]).amax(
            0
        )
        unified[name] = largest * flag
        scales += torch.stack([own[name].abs().mean() for own in vectors])
        rescaled += torch.stack([(unified[name] * mask).abs().mean() for mask in masks[name]])
    factors = scales / rescaled
    torch.save((unified, masks, factors), folder / "emr.pt")
    after = {name: (base[name] + unified[name] * masks[name][1] * factors[1]).to(base[name].dtype) for name in base}
    return folder / "emr.pt#1", "emr", after


def tall(folder: Path, model: nn.Module, as_torch: bool = False) -> Made:
    """As `find_optimal_mask` saves them, of vectors of sorted tensors, beside the tuned checkpoints."""
    base, tasks = model.state_dict(), ("Cars", "MNIST")
    both = {task: tuned(model, seed) for seed, task in enumerate(tasks)}
    (folder / "tall_masks/Net").mkdir(parents=True)
    packed, summed = (
        dict[str, Any](),
        {name: torch.stack([both[task][name] - base[name] for task in tasks]).sum(0) for name in base},
    )
    masks = {
        task: {
            name: (base[name] - one[name]).abs() > 0.4 * (base[name] + summed[name] - one[name]).abs() for name in base
        }
        for task, one in both.items()
    }
    for task, one in both.items():
        packed[task] = np.packbits(torch.cat([masks[task][name].reshape(-1) for name in sorted(base)]).numpy())
        file = folder / f"checkpoints/Net/{task}Val/nonlinear_finetuned.pt"
        file.parent.mkdir(parents=True)
        torch.save({f"model.visual.{name}": own for name, own in one.items()}, file)
    name = folder / "tall_masks/Net/TALL_mask_2task.npy"
    if as_torch:
        torch.save(packed, name)
    else:
        np.save(name, packed)  # type: ignore[arg-type]
    return Path(f"{name}#MNIST"), "tall", {n: base[n] + summed[n] * masks["MNIST"][n] for n in base}


def shira(folder: Path, model: nn.Module) -> Made:
    """By PEFT itself."""
    peft = pytest.importorskip("peft")
    config = peft.ShiraConfig(r=2, target_modules=["one"], modules_to_save=["two"], init_weights=False, random_seed=0)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        adapted.base_model.model.two.modules_to_save["default"].bias.add_(1)
    adapted.save_pretrained(folder)
    return folder, "shira", dict(adapted.merge_and_unload().state_dict())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [bitdelta, emr, tall, lambda *a: tall(*a, as_torch=True), shira])
def test_what_is_loaded_is_what_their_code_computes(
    write: Callable[..., Made], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = Network(dtype).requires_grad_(False)
    path, format, after = write(tmp_path, model)
    found = import_file(path, model, format)
    save_adapter(
        tmp_path / "patch.safetensors",
        Parts(found.masks, values=found.values),
        fingerprint(model, id="net"),
        weights=model,
    )
    before = copy.deepcopy(model.state_dict())
    load_mask(model, tmp_path / "patch.safetensors")
    for name, own in model.state_dict().items():
        assert torch.equal(own, after[name]), name
    assert any(not torch.equal(before[name], after[name]) for name in before)
    unload_mask(model)
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT
def test_one_task_of_a_file_is_packed_on_the_command_line(tmp_path: Path) -> None:
    code = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))\n"
    (tmp_path / "nets.py").write_text(code)
    model = load_backbone(f"{tmp_path}/nets.py:net", random_weights=0).model
    path, form, expected = emr(tmp_path, model)
    assert "#" in path.name
    base = ("--backbone", f"{tmp_path}/nets.py:net", "--random-weights", "0")
    result = CliRunner().invoke(app, ["pack", f"{path}", "--from", form, *base, "--output", f"{tmp_path / 'out'}"])
    assert result.exit_code == 0, result.stderr
    load_mask(model, tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], one) for name, one in expected.items())


@pytest.mark.parametrize("write", [bitdelta, emr, tall, shira])
def test_another_backbone_is_refused(write: Callable[..., Made], tmp_path: Path) -> None:
    path, format, _ = write(tmp_path, Network(torch.float32))
    other = Network(torch.float32)
    other.one = nn.Linear(96, 32, bias=False)
    with pytest.raises(BackboneMismatchError):
        import_file(path, other, format)


@pytest.mark.parametrize("format", ["bitdelta", "emr", "tall", "shira"])
@pytest.mark.parametrize("content", [None, b"", b"nothing of the kind"])
def test_other_files_are_refused(format: str, content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MaskpackError, match=r"file\.safetensors"):
        import_file(f"{file}#0" if format in ("emr", "tall") else file, Network(torch.float32), format)


def test_tasks_that_are_not_there_are_named(tmp_path: Path) -> None:
    path, _, _ = emr(tmp_path, Network(torch.float32))
    for name in (path.with_name("emr.pt"), path.with_name("emr.pt#3"), path.with_name("emr.pt#x")):
        with pytest.raises(DataError, match="3 tasks"):
            import_file(name, Network(torch.float32), "emr")
    path, _, _ = tall(tmp_path, Network(torch.float32))
    with pytest.raises(DataError, match="Cars, MNIST"):
        import_file(path.with_name("TALL_mask_2task.npy#EuroSAT"), Network(torch.float32), "tall")


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a file was run')",))


def test_nothing_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"x.mask": Bomb()}, tmp_path / "diff.pt")
    found = saved(tmp_path / "diff.pt")
    with pytest.raises(DataError, match="tensor"):
        tensor(found["x.mask"], tmp_path)
    with pytest.raises(MaskpackError):
        import_file(tmp_path / "diff.pt", Network(torch.float32), "bitdelta")


def test_a_tensor_is_within_its_numbers(tmp_path: Path) -> None:
    torch.save(
        {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.zeros(0, 4), "c": torch.tensor(2.5)}, tmp_path / "a.pt"
    )
    found = saved(tmp_path / "a.pt")
    assert torch.equal(tensor(found["a"], tmp_path), torch.arange(6.0).reshape(2, 3).T)
    assert tensor(found["b"], tmp_path).shape == (0, 4)
    assert tensor(found["c"], tmp_path) == 2.5
    stored, _, *rest = found["a"].given
    found["a"].given = (stored, 1, *rest)
    with pytest.raises(DataError, match="beyond its 6 numbers"):
        tensor(found["a"], tmp_path)
