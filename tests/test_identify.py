"""Which mask is an input for: by entropy, by each, by features of the base; combinations for unseen tasks."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from maskpack import MaskBank, identify
from maskpack.adapter.content import Parts
from maskpack.backbone.classifier import classifier_from
from maskpack.backbone.model import Embedding, Head
from maskpack.errors import ConfigError, UnknownNameError
from maskpack.mask import MaskSet, PackedMask
from maskpack.runtime.apply import masked
from maskpack.runtime.identify import entropies, mixture, profiles, superposition
from maskpack.training import attach_scores, extract_masks

from .helpers_models import bits, random_masks, same

TASKS, CLASSES = 4, 3


class Mlp(nn.Module):
    """Two hidden layers with random weights and a head that is never trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.fc = nn.Linear(128, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


def examples(task: int, count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around centres of a task's own: its classes."""
    centres = 2 * torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(task + 10))
    generator = torch.Generator().manual_seed(1000 * seed + task)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return centres[y] + 0.5 * torch.randn(count, 20, generator=generator), y


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, dict[str, MaskSet]]:
    """A random network and a mask of it for each task."""
    torch.manual_seed(0)
    model = Mlp().eval()
    found = {}
    for task in range(TASKS):
        scores = attach_scores(model, "topk", ["first.weight", "second.weight"])
        optimizer = torch.optim.Adam(scores.values(), lr=0.01)
        for step in range(60):
            x, y = examples(task, seed=step + 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        found[f"task{task}"] = extract_masks(model)
    return model, found


@pytest.fixture
def bank(trained: tuple[nn.Module, dict[str, MaskSet]]) -> Iterator[MaskBank]:
    with MaskBank(trained[0]) as bank:
        for name, masks in trained[1].items():
            bank.add(masks, name)
        yield bank


@pytest.mark.parametrize("how", ["one-shot", "binary", "each"])
def test_tasks_are_told_by_entropy(bank: MaskBank, how: str) -> None:
    before = bits(bank.model)
    bank.use("task1")
    passes = {"one-shot": 4, "binary": 7, "each": 4}[how]
    for task in range(TASKS):
        found = identify(bank, examples(task)[0], how)  # type: ignore[arg-type]
        assert found.likeliest == f"task{task}"
        assert max(found.scores, key=lambda name: found.scores[name]) == found.likeliest
        assert len(found.scores) == TASKS
        assert found.passes == passes
        assert 0 <= found.confidence <= 1
        assert found.name == (found.likeliest if found.confidence >= 0.5 else None)
    assert bank.active == "task1"
    bank.disable()
    assert same(bits(bank.model), before)


def test_what_is_none_of_them(bank: MaskBank) -> None:
    noise = 0.01 * torch.randn(64, 20)
    assert identify(bank, noise).name is None
    assert identify(bank, examples(0)[0], least=1.0).name is None
    assert identify(bank, examples(0)[0], least=0.0).name == "task0"
    known = profiles(bank, {f"task{task}": examples(task)[0] for task in range(TASKS)})
    for task in range(TASKS):
        found = identify(bank, examples(task, seed=7)[0], known)
        assert (found.name, found.passes) == (f"task{task}", 1)
        assert found.confidence > 0.6
    far = identify(bank, 30 * torch.randn(64, 20), known)
    assert far.name is None
    assert far.likeliest in bank.names


def test_slopes_are_those_of_the_definition(tiny: nn.Module) -> None:
    """By autograd through theta(a) in float64, with scales, flips, statistics and heads."""
    sets = {
        "a": random_masks(tiny, 0, scale=True),
        "b": random_masks(tiny, 1),
        "c": MaskSet({n: PackedMask(m.bits, m.shape, "flip") for n, m in random_masks(tiny, 2).items()}),
    }
    parts = {
        name: Parts(
            masks, Head(Embedding("fc"), torch.randn(3, 16), torch.randn(3)), {"bn1.running_mean": torch.rand(8)}
        )
        for name, masks in sets.items()
    }
    one = superposition(tiny, parts)
    x = torch.randn(5, 3, 8, 8)
    shares = torch.tensor([0.5, 0.2, 0.3])
    value, slopes = one.slopes(x, shares, lambda logits: entropies(logits).mean())
    wide = copy.deepcopy(tiny).double()
    a = shares.double().requires_grad_()
    whole = {
        name: sum((a.detach() if "running" in name else a)[i] * one.theta(i, name).double() for i in range(3))
        for name in one.base
    }
    loss = entropies_slowly(torch.func.functional_call(wide, whole, (x.double(),)))  # type: ignore[arg-type]
    loss.backward()
    assert a.grad is not None
    assert value == pytest.approx(float(loss.detach()), rel=1e-4)
    torch.testing.assert_close(slopes.double(), a.grad, rtol=1e-3, atol=1e-4)
    # at a corner there is one adapter
    alone = one.logits(x, one.added(torch.tensor([0.0, 1.0, 0.0])))
    with MaskBank(tiny) as bank, torch.no_grad():
        bank.add(sets["b"], "b")
        bank.use("b")
        tiny.bn1.running_mean.copy_(parts["b"].statistics["bn1.running_mean"])
        tiny.fc = nn.Linear(16, 3)
        head = parts["b"].head
        assert head is not None
        assert head.bias is not None
        tiny.fc.weight.copy_(head.weight)
        tiny.fc.bias.copy_(head.bias)
        torch.testing.assert_close(tiny(x), alone)


def entropies_slowly(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.stack([-sum(v * v.log() for v in row) for row in p]).mean()  # type: ignore[arg-type]


def test_a_combination_for_an_unseen_task(bank: MaskBank) -> None:
    x, y = examples(2)
    shares, outputs = mixture(bank, x, y)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]) == "task2"
    even = math.log(CLASSES)
    with torch.no_grad():
        assert float(nn.functional.cross_entropy(outputs(x), y)) < even / 2
    unlabelled, _ = mixture(bank, x, steps=40)
    assert max(unlabelled, key=lambda name: unlabelled[name]) == "task2"


def test_what_cannot_be_asked(bank: MaskBank, tiny: nn.Module) -> None:
    x = examples(0)[0]
    with pytest.raises(ConfigError, match="how must be one-shot, binary, each, or the Profiles of tasks; got 'guess'"):
        identify(bank, x, "guess")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there must be two adapters at least .*, got 1"):
        identify(bank, x, names=["task0"])
    with pytest.raises(ConfigError, match="there must be two adapters at least .*, got 1"):
        mixture(bank, x, names=["task0"])
    with pytest.raises(UnknownNameError, match="no adapter 'x'"):
        identify(bank, x, names=["task0", "x"])
    with pytest.raises(ConfigError, match="there are no examples of any task"):
        profiles(bank, {})
    with pytest.raises(ConfigError, match="a profile needs two examples at least, and 'task0' has 1"):
        profiles(bank, {"task0": x[:1]})
    heads = {name: Head(Embedding("fc"), torch.randn(2 + i, 16)) for i, name in enumerate("ab")}
    with pytest.raises(ConfigError, match="those of 'a', 'b' have not one shape; choose others, or how='each'"):
        superposition(tiny, {name: Parts(random_masks(tiny), head) for name, head in heads.items()})


def test_texts_with_heads_behind_an_encoder() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = BertModel(config, add_pooling_layer=False).eval()
    before = bits(model)
    inputs = {"input_ids": torch.randint(40, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    embedding = Embedding(pooling="mean")
    parts = {name: Parts(random_masks(model, i), Head(embedding, torch.randn(3, 16))) for i, name in enumerate("ab")}
    one = superposition(model, parts)
    with torch.no_grad(), masked(model, parts["b"]):
        wanted = classifier_from(model, parts["b"].head)(inputs)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(one.logits(inputs, one.added(torch.tensor([0.0, 1.0]))), wanted)
    assert same(bits(model), before)
