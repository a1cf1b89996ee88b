"""The head of a cascade, and the table of it beside its dispatcher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskpack import load_cascade, save_adapter
from maskpack.adapter.describe import inspect_adapter
from maskpack.backbone.load import Backbone
from maskpack.errors import AdapterError, DataError
from maskpack.runtime.cascade import LoadedCascade
from maskpack.training import load_data, train_cascade
from maskpack.training.cascade import CascadeResult, fit_cascade_head, fit_whitening
from maskpack.training.data.base import Data, loader, readable
from maskpack.training.evaluate import cascade_table
from maskpack.training.features import embed, embed_all, fit_probe, measured, routed

from .helpers_models import QUICK, bits, same, tiny_net

EXPERTS, D = 2, 16


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", labels_fraction=0.2)


@pytest.fixture(scope="module")
def trained(digits: Data) -> CascadeResult:
    return train_cascade(tiny_net(), digits, replace(QUICK, epochs=1), experts=EXPERTS)


@pytest.fixture
def backbone() -> Backbone:
    return tiny_net()


def whole(backbone: Backbone, cascade: LoadedCascade, data: Data) -> torch.Tensor:
    """The combined embeddings of the test split as a user gets them."""
    assert data.test is not None
    return torch.cat([cascade.embed(x) for x, _ in readable(loader(data.test, backbone.preprocess))])


@pytest.mark.parametrize("combine", ["conditional", "unconditional"])
def test_embeddings_by_set_are_those_of_the_cascade(
    combine: Any, trained: CascadeResult, backbone: Backbone, digits: Data
) -> None:
    parts = replace(trained.cascade, combine=combine)
    cascade = LoadedCascade(backbone.model, trained.parts, parts)
    assert digits.test is not None
    before = bits(backbone.model)
    x, y = embed_all(backbone, cascade, digits.test)
    assert same(bits(backbone.model), before)
    assert y.tolist() == [digits.test.labels[i] for i in digits.test.indices]
    found = routed(x, parts) if combine == "conditional" else x
    assert torch.allclose(found, whole(backbone, cascade, digits), atol=1e-5)


@pytest.mark.parametrize(("combine", "reduce"), [("conditional", None), ("unconditional", 12)])
def test_head_is_a_probe_on_what_the_cascade_gives(
    combine: Any, reduce: int | None, trained: CascadeResult, backbone: Backbone, digits: Data, tmp_path: Path
) -> None:
    result = fit_cascade_head(backbone, digits, trained, combine=combine, reduce=reduce)
    assert result.parts == trained.parts
    assert trained.cascade.weight is None, "what it was given is as before"
    adapter = save_adapter(tmp_path, result.parts, result.base, result.about, cascade=result.cascade)
    assert (adapter.about.task, adapter.about.class_names) == ("image-classification", digits.class_names)
    cascade = load_cascade(backbone.model, adapter)
    assert cascade.parts.combine == combine
    assert cascade.embed(torch.zeros(1, 3, 8, 8)).shape == (1, reduce or D * (EXPERTS + 1))
    assert digits.test is not None
    images = torch.cat([x for x, _ in readable(loader(digits.test, backbone.preprocess))])
    labels = torch.tensor([digits.test.labels[i] for i in digits.test.indices])
    names = [digits.class_names[int(label)] for label in labels]
    right = [one.label == name for one, name in zip(cascade.predict(images), names, strict=True)]
    table = cascade_table(backbone, adapter, digits, whiten=reduce)["rows"]
    row = next(r for r in table if (r["embedding"], r["whitened"]) == (combine, reduce is not None))
    assert sum(right) / len(right) == pytest.approx(row["probe"], abs=0.01)
    assert row["probe"] > 0.5


def test_without_labels_there_is_no_head(trained: CascadeResult, backbone: Backbone, digits: Data) -> None:
    unlabelled = replace(digits, class_names=())
    plain = fit_cascade_head(backbone, unlabelled, trained, combine="unconditional")
    assert (plain.cascade.combine, plain.cascade.weight, plain.about.class_names) == ("unconditional", None, None)
    reduced = fit_cascade_head(backbone, unlabelled, trained, reduce=7).cascade
    assert reduced.reduction is not None
    assert reduced.reduction.components.shape == (7, D * (EXPERTS + 1))
    assert reduced.weight is None
    with pytest.raises(DataError, match="'digits:5-9' have no training split, which the head of a cascade is"):
        fit_cascade_head(backbone, replace(digits, train=None), trained)


def test_table(trained: CascadeResult, backbone: Backbone, digits: Data, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path, trained.parts, trained.base, trained.about, cascade=trained.cascade)
    before = bits(backbone.model)
    found = cascade_table(backbone, adapter, digits)
    assert same(bits(backbone.model), before)
    assert digits.train is not None
    assert digits.test is not None
    assert (found["train"], found["test"], found["classes"]) == (len(digits.train), len(digits.test), 5)
    rows = {(row["embedding"], row["whitened"]): row for row in found["rows"]}
    kinds = ("raw", "dispatcher", "conditional", "unconditional")
    assert list(rows) == [(kind, whitened) for kind in kinds for whitened in (False, True)]
    steps = trained.about.training["cascade"]["steps"]
    sets = inspect_adapter(adapter)["sets"]
    parts = trained.cascade
    cascade = LoadedCascade(backbone.model, trained.parts, parts)
    (x, y), (test_x, test_y) = (embed_all(backbone, cascade, split) for split in (digits.train, digits.test))
    seen = {
        "raw": (embed(backbone, digits.train)[0], embed(backbone, digits.test)[0]),
        "dispatcher": (x[:, :D], test_x[:, :D]),
        "conditional": (routed(x, parts), routed(test_x, parts)),
        "unconditional": (x, test_x),
    }
    for (kind, whitened), row in rows.items():
        own, other = seen[kind]
        if whitened:
            whitening = fit_whitening(own, D)
            own, other = whitening(own), whitening(other)
        assert row["knn"] == measured("knn", own, y, other, test_y, 5)["accuracy"]
        assert row["probe"] == measured("probe", own, y, other, test_y, 5)["accuracy"]
        width = D if kind in ("raw", "dispatcher") else D * (EXPERTS + 1)
        names = {"raw": [], "dispatcher": ["dispatcher"]}.get(kind, list(sets))
        assert row["passes"] == {"raw": 1, "dispatcher": 1, "conditional": 2, "unconditional": EXPERTS + 1}[kind]
        assert row["steps"] == sum(steps[name] for name in names)
        assert row["dimensions"] == (D if whitened else width)
        assert row["mask_bytes"] == sum(sets[name]["payload_bytes"] for name in names)
        assert row["statistics_bytes"] == sum(sum(sets[name]["dense_bytes"].values()) for name in names)
        assert row["router_bytes"] == (
            inspect_adapter(adapter)["cascade"]["bytes"]["router"] if kind == "conditional" else 0
        )
        assert row["reduction_bytes"] == (4 * (width + D * width + D) if whitened else 0)
        assert row["head_bytes"] == 4 * 5 * (row["dimensions"] + 1)
        assert row["bytes"] == sum(size for key, size in row.items() if key.endswith("_bytes"))
        assert row["probe"] > 0.4


def test_whitened_features_have_the_penalty_of_raw_ones() -> None:
    """Coordinates of unit variance, and not 1 / n: else a probe's weights would be shrunk n times as strongly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 10, generator=generator) + 2 * torch.nn.functional.one_hot(torch.arange(400) % 4, 10)
    y = torch.arange(400) % 4
    z = fit_whitening(x, 10)(x)
    norms = [float(fit_probe(one, y, 4).weight.norm()) for one in (z, z / len(x) ** 0.5)]
    assert norms[1] / len(x) ** 0.5 < 0.8 * norms[0]


def test_what_cannot_be_compared(trained: CascadeResult, backbone: Backbone, digits: Data, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "x", trained.parts, trained.base, trained.about, cascade=trained.cascade)
    with pytest.raises(DataError, match="'digits:5-9' have no test split"):
        cascade_table(backbone, adapter, replace(digits, test=None))
    with pytest.raises(DataError, match="'digits:5-9' have no labels"):
        cascade_table(backbone, adapter, replace(digits, class_names=()))
    plain = save_adapter(tmp_path / "y", trained.parts["dispatcher"], trained.base)
    with pytest.raises(AdapterError, match="is no cascade"):
        cascade_table(backbone, plain, digits)
    about = replace(trained.about, training={"cascade": {"steps": {"dispatcher": "many"}}})
    foreign = save_adapter(tmp_path / "z", trained.parts, trained.base, about, cascade=trained.cascade)
    assert {row["steps"] for row in cascade_table(backbone, foreign, digits)["rows"]} == {0, None}
