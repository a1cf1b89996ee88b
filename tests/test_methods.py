"""Every method keeps the contract; the threshold's gradient is the published one."""

import itertools
import json
import math
from dataclasses import asdict, fields
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maskpack.adapter.content import Parts
from maskpack.errors import ConfigError, UnknownNameError
from maskpack.mask import PackedMask
from maskpack.runtime.apply import apply_parts, unload_mask
from maskpack.training import attach_scores, extract_masks
from maskpack.training.methods.base import METHODS, Method, State, alpha, build_method
from maskpack.training.methods.topk import greatest
from maskpack.training.scores import replaced_values, scored_weights, set_progress

ALL = METHODS.all()


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(48, 8))


# so high that some weights are removed, and with signs that some are inverted
RATES = {"threshold": 300.0, "gumbel": 1e5, "flip": 300.0, "ternary": 300.0, "edit": 0.05}


def trained(method: Method, scale: bool = False, steps: int = 3, rate: float = 5.0) -> tuple[nn.Module, Tensor]:
    """A small model with scores that took a few large steps, and an input for it."""
    torch.manual_seed(0)
    model = small_model()
    scores = attach_scores(model, method, scale=scale)
    assert all(one.dtype is torch.float32 for one in scores.values())
    x = torch.randn(5, 8, 4, 4)
    optimizer = torch.optim.SGD([one for one in scores.values() if method.learns], lr=rate) if method.learns else None
    for step in range(steps):
        set_progress(model, step / (steps - 1), batch_size=5)
        loss = model(x).square().mean()
        for one in scored_weights(model).values():
            loss = loss + (0.0 if (penalty := one.penalty()) is None else penalty)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, x


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_contract(cls: type[Method]) -> None:
    method = cls()
    assert cls.reference.startswith("https://")
    assert cls.__doc__
    assert json.loads(json.dumps(asdict(method))) == asdict(method)
    assert build_method(cls.id, {f.name: getattr(method, f.name) for f in fields(cls)}) == method
    model, _ = trained(method)
    for one in scored_weights(model).values():
        mask = one.binary()
        assert mask.shape == one.shape
        assert mask.dtype is torch.bool
        assert torch.equal(mask, one.binary())
        assert torch.equal(mask, one.mask().tensor())


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_hardens_says_that_another_weight_is_stored_than_was_trained(cls: type[Method]) -> None:
    model, _ = trained(cls(), rate=RATES.get(cls.id, 5.0))
    set_progress(model, 1.0, batch_size=5)
    modes = []
    for training in (True, False):
        model.train(training)
        modes.append([module.weight.detach().clone() for module in (model[0], model[2])])
    same = all(torch.equal(one, other) for one, other in zip(*modes, strict=True))
    assert same != cls.hardens


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_the_adapter_computes_what_evaluation_computed(cls: type[Method], scale: bool) -> None:
    """Bit for bit, and the model is as before the scores, its parameters in their order."""
    if scale and cls.op != "zero":
        with pytest.raises(ConfigError, match=f"the method '{cls.id}' removes no weights, so that there is no scale"):
            attach_scores(small_model(), cls(), scale=True)
        return
    torch.manual_seed(0)
    before = small_model().state_dict()
    model, x = trained(cls(), scale, rate=RATES.get(cls.id, 5.0))
    model.eval()
    with torch.no_grad():
        expected = model(x)
    values = replaced_values(model)
    masks = extract_masks(model)
    assert 0 < masks.density < 1, "or there is little to see"
    assert all(one.signs is None or not one.signs.all() for one in masks.values())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    apply_parts(model, Parts(masks, values=values))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    unload_mask(model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_methods_say_whether_higher_scores_keep_more(cls: type[Method]) -> None:
    model, _ = trained(cls())
    fits = cls.learns and cls.op != "replace"
    for one in scored_weights(model).values():
        scores, state = one.scores.detach(), one.state()
        fits = fits and scores.shape == one.shape and one.mask().signs is None
        if fits:
            masks = [cls().binarize(scores + more, state) for more in (-1e6, 0.0, 0.5, 1e6)]
            fits = all(bool((low <= high).all()) for low, high in itertools.pairwise(masks))
            fits = fits and not masks[0].any() and bool(masks[-1].all())
    assert cls.rising == fits


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.id)
def test_gradient_reaches_every_score(cls: type[Method]) -> None:
    model = small_model()
    scores = attach_scores(model, cls())
    set_progress(model, 0.0)
    (model(torch.randn(5, 8, 4, 4)) * torch.randn(5, 8)).sum().backward() if cls.learns else None
    for one in scores.values():
        assert one.requires_grad == cls.learns
        assert cls.learns == (one.grad is not None and bool((one.grad != 0).all()))


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
    with pytest.raises(ConfigError, match="init must be a finite number, got inf"):
        build_method("threshold", {"init": "inf"})
    with pytest.raises(ConfigError, match="init must be above threshold, .* got 0.0 and 0.0"):
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


def losses_and_masks(method: Method, rate: float, momentum: float = 0.9) -> tuple[list[float], list[Tensor]]:
    """Train the scores of a network that ends in logits, with a scale, and return what every step saw."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 20, generator=generator), torch.randint(5, (64,), generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    scores = attach_scores(model, method, scale=True)
    optimizer = torch.optim.SGD(list(scores.values()), lr=rate, momentum=momentum)
    losses, masks = [], []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        masks.append(torch.cat([one.binary().flatten() for one in scored_weights(model).values()]))
    return losses, masks


@pytest.mark.parametrize("detach", [False, True])
def test_shifted_and_scaled_scores_train_the_same_masks(detach: bool) -> None:
    """Theorems 1 and 2 of Self-Masking Networks, where powers of two make them exact; a single change differs."""

    def run(init: float, threshold: float, rate: float) -> tuple[list[float], list[Tensor]]:
        return losses_and_masks(
            build_method("threshold", {"init": init, "threshold": threshold, "detach_scale": detach}), rate
        )

    losses, masks = run(1.0, 0.0, 32.0)
    assert 0.2 < float(masks[-1].float().mean()) < 0.9
    for init, threshold, rate in ((2.0, 0.0, 64.0), (0.5, 0.0, 16.0), (2.0, 1.0, 32.0), (4.0, 2.0, 64.0)):
        same_losses, same_masks = run(init, threshold, rate)
        assert same_losses == losses
        assert all(torch.equal(one, other) for one, other in zip(masks, same_masks, strict=True))
    for init, threshold, rate in ((1.0, 0.0, 64.0), (1.0, 0.5, 32.0), (2.0, 0.0, 32.0)):
        assert run(init, threshold, rate)[0] != losses


def test_the_rate_doubled_is_the_threshold_halfway() -> None:
    doubled, _ = losses_and_masks(build_method("threshold"), 64.0)
    halfway, _ = losses_and_masks(build_method("threshold", {"threshold": 0.5}), 32.0)
    assert doubled == halfway


def test_the_gradient_of_the_scale_can_be_left_out() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, scores, g = (torch.randn(9, 11, generator=generator) for _ in range(3))
    ours = scores.clone().requires_grad_()
    (build_method("threshold", {"detach_scale": True}).effective(weight, ours, True) * g).sum().backward()
    assert ours.grad is not None
    assert torch.allclose(ours.grad, g * weight / alpha(scores > 0))


@settings(deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=40), st.data())
def test_the_greatest_are_those_of_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(values)))
    best = sorted(range(len(values)), key=lambda index: -values[index])[:kept]
    found = greatest(torch.tensor(values, dtype=torch.float32), kept)
    assert found.nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_topk_keeps_its_share(scope: str) -> None:
    model = small_model()
    with torch.no_grad():
        model[0].weight.mul_(10)
    attach_scores(model, build_method("topk", {"share": 0.3, "scope": scope, "init": "magnitude"}))
    masks = extract_masks(model)
    assert masks.kept == (
        math.ceil(Fraction(3, 10) * masks.total)
        if scope == "global"
        else sum(math.ceil(Fraction(3, 10) * len(one.bits)) for one in masks.values())
    )
    flat = torch.cat([p.detach().abs().flatten() for n, p in model.named_parameters() if n in masks])
    kept = torch.cat([mask.tensor().flatten() for mask in masks.values()])
    if scope == "global":
        assert flat[kept].min() >= flat[~kept].max()
    else:
        assert [round(one.density, 2) for one in masks.values()] == [0.3, 0.3]


def test_topk_starts_as_layers_do_and_its_scale_is_a_constant() -> None:
    weight, g = (torch.randn(40, 25, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for absolute in (True, False):
        method = build_method("topk", {"absolute": absolute, "share": 0.25})
        scores = method.init_scores(weight)
        assert bool((scores >= 0).all()) == absolute
        assert 0.19 < float(scores.abs().max()) <= 0.2, "1 / sqrt(25)"
        assert absolute or float(scores.min()) < -0.19
        scores = torch.randn(40, 25, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (method.effective(weight, scores, True) * g).sum().backward()
        sign = scores.detach().sign() if absolute else 1.0
        assert scores.grad is not None
        assert torch.allclose(scores.grad, sign * weight * g / 0.5)


def test_topk_of_absolute_or_raw_scores_and_its_progress() -> None:
    scores = torch.tensor([-4.0, 1.0, 2.0, -3.0])
    assert build_method("topk").binarize(scores).tolist() == [True, False, False, True]
    assert build_method("topk", {"absolute": False}).binarize(scores).tolist() == [False, True, True, False]
    method = build_method("topk", {"progressive": True, "share": 0.25})
    kept = [int(method.binarize(scores, State(progress=at)).sum()) for at in (0.0, 0.4, 0.7, 1.0)]
    assert kept == [4, 3, 2, 1]
    for share, count, expected in ((0.07, 100, 7), (0.9, 10, 9), (0.3, 10, 3), (0.31, 10, 4), (1.0, 10, 10)):
        for progressive in (False, True):  # exact, also where the share was approached
            method = build_method("topk", {"progressive": progressive, "share": share})
            assert int(method.binarize(torch.arange(count).float()).sum()) == expected
    assert (
        int(build_method("topk", {"progressive": True, "share": 0.1}).binarize(scores, State(progress=0.0)).sum()) == 4
    )


def test_nm_keeps_n_of_m_inputs() -> None:
    for kept, group in ((2, 4), (1, 4), (4, 8)):
        model, _ = trained(build_method("nm", {"kept": kept, "group": group}))
        for mask in extract_masks(model).values():
            groups = mask.tensor().movedim(1, -1).reshape(-1, group)
            assert set(groups.sum(1).tolist()) == {kept}
    # before any step the prior wins: the choice is that of the greatest weights
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    attach_scores(linear, build_method("nm", {"prior": 100.0}))
    groups = linear.parametrizations.weight.original.detach().abs().reshape(-1, 4)  # type: ignore[union-attr, index]
    least = groups.sort(dim=1).values[:, 2:3]
    assert torch.equal(extract_masks(linear)["weight"].tensor().reshape(-1, 4), groups >= least)


def test_nm_prefers_the_greatest_weights_of_the_input_channels() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3)
    attach_scores(conv, build_method("nm", {"prior": 100.0}))
    groups = conv.parametrizations.weight.original.detach().abs().movedim(1, -1).reshape(-1, 4)  # type: ignore[union-attr, index]
    least = groups.sort(dim=1).values[:, 2:3]
    assert torch.equal(extract_masks(conv)["weight"].tensor().movedim(1, -1).reshape(-1, 4), groups >= least)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_nm_draws_choices_with_the_probabilities_of_a_softmax(progress: float) -> None:
    method = build_method("nm", {"kept": 1, "factor": 1.0, "last_factor": 2.0, "temperature": 0.002,
                                 "last_temperature": 0.001})  # fmt: skip
    logits, count = torch.tensor([0.0, 0.5, 1.0, 2.0]), 50_000
    choices = method._choices(torch.device("cpu")).argmax(1)  # type: ignore[attr-defined]
    scores = logits[choices].expand(count, 4)
    torch.manual_seed(0)
    state = State(progress=progress, training=True, shape=(count, 4))
    drawn = method.effective(torch.ones(count, 4), scores, False, state).mean(0)
    assert torch.allclose(drawn, ((1 + progress) * logits).softmax(0), atol=0.01)


def test_nm_is_soft_as_its_temperature_says() -> None:
    method = build_method("nm", {"kept": 1, "temperature": 4.0, "last_temperature": 0.01})
    scores, shares = torch.zeros(2000, 4), []
    for progress in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        state = State(progress=progress, training=True, shape=(2000, 4))
        shares.append(float(method.effective(torch.ones(2000, 4), scores, False, state).amax(1).mean()))
    assert 0.25 < shares[0] < shares[1] < shares[2]
    assert shares[0] < 0.45
    assert shares[2] > 0.99


def test_flip_inverts_what_is_not_above_zero() -> None:
    scores = torch.tensor([-1.0, 0.0, 1e-30])
    assert build_method("flip").binarize(scores).tolist() == [False, False, True]
    assert build_method("flip").effective(torch.ones(3), scores, False).tolist() == [-1.0, -1.0, 1.0]


def test_ternary_keeps_removes_and_inverts() -> None:
    method, weight = build_method("ternary"), torch.tensor([1.0, 2.0, -3.0, 4.0])
    scores = torch.tensor([0.6, 0.5, -0.1, 0.0])
    assert method.effective(weight, scores, False).tolist() == [1.0, 0.0, 3.0, 0.0]
    signs = method.packed(scores, False).signs
    assert signs is not None
    assert signs.tolist() == [True, True, False, True], "a removed weight has no sign to invert"


def test_gumbel_draws_in_training_and_decides_in_evaluation() -> None:
    method = build_method("gumbel")
    weight, scores = torch.ones(20_000), torch.full((20_000,), 1.5)
    torch.manual_seed(0)
    drawn = method.effective(weight, scores, False, State(training=True)).mean()
    assert abs(float(drawn.detach()) - float(torch.tensor(1.5).sigmoid())) < 0.01
    assert float(method.effective(weight, scores, False).mean()) == 1.0
    assert method.binarize(torch.tensor([0.0, -1e-9])).tolist() == [True, False]
    penalty = method.penalty(scores, State(batch_size=100))
    assert penalty is not None
    assert penalty.item() == pytest.approx(1e-4 / 100 * 1.5 * 20_000)


def test_the_gradient_of_gumbel_goes_through_the_sigmoid() -> None:
    method = build_method("gumbel", {"temperature": 0.5})
    weight, logits, g = (torch.randn(300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))
    logits.requires_grad_()
    torch.manual_seed(3)
    drawn = method.effective(weight, logits, False, State(training=True))
    (drawn * g).sum().backward()
    torch.manual_seed(3)
    u1, u2 = torch.rand(2, 300).double()
    noise = -((u2 + 1e-10).log() / (u1 + 1e-10).log() + 1e-10).log()
    soft = ((logits.detach() + noise) / 0.5).sigmoid()
    assert torch.equal(drawn.detach(), torch.where(soft > 0.5, weight, 0.0))
    assert logits.grad is not None
    assert torch.allclose(logits.grad.double(), (weight * g) * soft * (1 - soft) / 0.5, atol=1e-4)


def test_naive_removes_a_band_about_the_mean() -> None:
    two = torch.tensor([0.0, 1.0])  # both are one deviation from the mean
    assert build_method("naive").binarize(two).tolist() == [True, True]
    assert build_method("naive", {"width": 1.01}).binarize(two).tolist() == [False, False]
    model = small_model()
    with torch.no_grad():
        model[0].weight.normal_(5.0, 2.0)
        model[2].weight.normal_(0.0, 0.01)
    attach_scores(model, "naive")
    own = extract_masks(model)
    assert all(0.25 < mask.density < 0.4 for mask in own.values())  # 0.317 of a normal distribution
    every = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).double()
    away = (model[0].weight.double() - every.mean()).abs() - every.std(correction=0)
    attach_scores(model, build_method("naive", {"scope": "global"}))
    sure = away.abs() > 1e-5
    assert torch.equal(extract_masks(model)["0.weight"].tensor()[sure], (away > 0)[sure])


def test_edit_keeps_what_was_hardly_edited() -> None:
    weight, scores = torch.ones(4), torch.tensor([0.5, -0.001, 0.01, -2.0])
    method = build_method("edit")
    assert method.binarize(scores).tolist() == [False, True, True, False]
    assert method.effective(weight, scores, False).tolist() == [1.5, 1.0, 1.0, -1.0]
    assert build_method("edit", {"share": 0.25}).binarize(scores).tolist() == [True, True, True, False]
    penalty = method.penalty(scores, State())
    assert penalty is not None
    assert penalty.item() == pytest.approx(-(0.5 + 0.001 + 0.01 + 1.0) / 4)
    low = build_method("edit", {"rank": 1, "threshold": 0.0})
    edits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(low.effective(edits, edits, False, State(training=True)), edits + edits), "whole while it learns"
    left = low.values(torch.zeros(6, 5), edits)
    assert int(torch.linalg.matrix_rank(left)) == 1
    assert torch.linalg.matrix_norm(edits - left, 2) == pytest.approx(float(torch.linalg.svdvals(edits)[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topk", {"share": 0}, "share must be a finite number above 0 and at most 1, got 0"),
        ("topk", {"scope": "all"}, "scope must be one of tensor, global, got 'all'"),
        ("topk", {"init": "ones"}, "init must be one of kaiming, magnitude, got 'ones'"),
        ("flip", {"init": 0}, "init must be a finite number above 0, got 0"),
        ("ternary", {"init": 0.5}, "init must be above threshold, .* got 0.5 and 0.5"),
        ("gumbel", {"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ("gumbel", {"strength": -1}, "strength must be a finite number at least 0, got -1"),
        ("nm", {"kept": 4}, "expected 0 < kept < group <= 8, got kept = 4, group = 4"),
        ("nm", {"factor": "inf"}, "factor must be a finite number above 0, got inf"),
        ("naive", {"width": 0}, "width must be a finite number above 0, got 0"),
        ("naive", {"scope": "x"}, "scope must be one of tensor, global, got 'x'"),
        ("edit", {"share": 2}, "share must be a finite number at least 0 and at most 1, got 2"),
        ("edit", {"bound": 0}, "bound must be a finite number above 0, got 0"),
        ("edit", {"rank": -1}, "rank must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_impossible_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(name, options)


def test_nm_refuses_weights_without_whole_groups() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    before = list(model.state_dict())
    with pytest.raises(
        ConfigError, match=r"1.weight: a weight of shape \(4, 6\) has no whole groups of 4 along its inputs"
    ):
        attach_scores(model, "nm")
    assert list(model.state_dict()) == before
