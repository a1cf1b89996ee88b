"""Masks that are packed with the base's weights: onto the base and off again, and onto no other."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from maskpack_cli.main import app
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from maskpack import fingerprint, load_mask, save_adapter, unload_mask
from maskpack.adapter.edit import convert_adapter
from maskpack.adapter.read import Adapter
from maskpack.errors import BackboneMismatchError
from maskpack.mask import MaskSet

MASKED = ("conv.weight", "fc.weight")
SOURCE = """
from torch import nn
from collections import OrderedDict

def net():
    conv, fc = nn.Conv2d(8, 32, 3), nn.Linear(32, 200)
    return nn.Sequential(OrderedDict(conv=conv, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=fc))
"""


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    scope: dict[str, object] = {}
    exec(SOURCE, scope)
    made = scope["net"]()  # type: ignore[operator]
    assert isinstance(made, nn.Module)
    return made.eval()


def by_magnitude(model: nn.Module, seed: int = 0) -> MaskSet:
    """Keep great weights more often than small ones, as masks do that were trained with SGD."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name in MASKED:
        weight = model.get_parameter(name).detach().abs()
        masks[name] = torch.rand(weight.shape, generator=generator) < 0.2 + 0.8 * weight / weight.max()
    return MaskSet.from_tensors(masks)


def packed(path: Path, model: nn.Module, masks: MaskSet) -> Adapter:
    adapter = save_adapter(path, masks, fingerprint(model, id="tests:net"), profile="max", weights=model)
    chosen = [payload.coding.codec for payload in adapter.header.sets["default"].payloads]
    assert chosen == ["logit-base"] * len(MASKED)
    return adapter


def bits(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    wide = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {name: tensor.detach().view(wide[tensor.dtype]).flatten().tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_the_base_and_off_again(tmp_path: Path, dtype: torch.dtype) -> None:
    base = network()
    masks, second = by_magnitude(base), by_magnitude(base, 1)
    packed(tmp_path / "one", base, masks)
    packed(tmp_path / "two", base, second)
    model = network().to(dtype)
    before = bits(model.state_dict())
    for path, chosen in (("one", masks), ("two", second), ("two", second)):  # the second comes onto the base again
        load_mask(model, tmp_path / path)
        wanted = {name: tensor.to(dtype) for name, tensor in base.state_dict().items()}
        wanted |= {name: torch.where(chosen[name].tensor(), wanted[name], 0) for name in MASKED}
        assert bits(model.state_dict()) == bits(wanted)
    unload_mask(model)
    assert bits(model.state_dict()) == before


@pytest.mark.filterwarnings("ignore::maskpack.runtime.load.MaskpackWarning")
@pytest.mark.parametrize("verify", ["strict", "warn", "off"])
def test_onto_nothing_else(tmp_path: Path, verify: str) -> None:
    base = network()
    packed(tmp_path, base, by_magnitude(base))
    last = copy.deepcopy(base)
    with torch.no_grad():
        last.get_parameter("fc.weight")[-1, -1] *= -1  # the last of a payload: most of it decodes
    for other in (network(1), last):
        before = bits(other.state_dict())
        words = "made for the weights of" if verify == "strict" else "was packed with other weights than those of the"
        with pytest.raises(BackboneMismatchError, match=words):
            load_mask(other, tmp_path, verify=verify)  # type: ignore[arg-type]
        assert bits(other.state_dict()) == before
    half = network().half()
    with pytest.raises(BackboneMismatchError, match=r"torch\.float16, expected .*; load the adapter before casting"):
        load_mask(half, tmp_path, verify=verify)  # type: ignore[arg-type]
    assert bits(half.state_dict()) == bits(network().half().state_dict())


def test_verify_says_what_needs_the_base(tmp_path: Path) -> None:
    base = network()
    packed(tmp_path / "a", base, by_magnitude(base))
    (tmp_path / "net.py").write_text(SOURCE)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    run = ["verify", str(tmp_path / "a")]
    alone = CliRunner().invoke(app, run)
    assert alone.exit_code == 0
    words = "need the weights of tests:net (--backbone): default/conv.weight, default/fc.weight\n"
    assert alone.stderr == f"Not decoded, since they {words}"
    assert "needs_base" in CliRunner().invoke(app, [*run, "--json"]).stdout
    backbone = ["--backbone", f"{tmp_path / 'net.py'}:net", "--weights", str(tmp_path / "base.safetensors")]
    result = CliRunner().invoke(app, [*run, *backbone, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["decoded"], report["needs_base"], report["mask_id"]) == (2, [], True)
    wrong = CliRunner().invoke(app, [*run, *backbone[:2], "--random-weights", "3"])
    assert wrong.exit_code == 1
    assert "made for the weights of tests:net, and the model has others" in wrong.stderr


def test_many_names_are_cut_short(tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))
    masks = MaskSet.from_tensors({name: weight.detach() > 0.01 for name, weight in model.named_parameters()})
    base = fingerprint(model, id="tests:four")
    save_adapter(tmp_path / "a", masks, base, codec="logit-base", weights=model)
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "a")]).stderr
    assert "default/2.weight, … (all: --json)" in shown


def test_converted_to_masks_that_need_no_base_and_back(tmp_path: Path) -> None:
    base = network()
    masks = by_magnitude(base)
    adapter = packed(tmp_path / "a", base, masks)
    plain = convert_adapter(adapter, tmp_path / "b", base=base)
    assert plain.parts().masks == masks
    back = convert_adapter(plain, tmp_path / "c", profile="max", base=base)
    assert back.digest == adapter.digest
