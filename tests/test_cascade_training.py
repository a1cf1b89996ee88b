"""train_cascade: the specified steps, each of them resumable, and a router that needs no scikit-learn."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskpack import save_adapter
from maskpack.backbone.model import Embedding
from maskpack.errors import ConfigError, StateError, TrainingError
from maskpack.mask import mask_id
from maskpack.runtime.cascade import LoadedCascade, load_cascade
from maskpack.training import TrainConfig, load_data, train_cascade
from maskpack.training.cascade import (
    CLUSTERS,
    COORDINATES,
    ROUTER,
    CascadeResult,
    fit_cascade_head,
    fit_router,
    fit_whitening,
)
from maskpack.training.data.base import Data, loader, readable
from maskpack.training.features import by_class, embed, fit_probe
from maskpack.training.run_folder import FILE, load_checkpoint

from .helpers_models import QUICK, StopHere, bits, same, tiny_net

EXPERTS = 2
SETS = ("dispatcher", "expert-0", "expert-1")


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", labels_fraction=0.15)


@pytest.fixture(scope="module")
def trained(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CascadeResult, list[dict[str, Any]]]:
    folder, events = tmp_path_factory.mktemp("cascade"), list[dict[str, Any]]()
    result = train_cascade(
        tiny_net(), digits, QUICK, experts=EXPERTS, output=folder, report=lambda event: events.append(dict(event))
    )
    return folder, result, events


def test_parts_and_record(trained: Any, digits: Data) -> None:
    folder, result, events = trained
    assert digits.train is not None
    assert tuple(result.parts) == SETS
    assert all(one.head is None and [*one.norms] == ["bn1", "bn2"] for one in result.parts.values())
    assert len({mask_id({"x": one.masks}) for one in result.parts.values()}) == len(SETS)
    cascade = result.cascade
    assert (cascade.dispatcher, cascade.experts, cascade.embedding) == (SETS[0], SETS[1:], Embedding("fc"))
    assert cascade.weight is None
    assert result.about.class_names is None
    about = result.about.training["cascade"]
    count, sizes = len(digits.train), about["rows"]
    assert sum(sizes) == count
    assert 0 < about["explained_variance"] <= 1
    assert about["coordinates"] == int((count / EXPERTS) ** 0.5) == len(cascade.router.whitening.scale) < COORDINATES
    assert np.isfinite(about["log_likelihood"])
    for name, size in zip(SETS[1:], sizes, strict=True):
        epochs = round(count / size * QUICK.epochs)
        assert about["steps"][name] == epochs * (size // QUICK.batch_size)
        assert load_checkpoint(folder / name / FILE)[1]["epoch"] == epochs
    assert about["steps"]["dispatcher"] == QUICK.epochs * (count // QUICK.batch_size)
    assert [event["part"] for event in events if event["event"] == "end"] == list(SETS)
    densities = [one.masks.density for one in result.parts.values()]
    assert result.metrics["dispatcher_density"] == densities[0]
    assert result.about.training["metrics"] == result.metrics
    assert all(name.startswith("dispatcher_") for name in result.metrics if name != "expert_density")
    assert result.metrics["expert_density"] == pytest.approx(sum(densities[1:]) / EXPERTS)


def test_experts_start_as_the_dispatcher_on_their_rows(trained: Any) -> None:
    folder, result, _ = trained
    start = load_checkpoint(folder / "expert-0" / FILE)[1]["run"]["start"]
    assert start == load_checkpoint(folder / "expert-1" / FILE)[1]["run"]["start"] is not None
    masks = {name: one.masks for name, one in result.parts.items()}
    for name in SETS[1:]:
        changed = sum((masks[name][key].bits ^ masks["dispatcher"][key].bits).count() for key in masks[name])
        assert 0 < changed < 0.1 * masks[name].total


def test_what_is_stored_routes_as_training_did(trained: Any, digits: Data, tmp_path: Path) -> None:
    folder, result, _ = trained
    assert digits.train is not None
    backbone = tiny_net()
    before = bits(backbone.model)
    save_adapter(tmp_path, result.parts, result.base, result.about, cascade=result.cascade)
    cascade = load_cascade(backbone.model, tmp_path)
    chosen = [cascade.route(x)[0] for x, _ in readable(loader(digits.train, backbone.preprocess))]
    clusters = json.loads((folder / CLUSTERS).read_text())
    assert torch.cat(chosen).tolist() == clusters["expert"]
    assert np.array(clusters["points"]).shape == (len(digits.train), 2)
    assert np.array(clusters["points"]).std(0) == pytest.approx([1, 1], abs=0.02)
    assert same(bits(backbone.model), before)


@pytest.mark.parametrize("stop", [("dispatcher", "end"), ("expert-1", "epoch")])
def test_resumes_wherever_it_stopped(stop: tuple[str, str], trained: Any, digits: Data, tmp_path: Path) -> None:
    def report(event: Mapping[str, Any]) -> None:
        if (event["part"], event["event"]) == stop and event.get("epoch", 2) == 2:
            raise StopHere

    with pytest.raises(StopHere):
        train_cascade(tiny_net(), digits, QUICK, experts=EXPERTS, output=tmp_path, report=report)
    with pytest.raises(StateError, match="holds the checkpoint of an earlier run; continue it with resume"):
        train_cascade(tiny_net(), digits, QUICK, experts=EXPERTS, output=tmp_path)
    events = list[Mapping[str, Any]]()
    done = train_cascade(tiny_net(), digits, QUICK, experts=EXPERTS, output=tmp_path, resume=True, report=events.append)
    expected = trained[1]
    for name in SETS:
        assert done.parts[name].masks == expected.parts[name].masks
        for key, norm in expected.parts[name].norms.items():
            assert np.array_equal(done.parts[name].norms[key].scale, norm.scale)
            assert np.array_equal(done.parts[name].norms[key].shift, norm.shift)
    ours, theirs = done.cascade.router, expected.cascade.router
    assert torch.equal(ours.precisions, theirs.precisions)
    assert done.about.training == expected.about.training
    if stop[0] == "expert-1":
        assert {event["part"] for event in events if event["event"] == "epoch"} == {"expert-1"}, "the rest is read back"


def test_another_run_is_not_continued(trained: Any, digits: Data) -> None:
    folder = trained[0]

    def again(config: TrainConfig = QUICK, experts: int = EXPERTS, data: Data = digits) -> CascadeResult:
        return train_cascade(tiny_net(), data, config, experts=experts, output=folder, resume=True)

    kept = (folder / ROUTER).read_bytes()
    with pytest.raises(StateError, match="belongs to another run: epochs differ; resume"):
        again(replace(QUICK, epochs=3))
    with pytest.raises(StateError, match="the router in .* belongs to another run: experts differ; resume"):
        again(experts=3)
    with pytest.raises(StateError, match="belongs to another run: data differ"):
        again(data=load_data("digits:5-9", labels_fraction=0.2))
    assert (folder / ROUTER).read_bytes() == kept
    (folder / ROUTER).write_bytes(kept[:100])
    with pytest.raises(StateError, match="router.safetensors is damaged: .*; delete it and resume: it is fi"):
        again()
    (folder / ROUTER).write_bytes(kept)
    assert again().parts["expert-1"].masks == trained[1].parts["expert-1"].masks


def test_clusters_smaller_than_a_batch_are_an_error(digits: Data, tmp_path: Path) -> None:
    config = replace(QUICK, batch_size=26, epochs=1)

    def run(experts: int, **options: Any) -> CascadeResult:
        return train_cascade(tiny_net(), digits, config, experts=experts, output=tmp_path, **options)

    expected = r"the clusters have \d+, \d+, \d+, \d+ rows, each expert needs a batch of 26; resume with fewer experts"
    with pytest.raises(TrainingError, match=expected):
        run(4)
    assert (tmp_path / CLUSTERS).exists(), "so that one can look"
    assert not (tmp_path / "expert-0").exists()
    events = list[Any]()
    assert len(run(2, resume=True, report=events.append).parts) == 3
    kinds = [event["event"] for event in events if event["part"] == "dispatcher"]
    assert [kind for kind in kinds if kind not in ("warning", "begin")] == ["end"], (
        "the dispatcher is not trained again"
    )


def test_rows_that_cannot_be_read_belong_to_no_cluster(digits: Data, tmp_path: Path) -> None:
    assert digits.train is not None
    broken = set(digits.train.indices[:7])
    data = replace(digits, train=replace(digits.train, unreadable=set(broken)))
    config = replace(QUICK, epochs=1, seed=3)
    result = train_cascade(tiny_net(), data, config, experts=2, output=tmp_path)
    rows = [row for row in digits.train.indices if row not in broken]
    chosen = json.loads((tmp_path / CLUSTERS).read_text())["expert"]
    assert len(chosen) == len(rows)
    # each expert has seen its rows, and the router is the one of the run's seed
    cascade = LoadedCascade(tiny_net().model, result.parts, result.cascade)
    readable_rows = replace(digits.train, indices=rows)
    with cascade.loaded("dispatcher"):
        x, _ = embed(replace(tiny_net(), model=cascade.model), readable_rows, cache=False)
    router = fit_router(x, 2, seed=3)[0]
    assert torch.allclose(router.means, result.cascade.router.means, atol=1e-3)
    assert not torch.allclose(router.means, fit_router(x, 2, seed=0)[0].means, atol=1e-3), "else the test shows little"
    assert router.route(x).tolist() == chosen
    for k in range(2):
        run = load_checkpoint(tmp_path / f"expert-{k}" / FILE)[1]["run"]
        assert run["data"][1] == chosen.count(k)


def test_impossible_settings(digits: Data) -> None:
    with pytest.raises(ConfigError, match="at least 2 experts and a batch of rows for each; got 1 experts, 107"):
        train_cascade(tiny_net(), digits, QUICK, experts=1)
    with pytest.raises(ConfigError, match="got 7 experts, 107 training rows and a batch size of 16"):
        train_cascade(tiny_net(), digits, QUICK, experts=7)


def test_self_supervised_and_with_steps(digits: Data) -> None:
    options = {
        "prototypes": 12,
        "dimension": 16,
        "small_crops": 1,
        "small_size": 6,
        "queue": 32,
        "freeze_prototypes": 3,
    }
    config = replace(QUICK, objective="self-supervised", objective_options=options, steps=4, batch_size=16)
    model = tiny_net()
    before = bits(model.model)
    result = train_cascade(model, digits, config, experts=2)
    assert set(result.about.training["cascade"]["steps"].values()) == {4}
    assert result.about.task == "image-feature-extraction"
    assert same(bits(model.model), before)


# --- the router ------------------------------------------------------------------------------------------------------


def real_features() -> torch.Tensor:
    """Pixels of the digits images: 1,797 rows, 64 columns, of which some are constant."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data).float()


def test_says_what_scikit_learn_says() -> None:
    from sklearn.mixture import GaussianMixture

    x = real_features()
    unit = nn.functional.normalize(x.double(), dim=1)
    whitening = fit_whitening(unit, COORDINATES)
    z = whitening(unit)
    mixture = GaussianMixture(4, n_init=5, max_iter=500, random_state=3).fit(z.numpy())
    router, about = fit_router(x, 4, seed=3)
    assert router.route(x).tolist() == mixture.predict(z.numpy()).tolist()
    assert np.allclose(router.posterior(x).numpy(), mixture.predict_proba(z.numpy()), atol=1e-4)
    assert np.bincount(router.route(x), minlength=4).min() > 0
    means, nearest = torch.from_numpy(mixture.means_), router.route(x)
    assert torch.cdist(z, means).argmin(1).tolist() != nearest.tolist(), "the most likely is not always the nearest"
    assert torch.equal(fit_router(x, 4, seed=3)[0].precisions, router.precisions)
    assert about["coordinates"] == COORDINATES
    assert about["log_likelihood"] == pytest.approx(mixture.score(z.numpy()))
    assert about["converged"] is True


def test_whitened_coordinates_have_unit_variance() -> None:
    x = real_features()
    whitening = fit_whitening(x, 20)
    z = whitening(x)
    assert torch.allclose(z.mean(0), torch.zeros(20), atol=1e-4)
    assert torch.allclose(z.T @ z / (len(x) - 1), torch.eye(20), atol=1e-3)
    assert torch.allclose(whitening.components @ whitening.components.T, torch.eye(20), atol=1e-5)
    centered = (x - x.mean(0)).double()
    singular = torch.linalg.svdvals(centered)[:20] / (len(x) - 1) ** 0.5
    assert torch.allclose(whitening.scale.double(), singular, rtol=1e-4)


def test_whitening_leaves_out_what_is_not_there() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    assert len(fit_whitening(flat, 20).scale) == 3
    assert len(fit_whitening(torch.randn(5, 12, generator=generator), 20).scale) == 4
    wide = torch.randn(30, 5000, generator=generator)
    assert fit_whitening(wide, 4).components.shape == (4, 5000)
    with pytest.raises(TrainingError, match="of 40 training rows are all alike .* masks have collapsed; lower the"):
        fit_whitening(torch.randn(12, generator=generator).expand(40, 12), 20)


def test_the_head_says_what_the_cascade_is_worth(trained: Any, digits: Data) -> None:
    _, result, _ = trained
    backbone = tiny_net()
    whole = fit_cascade_head(backbone, digits, result, combine="unconditional")
    found = whole.metrics
    assert digits.test is not None
    assert digits.train is not None
    # with the masks by the runtime, and without them by a model of our own
    cascade = LoadedCascade(backbone.model, whole.parts, whole.cascade, whole.about)
    x, y = (torch.cat(list(one)) for one in zip(*readable(loader(digits.test, backbone.preprocess)), strict=True))
    weight, bias = whole.cascade.weight, whole.cascade.bias
    assert weight is not None
    assert bias is not None
    weight, bias = weight.float(), bias.float()

    def accuracy(features: torch.Tensor) -> float:
        return float((nn.functional.linear(features, weight, bias).argmax(1) == y).double().mean())

    assert found["test_accuracy"] == pytest.approx(accuracy(cascade.embed(x)), abs=0.01)
    blocks = []
    for name in SETS:
        bare = tiny_net()
        bare.model.load_state_dict(result.parts[name].resolved(bare.model.state_dict()).dense, strict=False)
        blocks.append(embed(bare, digits.test, cache=False)[0])
    assert found["test_accuracy_without_masks"] == pytest.approx(accuracy(torch.cat(blocks, 1)), abs=0.01)
    assert found["test_accuracy_without_masks"] != found["test_accuracy"]
    probe = fit_probe(*embed(backbone, digits.train, cache=False), 5)
    right = by_class(probe.logits(embed(backbone, digits.test, cache=False)[0]), y)["accuracy"]
    assert found["test_probe_accuracy"] == pytest.approx(right)
    assert whole.about.training["metrics"] == found
    assert whole.about.training["lora_bytes"]["rank_1_4bit"] == 17 + 44
