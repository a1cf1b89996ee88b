"""load_cascade: the right masks for each input, one model, and the base to the bit after every call."""

import copy
from collections import UserDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from maskpack import load_cascade, load_mask, unload_mask
from maskpack.adapter.content import Cascade, Parts, Router, Whitening
from maskpack.adapter.read import Adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.model import Embedding
from maskpack.errors import AdapterError, BackboneMismatchError, ConfigError, DataError, StateError
from maskpack.runtime.cascade import Cost, LoadedCascade
from maskpack.runtime.load import MaskpackWarning

from .conftest import TinyNet
from .helpers_cascade import cascade_parts
from .helpers_models import bits, make_adapter, random_masks, same

EXPERTS = 3
CLASSES = ("a", "b", "c", "d")
INPUTS = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def sets_of(model: nn.Module, scale: bool = False) -> dict[str, Parts]:
    """A dispatcher and experts with masks and statistics of their own."""
    found = {}
    for seed, name in enumerate(["dispatcher", *(f"expert-{k}" for k in range(EXPERTS))]):
        generator = torch.Generator().manual_seed(100 + seed)
        statistics = {
            f"bn{i}.running_{what}": 0.1 + 0.2 * torch.rand(8 * i, generator=generator) - 0.2 * (what == "mean")
            for i in (1, 2)
            for what in ("mean", "var")
        }
        found[name] = Parts(random_masks(model, seed, scale), None, statistics)
    return found


def spread(features: int = 16, experts: int = EXPERTS, **options: Any) -> Cascade:
    """A cascade whose router sends inputs to every expert: its components lie at embeddings of some of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet()
        model(torch.randn(32, 3, 8, 8))
    parts = cascade_parts(features, experts, **options)
    if features != 16:
        return parts
    with torch.no_grad():
        network = copies(model, {"dispatcher": sets_of(model)["dispatcher"]})["dispatcher"]
        x = nn.functional.normalize(features_of(network, INPUTS), dim=1)
    _, values, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    whitening = Whitening(x.mean(0), directions[:3], values[:3] / len(x) ** 0.5)
    precisions = torch.eye(3).repeat(experts, 1, 1)
    router = Router(whitening, torch.full((experts,), 1 / experts), whitening(x)[:experts], precisions)
    return replace(parts, router=router)


def saved(path: Path, model: nn.Module, cascade: Cascade | None = None, scale: bool = False, **options: Any) -> Adapter:
    return save_adapter(
        path,
        sets_of(model, scale),
        fingerprint(model, id="tests:tiny", head=["fc"]),
        cascade=cascade or spread(),
        preprocess={"kind": "image", "size": 8, "resize": 8},
        **options,
    )


def test_a_cascade_of_a_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = TinyNet().eval()
    model = nn.ModuleDict({"encoder": part})
    adapter = saved(tmp_path / "cascade", part)
    expected = load_cascade(part, adapter).embed(INPUTS)
    found = load_cascade(model, adapter)
    assert found.model is part
    assert torch.equal(found.embed(INPUTS), expected)
    outer = saved(tmp_path / "outer", part, replace(spread(), embedding=Embedding("fc")))
    assert torch.equal(load_cascade(part, outer).embed(INPUTS), expected)


def copies(model: TinyNet, sets: dict[str, Parts]) -> dict[str, TinyNet]:
    """The definition: a whole network for each set."""
    found = {}
    for name, parts in sets.items():
        one = copy.deepcopy(model).eval()
        with torch.no_grad():
            for key, mask in parts.masks.items():
                weight = one.get_parameter(key)
                alpha = 1.0 if mask.alpha is None else mask.alpha
                weight.copy_(torch.where(mask.tensor(), weight / alpha, torch.zeros(())))
            for key, statistic in parts.statistics.items():
                one.get_buffer(key).copy_(statistic)
        found[name] = one
    return found


def features_of(model: TinyNet, x: Tensor) -> Tensor:
    x = torch.relu(model.bn1(model.conv1(x)))
    return torch.relu(model.bn2(model.conv2(x))).mean((2, 3))


@torch.no_grad()
def by_hand(model: TinyNet, sets: dict[str, Parts], parts: Cascade, x: Tensor) -> Tensor:
    """Input by input, with a network for each set."""
    networks, rows = copies(model, sets), []
    for one in x.split(1):
        blocks = [features_of(networks["dispatcher"], one)]
        chosen = int(parts.router.route(blocks[0]))
        for k, name in enumerate(parts.experts):
            asked = parts.combine == "unconditional" or k == chosen
            blocks.append(features_of(networks[name], one) if asked else torch.zeros(1, 16))
        row = torch.cat(blocks, 1)
        rows.append(row if parts.reduction is None else parts.reduction(row))
    return torch.cat(rows)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("reduced", [0, 5])
@pytest.mark.parametrize("combine", ["conditional", "unconditional"])
def test_embeds_as_networks_of_their_own_do(
    combine: Any, reduced: int, scale: bool, tmp_path: Path, tiny: TinyNet
) -> None:
    parts = spread(reduced=reduced, combine=combine)
    saved(tmp_path, tiny, parts, scale)
    before = bits(tiny)
    expected = by_hand(tiny, sets_of(tiny, scale), parts, INPUTS)
    cascade = load_cascade(tiny, tmp_path)
    assert same(bits(tiny), before), "loading changes nothing"
    found = cascade.embed(INPUTS)
    assert found.shape == (24, reduced or 16 * (EXPERTS + 1))
    assert torch.allclose(found, expected, atol=1e-5)
    assert same(bits(tiny), before)
    chosen, posterior = cascade.route(INPUTS)
    assert torch.equal(chosen, posterior.argmax(1))
    assert len(set(chosen.tolist())) > 1, "else the test shows little"
    if not reduced:
        zero = found.reshape(24, EXPERTS + 1, 16)[:, 1:].abs().sum(2) == 0
        wanted = torch.nn.functional.one_hot(chosen, EXPERTS) == 0
        assert torch.equal(zero, wanted if combine == "conditional" else torch.zeros_like(wanted))


def test_cost_is_counted(tmp_path: Path, tiny: TinyNet) -> None:
    saved(tmp_path, tiny)
    cascade = load_cascade(tiny, tmp_path)
    chosen, _ = cascade.route(INPUTS)
    packed = sum(-(-len(mask.bits) // 8) for one in sets_of(tiny).values() for mask in one.masks.values())
    statistics = 4 * (EXPERTS + 1) * 2 * (8 + 16)
    assert cascade.cost == Cost(24, 24, 1, cascade.cost.seconds, packed + statistics)
    cascade.cost = Cost()
    cascade.embed(INPUTS)
    used = len(set(chosen.tolist()))
    assert cascade.cost == Cost(24, 48, 1 + used, cascade.cost.seconds), "each expert's masks are put on once at most"
    assert cascade.cost.passes_per_input == 2
    assert cascade.cost.seconds > 0
    cascade.parts = replace(cascade.parts, combine="unconditional")
    cascade.cost = Cost()
    cascade.embed(INPUTS)
    assert cascade.cost.passes_per_input == EXPERTS + 1
    assert Cost().passes_per_input == 0


def test_batches_of_no_and_of_one_input(tmp_path: Path, tiny: TinyNet) -> None:
    saved(tmp_path, tiny)
    cascade = load_cascade(tiny, tmp_path)
    whole = cascade.embed(INPUTS)
    assert torch.allclose(torch.cat([cascade.embed(one) for one in INPUTS.split(1)]), whole, atol=1e-5)
    assert cascade.embed(INPUTS[:0]).shape == (0, 16 * (EXPERTS + 1))
    assert cascade.route(INPUTS[:0])[0].shape == (0,)


class Encoder(nn.Module):
    """A text encoder as transformers has them: token tensors in, an object with last_hidden_state out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.dense = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return type("Output", (), {"last_hidden_state": torch.tanh(self.dense(self.words(input_ids)))})()


def test_of_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder()
    sets = {
        name: Parts(random_masks(model, seed))
        for seed, name in enumerate(["dispatcher", *(f"expert-{k}" for k in range(EXPERTS))])
    }
    parts = spread(embedding=Embedding(None, "mean", True), combine="unconditional")
    save_adapter(tmp_path, sets, fingerprint(model, id="tests:encoder"), cascade=parts)
    tokens = torch.randint(0, 50, (12, 6))
    batch = {"input_ids": tokens, "attention_mask": (torch.arange(6) < torch.randint(1, 7, (12, 1))).long()}
    unconditional = load_cascade(model, tmp_path)
    found = unconditional.embed(batch).reshape(12, EXPERTS + 1, 16)
    assert torch.allclose(found.norm(dim=2), torch.ones(12, EXPERTS + 1), atol=1e-5)
    with torch.no_grad():
        hidden = torch.tanh(torch.where(sets["expert-1"].masks["dense.weight"].tensor(), model.dense.weight, 0)
                            @ model.words(tokens)[..., None] + model.dense.bias[:, None])[..., 0]  # fmt: skip
        seen = batch["attention_mask"][..., None]
        assert torch.allclose(found[:, 2], nn.functional.normalize((hidden * seen).sum(1), dim=1), atol=1e-5)
    as_tokenized = UserDict(batch)  # as a tokenizer's BatchEncoding: a mapping, but no dictionary
    assert torch.equal(unconditional.embed(as_tokenized).reshape(found.shape), found)
    assert torch.equal(unconditional.route(as_tokenized)[0], unconditional.route(batch)[0])
    with pytest.raises(DataError, match="expected a preprocessed batch, .*; got list"):
        unconditional.embed(["a text"])  # type: ignore[arg-type]
    conditional = LoadedCascade(model, sets, replace(parts, combine="conditional"))
    some = conditional.embed(batch).reshape(12, EXPERTS + 1, 16)
    assert torch.allclose(some[some != 0], found[some != 0], atol=1e-5)
    assert ((some != 0).any(2).sum(1) == 2).all()


class StopHere(Exception):  # noqa: N818
    pass


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fail_at=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.booleans(),
    combine=st.sampled_from(["conditional", "unconditional"]),
    training=st.booleans(),
)
def test_the_base_comes_back_whatever_happens(
    fail_at: int, dtype: torch.dtype, scale: bool, combine: Any, training: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = TinyNet().train(training)
    sets = sets_of(model, scale)
    model.to(dtype)
    cascade = LoadedCascade(model, sets, spread(combine=combine))
    before, modes = bits(model), [m.training for m in model.modules()]
    passes = 0

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > fail_at:
            raise StopHere

    hook = model.conv2.register_forward_pre_hook(interrupt)
    try:
        cascade.embed(INPUTS)
        assert passes <= fail_at
    except StopHere:
        pass
    hook.remove()
    assert same(bits(model), before)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    cascade.embed(INPUTS)
    assert same(bits(model), before)


def test_a_mask_that_does_not_fit_leaves_the_base(tiny: TinyNet) -> None:
    sets = sets_of(tiny)
    sets["expert-1"] = replace(sets["expert-1"], statistics={"bn1.running_mean": torch.rand(9)})
    before = bits(tiny)
    with pytest.raises(BackboneMismatchError, match="the model has no 'bn1.running_mean' of shape"):
        LoadedCascade(tiny, sets, spread(combine="unconditional")).embed(INPUTS)
    assert same(bits(tiny), before)


def test_predicts(tmp_path: Path, tiny: TinyNet) -> None:
    parts = spread(classes=4)
    saved(tmp_path / "x", tiny, parts, class_names=CLASSES)
    cascade = load_cascade(tiny, tmp_path / "x")
    assert parts.weight is not None
    logits = by_hand(tiny, sets_of(tiny), parts, INPUTS) @ parts.weight.T + parts.bias
    for size in (5, 64):
        found = cascade.predict(INPUTS, batch_size=size)
        assert [one.label for one in found] == [CLASSES[int(i)] for i in logits.argmax(1)]
        scores = torch.tensor([one.score for one in found])
        assert torch.allclose(scores, logits.softmax(1).max(1).values, atol=1e-5)
    Image.new("L", (9, 9), 70).save(tmp_path / "x.png")
    (one,) = cascade.predict([tmp_path / "x.png"])
    assert one.label in CLASSES
    saved(tmp_path / "y", tiny)
    with pytest.raises(AdapterError, match="has no .*, so it cannot predict by itself"):
        load_cascade(tiny, tmp_path / "y").predict(INPUTS)


def test_a_loaded_mask_is_unloaded_and_does_not_mix(tmp_path: Path, tiny: TinyNet) -> None:
    make_adapter(tmp_path / "mask", tiny)
    saved(tmp_path / "cascade", tiny)
    before = bits(tiny)
    load_mask(tiny, tmp_path / "mask")
    cascade = load_cascade(tiny, tmp_path / "cascade")
    assert same(bits(tiny), before)
    load_mask(tiny, tmp_path / "mask")
    with pytest.raises(StateError, match=r"has a mask already; call unload_mask\(model\) first"):
        cascade.embed(INPUTS)
    unload_mask(tiny)
    assert same(bits(tiny), before)


def test_refuses_what_it_cannot_use(tmp_path: Path, tiny: TinyNet) -> None:
    make_adapter(tmp_path / "mask", tiny)
    with pytest.raises(AdapterError, match="is no cascade, it has one mask set; use load_mask"):
        load_cascade(tiny, tmp_path / "mask")
    several = save_adapter(tmp_path / "sets", sets_of(tiny), fingerprint(tiny, id="x", head=["fc"]))
    with pytest.raises(AdapterError, match="it has 4 mask sets without a router"):
        load_cascade(tiny, several)
    with pytest.raises(ConfigError, match="verify must be one of strict, warn, off, got .no."):
        load_cascade(tiny, several, verify="no")  # type: ignore[arg-type]
    adapter = saved(tmp_path / "x", tiny)
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.conv1.weight.add_(1)
    with pytest.raises(BackboneMismatchError, match="1 of 2 masked tensors differ"):
        load_cascade(other, adapter)
    with pytest.warns(MaskpackWarning, match="1 of 2 masked tensors differ"):
        load_cascade(other, adapter, verify="warn")
    with pytest.raises(BackboneMismatchError, match="lacks 2 of the 2 masked parameters"):
        load_cascade(
            nn.Sequential(nn.Linear(2, 2)),
            saved(tmp_path / "y", tiny, spread(embedding=Embedding("0"))),
            verify="off",
        )
    with pytest.raises(BackboneMismatchError, match="has no 'head', whose input the cascade takes"):
        load_cascade(tiny, saved(tmp_path / "z", tiny, spread(embedding=Embedding("head"))))
    wide = load_cascade(tiny, saved(tmp_path / "w", tiny, cascade_parts(17, EXPERTS)))
    with pytest.raises(BackboneMismatchError, match="gives embeddings of 16 features, the router expects 17"):
        wide.embed(INPUTS)
