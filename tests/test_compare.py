"""compare: every row is fitted and measured, splits are kept apart, what is done is not done again."""

import json
import mmap
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from maskpack_cli.main import app
from torch import nn
from typer.testing import CliRunner

from maskpack import load_adapter, load_backbone, load_cascade, load_mask
from maskpack.adapter.describe import inspect_adapter
from maskpack.errors import (
    ConfigError,
    DataError,
    SelectionError,
    StateError,
    StoppedError,
    TrainingError,
    UnknownNameError,
)
from maskpack.lab import compare
from maskpack.lab.baselines.base import BASELINES, Trial, find_baseline
from maskpack.lab.comparison import Trials, markdown, summaries
from maskpack.lab.trial import Job, Worker, measure, run, splits
from maskpack.training import TrainConfig
from maskpack.training.batchnorm import recalibrate
from maskpack.training.data.base import loader, readable
from maskpack.training.data.load import load_data
from maskpack.training.evaluate import adapter_accuracy
from maskpack.training.features import measure_features
from maskpack.training.run_folder import claim, write_json
from maskpack.training.trainer import process_memory

from .helpers_models import TINY_FACTORY

FEATURES, CLASSES = 16, 5
HEAD = CLASSES * (FEATURES + 1)
BODY = 8 * 27 + 8 + 2 * 8 + 16 * 72 + 2 * 16
MASKED = 8 * 27 + 16 * 72
DATA = {"reference": "digits:0-4"}
VIEWS = {"prototypes": 8, "dimension": 8, "small_crops": 0, "queue": 0, "freeze_prototypes": 1, "large_least": 0.5}
QUICK = TrainConfig(
    optimizer="sgd",
    scale=True,
    train=(),
    bn="adapt",
    steps=4,
    batch_size=16,
    warmup=0.0,
    augment="none",
    objective_options=VIEWS,
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("factory") / "nets.py"
    path.write_text(TINY_FACTORY)
    return {"reference": f"{path}:tiny", "random_weights": 0, "image_size": 8}


@pytest.fixture(autouse=True)
def timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few passes are enough to see that a time is measured."""
    monkeypatch.setattr("maskpack.lab.trial.TIMED", 0.0)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """One for all tests: its start is what takes time."""
    code = "from maskpack.lab import trial; trial.TIMED = 0.0; trial.serve()"
    with pytest.MonkeyPatch.context() as patch, Worker() as one:
        patch.setattr(Worker, "command", (sys.executable, "-c", code))
        yield one


def job(folder: Path, backbone: Mapping[str, Any], baseline: str, **changes: Any) -> Job:
    settings = {**QUICK.to_json(), "lr": 0.05, **changes.pop("settings", {})}
    values: dict[str, Any] = {"baseline": baseline, "share": 1.0, "validate": False, "settings": settings}
    return Job(**values | {"backbone": backbone, "data": DATA, "folder": str(folder), **changes})


EXPECTED = {
    "knn": (0, "bank"),
    "probe": (HEAD, "head"),
    "full": (BODY + HEAD, "weights"),
    "bitfit": (8 + 8 + 16 + HEAD, "weights"),
    "norms": (2 * 8 + 2 * 16 + HEAD, "statistics"),
    "ia3": (8 + 16 + HEAD, "weights"),
    "lora:2": (2 * (27 + 8) + 2 * (72 + 16) + HEAD, "weights"),
    "lora-xs:2": (2 * 2 * 2 + HEAD, "weights"),
    "vera:4": (8 + 16 + 2 * 4 + HEAD, "weights"),
    "mask": (MASKED + HEAD, "masks"),
    "auto:200": (MASKED + HEAD, "masks"),
    "self-supervised": (MASKED + HEAD, "masks"),
    "cascade:2": (3 * MASKED + CLASSES * (3 * FEATURES + 1), "masks"),
}


# of these, what is stored with the adapted statistics
FOLDED = {"full": 2 * 8 + 2 * 16, "bitfit": 8 + 16, "norms": 2 * 8 + 2 * 16}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_rows(name: str, backbone: dict[str, Any], tmp_path: Path) -> None:
    events: list[Mapping[str, Any]] = []
    dense = EXPECTED[name][1] in ("weights", "statistics")
    rate = 0.05 if dense else 40.0  # of scores: one that changes masks
    found = run(job(tmp_path, backbone, name, settings={"lr": rate}), events.append)
    trained, part = EXPECTED[name]
    assert found["trained"] == trained
    assert found["sizes"][part] > 0
    assert found["bytes"] == sum(found["sizes"].values())
    assert 0 <= found["accuracy"] <= 1
    assert found["examples"] == len(load_data("digits:0-4").test or ())
    assert found["overhead"] > 0
    assert found["seconds"] > 0
    assert bool(events) == (found["steps"] > 0)
    if name in ("mask", "auto:200", "cascade:2"):
        assert found["bytes"] == inspect_adapter(tmp_path / "mask.safetensors")["size"]
    if name == "cascade:2":
        raw, whitened = found["controls"]["dispatcher"], found["controls"]["dispatcher, whitened"]
        assert raw["trained"] == whitened["trained"] == MASKED + HEAD
        assert whitened["bytes"] == raw["bytes"] + 4 * (FEATURES + FEATURES * FEATURES + FEATURES)
        assert found["steps"] > raw["steps"] == whitened["steps"] > 0
        lines = markdown(summaries(name, 1.0, 0.05, [0], [found])).splitlines()[2:5]
        assert [line.split(" | ")[0] for line in lines] == [
            "| cascade:2", "| cascade:2: dispatcher", "| cascade:2: dispatcher, whitened"
        ]  # fmt: skip
        assert lines[1].endswith("| - | - | - |")
    else:
        bits = {"full": [], "lora:2": ["8 bits", "4 bits", "2 bits", "1 bit"]}
        assert [*found["controls"]] == bits.get(name, ["4 bits"] if dense else [])
    if name in ("mask", "auto:200", "self-supervised", "cascade:2"):
        assert found["accuracy"] == of_the_file(tmp_path / "mask.safetensors", backbone), "of what is stored"
    if not find_baseline(name).needs_labels:
        trained_once = [event for event in events if event["event"] == "epoch"]
        spent = json.loads((tmp_path / "spent.json").read_text())
        assert spent["seconds"] < found["seconds"], "without the first probe"
        (tmp_path / "spent.json").write_text(json.dumps({"seconds": 1000, "peak_memory": 10**12}))
        few = run(job(tmp_path, backbone, name, settings={"lr": rate}, share=0.2), events.append)
        assert [event for event in events if event["event"] == "epoch"] == trained_once
        assert few["labels"] == found["labels"] // 5
        assert few["seconds"] > 1000
        assert few["peak_memory"] == 10**12
        (tmp_path / "spent.json").write_text("{")
        with pytest.raises(StateError, match=r"cannot read .*spent.json as JSON: .*; delete it and run again"):
            run(job(tmp_path, backbone, name, settings={"lr": rate}, share=0.1), events.append)
    if dense:
        assert found["sizes"]["weights"] == 2 * (trained - HEAD - FOLDED.get(name, 0))
        assert 0 < found["sizes"]["statistics"] < 4 * 2 * (8 + 16)


def of_the_file(path: Path, options: Mapping[str, Any]) -> float:
    """Test accuracy by an adapter file: of its head, or of a probe where it has none."""
    backbone, data, adapter = load_backbone(**options), load_data("digits:0-4"), load_adapter(str(path))
    assert data.test is not None
    if adapter.cascade is not None:
        cascade = load_cascade(backbone.model, adapter)
        labels = [label for _, label in data.test]
        images = torch.cat([x for x, _ in readable(loader(data.test, backbone.preprocess, batch_size=16))])
        given = cascade.predict(images, batch_size=16)
        return sum(one.label == data.class_names[y] for one, y in zip(given, labels, strict=True)) / len(labels)
    load_mask(backbone.model, adapter)
    if adapter.parts(stream=True).head is not None:
        return float(adapter_accuracy(backbone.model, adapter, data.test, batch_size=16)["accuracy"])
    return float(measure_features(backbone, data, ["probe"], batch_size=16, cache=False)[0]["accuracy"])


def test_dense_rows_are_measured_as_they_are_stored(backbone: dict[str, Any], tmp_path: Path) -> None:
    for name, what in (("full", ""), ("lora:2", ".lora_")):
        data = load_data("digits:0-4", labels_fraction=0.1)
        data = replace(data, test=None)
        trial = Trial(load_backbone(**backbone), data, data, replace(QUICK, lr=0.05), tmp_path / name, print)
        find_baseline(name).fit(trial)
        model = trial.backbone.model
        norms = {p for one in model.modules() if isinstance(one, nn.BatchNorm2d) for p in one.parameters()}  # in steps
        named = [(key, one) for key, one in model.named_parameters() if one not in norms]
        learned = [one for key, one in named if what in key and not key.startswith("5.")]
        assert learned
        assert all(torch.equal(one, one.half().float()) for one in learned), "2 bytes a number"
        if what:
            layers = [module for module in model.modules() if hasattr(module, "scaling")]
            assert {scale for layer in layers for scale in layer.scaling.values()} == {2.0}, "alpha is twice the rank"


def test_rates_are_measured_on_held_out_rows(backbone: dict[str, Any], tmp_path: Path) -> None:
    found = run(job(tmp_path, backbone, "knn", validate=True), lambda _: None)
    rows = len(load_data("digits:0-4").train or ())
    assert found["examples"] == round(0.2 * rows)
    assert found["labels"] == rows - found["examples"]
    assert "overhead" not in found, "which is of no use for choosing"


def test_every_row_is_in_the_table_above() -> None:
    assert {name.partition(":")[0] for name in EXPECTED} == {row.id for row in BASELINES.all()}
    for row in BASELINES.all():
        assert row.__doc__
        assert all(len(set(rates)) >= 3 for rates in row.rates.values())


def test_learning_helps(backbone: dict[str, Any], tmp_path: Path) -> None:
    settings = {"steps": 40, "lr": 0.1, "head_lr": 0.2}
    full = run(job(tmp_path / "full", backbone, "full", settings=settings), lambda _: None)
    probe = run(job(tmp_path / "probe", backbone, "probe"), lambda _: None)
    knn = run(job(tmp_path / "knn", backbone, "knn"), lambda _: None)
    assert min(full["accuracy"], probe["accuracy"], knn["accuracy"]) > 0.5, "of five classes"


def test_splits() -> None:
    data = load_data("digits:0-4")
    assert data.train is not None
    for share in (1.0, 0.1):
        known, unlabelled, test = splits(data, share, 0, False)
        assert test is data.test
        assert known.train is not None and unlabelled.train is not None  # noqa: PT018
        assert set(known.train.indices) <= set(unlabelled.train.indices)
        assert len(unlabelled.train) == len(data.train)
        assert (known.test, known.validation, unlabelled.test, unlabelled.class_names) == (None, None, None, ())
        chosen, without, held = splits(data, share, 0, True)
        assert chosen.train is not None and without.train is not None  # noqa: PT018
        assert set(chosen.train.indices) | set(held.indices) == set(known.train.indices)
        assert not set(held.indices) & set(without.train.indices)
        assert len(held) == round(0.2 * len(known.train))
    other, _, _ = splits(data, 0.1, 1, False)
    assert other.train is not None
    assert set(other.train.indices) != set(known.train.indices)
    with pytest.raises(DataError, match="1 rows with labels are too few to choose a learning rate on; give one"):
        splits(data, 0.002, 0, True)
    with pytest.raises(DataError, match="'digits:0-4' have no test split; a comparison needs a training and"):
        splits(replace(data, test=None), 1.0, 0, False)
    with pytest.raises(DataError, match="'digits:0-4' have no labels"):
        splits(replace(data, class_names=()), 1.0, 0, False)
    with pytest.raises(DataError, match="'digits:0-4' have no training split"):
        splits(replace(data, train=None), 1.0, 0, False)


def test_nothing_to_measure_on(backbone: dict[str, Any]) -> None:
    test = load_data("digits:0-4").test
    assert test is not None
    with pytest.raises(DataError, match="no row to measure on could be read"):
        measure(lambda _: torch.zeros(0), load_backbone(**backbone), replace(test, unreadable=set(test.indices)), 64)


class Told:
    """Stands for the worker: what a trial measures is told by its job, and nothing is trained."""

    def __init__(self, accuracy: Callable[[Job], float]):
        self.accuracy, self.jobs = accuracy, list[Job]()

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, path: Path) -> Iterator[dict[str, Any]]:
        job = Job(**json.loads(path.read_text()))
        self.jobs.append(job)
        found = self.accuracy(job)
        if found < 0:
            yield {"event": "error", "kind": "TrainingError", "message": "the loss is nan"}
        else:
            sizes: dict[str, int] = {"head": 4}
            numbers = {"examples": 1, "trained": 1, "steps": 1, "bytes": 4, "labels": 1, "seconds": 1, "peak_memory": 1}
            result = {"accuracy": found, **numbers, "sizes": sizes, "controls": {}, "overhead": 1}
            yield {"event": "result", "result": result}
        yield {"event": "exit", "code": int(found < 0)}


def chosen(
    folder: Path, name: str, rates: Sequence[float] | None, accuracy: Mapping[float, float]
) -> tuple[float | None, list[dict[str, Any]]]:
    """The rate that is chosen where validation accuracies follow from it, and what was tried."""
    told = Told(lambda job: accuracy[round(job.settings["lr"], 6)])
    trials = Trials(folder, {}, {}, QUICK, None, told)  # type: ignore[arg-type]
    rate, bn, tried = trials.choose(name, find_baseline(name), rates, 0, 1.0)
    assert all(job.validate for job in told.jobs), "rates are never chosen on the test split"
    assert bn is None, "statistics are as the settings say"
    return rate, tried


def test_rates_are_chosen_and_searched_past_an_edge(tmp_path: Path) -> None:
    assert find_baseline("full").rates["sgd"] == (0.003, 0.01, 0.03)
    assert chosen(tmp_path / "inner", "full", None, {0.003: 0.1, 0.01: 0.5, 0.03: 0.2})[0] == 0.01
    beyond = {0.003: 0.1, 0.01: 0.2, 0.03: 0.3, 0.09: 0.4, 0.27: -1}
    rate, tried = chosen(tmp_path / "beyond", "full", None, beyond)
    assert rate == pytest.approx(0.09)
    assert [one["accuracy"] for one in tried] == [0.1, 0.2, 0.3, 0.4, 0.0]
    below = {1: 0.5, 2: 0.4, 0.5: 0.6, 0.25: 0.7}
    assert chosen(tmp_path / "below", "full", [2.0, 1.0], below)[0] == pytest.approx(0.25)  # two more at most
    assert chosen(tmp_path, "full", [7.0], {}) == (7.0, [])
    assert chosen(tmp_path, "probe", None, {}) == (None, [])
    with pytest.raises(TrainingError, match=r"baseline 'full': training failed with all of the rates .*1, 2"):
        chosen(tmp_path / "none", "full", [1.0, 2.0], {1: -1, 2: -1, 0.5: -1, 0.25: -1, 4: -1, 8: -1})


def test_the_better_of_frozen_and_adapted_statistics(backbone: dict[str, Any], tmp_path: Path) -> None:
    best = {("freeze", 2): 0.5, ("adapt", 2): 0.6, ("adapt", 1): 0.7, ("freeze", 4): 0.8}  # the middle rate is 2
    told = Told(lambda job: best.get((job.settings["bn"], job.settings["lr"]), 0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskpack.lab.comparison.Worker", lambda: told)
        given = {"norms": [0.5, 1.0, 2.0, 4.0], "self-supervised": [1.0, 2.0, 4.0], "probe": [1.0]}
        found = compare(backbone, DATA, tmp_path, baselines=[*given], rates=given, config=replace(QUICK, bn=None))
    norms, without_labels, probe = found["rows"]
    assert (norms["rate"], norms["bn"]) == (1.0, "adapt")
    assert len(norms["search"]) == 5
    assert len({job.folder for job in told.jobs if job.baseline == "norms"}) == 6
    assert {job.settings["bn"] for job in told.jobs if job.baseline != "norms"} == {None}, "their own defaults hold"
    assert without_labels["bn"] is probe["bn"] is None
    assert "| norms (statistics adapted) | 100 % | 70.00 |" in (tmp_path / "results.md").read_text()


def test_shards_do_each_trial_once(backbone: dict[str, Any], tmp_path: Path) -> None:
    told = Told(lambda job: 0.5 - abs(job.settings["lr"] - 4) / 10 if job.settings["lr"] else 0.3)
    given = {"norms": [1.0, 2.0], "probe": [1.0], "mask": [3.0, 4.0, 5.0]}
    options: dict[str, Any] = {"baselines": [*given], "rates": given, "config": QUICK, "seeds": (0, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskpack.lab.comparison.Worker", lambda: told)
        expected = compare(backbone, DATA, tmp_path / "whole", **options)
        alone = {job.folder.replace("whole", "shared") for job in told.jobs}
        told.jobs.clear()
        busy, waiting = set[int](), 1
        for _ in range(5):
            for number in (1, 2, 3):
                before = len(told.jobs)
                found = compare(backbone, DATA, tmp_path / "shared", shard=(number, 3), **options)
                waiting = found.get("waiting", 0)
                busy |= {number} if len(told.jobs) > before else set()
            if not waiting:
                break
    assert waiting == 0
    assert busy == {1, 2, 3}
    assert sorted(job.folder for job in told.jobs) == sorted(alone)
    assert found == expected
    assert json.loads((tmp_path / "shared/results.json").read_text()) == json.loads(json.dumps(expected))
    with pytest.raises(ConfigError, match=r"a shard is \(number, count\) .*, got \(4, 3\)"):
        compare(backbone, DATA, tmp_path / "shared", shard=(4, 3), **options)


def test_searches_with_other_shares_share_no_training(tmp_path: Path) -> None:
    told = Told(lambda job: 0.5 - abs(job.settings["lr"] - 2) / 10)
    trials = Trials(tmp_path, {}, {}, QUICK, None, told)  # type: ignore[arg-type]
    for share in (0.5, 1.0):
        assert trials.choose("self-supervised", find_baseline("self-supervised"), [1.0, 2.0, 3.0], 0, share)[0] == 2
    assert len({job.folder for job in told.jobs}) == 6, "other rows are held out"


def test_what_trials_are_asked_for(backbone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(job: Job) -> float:
        best = {"probe": 0.3, "self-supervised": 0.7}.get(job.baseline) or 0.6 - 10 * abs(job.settings["lr"] - 0.02)
        # the test split likes other rates, and must not be asked
        return (best if job.validate else 1 - best) + job.settings["seed"] / 100 + job.share / 1000

    told = Told(accuracy)
    monkeypatch.setattr("maskpack.lab.comparison.Worker", lambda: told)
    found = compare(
        backbone,
        DATA,
        tmp_path,
        baselines=["probe", "full", "self-supervised"],
        rates={"full": [0.01, 0.02, 0.03], "self-supervised": [5.0]},
        seeds=(3, 4),
        fractions=(0.5, 1.0),
        config=QUICK,
    )
    asked = [
        (
            job.baseline,
            job.validate,
            None if job.baseline == "probe" else job.settings["lr"],
            job.share,
            job.settings["seed"],
        )
        for job in told.jobs
    ]
    assert asked == [
        *(("probe", False, None, *one) for one in ((0.5, 3), (0.5, 4), (1.0, 3))),
        *(("full", True, rate, 1.0, 3) for rate in (0.02, 0.01, 0.03)),
        *(("full", False, 0.02, *one) for one in ((0.5, 3), (0.5, 4), (1.0, 3), (1.0, 4))),
        *(("self-supervised", False, 5.0, *one) for one in ((0.5, 3), (0.5, 4), (1.0, 3), (1.0, 4))),
    ]
    assert len(list(tmp_path.rglob("result-*.json"))) == len(told.jobs)
    folders = {job.folder for job in told.jobs if job.baseline == "full"}
    assert len(folders) == 7, "training of a share is not continued by that of another, or by that of a search"
    assert len({job.folder for job in told.jobs if job.baseline == "self-supervised"}) == 2, (
        "trained once for all shares"
    )
    full = found["rows"][2]
    assert (full["method"], full["labels_fraction"], full["rate"]) == ("full", 0.5, 0.02)
    assert full["accuracies"] == pytest.approx([0.4305, 0.4405])
    assert full["deviation"] == pytest.approx(statistics.stdev([0.43, 0.44]))
    assert found["rows"][1]["deviation"] is None, "a row in which the seed plays no part has one accuracy"


@pytest.mark.slow
def test_a_comparison(
    backbone: dict[str, Any], tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskpack.lab.comparison.Worker", lambda: nullcontext(worker))
    events: list[Mapping[str, Any]] = []
    options: dict[str, Any] = {"config": replace(QUICK, objective_options={}, train=("none",))}
    first = compare(
        backbone,
        DATA,
        tmp_path,
        baselines=["probe", "mask"],
        rates={"mask": [20.0]},
        seeds=(0, 1),
        report=events.append,
        **options,
    )
    assert [(row["method"], row["seeds"]) for row in first["rows"]] == [("probe", [0]), ("mask", [0, 1])]
    mask = first["rows"][1]
    assert mask["accuracy"] == pytest.approx(sum(mask["accuracies"]) / 2)
    assert mask["rate"] == 20
    assert {event["part"] for event in events} == {
        "probe, seed 0", "mask, seed 0, rate 20", "mask, seed 1, rate 20"
    }  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(first))
    table = (tmp_path / "results.md").read_text()
    assert table == markdown(first["rows"])
    assert re.search(r"^\| mask \| 100 % \| \d+\.\d\d ± \d+\.\d\d \| 1,453 \|", table, re.MULTILINE)
    assert "over 2 seeds" in table
    assert str(tmp_path) not in json.dumps(first)  # results can be passed on

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result-*.json")}
    again = compare(
        backbone, DATA, tmp_path, baselines=["mask", "probe"], rates={"mask": [20.0]}, seeds=(0, 1), **options
    )
    assert again["rows"] == first["rows"][::-1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result-*.json")} == stamps
    about = json.loads((tmp_path / "comparison.json").read_text())  # as of a release that had fewer settings
    del about["settings"]["selective"], about["settings"]["clip"]
    (tmp_path / "comparison.json").write_text(json.dumps(about))
    assert compare(backbone, DATA, tmp_path, baselines=["probe"], seeds=(0, 1), **options)["rows"] == first["rows"][:1]
    other = TrainConfig(**{**{name: getattr(QUICK, name) for name in ("optimizer", "scale")}, "steps": 5})
    with pytest.raises(StateError, match=r"holds results of other settings: settings \(.*steps.*\); choose"):
        compare(backbone, DATA, tmp_path, baselines=["probe"], config=other)
    with pytest.raises(StateError, match=r"other settings: data \(.*classes, digest, id\), settings"):
        compare(backbone, {"reference": "digits:5-8"}, tmp_path, baselines=["probe"], config=QUICK)

    settings = "--optimizer sgd --scale --steps 4 --batch-size 16 --warmup 0 --augment none".split()
    settings += "--train none --bn adapt".split()
    more = "--baseline probe --baseline mask --lr mask=20 --seeds 2".split()
    done = CliRunner().invoke(app, words(backbone, tmp_path, *settings, *more))
    assert done.exit_code == 0, done.output
    assert "mask, seed 1, rate 20: " in done.output
    assert re.search(r"^probe +100 % +\d+\.\d\d +85 +340 +340", done.output, re.MULTILINE)
    file = tmp_path / "run.toml"
    file.write_text("\n".join(["seeds = 2", 'baseline = ["probe", "mask"]', 'lr = "mask=20"']))
    done = CliRunner().invoke(app, words(backbone, tmp_path, *settings, "--config", str(file), "--json"))
    assert json.loads(done.stdout) == json.loads(json.dumps(first))
    picture = tmp_path / "labels.svg"
    done = CliRunner().invoke(app, ["plot", "labels", str(tmp_path / "results.json"), "--output", str(picture)])
    assert done.exit_code == 0, done.output


def test_damaged_files(backbone: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text('{"backbone": {}')
    done = CliRunner().invoke(app, words(backbone, tmp_path, "--baseline", "probe", "--seeds", "1"))
    assert done.exit_code == 1, done.output
    assert re.search(r"cannot read .*comparison.json as JSON: .*; choose another folder", done.stderr)
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(StateError, match="comparison.json must have backbone, data, it has a list; choose another fol"):
        claim(tmp_path / "comparison.json", {"backbone": {}, "data": {}})
    result = tmp_path / "probe" / "seed-0-labels-1" / "result-1.json"
    result.parent.mkdir(parents=True)
    with Worker() as worker:
        trials = Trials(tmp_path, backbone, DATA, QUICK, None, worker)
        for text, message in (("", "cannot read .*result-1.json as JSON"), ("{}", "must have accuracy, .* nothing")):
            result.write_text(text)
            with pytest.raises(StateError, match=f"{message}.*; delete it, and it is measured again"):
                trials.run("probe", find_baseline("probe"), 0, 1.0, None)


def test_errors_of_a_trial(backbone: dict[str, Any], worker: Worker, tmp_path: Path) -> None:
    trials = Trials(tmp_path, backbone, DATA, QUICK, None, worker)
    (tmp_path / "probe" / "seed-3-labels-1" / "spent.json").mkdir(parents=True)
    with pytest.raises(StateError, match=r"probe, seed 3: .*spent\.json"):
        trials.run("probe", find_baseline("probe"), 3, 1.0, None)
    with pytest.raises(TrainingError, match=r"full, seed 0, rate 1e\+30: the loss is (nan|inf) at step"):
        trials.run("full", find_baseline("full"), 0, 1.0, 1e30)


def test_a_worker_that_dies(backbone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "command", (sys.executable, "-c", "import os; os._exit(9)"))
    with Worker() as spoiled, pytest.raises(StateError, match="probe, seed 3: its process ended with the exit code 9"):
        Trials(tmp_path, backbone, DATA, QUICK, None, spoiled).run("probe", find_baseline("probe"), 3, 1.0, None)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"baselines": ["lorra"]}, UnknownNameError, "unknown baseline 'lorra'; known: .*; did you mean 'lora'"),
        ({"baselines": ["vera:0"]}, ConfigError, "a rank of at least 1 behind the colon, as in vera:256; got '0'"),
        ({"baselines": ["lora:x"]}, ConfigError, "a rank of at least 1 behind the colon, as in lora:8; got 'x'"),
        (
            {"baselines": ["cascade:1"]},
            ConfigError,
            "of experts of at least 2 behind the colon, as in cascade:5",
        ),
        ({"baselines": ["probe:2"]}, ConfigError, "the baseline 'probe' takes nothing behind a colon, got '2'"),
        ({"baselines": ["mask:magick"]}, UnknownNameError, "unknown method 'magick'"),
        ({"baselines": ["probe", "probe"]}, ConfigError, "baselines must be at least one, each once; got probe, probe"),
        ({"baselines": ["probe"], "seeds": []}, ConfigError, "seeds must be at least one, each once; got none"),
        ({"baselines": ["probe"], "fractions": [0.0]}, ConfigError, "share of labels must be in"),
        (
            {"baselines": ["probe"], "rates": {"full": [1]}},
            ConfigError,
            "a rate is given for 'full', which is none of the b",
        ),
        (
            {"baselines": ["full"], "rates": {"full": [-1]}},
            ConfigError,
            r"of 'full' must be finite .* got \[-1\]",
        ),
        (
            {"baselines": ["probe", "cascade:2"], "config": replace(QUICK, objective_options={"prototypes": "x"})},
            ConfigError,
            "option 'prototypes' of the objective 'swav' must be of type int, got 'x'",
        ),
        ({"baselines": ["mask"], "config": TrainConfig(include=("x",))}, SelectionError, "include 'x' matches none"),
        (
            {"baselines": ["lora"], "config": TrainConfig(include=("0.1.weight",))},
            ConfigError,
            "'lora' is for weights of linear and convolution layers, and 1 of the 1 chosen are others, first '0.1.w",
        ),
    ],
)
def test_wrong_rows(
    options: dict[str, Any], error: type[Exception], match: str, backbone: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        compare(backbone, DATA, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_backbone_without_biases(backbone: dict[str, Any], tmp_path: Path) -> None:
    bare = {**backbone, "reference": str(backbone["reference"]).replace(":tiny", ":bare")}
    for name, word in (("bitfit", "biases"), ("norms", "norms")):
        with pytest.raises(ConfigError, match=f"has no {word}, so there is no baseline '{name}'; leave it out"):
            compare(bare, DATA, tmp_path, baselines=[name])


def test_memory() -> None:
    before = process_memory()
    block = mmap.mmap(-1, 64 << 20)  # pages of its own; an allocator might have free ones
    block.write(b"x" * (64 << 20))
    after = process_memory()
    assert after[0] >= before[0] + (60 << 20)
    assert after[1] >= after[0]
    block.close()


def test_recalibrate() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 6, 6) * 3 + 1, torch.zeros(8)) for _ in range(4)]
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.BatchNorm2d(3, track_running_stats=False))
    layer = model[0]
    assert isinstance(layer, nn.BatchNorm2d)
    recalibrate(model, batches)
    x = torch.cat([x for x, _ in batches])
    assert layer.running_mean is not None and layer.running_var is not None  # noqa: PT018
    assert torch.allclose(layer.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    variances = torch.stack([x.var((0, 2, 3)) for x, _ in batches])
    assert torch.allclose(layer.running_var, variances.mean(0), atol=1e-4)
    assert layer.momentum == 0.1
    assert not model.training


# --- command line ---------------------------------------------------------------------------------------------------


def words(backbone: Mapping[str, Any], folder: Path, *more: str) -> list[str]:
    own = ["--backbone", str(backbone["reference"]), "--random-weights", "0", "--image-size", "8"]
    return ["compare", *own, "--data", "digits:0-4", "--output", str(folder), *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config", "no.toml"], "cannot read the settings in no.toml"),
        (["--lr", "full"], "--lr must be BASELINE=RATE or BASELINE=RATE,RATE,…, got 'full'"),
        (["--lr", "full=a,b"], "--lr must be BASELINE=RATE"),
        (["--shard", "4/3"], "--shard must be NUMBER/COUNT with a number from 1 to the count, got '4/3'"),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
        (["--baseline", "nothing"], "unknown baseline 'nothing'"),
        (["--baseline", "probe", "--data", "texts"], "the data 'texts' are for text-classification, the backbone"),
    ],
)
def test_wrong_words(more: Sequence[str], message: str, backbone: dict[str, Any], tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "test"):
        (texts / f"{split}.csv").write_text("text,label\na,x\nb,y\n")
    more = [str(texts) if one == "texts" else one for one in more]
    done = CliRunner().invoke(app, words(backbone, tmp_path / "a", *more))
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert not (tmp_path / "a").exists()


# --- accidents --------------------------------------------------------------------------------------------------------

# a worker whose jobs report once, have a process of their own as a training with readers has, and never end
ENDLESS = """
import subprocess, sys, time
from maskpack.lab import trial

def run(job, report):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report({"event": "begun"})
    time.sleep(600)

trial.run, trial.IMPORTED = run, ()
trial.serve()
"""


def processes_of(group: int) -> list[int]:
    """The processes of a group."""
    found = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def none_left(group: int) -> bool:
    until = time.monotonic() + 20
    while processes_of(group) and time.monotonic() < until:
        time.sleep(0.05)
    return not processes_of(group)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_comparison_that_was_stopped(
    number: signal.Signals, backbone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[Worker] = []
    monkeypatch.setattr(Worker, "command", (sys.executable, "-c", ENDLESS))
    monkeypatch.setattr("maskpack.lab.comparison.Worker", lambda: workers.append(Worker()) or workers[0])
    groups: list[int] = []

    def stop(event: Mapping[str, Any]) -> None:
        assert workers[0]._process is not None
        groups.append(workers[0]._process.pid)
        assert len(processes_of(groups[0])) == 3
        with pytest.raises(StateError, match=f"process {os.getpid()} on "):
            compare(backbone, DATA, tmp_path, baselines=["probe"], config=QUICK)
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # not sent: a process in the background ignores it
        os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else StoppedError) as stopped:
        compare(backbone, DATA, tmp_path, baselines=["probe"], config=QUICK, report=stop)
    assert none_left(groups[0])
    assert number == signal.SIGINT or "SIGTERM; call compare again" in str(stopped.value)
    assert not list(tmp_path.rglob("result-*.json"))


@pytest.mark.slow
def test_nothing_is_left_of_a_comparison_that_was_killed(backbone: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "job.json", asdict(job(tmp_path, backbone, "probe")))
    code = f"""
import sys
from pathlib import Path
from maskpack.lab.trial import Worker

Worker.command = (sys.executable, "-c", {ENDLESS!r})
with Worker() as worker:
    for event in worker.run(Path(sys.argv[1])):
        print(worker._process.pid, flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "job.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        group = int(process.stdout.readline())
        assert len(processes_of(group)) == 3
        process.kill()
    assert none_left(group)


@pytest.mark.parametrize("name", ["full", "lora-xs:2"])
def test_interrupted_and_continued(name: str, backbone: dict[str, Any], tmp_path: Path) -> None:
    one = job(tmp_path / "one", backbone, name, settings={"lr": 0.01, "steps": None, "epochs": 3})
    folder = Path(one.folder)
    events: list[Mapping[str, Any]] = []

    def interrupt(event: Mapping[str, Any]) -> None:
        events.append(event)
        if event["event"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(one, interrupt)
    spent = json.loads((folder / "spent.json").read_text())["seconds"]
    events.clear()
    found = run(one, events.append)
    assert found["seconds"] > spent
    assert next(event["epoch"] for event in events if event["event"] == "epoch") > 1
    whole = run(replace(one, folder=str(tmp_path / "whole")), events.append)
    for few, other in zip(found["controls"].values(), whole["controls"].values(), strict=True):
        assert few["sizes"] == other["sizes"]
    assert found["accuracy"] == whole["accuracy"]
