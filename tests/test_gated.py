"""Gates: what the weights and gates learn, compared with formulas written out, and what is left when they are hard."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.light_switch import divergence
from maskpack import fingerprint, load_mask, save_adapter
from maskpack.errors import ConfigError, SelectionError, StateError, UnknownNameError
from maskpack.training import attach_gates
from maskpack.training.config import GATE_START
from maskpack.training.gates import GateHistory, Gates, counts

from .conftest import TinyNet

TASKS = ("a", "b", "c")


def gated_linear(start: float = GATE_START) -> tuple[nn.Linear, Gates]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    return layer, attach_gates(layer, TASKS, start=start)


def drawn(gates: Gates, seed: int = 1) -> None:
    """Put every logit somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for task in gates.tasks:
            for logits in gates.logits(task).values():
                logits.copy_(3 * torch.randn(logits.shape, generator=generator))


def test_gradients_are_those_of_the_formula() -> None:
    layer, gates = gated_linear()
    drawn(gates)
    gates.use("b")
    x, y = torch.randn(7, 4), torch.randn(7, 3)
    nn.functional.mse_loss(layer(x), y).backward()
    weights, logits = gates.weights(), gates.logits("b")
    for name in ("weight", "bias"):
        w, gate = weights[name].detach().double(), torch.sigmoid(logits[name].detach().double())
        theta = {name: one.detach() * gates.values("b")[name] for name, one in weights.items()}
        residual = 2 * (x @ theta["weight"].T + theta["bias"] - y).double() / y.numel()
        of_theta = residual.T @ x.double() if name == "weight" else residual.sum(0)
        for found, expected in (
            (weights[name].grad, of_theta * gate),
            (logits[name].grad, of_theta * w * gate * (1 - gate)),
        ):
            assert found is not None
            assert torch.allclose(found.double(), expected, atol=1e-6)
            assert float(expected.abs().max()) > 1e-3
    assert all(one.grad is None for task in ("a", "c") for one in gates.logits(task).values())


def test_a_step_moves_the_weights_and_the_gates_of_its_task() -> None:
    layer, gates = gated_linear()
    optimizer = torch.optim.Adam(gates.parameter_groups(0.01))

    def step(task: str) -> None:
        gates.use(task)
        nn.functional.mse_loss(layer(torch.randn(5, 4)), torch.zeros(5, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step("a")
    step("b")
    before = {task: gates.values(task)["weight"] for task in TASKS}
    assert torch.equal(before["c"], torch.sigmoid(torch.full((3, 4), GATE_START)))
    step("b")
    assert torch.equal(gates.values("a")["weight"], before["a"]), "its own moments do not push it either"
    assert not torch.equal(gates.values("b")["weight"], before["b"])


def test_rates() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    gates = attach_gates(model, TASKS, ["0.*"])
    others, own = gates.parameter_groups(0.1)
    assert (others["lr"], own["lr"]) == (0.1, pytest.approx(0.1 * 4 * 3))
    assert {id(p) for p in own["params"]} == {id(p) for t in TASKS for p in gates.logits(t).values()}
    assert {id(p) for p in others["params"]} == {id(p) for p in (*gates.weights().values(), *model[1].parameters())}
    assert gates.parameter_groups(0.1, factor=2)[1]["lr"] == pytest.approx(0.2)
    assert gates.parameter_groups(0.1, most=0.05)[1]["lr"] == 0.05
    assert gates.parameter_groups(0.001, most=0.05)[1]["lr"] == pytest.approx(0.012)


@pytest.mark.parametrize("which", ["r1", "r2"])
def test_regularisers(which: str) -> None:
    _, gates = gated_linear()
    gates.use("a")
    points = torch.tensor([-2.0, -math.sqrt(0.5), 0.0, 0.3, math.sqrt(0.5), 5.0])
    with torch.no_grad():
        for logits in gates.logits("a").values():
            logits.fill_(30.0)  # far from 0, where both are 0
        gates.logits("a")["weight"].view(-1)[:6] = points
    value = gates.penalty(**{which: 0.5})
    value.backward()
    p = points.double()
    expected = {"r1": (-p.abs()).exp(), "r2": (-(p**2)).exp()}[which]
    slope = {"r1": -p.sign() * expected, "r2": -2 * p * expected}[which]
    assert float(value.detach()) == pytest.approx(0.5 * float(expected.sum()), rel=1e-5)
    gradient = gates.logits("a")["weight"].grad
    assert gradient is not None
    assert torch.allclose(gradient.view(-1)[:6].double(), 0.5 * slope, atol=1e-6)
    assert float(gradient.view(-1)[2]) == 0.0
    assert gates.logits("b")["weight"].grad is None
    if which == "r2":
        assert slope.abs().argmax() in (1, 4)
    assert float(gates.penalty()) == 0.0


def test_hard_gates_compute_what_a_loaded_mask_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    model(torch.randn(32, 3, 8, 8))
    model.eval()
    plain = deepcopy(model)
    gates = attach_gates(model, TASKS)
    drawn(gates)
    gates.hard = True
    x = torch.randn(6, 3, 8, 8)
    logits = {}
    with torch.no_grad():
        for task in TASKS:
            gates.use(task)
            logits[task] = model(x)
    masks = gates.harden()
    assert list(masks) == list(TASKS)
    assert list(model.state_dict()) == list(plain.state_dict())
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for task in TASKS:
        path = tmp_path / f"{task}.safetensors"
        save_adapter(path, masks[task], fingerprint(model, id="tests:tiny"))
        loaded = load_mask(deepcopy(model), path)
        with torch.no_grad():
            assert torch.equal(loaded(x), logits[task])
    assert 0.3 < masks["a"].density < 0.7
    assert masks["a"]["conv2.bias"].shape == (16,)


def test_hardening_is_the_sign_of_the_logit() -> None:
    layer, gates = gated_linear(start=0.0)
    with torch.no_grad():
        gates.logits("a")["bias"].copy_(torch.tensor([-1e-30, 0.0, 1e-30]))
    assert gates.masks("a")["bias"].tensor().tolist() == [False, False, True]
    assert gates.values("a")["bias"].tolist() == [0.5, 0.5, 0.5]
    gates.use("a")
    soft = layer.bias.detach()
    gates.hard = True
    assert (layer.bias != 0).tolist() == [False, False, True]
    assert torch.equal(layer.bias[2].detach(), 2 * soft[2])


def test_tied_weights_have_one_gate() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    gates = attach_gates(model, ["a"])
    assert list(gates.logits("a")) == ["0.weight"]
    assert torch.equal(model[0].weight, model[1].weight)
    gates.detach()
    assert model[0].weight is model[1].weight


def test_frozen_weights_learn_again_where_they_have_gates() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    gates = attach_gates(model, ["a"], ["weight"])
    assert [p.requires_grad for p in (gates.weights()["weight"], model.bias)] == [True, False]


def test_errors() -> None:
    layer, gates = gated_linear()
    with pytest.raises(StateError, match=r"this model has gates already; call harden\(\) or detach\(\) on them first"):
        attach_gates(layer, TASKS)
    with pytest.raises(UnknownNameError, match="there are no gates for a task 'd'; the tasks are: a, b, c"):
        gates.use("d")
    gates.harden()
    with pytest.raises(StateError, match="these gates were taken off the model already; attach gates anew"):
        gates.harden()
    with pytest.raises(ConfigError, match="tasks is \\[\\], expected a list of names"):
        attach_gates(layer, [])
    with pytest.raises(ConfigError, match="tasks is .*a.*; give each once"):
        attach_gates(layer, ["a", "a"])
    with pytest.raises(SelectionError, match="matches none of 2 parameters"):
        attach_gates(layer, TASKS, ["conv*"])
    attach_gates(layer, TASKS)


def test_history() -> None:
    _, gates = gated_linear()
    drawn(gates)
    history = GateHistory(gates)
    history.add(0)
    history.add(10)
    end, (first, second) = history.content["weight_end"], history.content["rows"]
    assert (first["step"], second["step"]) == (0, 10)
    assert first["gates"] == second["gates"]
    assert {task: {name: sum(one) for name, one in own.items()} for task, own in first["weights"].items()} == {
        task: {"weight": 12, "bias": 3} for task in TASKS
    }
    assert end == pytest.approx(1.5 * max(float(w.detach().abs().max()) for w in gates.weights().values()), rel=0.5)
    values = torch.tensor([-7.0, 0.0, 0.1, 0.99, 1.0, 9.0])
    assert counts(values, 0.0, 1.0, 4) == [3, 0, 0, 3]


def test_divergence() -> None:
    one, other = torch.tensor([3, 1, 0, 0]), torch.tensor([0, 0, 5, 5])
    assert divergence(one, one * 7) == pytest.approx(0)
    assert divergence(one, other) == pytest.approx(1)
    p, q = one / 4, torch.tensor([1, 1, 1, 1]) / 4
    slow = sum(0.5 * float(a) * math.log2(a / ((a + b) / 2)) for x, y in ((p, q), (q, p))
               for a, b in zip(x, y, strict=True) if a)  # fmt: skip
    assert divergence(p, q) == pytest.approx(slow)


def test_noisy_tasks_learn_more_together() -> None:
    """As published: with few noisy rows a task, gates are better than a network for each, and than one for all."""
    count, size, rows = 8, 8, 9
    torch.manual_seed(3)
    weight, kept = torch.rand(size) * 2 - 1, torch.rand(count, size) < 0.5
    x, x_test = (torch.rand(count, n, size) * 2 - 1 for n in (rows, 200))
    y, y_test = (torch.einsum("tnd,td->tn", one, kept * weight) for one in (x, x_test))
    y = y + 0.4 * torch.randn(y.shape)
    names = [str(task) for task in range(count)]
    errors = {}
    for kind in ("gated", "shared", "separate"):
        models = [nn.Linear(size, 1) for _ in range(count if kind == "separate" else 1)]
        gates = attach_gates(models[0], names) if kind == "gated" else None
        groups = gates.parameter_groups(0.01) if gates else [{"params": p} for m in models for p in m.parameters()]
        optimizer = torch.optim.Adam(groups, lr=0.01)
        for _ in range(500):
            task = int(torch.randint(count, ()))
            if gates:
                gates.use(names[task])
            nn.functional.mse_loss(models[task % len(models)](x[task])[:, 0], y[task]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            total = 0.0
            for task in range(count):
                if gates:
                    gates.use(names[task])
                total += float(nn.functional.mse_loss(models[task % len(models)](x_test[task])[:, 0], y_test[task]))
        errors[kind] = total / count
    assert errors["gated"] < 0.8 * min(errors["separate"], errors["shared"]), errors
