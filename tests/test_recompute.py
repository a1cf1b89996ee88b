"""The training step: effective weights are not kept, compiled steps and several processes give the same masks."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from maskpack import MaskSet
from maskpack.errors import TrainingError
from maskpack.training import attach_scores, extract_masks
from maskpack.training.methods.base import METHODS, Method, build_method
from maskpack.training.scores import ScoredWeight

from .helpers_models import bits, same

STEPS = 3


def steps(model: nn.Module, scores: dict[str, nn.Parameter], call: Any = None) -> list[float]:
    """Some steps of SGD on random inputs."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(scores.values(), lr=20.0, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
        loss = nn.functional.cross_entropy((model if call is None else call)(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("method", [cls.id for cls in METHODS.all() if cls.op == "zero" and cls.learns])
def test_the_same_bits_as_with_weights_that_are_kept(
    tiny: nn.Module, method: str, scale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr("maskpack.training.scores.Recompute.note", lambda *_: None)
        torch.manual_seed(1)
        model = copy.deepcopy(tiny).train()
        scores = attach_scores(model, method, ["*conv2.weight"], scale=scale)
        found.append((steps(model, scores), {name: one.detach() for name, one in scores.items()}))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[0][1][name], one) for name, one in found[1][1].items())


@pytest.mark.parametrize("method", ["threshold", "topk", "flip", "edit"])
def test_no_effective_weight_lives_until_the_backward_pass(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of linear layers, convolutions and attention with one matrix; methods that draw keep theirs."""
    model = nn.ModuleDict({
        "conv": nn.Conv2d(3, 8, 1, bias=False), "linear": nn.Linear(8, 8),
        "attention": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    })  # fmt: skip
    net = Net(model)
    made: list[StorageWeakRef] = []
    real = ScoredWeight.forward

    def watched(self: ScoredWeight, weight: torch.Tensor) -> torch.Tensor:
        result = real(self, weight)
        made.append(StorageWeakRef(result.untyped_storage()))
        return result

    monkeypatch.setattr(ScoredWeight, "forward", watched)
    attach_scores(net, method)
    loss = net(torch.randn(2, 3, 4, 4)).square().sum()
    gc.collect()
    assert len(made) >= 6  # attention asks for its matrix more than once
    assert all(one.expired() for one in made)
    loss.backward()
    assert all(one.scores.grad.abs().sum() > 0 for one in net.modules() if isinstance(one, ScoredWeight))
    made.clear()
    extract_masks(net)
    attach_scores(net, "gumbel")
    loss = net(torch.randn(2, 3, 4, 4)).square().sum()
    assert sum(not one.expired() for one in made) >= 6
    with torch.no_grad():
        net(torch.randn(2, 3, 4, 4))


class Net(nn.Module):
    """A convolution, a linear layer and attention, one after another."""

    def __init__(self, parts: nn.ModuleDict):
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.parts["conv"](x).flatten(2).transpose(1, 2)
        return self.parts["attention"](self.parts["linear"](x))  # type: ignore[no-any-return]


def test_a_step_between_forward_and_backward_is_refused(tiny: nn.Module) -> None:
    scores = attach_scores(tiny)
    loss = tiny(torch.randn(2, 3, 8, 8)).sum()
    with torch.no_grad():
        scores["conv2.weight"].add_(1)
    with pytest.raises(TrainingError, match=r"scores or weights were changed between .*; call backward\(\) before"):
        loss.backward()


def test_scores_that_are_taken_off_leave_no_hooks(tiny: nn.Module) -> None:
    before = bits(tiny)
    attach_scores(tiny)
    with pytest.raises(RuntimeError):
        tiny(torch.randn(2, 4, 8, 8))  # a forward pass that fails ends the watch as well
    masks = extract_masks(tiny)
    assert masks.density == 1
    assert not tiny._forward_hooks
    assert not tiny._forward_pre_hooks
    x = torch.randn(2, 3, 8, 8)
    tiny(x.requires_grad_()).sum().backward()
    assert same(bits(tiny), before)


def test_a_compiled_step_gives_the_same_masks(tiny: nn.Module) -> None:
    masks: list[MaskSet] = []
    losses = []
    for compiled in (False, True):
        model = copy.deepcopy(tiny)
        scores = attach_scores(model, build_method("threshold"), scale=True)
        losses.append(steps(model, scores, torch.compile(model, backend="aot_eager") if compiled else None))
        masks.append(extract_masks(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert masks[0] == masks[1]
    torch.compiler.reset()


def test_methods_that_draw_say_so(tiny: nn.Module) -> None:
    """A method that gives another weight when it is asked twice in training is marked."""
    weight = tiny.get_parameter("conv2.weight").detach()
    for cls in METHODS.all():
        method: Method = build_method(cls.id)
        model = copy.deepcopy(tiny)
        attach_scores(model, method, ["*conv2.weight"])
        scored = next(one for one in model.modules() if isinstance(one, ScoredWeight))
        state = scored.state(training=True)
        first, second = (method.effective(weight, scored.scores, False, state).detach() for _ in range(2))
        assert torch.equal(first, second) != method.draws, cls.id
