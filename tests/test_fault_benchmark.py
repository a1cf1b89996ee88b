"""The fault benchmark: it writes down the requests of a flow, lets the right one fail, and notices what is wrong."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_client import answer
from benchmarks.fault_flows import FLOWS, Client, Run, adapter, without_card
from benchmarks.fault_matrix import markdown
from benchmarks.faults import steps_of
from benchmarks.report import write_between
from benchmarks.training_kills import markdown as killed_table
from maskpack.hub.pull import pull
from maskpack.hub.push import push

from .helpers_hub import CARD, CONFIG, MODEL, saved, write_adapter
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer


class Told:
    """Stands in for a client: gives the answers that it was told, and calls nobody."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    def start(self, *_: object, **__: object) -> None:
        return

    def wait(self) -> dict[str, Any]:
        return self.answers.pop(0)

    def call(self, *_: object, **__: object) -> dict[str, Any]:
        return self.wait()


FAILED = {"error": "HubError", "ours": True, "text": "the connection broke"}


def run_of(hub: HubServer, folder: Path, *answers: dict[str, Any]) -> Run:
    told: Any = Told(*answers)
    return Run(hub, told, folder, 7, seed=0)


@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)
def test_every_step_of_a_push_can_fail(hub: HubServer, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", without_card(0))
    push(folder, "alice/r1", token=WRITE_TOKEN)
    steps = steps_of(list(hub.log), "alice/r1")
    assert "POST hub:/api/repos/create" in [step.label for step in steps]
    assert "POST hub:/api/models/REPOSITORY/commit/main" in [step.label for step in steps]
    faults = [step.fault("norange", "alice/r2") for step in steps]  # this kind breaks nothing here
    for fault in faults:
        hub.faults.rules = [fault]
        hub.repositories.pop("alice/r2", None)
        write_adapter(folder, without_card(2 + faults.index(fault)))
        push(folder, "alice/r2", token=WRITE_TOKEN)
        assert fault.met > fault.skip, fault


def test_faults_that_make_sense(hub: HubServer) -> None:
    hub.add("alice/r1", saved())
    pull("alice/r1")
    steps = {step.label: step.kinds for step in steps_of(list(hub.log), "alice/r1")}
    assert "corrupt" in steps["GET store:/HASH"]
    assert "stall" in steps[f"GET hub:/REPOSITORY/resolve/COMMIT/{CONFIG}"]
    assert {"lost", "silent", "short"} <= set(steps["POST hub:/api/models/REPOSITORY/paths-info/COMMIT"])
    assert not {"lost", "short", "close"} & set(steps[f"HEAD hub:/REPOSITORY/resolve/COMMIT/{MODEL}"])


def test_wrong_pushes_are_noticed(hub: HubServer, tmp_path: Path) -> None:
    flow = FLOWS[1]
    run = run_of(hub, tmp_path)
    flow.prepare(run)
    assert flow.check(run, {"commit": "a" * 40}) == ["success without that commit"]
    commit = hub.add(run.repo_id, {**without_card(run.seed), CARD: b"---\n---\n"})
    assert flow.check(run, {"commit": commit}) == []
    words = {**FAILED, "text": "and nothing of yours was written"}
    assert flow.check(run, words) == ["the commit landed and the error says that nothing was written"]
    assert flow.check(run, {"commit": hub.add(run.repo_id, {"x": b""})}) == ["2 commits"]
    hub.add(run.repo_id, {MODEL: without_card(5)[MODEL]})
    found = flow.check(run_of(hub, tmp_path), FAILED)
    assert f"{MODEL} at the Hub has other bytes" in found
    run.client = Told({"commit": "x"})  # type: ignore[assignment]
    run.before = run.history()
    assert flow.check(run, FAILED) == ["pushed again: success without that commit"]
    git = hub.repositories[run.repo_id].git
    empty = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # the blob of "x", which git fsck alone reads
    (git.path / "objects" / empty[:2] / empty[2:]).write_bytes(b"damaged")
    run.client = Told(FAILED)  # type: ignore[assignment]
    assert "git fsck" in flow.check(run, FAILED)[-1]


def test_wrong_pulls_are_noticed(hub: HubServer, tmp_path: Path) -> None:
    flow, run = FLOWS[3], run_of(hub, tmp_path)
    flow.prepare(run)
    right = {"path": str(write_adapter(tmp_path / "right", adapter(run.seed))), "commit": run.commit}
    assert flow.check(run, right) == []
    assert flow.check(run, {**right, "commit": "b" * 40}) == ["another commit"]
    other = adapter(run.seed) | {MODEL: b"half", "x.tmp": b""}
    wrong = {"path": str(write_adapter(tmp_path / "wrong", other)), "commit": run.commit}
    assert flow.check(run, wrong) == [f"{MODEL} has other bytes", "x.tmp is no file of an adapter"]
    run.client = Told(wrong, right)  # type: ignore[assignment]
    assert flow.check(run, FAILED)[0] == f"left behind: {MODEL} has other bytes"
    run.client = Told(FAILED, FAILED)  # type: ignore[assignment]
    assert flow.check(run, FAILED) == ["pulled again: the connection broke"]
    (Path(right["path"]) / CARD).unlink()
    assert flow.check(run, right) == [f"{CARD} has other bytes"]


def test_answers_of_a_client(tmp_path: Path) -> None:
    found = answer({"call": "pull", "args": [str(tmp_path / "gone")], "options": {}})
    assert (found["error"], found["ours"]) == ("AdapterError", True)
    found = answer({"call": "pull", "args": [], "options": {}})
    assert (found["error"], found["ours"]) == ("TypeError", False)
    folder = write_adapter(tmp_path / "adapter")
    assert answer({"call": "pull", "args": [str(folder)], "options": {}})["path"] == str(folder)


def test_client_process(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("alice/r1", saved())
    client = Client(hub, tmp_path / "client")
    try:
        assert client.call("pull", "alice/r1", cache_dir=tmp_path / "cache")["commit"] == commit
        assert client.call("pull", "alice/typo")["error"] == "AdapterError"
    finally:
        client.stop()


def test_tables(tmp_path: Path) -> None:
    row = {"flow": "a push", "transport": "lfs", "step": "GET hub:/x", "outcome": "ok", "wrong": []}
    rows = [row | {"kind": "503"}, row | {"kind": "silent", "outcome": "hangs", "wrong": ["no answer"]}]
    text = markdown(rows, [{"transport": "xet", "what": "a race", "outcome": "2 ok", "wrong": []}], [])
    assert "Runs in which something was wrong: 1." in text
    assert "| `GET hub:/x` | ok |  |  |  |  | **hangs** |" in text
    assert "| Xet | a race | 2 ok | no |" in text
    page = tmp_path / "page.md"
    begin, end = "<!-- begin: make it -->", "<!-- end: make it -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write_between(page, "make it", text)
    assert page.read_text() == f"before\n{begin}\n{text}{end}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="lacks the markers"):
        write_between(page, "make it", text)


def test_table_of_killed_trainings() -> None:
    kill = {"run": "adam", "signal": "SIGKILL", "status": -9, "step": 4, "middle": True, "wrong": ""}
    other = {**kill, "signal": "SIGINT", "status": 1, "step": 0, "middle": False, "wrong": "status or traceback"}
    runs = [{"run": "adam", "kills": 3, "wrong": ""}, {"run": "budget", "kills": 1, "wrong": "adapter"}]
    lines = killed_table([kill, {**kill, "middle": False}, other, *runs]).splitlines()
    assert [line for line in lines if line.startswith("| SIG")] == [
        "| SIGKILL | 2 | 2 | 1 | 0 |",
        "| SIGTERM | 0 | 0 | 0 | 0 |",
        "| SIGINT | 1 | 0 | 0 | 1 |",
    ]
    assert lines[-1].startswith("2 runs of 6 kinds, each ended up to 3 times")
    assert " 1 of them have the adapter" in lines[-1]
