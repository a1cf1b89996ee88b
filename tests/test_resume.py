"""Checkpoints in the middle of an epoch, and what a run does that goes on from one, or that a signal stops."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskpack.adapter.content import Parts
from maskpack.errors import ConfigError, StateError, StoppedError
from maskpack.lab.comparison import compare
from maskpack.training.cascade import train_cascade
from maskpack.training.config import JointConfig, learning_rate
from maskpack.training.data.base import Data, load_data
from maskpack.training.loop import Position, Run
from maskpack.training.multitask import Task, train_jointly, train_tasks
from maskpack.training.run_folder import FILE, LOCK, load_checkpoint, locked, parse_every
from maskpack.training.trainer import TrainResult, train_mask
from maskpack.training.transfer import train_transfer

from .helpers_models import QUICK_CROPS, dropout_net

ROOT = Path(__file__).parent.parent
VIEWS = {"prototypes": 8, "dimension": 8, "small_crops": 1, "queue": 16, "queue_start": 0.0, "freeze_prototypes": 3}
CASES = {
    "adam": QUICK_CROPS,
    "accumulated": replace(QUICK_CROPS, accumulate=3, batch_size=8),
    "sgd": replace(QUICK_CROPS, optimizer="sgd", lr=20.0, scale=True, steps=13, train=("1.weight", "1.bias")),
    "queue": replace(QUICK_CROPS, objective="swav", objective_options=VIEWS),
    "budget": replace(QUICK_CROPS, bytes_budget=60),
    "drawn": replace(QUICK_CROPS, method="gumbel", lr=0.5),
    "outputs": replace(QUICK_CROPS, objective="distribution", bn="freeze", lr=0.15),
}


class StopHere(Exception):  # noqa: N818
    pass


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits:5-9", labels_fraction=0.2, validation_fraction=0.1)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the runs that follow fail after this step, as if they were killed; 0: none."""

    def after_step(self: Run, at: Position) -> None:
        usual(self, at)
        if at.step == step:
            raise StopHere

    monkeypatch.undo()
    usual = Run.after_step
    monkeypatch.setattr(Run, "after_step", after_step)


def same(one: TrainResult, other: TrainResult) -> None:
    assert tensors(one.parts).keys() == tensors(other.parts).keys()
    for name, tensor in tensors(one.parts).items():
        assert torch.equal(tensor, tensors(other.parts)[name]), name
    assert one.metrics == other.metrics


def tensors(parts: Parts) -> dict[str, Tensor]:
    found = {name: mask.tensor() for name, mask in parts.masks.items()} | dict(parts.statistics | parts.parameters)
    if parts.head is not None and parts.head.weight is not None:
        found |= {"head": parts.head.weight}
    return found


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_left"} for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_any_step_may_be_the_last_before_a_kill(
    case: str, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CASES[case]
    data = digits if config.objective == "supervised" else replace(digits, class_names=(), validation=None, test=None)

    def run(name: str, resume: bool = False) -> TrainResult:
        return train_mask(dropout_net(), data, config, output=tmp_path / name, resume=resume, checkpoint_every="2steps")

    whole = run("whole")
    assert whole.parts.masks.density < 1
    resume = False
    for step in (3, 8, 9):  # in the middle of an epoch, at its end, in the next
        stop_after(monkeypatch, step)
        with pytest.raises(StopHere):
            run("cut", resume)
        torch.manual_seed(step)
        resume = True
        assert load_checkpoint(tmp_path / "cut" / FILE)[1]["step"] == step // 2 * 2
    monkeypatch.undo()
    same(run("cut", resume), whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    one, other = (load_checkpoint(tmp_path / name / FILE) for name in ("cut", "whole"))
    assert all(torch.equal(one[0][name], tensor) for name, tensor in other[0].items())
    assert {**one[1], "log": 0} == {**other[1], "log": 0}


class Watched:
    """Rows of a data set that notes which were read; some cannot be decoded."""

    def __init__(self, rows: Any, spoiled: set[int]):
        self.rows, self.spoiled, self.seen = rows, spoiled, list[int]()
        self.features = rows.features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        self.seen.append(row)
        return {"image": {"bytes": b"", "path": None}} if row in self.spoiled else self.rows[row]


def test_what_was_read_is_not_read_again(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digits.train is not None
    spoiled = set(digits.train.indices[::3])
    config = replace(QUICK_CROPS, epochs=1)

    def run(name: str, resume: bool = False) -> tuple[TrainResult, list[int]]:
        assert digits.train is not None
        rows = Watched(digits.train.rows, spoiled)
        data = replace(digits, train=replace(digits.train, rows=rows, unreadable=set()), validation=None, test=None)
        options: dict[str, Any] = {"output": tmp_path / name, "resume": resume, "checkpoint_every": "1steps"}
        return train_mask(dropout_net(), data, config, **options), rows.seen

    whole, seen = run("whole")
    stop_after(monkeypatch, 6)
    with pytest.raises(StopHere):
        run("cut")
    monkeypatch.undo()
    resumed, again = run("cut", True)
    same(resumed, whole)
    assert resumed.about == whole.about
    assert whole.about.training["data"]["unreadable"] > 0
    assert again == seen[6 * config.batch_size :]


def test_processes_that_read_data_change_nothing(digits: Data) -> None:
    data = replace(digits, validation=None, test=None)
    one, other = (
        train_mask(dropout_net(), data, replace(QUICK_CROPS, epochs=1, workers=workers)) for workers in (0, 2)
    )
    same(one, other)


@pytest.mark.slow
def test_a_joint_run_goes_on_at_any_step(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(QUICK_CROPS, accumulate=2, batch_size=8)
    tasks = {"one": Task(digits), "two": Task(digits, "none")}

    def run(name: str, resume: bool = False) -> Any:
        options: dict[str, Any] = {"output": tmp_path / name, "resume": resume, "checkpoint_every": "1steps"}
        return train_jointly(dropout_net(), tasks, config, JointConfig(weight_lr=0.01, gate_factor=50.0), **options)

    whole = run("whole")
    for step in (5, 20):
        stop_after(monkeypatch, step)
        with pytest.raises(StopHere):
            run("cut", step > 5)
    monkeypatch.undo()
    resumed = run("cut", True)
    for name in tasks:
        same(resumed[name], whole[name])
    assert resumed["one"].base.digests == whole["one"].base.digests
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


# --- more steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [{"steps": 5}, {"epochs": 1}])
def test_a_constant_rate_with_more_steps_is_the_longer_run(first: dict[str, int], digits: Data, tmp_path: Path) -> None:
    config = replace(QUICK_CROPS, schedule="constant", warmup=0.0)
    whole = train_mask(dropout_net(), digits, replace(config, steps=13))
    short = train_mask(dropout_net(), digits, replace(config, **first), output=tmp_path)
    events = list[Mapping[str, Any]]()
    options: dict[str, Any] = {"output": tmp_path, "resume": True, "report": events.append}
    with pytest.raises(StateError, match="belongs to another run: .*(steps|epochs)"):
        train_mask(dropout_net(), digits, replace(config, steps=13), longer=False, **options)
    longer = train_mask(dropout_net(), digits, replace(config, steps=13), **options)
    same(longer, whole)
    made = short.about.training["steps"]
    said = [f"resumed at step {made} of {made} with 13 steps"]
    assert [event["resumed"] for event in events if event["event"] == "resumed"] == said
    assert longer.about.training["extended"] == said
    assert "extended" not in whole.about.training
    with pytest.raises(StateError, match="13 of 13 steps, and 12"):
        train_mask(dropout_net(), digits, replace(config, steps=12), **options)
    assert train_mask(dropout_net(), digits, replace(config, steps=13), **options).about == longer.about


def test_a_schedule_goes_on_as_the_longer_one(digits: Data, tmp_path: Path) -> None:
    train_mask(dropout_net(), digits, QUICK_CROPS, output=tmp_path)
    train_mask(dropout_net(), digits, replace(QUICK_CROPS, epochs=4), output=tmp_path, resume=True)
    steps = 4 * (load_checkpoint(tmp_path / FILE)[1]["steps"] // 4)
    lines = [line for line in logged(tmp_path) if line["event"] == "step"]
    rates = {line["step"]: line["lr"] for line in lines}
    assert rates[20] == pytest.approx(QUICK_CROPS.score_lr(steps, 0) * learning_rate(QUICK_CROPS, 19, steps))
    assert rates[20] > rates[16]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_at_the_next_step(number: signal.Signals, digits: Data, tmp_path: Path) -> None:
    before = signal.getsignal(number)

    def report(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 10:
            os.kill(os.getpid(), number)

    def run(name: str, **options: Any) -> TrainResult:
        return train_mask(dropout_net(), digits, QUICK_CROPS, output=tmp_path / name, **options)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else StoppedError) as caught:
        run("cut", report=report)
    if isinstance(caught.value, StoppedError):
        assert caught.value.signal == number
    assert load_checkpoint(tmp_path / "cut" / FILE)[1]["step"] == 10
    assert signal.getsignal(number) == before
    same(run("cut", resume=True), run("whole"))


def test_a_signal_at_the_end_of_an_epoch_waits_for_it(digits: Data, tmp_path: Path) -> None:
    def report(event: Mapping[str, Any]) -> None:
        if event["event"] == "epoch":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="step 8 of 16"):
        train_mask(dropout_net(), digits, QUICK_CROPS, output=tmp_path, report=report, checkpoint_every="1h")
    assert load_checkpoint(tmp_path / FILE)[1]["epoch"] == 1


def test_other_threads_and_runs_without_a_folder_leave_signals_alone(digits: Data, tmp_path: Path) -> None:
    seen = list[Any]()

    def train(output: Path | None) -> None:
        config = replace(QUICK_CROPS, steps=1)
        train_mask(
            dropout_net(), digits, config, output=output, report=lambda _: seen.append(signal.getsignal(signal.SIGTERM))
        )

    thread = threading.Thread(target=train, args=(tmp_path,))
    thread.start()
    thread.join()
    train(None)
    assert set(seen) == {signal.getsignal(signal.SIGTERM)}
    assert (tmp_path / FILE).exists()


def test_interrupts_say_how_to_go_on(digits: Data, tmp_path: Path) -> None:
    def report(event: Mapping[str, Any]) -> None:
        if event["event"] != "begin":
            raise KeyboardInterrupt

    for every, notes in (("1h", []), ("1steps", [f"--resume.*{tmp_path}"])):
        with pytest.raises(KeyboardInterrupt) as caught:
            train_mask(dropout_net(), digits, QUICK_CROPS, output=tmp_path, report=report, checkpoint_every=every)
        assert len(getattr(caught.value, "__notes__", [])) == len(notes)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90s", (90, None)),
        ("10min", (600, None)),
        ("1.5h", (5400, None)),
        ("500steps", (None, 500)),
        ("1 step", (None, 1)),
    ],
)
def test_intervals(text: str, found: tuple[Any, Any]) -> None:
    assert parse_every(text) == found


@pytest.mark.parametrize(
    "text", ["", "10", "min", "0s", "0steps", "1.5steps", "-1min", "10 minutes", "5epochs", "infs"]
)
def test_no_intervals(text: str, digits: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"10min or 2h.*{text!r}"):
        train_mask(dropout_net(), digits, QUICK_CROPS, output=tmp_path / "a", checkpoint_every=text)
    assert not (tmp_path / "a").exists()


# --- one run in a folder ---------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from maskpack.training.run_folder import locked
with locked(Path({folder!r})):
    child = os.fork()  # as a process that reads data; it outlives its parent
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_runs_until_it_ends_in_any_way(digits: Data, tmp_path: Path) -> None:
    script = HOLDER.format(root=str(ROOT), folder=str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        for resume in (False, True):
            with pytest.raises(StateError, match=f"{tmp_path} \\(process {holder.pid} on .+\\)"):
                train_mask(dropout_net(), digits, QUICK_CROPS, output=tmp_path, resume=resume)
        holder.kill()
        holder.wait()
        assert (tmp_path / LOCK).exists(), "a file that means nothing any more"
        train_mask(dropout_net(), digits, replace(QUICK_CROPS, steps=1), output=tmp_path)
        assert not (tmp_path / LOCK).exists()
    finally:
        holder.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_whatever_trains_into_a_folder_locks_it(digits: Data, tmp_path: Path) -> None:
    small, backbone = replace(QUICK_CROPS, steps=1), dropout_net()
    factory = {"reference": f"{ROOT / 'cli/maskpack_cli/digits_backbone.py'}:digits_cnn", "random_weights": 0}
    settled = replace(small, bn="freeze")
    calls: list[Callable[[], Any]] = [
        lambda: train_mask(backbone, digits, small, output=tmp_path),
        lambda: train_cascade(backbone, digits, small, experts=2, output=tmp_path),
        lambda: train_transfer(backbone, digits, digits, settled, output=tmp_path),
        lambda: train_tasks(backbone, {"one": Task(digits)}, tmp_path, config=small),
        lambda: train_jointly(backbone, {"one": Task(digits)}, small, output=tmp_path),
        lambda: compare(factory, {"reference": "digits:5-9"}, tmp_path, baselines=["knn"], config=small),
    ]
    with locked(tmp_path):
        for call in calls:
            with pytest.raises(StateError, match=f"another run writes into {tmp_path}"):
                call()
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_locks_of_folders_inside_and_of_threads(tmp_path: Path) -> None:
    with locked(tmp_path), locked(tmp_path / "a"):
        with pytest.raises(StateError, match=f"{os.getpid()} on "), locked(tmp_path):
            pass
        with pytest.raises(StateError), locked(tmp_path / "a"):
            pass
    with locked(tmp_path), locked(tmp_path / "a"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a"]


def test_locks_by_many_threads_are_held_by_one(tmp_path: Path) -> None:
    held, most = list[int](), list[int]()

    def take() -> None:
        for _ in range(100):
            try:
                with locked(tmp_path):
                    held.append(1)
                    most.append(len(held))
                    time.sleep(0)
                    held.pop()
            except StateError:
                pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert set(most) == {1}
