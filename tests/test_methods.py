"""Every method keeps the contract; the threshold's gradient is the published one."""

import json
from dataclasses import fields

import pytest
import torch

from maskpack.errors import ConfigError, UnknownNameError
from maskpack.mask import PackedMask
from maskpack.methods.base import METHODS, Method, alpha, build_method, method_config

ALL = METHODS.all()


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_contract(cls: type[Method]) -> None:
    method = cls()
    weight = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    scores = method.init_scores(weight)
    assert scores.shape == weight.shape
    assert scores.dtype is torch.float32
    mask = method.binarize(scores)
    assert mask.shape == weight.shape
    assert mask.dtype is torch.bool
    assert torch.equal(mask, method.binarize(scores))
    assert mask.any()
    assert cls.reference.startswith("https://")
    assert cls.__doc__
    assert json.loads(json.dumps(method_config(method)))["id"] == cls.id
    assert build_method(cls.id, {f.name: getattr(method, f.name) for f in fields(cls)}) == method


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_gradient_reaches_every_score(cls: type[Method], scale: bool) -> None:
    method, weight = cls(), torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    scores = method.init_scores(weight).requires_grad_()
    (method.effective(weight, scores, scale) * torch.randn(5, 7)).sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad != 0).all())


def test_two_classes_of_one_id_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    known = METHODS["threshold"]
    assert METHODS.register(known) is known, "once more is the same"
    other = type("Other", (known,), {"id": "threshold"})
    with pytest.raises(UnknownNameError, match=r"two methods have the id 'threshold': .*\.Threshold and .*; rename"):
        METHODS.register(other)
    assert METHODS["threshold"] is known


def test_options_are_checked() -> None:
    assert build_method("threshold", {"init": "2"}).init_scores(torch.zeros(1)).item() == 2.0
    with pytest.raises(
        UnknownNameError, match="unknown method 'treshold'; known: .*threshold.*did you mean 'threshold'"
    ):
        build_method("treshold")
    with pytest.raises(ConfigError, match="method 'threshold' has no option 'k'; it has: init, threshold"):
        build_method("threshold", {"k": 1})
    with pytest.raises(ConfigError, match="option 'init' of the method 'threshold' must be of type float, got 'big'"):
        build_method("threshold", {"init": "big"})
    with pytest.raises(ConfigError, match="scores start at inf with the threshold 0.0: .* choose finite values"):
        build_method("threshold", {"init": "inf"})
    with pytest.raises(
        ConfigError, match="scores start at 0.0 with the threshold 0.0: every weight would start masked"
    ):
        build_method("threshold", {"init": 0.0})


def effective_reference(weight: torch.Tensor, scores: torch.Tensor, scale: bool) -> torch.Tensor:
    """w * m / sqrt(mean(m)) with autograd's own gradient, through a mask that equals the scores plus a constant."""
    mask = (scores > 0).to(scores.dtype)
    through = scores + (mask - scores).detach()
    return weight * through / through.mean().sqrt() if scale else weight * through


@pytest.mark.parametrize("scale", [False, True])
def test_gradient_is_autograds_with_alpha_in_the_graph(scale: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, scores, g = (torch.randn(9, 11, generator=generator) for _ in range(3))
    ours, theirs = scores.clone().requires_grad_(), scores.clone().double().requires_grad_()
    (build_method("threshold").effective(weight, ours, scale) * g).sum().backward()
    (effective_reference(weight.double(), theirs, scale) * g).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5)


def test_ties_are_off() -> None:
    assert build_method("threshold").binarize(torch.tensor([-1.0, 0.0, 1e-30])).tolist() == [False, False, True]


def test_an_empty_mask_gives_zeros_not_nan() -> None:
    scores = torch.full((4, 4), -1.0, requires_grad=True)
    effective = build_method("threshold").effective(torch.randn(4, 4), scores, True)
    assert bool((effective == 0).all())
    effective.sum().backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())


def test_training_and_adapter_have_the_same_alpha() -> None:
    generator = torch.Generator().manual_seed(3)
    for total in (1, 7, 1000, 12345):
        mask = torch.rand(total, generator=generator) > 0.4
        assert float(alpha(mask)) == PackedMask.from_tensor(mask, scale=True).alpha


def test_zeros_are_positive_and_infinite_weights_no_nan() -> None:
    weight = torch.tensor([-1.0, float("inf"), -2.0, float("nan")])
    scores = torch.tensor([-1.0, -1.0, 1.0, -1.0])
    effective = build_method("threshold").effective(weight, scores, False)
    assert effective.tolist() == [0.0, 0.0, -2.0, 0.0]
    assert not torch.signbit(effective[0])
