"""A search for settings: what it tries and chooses, that it keeps its budget, and that it goes on."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskpack.backbone.load import Backbone
from maskpack.errors import ConfigError, StateError
from maskpack.training import auto
from maskpack.training.auto import NORMS, Trial, candidates, finalists, in_words, kept_trials, train_auto
from maskpack.training.config import TrainConfig, config_from
from maskpack.training.data.base import Data, load_data
from maskpack.training.trainer import TrainResult, train_mask

from .helpers_models import tiny_net

CONFIG = TrainConfig(steps=40, batch_size=32, augment="none")
STEPS = 300


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", validation_fraction=0.1, labels_fraction=0.3)


Searched = tuple[TrainResult, list[Mapping[str, Any]]]


@pytest.fixture(scope="module")
def searched(digits: Data) -> Searched:
    """A search and the training behind it, and what was reported."""
    events = list[Mapping[str, Any]]()
    before = bits_of((backbone := tiny_net()).model)
    result = train_auto(backbone, digits, CONFIG, search_steps=STEPS, report=lambda e: events.append(dict(e)))
    assert all(torch.equal(before[name], one) for name, one in bits_of(backbone.model).items())
    return result, events


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_best_of_the_last_round_is_trained(searched: Searched, digits: Data) -> None:
    result, events = searched
    record = result.about.training
    assert record is not None
    found = record["auto"]
    assert found["steps"] == STEPS >= sum(one["steps"] for one in found["trials"])
    last = max(one["steps"] for one in found["trials"])
    finals = {json.dumps(one["changes"]): one["figure"] for one in found["trials"] if one["steps"] == last}
    assert {"{}", json.dumps(NORMS)} < finals.keys()
    assert finals[json.dumps(found["chosen"])] == max(finals.values())
    # the training afterwards is the one that the chosen settings give alone
    settings = config_from(record["settings"])
    assert {name: record["settings"][name] for name in found["chosen"]} == found["chosen"]
    alone = train_mask(tiny_net(), digits, settings)
    assert alone.parts.masks == result.parts.masks
    assert alone.metrics == result.metrics
    assert record["data"]["rows"]["train"] == len(digits.train or ())
    # something is seen at once, and the steps of the search rise
    search = [one for one in events if one.get("part", "").startswith("search")]
    assert search[0]["step"] == 0
    steps = [one["step"] for one in search if one["event"] == "step"]
    assert steps == sorted(steps)
    assert steps[-1] <= search[-2]["steps"] <= STEPS
    assert len([one for one in search if one["event"] == "trial"]) == len(found["trials"])


def test_a_search_that_was_killed_goes_on(searched: Searched, digits: Data, tmp_path: Path) -> None:
    whole, tiny_backbone = searched[0], tiny_net()
    for stop in ("trial", "step", "final"):  # after a trial, in the next one, in the training itself
        seen = 0

        def report(event: Mapping[str, Any], stop: str = stop) -> None:
            nonlocal seen
            search = event.get("part", "").startswith("search")
            due = not search and event["event"] == "epoch" if stop == "final" else event["event"] == stop and search
            seen += due
            if due and seen == (1 if stop == "final" else 3):
                raise KeyboardInterrupt

        options: dict[str, Any] = {"output": tmp_path, "resume": stop != "trial", "checkpoint_every": "2steps"}
        with pytest.raises(KeyboardInterrupt):
            train_auto(tiny_backbone, digits, CONFIG, search_steps=STEPS, report=report, **options)
        if stop == "trial":
            with pytest.raises(StateError, match="holds the search of an earlier run; continue it with resume"):
                train_auto(tiny_backbone, digits, CONFIG, search_steps=STEPS, output=tmp_path)
            for other in ({"search_steps": STEPS + 1}, {"config": replace(CONFIG, seed=1)}):
                given = {"config": CONFIG, "search_steps": STEPS, **other}
                with pytest.raises(StateError, match="results of other settings"):
                    train_auto(tiny_backbone, digits, **given, output=tmp_path, resume=True)  # type: ignore[arg-type]
    made = (tmp_path / "search/trials.jsonl").read_bytes()
    again = train_auto(tiny_backbone, digits, CONFIG, search_steps=STEPS, output=tmp_path, resume=True)
    assert (tmp_path / "search/trials.jsonl").read_bytes() == made
    assert again.about.training == whole.about.training
    assert again.parts.masks == whole.parts.masks
    assert sorted(one.name for one in (tmp_path / "search").iterdir()) == ["search.json", "trials.jsonl"]


def test_trials_are_read_back_or_refused(tmp_path: Path) -> None:
    path, trial = tmp_path / "trials.jsonl", Trial({"top": 0.1}, 10, 0.5)
    assert kept_trials(path) == []
    line = json.dumps({"changes": {"top": 0.1}, "steps": 10, "figure": 0.5}) + "\n"
    path.write_text(line)
    assert kept_trials(path) == [trial]
    path.write_text(line + "{}\n")
    with pytest.raises(StateError, match=r"cannot read the trials in .*; delete it and resume"):
        kept_trials(path)


def test_what_is_given_is_not_searched(tiny_backbone: Backbone) -> None:
    def of(config: TrainConfig, probe: bool = True) -> list[auto.Changes]:
        return candidates(tiny_backbone, config, 1368, 40, probe)

    found = of(CONFIG)
    assert found[:2] == [{}, NORMS]
    assert {"top": 0.1} in found
    assert {name for one in found for name in one} == {"top", "train", "lr", "train_lr", "bn", "head_start"}
    given = replace(CONFIG, top=0.2, lr=0.1, train_lr=0.1, bn="freeze", head_start="probe")
    assert of(given) == [{}]
    assert "head_start" not in {name for one in of(CONFIG, probe=False) for name in one}
    assert all("top" not in one for one in of(replace(CONFIG, method="nm")))


def test_finalists() -> None:
    def trials(**accuracy: float) -> list[Trial]:
        kinds: dict[str, auto.Changes] = {
            "default": {}, "norms": NORMS, "all": {"top": 1.0}, "fast": {"lr": 0.1}, "slow": {"lr": 0.02},
            "alone": {"top": 1.0, "train": ["none"]}, "adapt": {"bn": "adapt"},
        }  # fmt: skip
        return [Trial(kinds[name], 10, value) for name, value in accuracy.items()]

    # the two best of different settings together
    found = finalists(trials(default=0.5, norms=0.4, all=0.6, fast=0.65, slow=0.7, adapt=0.55))
    assert found == [{}, NORMS, {"lr": 0.02, "top": 1.0}, {"lr": 0.02}]
    # nothing helped: the best others
    assert finalists(trials(default=0.5, norms=0.4, all=0.5, fast=0.3))[2:] == [{"top": 1.0}, {"lr": 0.1}]
    # without scores there is no rate of theirs, and norms must learn
    found = finalists(trials(default=0.5, norms=0.8, fast=0.7, alone=0.7, adapt=0.6))
    assert found[2] == {"top": 0.0, "bn": "adapt"}
    found = finalists(trials(default=0.5, norms=0.7, fast=0.8, adapt=0.6))
    assert found[2] == {"lr": 0.1, "bn": "adapt"}


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        ({}, 50, r"a search of 50 steps is too short for \d candidates; give at least \d+ steps"),
        ({"objective": "swav"}, 500, "the objective 'swav' has no labels; leave auto out"),
    ],
)
def test_a_search_that_cannot_be(
    tiny_backbone: Backbone, digits: Data, settings: dict[str, Any], steps: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train_auto(tiny_backbone, digits, replace(CONFIG, **settings), search_steps=steps)


def test_a_rate_that_is_too_great_ends_its_trial_alone(
    tiny_backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "candidates", lambda *_, **__: [{}, NORMS, {"train_lr": 1e30}])
    result = train_auto(tiny_backbone, digits, replace(CONFIG, bn="freeze"), search_steps=STEPS)
    assert result.about.training is not None
    failed = [one for one in result.about.training["auto"]["trials"] if "train_lr" in one["changes"]]
    assert [one["figure"] for one in failed] == [None] * len(failed) != []
    assert "train_lr" not in result.about.training["auto"]["chosen"]


def test_norms_alone(tiny_backbone: Backbone, digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = train_mask(tiny_backbone, digits, replace(CONFIG, top=0.0))
    assert alone.parts.masks.density == 1.0
    assert (sorted(alone.parts.norms), dict(alone.parts.parameters)) == (["bn1", "bn2"], {})
    assert alone.about.training is not None
    assert (alone.about.training["scores"], "scores" in alone.about.training["rates"]) == (0, False)
    said = "the search found no masks that are better than norms and head alone"
    assert not any("masks keep every weight" in one for one in alone.about.training.get("warnings", []))
    monkeypatch.setattr(auto, "candidates", lambda *_, **__: [NORMS])
    monkeypatch.setattr(auto, "finalists", lambda *_: [NORMS])
    events: list[Mapping[str, Any]] = []
    found = train_auto(tiny_backbone, digits, CONFIG, search_steps=STEPS, report=events.append)
    assert found.parts.masks == alone.parts.masks
    assert found.about.training is not None
    assert found.about.training["warnings"][-1].startswith(said)
    assert str(events[-1]["warning"]).startswith(said)
    with pytest.raises(ConfigError, match="nothing would learn"):
        train_mask(tiny_backbone, digits, replace(CONFIG, top=0.0, train=(), head_kind="own"))


def test_in_words() -> None:
    assert [in_words(one) for one in ({}, NORMS, {"top": 1.0, "train": ["none"], "bn": "adapt"})] == [
        "settings as given",
        "norms alone",
        "top 1, train none, bn adapt",
    ]
