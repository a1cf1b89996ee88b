"""k-NN, probe, accuracy by class: against slow obvious references, and no evaluation row is ever learned from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskpack.backbone.load import Backbone, load_backbone
from maskpack.errors import ConfigError, DataError
from maskpack.training import features as frozen
from maskpack.training import features as knn
from maskpack.training.data.base import Data, few_labels, load_data
from maskpack.training.features import ABSENT, Probe, by_class, embed, fit_probe, knn_scores, measure_features


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKPACK_CACHE", str(tmp_path / "cache"))


def drawn(seed: int, n: int, features: int, classes: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows around a centre for each class, in two halves."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (2 * n,), generator=g)
    x = torch.randn(classes, features, generator=g)[y] + spread * torch.randn(2 * n, features, generator=g) + 3
    return x[:n], y[:n], x[n:], y[n:]


# --- k-NN ------------------------------------------------------------------------------------------------------------


def slow_knn(bank: Tensor, labels: Tensor, x: Tensor, classes: int, k: int, temperature: float) -> list[list[float]]:
    shares = []
    for query in x.double().numpy():
        cosines = [
            float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) if row.any() and query.any() else 0.0
            for row in bank.double().numpy()
        ]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(labels[i])] += np.exp(cosines[i] / temperature)
        shares.append([vote / sum(votes) for vote in votes])
    return shares


def knn_accuracy(bank: Tensor, labels: Tensor, x: Tensor, y: Tensor, classes: int, *rest: Any, **options: Any) -> float:
    found: float = by_class(knn_scores(bank, labels, x, classes, *rest, **options), y)["accuracy"]
    return found


def accuracy(probe: Probe, x: Tensor, y: Tensor) -> float:
    found: float = by_class(probe.logits(x), y)["accuracy"]
    return found


@pytest.mark.parametrize("seed", range(12))
def test_knn_is_what_it_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(seed)
    n, m, features, classes = (int(torch.randint(low, high, (1,), generator=g)) for low, high in
                               ((1, 40), (1, 60), (1, 20), (2, 9)))  # fmt: skip
    bank, labels = torch.randn(m, features, generator=g) * 7, torch.randint(classes, (m,), generator=g)
    x = torch.randn(n, features, generator=g) * 0.1
    k, temperature = [1, 3, 200][seed % 3], [0.1, 0.5, 5.0, 1.0][seed % 4]
    monkeypatch.setattr(knn, "CHUNK", [1, 7 * m, 1 << 24][seed % 3])
    expected = torch.tensor(slow_knn(bank, labels, x, classes, k, temperature))
    found = knn_scores(bank, labels, x, classes, k, temperature)
    if features == 1:  # cosines are 1 or -1, so which of the equal ones vote is open
        assert found.shape == expected.shape
    else:
        assert torch.allclose(found.double(), expected, atol=1e-4)
        y = expected.argmax(1)
        y[0] = (y[0] + 1) % classes
        assert knn_accuracy(bank, labels, x, y, classes, k, temperature) == pytest.approx((n - 1) / n)


def test_knn_of_few_lengthless_and_equal_rows() -> None:
    bank, labels = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), torch.tensor([2, 1, 0, 2])
    x = torch.tensor([[2.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    scores = knn_scores(bank, labels, x, 4, k=2)
    assert scores.argmax(1)[:2].tolist() == [1, 0]
    assert scores[2].tolist() == pytest.approx([0.5, 0.5, 0, 0])
    # of equal votes the first class counts
    assert knn_accuracy(bank, labels, x, torch.tensor([1, 0, 0]), 4, k=2) == 1.0
    bank_x, bank_y, other, y = drawn(0, 300, 5, 4)
    assert torch.equal(knn_scores(bank_x, bank_y, other, 4), knn_scores(bank_x, bank_y, other, 4, 200, 0.1))
    found = knn_scores(bank_x, bank_y, other, 4, 200, 0.1).argmax(1)
    assert knn_accuracy(bank_x, bank_y, other, y, 4) == float((found == y).double().mean())
    assert torch.isfinite(knn_scores(bank, labels, x, 4, temperature=1e-4)).all()
    assert torch.isfinite(knn_scores(bank, labels, torch.zeros(2, 2), 4)).all()
    assert bank[2].tolist() == [0.0, 3.0], "the bank stays as it was"


# --- linear probe ----------------------------------------------------------------------------------------------------


def objective(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(x.double() @ weight.T + bias, y)
    return loss + 0.01 / len(x) / 2 * weight.square().sum()


def gradient(probe: Probe, x: Tensor, y: Tensor) -> float:
    weight, bias = probe.weight.double().requires_grad_(), probe.bias.double().requires_grad_()
    grads = torch.autograd.grad(objective(weight, bias, x, y), [weight, bias])
    return max(float(g.abs().max()) for g in grads)


@pytest.mark.parametrize(
    ("n", "features", "classes", "spread"), [(300, 12, 5, 1.0), (60, 200, 4, 2.0), (40, 40, 3, 0.1), (200, 8, 2, 2.0)]
)
def test_probe_is_the_minimum_and_that_of_scikit_learn(n: int, features: int, classes: int, spread: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, test_x, test_y = drawn(n, n, features, classes, spread)
    probe = fit_probe(x, y, classes)
    assert gradient(probe, x, y) < 2e-5
    # with two classes scikit-learn has one vector of weights, the difference of our two: half the penalty
    strength = 100 * (2 if classes == 2 else 1)
    other = linear_model.LogisticRegression(C=strength, tol=1e-9, max_iter=50_000).fit(x.double().numpy(), y.numpy())
    if classes > 2:
        weight, bias = torch.tensor(other.coef_), torch.tensor(other.intercept_)
        theirs = float(objective(weight, bias, x, y))
        assert float(objective(probe.weight.double(), probe.bias.double(), x, y)) <= theirs * (1 + 1e-5)
    expected = torch.tensor(other.predict_proba(test_x.double().numpy()))
    assert torch.allclose(probe.logits(test_x).softmax(1).double(), expected, atol=5e-3)
    assert accuracy(probe, test_x, test_y) == pytest.approx(other.score(test_x, test_y), abs=0.011)


def test_the_penalty_is_felt() -> None:
    x, y, *_ = drawn(0, 50, 10, 3)
    more = fit_probe(torch.cat([x] * 4), torch.cat([y] * 4), 3).weight.norm()
    # the sum of losses is four times as large, the penalty on the weights is the same
    assert float(more) > 1.1 * float(fit_probe(x, y, 3).weight.norm())


def test_probe_of_features_in_any_place_and_scale() -> None:
    """Dead, huge, equal and shifted features, and more features than rows: still the minimum."""
    x, y, *_ = drawn(1, 80, 30, 4)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = 0, 5, x[:, 4], x[:, 3] * 1e3
    assert gradient(fit_probe(x, y, 4), x, y) < 1e-3
    unscaled = x.clone()
    unscaled[:, 3] /= 1e3
    assert gradient(fit_probe(unscaled, y, 4), unscaled, y) < 2e-5
    assert fit_probe(x, y, 4).weight[:, 0].abs().max() == 0
    assert accuracy(fit_probe(x * 1e9, y, 4), x * 1e9, y) > 0.9
    assert accuracy(fit_probe(x * 0, y, 4), x, y) == float((y == y.mode().values).double().mean())


def test_classes_without_a_training_row_are_never_predicted() -> None:
    x, y, test_x, _ = drawn(2, 60, 6, 3)
    few = fit_probe(x, y * 2, 7)  # classes 1, 3, 5 and 6 have none
    same = fit_probe(x, y, 3)
    assert few.weight.shape == (7, 6)
    assert torch.equal(few.weight[[0, 2, 4]], same.weight)
    assert few.weight[[1, 3, 5, 6]].abs().max() == 0
    logits = few.logits(test_x * 1e6)
    assert torch.equal(logits[:, 5], torch.full((60,), ABSENT))
    assert set(logits.argmax(1).tolist()) <= {0, 2, 4}
    alone = fit_probe(x[:1], torch.tensor([4]), 7)
    assert alone.logits(test_x).argmax(1).unique().tolist() == [4]


def test_probe_of_nothing() -> None:
    with pytest.raises(DataError, match="a linear probe needs finite features of at least one row, got 0 rows"):
        fit_probe(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 2)
    with pytest.raises(DataError, match="a linear probe needs finite features"):
        fit_probe(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), 2)


# --- accuracy by class -----------------------------------------------------------------------------------------------


def test_confusion_counts_true_against_predicted() -> None:
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(200, 6, generator=g), torch.randint(5, (200,), generator=g)
    expected = [[0] * 6 for _ in range(6)]
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        expected[label][row.index(max(row))] += 1
    found = by_class(logits, y)
    assert found["confusion"] == expected
    assert found["accuracy"] == sum(expected[i][i] for i in range(6)) / 200
    assert found["per_class"] == [*(expected[i][i] / sum(expected[i]) for i in range(5)), None]


# --- from training rows to test rows ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_measures_of_features(tiny_backbone: Backbone) -> None:
    data = load_data("digits:5-9")
    assert data.train is not None
    assert data.test is not None
    rows = measure_features(tiny_backbone, data, ["knn", "probe"], [1.0, 0.1])
    assert [(r["measure"], r["labels_fraction"], r["labels"], r["examples"]) for r in rows] == [
        ("knn", 1.0, 718, 178), ("probe", 1.0, 718, 178), ("knn", 0.1, 71, 178), ("probe", 0.1, 71, 178),
    ]  # fmt: skip
    x, y = embed(tiny_backbone, few_labels(data.train, 0.1))
    test_x, test_y = embed(tiny_backbone, data.test)
    assert rows[2]["accuracy"] == knn_accuracy(x, y, test_x, test_y, 5)
    assert rows[3]["accuracy"] == accuracy(fit_probe(x, y, 5), test_x, test_y)
    assert rows[1]["accuracy"] > rows[3]["accuracy"] > 0.3
    assert sum(map(sum, rows[0]["confusion"])) == 178
    for fraction in (0.0, 2.0):
        with pytest.raises(ConfigError, match="the share of labels must be in"):
            measure_features(tiny_backbone, data, ["knn"], [fraction])


@pytest.mark.usefixtures("cache")
def test_no_evaluation_row_is_ever_learned_from(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_data("digits:5-9", validation_fraction=0.2)
    assert whole.train is not None
    assert whole.test is not None
    learned: list[set[int]] = []

    def spying(bank: Tensor, *rest: object) -> Tensor:
        learned.append({hash(row.numpy().tobytes()) for row in bank})
        return knn_scores(bank, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(frozen, "knn_scores", spying)
    for data in (whole, replace(whole, test=whole.validation)):
        assert data.test is not None
        measure_features(tiny_backbone, data, ["knn"], [1.0, 0.5])
        asked = {hash(row.numpy().tobytes()) for row in embed(tiny_backbone, data.test)[0]}
        assert len(asked) == len(data.test)
        assert not asked & learned[-1]
        assert not asked & learned[-2]
    shared = replace(whole.train, indices=[*whole.train.indices[:3], 5000])
    with pytest.raises(DataError, match="3 rows of 'digits:5-9' are in the training and in the test split; measured"):
        measure_features(tiny_backbone, replace(whole, test=shared), ["knn"])
    again = load_data("digits:5-9").train  # other objects, the same rows
    with pytest.raises(DataError, match="574 rows of 'digits:5-9' are in the training and in the test split"):
        measure_features(tiny_backbone, replace(whole, test=again), ["probe"])


def test_both_splits_are_needed(tiny_backbone: Backbone) -> None:
    data = load_data("digits:5-9")
    for missing in ("train", "test"):
        with pytest.raises(DataError, match=f"'digits:5-9' have no {missing} split"):
            measure_features(tiny_backbone, replace(data, **{missing: None}), ["knn"])
    with pytest.raises(DataError, match="'digits:5-9' have no labels"):
        measure_features(tiny_backbone, load_data("digits:5-9", labelled=False), ["knn"])


@pytest.mark.usefixtures("cache")
def test_real_features(shared_data: Path) -> None:
    """ResNet-20 was trained on CIFAR-10's labels, so its features tell most of the photos of PACS apart."""
    factory = Path(__file__).parent.parent / "benchmarks" / "backbones.py"
    backbone = load_backbone(f"{factory}:resnet20", weights=shared_data / "weights/resnet20_cifar10.safetensors")
    data: Data = load_data(str(shared_data / "data/pacs/photo"), labels_fraction=0.3)
    neighbours, probe = measure_features(backbone, data, ["knn", "probe"])
    assert 0.5 < neighbours["accuracy"] < probe["accuracy"]
    assert 0.65 < probe["accuracy"] < 0.85
