"""Recorded trials of benchmarks: how they are kept, and what is in the repository."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measured

ROOT = Path(__file__).parents[1]
RECORD = """
import sys
from pathlib import Path
from benchmarks import measured

measured.FOLDER = Path(sys.argv[1])
for number in range(50):
    measured.record("x", {"process": sys.argv[2], "number": number}, ["y" * 5000])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "measured")
    return tmp_path / "measured"


@pytest.mark.usefixtures("folder")
def test_a_recorded_trial_is_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert measured.trials("x") == []
    for seed in (0, 1):
        assert measured.trial("x", {"seed": seed, "names": ("a", "ä")}, lambda seed=seed: {"y": seed}) == {"y": seed}
    assert capsys.readouterr().out.splitlines() == ["x seed=0 names=('a', 'ä')", "x seed=1 names=('a', 'ä')"]
    assert measured.trial("x", {"seed": 1, "names": ("a", "ä")}, lambda: 1 / 0) == {"y": 1}
    with pytest.raises(ZeroDivisionError):
        measured.trial("x", {"seed": 1}, lambda: 1 / 0)  # a subset of the settings is another trial
    assert measured.trials("x", seed=1) == [{"seed": 1, "names": ["a", "ä"], "result": {"y": 1}}]
    assert len(measured.trials("x", lr=None)) == 2
    assert measured.trials("x", lr=0.1) == []


def test_a_run_replaces_the_file(folder: Path) -> None:
    for wrong in (1, 0):
        measured.rewrite(folder / "x.jsonl", [{"attack": "a", "wrong": wrong}, {"wrong": 2}], "attack")
    assert measured.trials("x") == [{"attack": "a", "result": {"wrong": 0}}, {"result": {"wrong": 2}}]


def test_processes_record_whole_lines(folder: Path) -> None:
    command = [sys.executable, "-c", RECORD, str(folder)]
    running = [subprocess.Popen([*command, str(process)], cwd=ROOT) for process in range(4)]
    assert [one.wait() for one in running] == [0] * 4
    found = {(one["process"], one["number"]) for one in measured.trials("x")}
    assert len(found) == 200


def test_files_in_the_repository() -> None:
    files = sorted((ROOT / "benchmarks" / "measured").iterdir())
    assert 1 <= len(files) <= 40
    for path in files:
        assert path.suffix == ".jsonl"
        assert not set(path.name) & set(" ,"), path.name
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert all("result" in one for one in lines), path.name
        settings = [json.dumps({**one, "result": None}, sort_keys=True) for one in lines]
        assert len(set(settings)) == len(settings), f"{path.name}: a trial is recorded twice"
