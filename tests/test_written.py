"""Weights that something else wrote while a mask was on them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack import MaskBank, load_adapter, load_mask, unload_mask
from maskpack.errors import StateError
from maskpack.mask import MaskSet
from maskpack.runtime.apply import applied

from .conftest import TinyNet
from .helpers_models import bits, make_adapter, random_masks, same


def step(model: nn.Module) -> None:
    """Take one optimizer step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()


def add_one(model: Any) -> None:
    with torch.inference_mode():
        model.conv2.weight.add_(1)


WRITERS: dict[str, Callable[[Any], object]] = {
    "optimizer": step,
    "load_state_dict": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "assigned": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "in place": add_one,
    "another object": lambda model: setattr(model.conv2, "weight", nn.Parameter(torch.zeros(16, 8, 3, 3))),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("scale", [False, True])
def test_they_are_named(tmp_path: Path, tiny: nn.Module, writer: str, scale: bool) -> None:
    make_adapter(tmp_path, tiny, scale=scale, classes=5)
    base = copy.deepcopy(tiny)
    load_mask(tiny, tmp_path)
    WRITERS[writer](tiny)
    now = bits(tiny)
    first = "conv1.weight" if writer in ("optimizer", "load_state_dict", "assigned") else "conv2.weight"
    for refused in (lambda: unload_mask(tiny), lambda: load_mask(tiny, tmp_path)):
        with pytest.raises(StateError, match=rf"parameters .*'{first}'.*force=True"):
            refused()
        assert same(bits(tiny), now)
    assert unload_mask(tiny, force=True) is tiny
    assert applied(tiny) is None
    zeros = ~load_adapter(tmp_path).parts().masks["conv2.weight"].tensor()
    assert torch.equal(tiny.get_parameter("conv2.weight")[zeros], base.get_parameter("conv2.weight")[zeros])


def test_what_is_no_write_of_the_weights(tmp_path: Path, tiny: nn.Module) -> None:
    """Forward passes in training mode, gradients, moving and casting, masks of a model that shares the weights."""
    make_adapter(tmp_path, tiny)
    before = bits(tiny)
    load_mask(tiny, tmp_path)
    tiny.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    tiny.zero_grad()
    tiny.requires_grad_(False).double().float()
    other = TinyNet()
    other.conv1, other.conv2 = tiny.conv1, tiny.conv2
    load_mask(other, tmp_path, verify="off")
    unload_mask(other)
    unload_mask(tiny)
    now = bits(tiny)
    assert all(torch.equal(now[name], before[name]) for name in before if not name.endswith("num_batches_tracked"))


def test_shared_weights_that_are_unloaded_in_the_order_of_loading(tmp_path: Path, tiny: nn.Module) -> None:
    make_adapter(tmp_path, tiny)
    other = TinyNet()
    other.conv1 = tiny.conv1
    load_mask(tiny, tmp_path)
    load_mask(other, tmp_path, verify="off")
    with pytest.raises(StateError, match=r"1 of the \d parameters .*'conv1.weight'"):
        unload_mask(tiny)
    unload_mask(other)
    unload_mask(tiny)


def test_models_made_in_inference_mode_have_no_versions(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = TinyNet().eval()
    before = bits(model)
    for scale in (False, True):
        make_adapter(tmp_path / str(scale), model, scale=scale)
        with torch.inference_mode():
            load_mask(model, tmp_path / str(scale))
        assert not same(bits(model), before)
        unload_mask(model)
        assert same(bits(model), before)


def test_a_switch_notices_them(tmp_path: Path, tiny: nn.Module) -> None:
    base = bits(tiny)
    bank = MaskBank(tiny)
    for seed, name in enumerate("ab"):
        bank.add(random_masks(tiny, seed, scale=name == "b"), name)
    bank.use("a")
    masked = bits(tiny)
    with torch.no_grad():
        tiny.get_parameter("fc.weight").add_(1)  # no adapter changes it
    bank.use("b")
    bank.use("a")
    with torch.no_grad():
        tiny.get_parameter("conv2.weight").mul_(1)
    for refused in (lambda: bank.use("b"), bank.disable, lambda: bank.remove("a"), bank.close):
        with pytest.raises(StateError, match=r"1 of the 2 parameters .*'conv2.weight'.*bank.close\(force=True\)"):
            refused()
        assert bank.active == "a"
    assert torch.equal(bits(tiny)["conv2.weight"], masked["conv2.weight"])
    bank.close(force=True)
    after = bits(tiny)
    assert same({n: t for n, t in after.items() if "fc" not in n}, {n: t for n, t in base.items() if "fc" not in n})
    with MaskBank(tiny) as bank:
        bank.add(MaskSet(dict(random_masks(tiny))), "a")
        tiny.load_state_dict(tiny.state_dict(), assign=True)  # the bank would write into tensors that nobody uses
        with pytest.raises(StateError, match=r"'conv1.weight'"):
            bank.use("a")
