"""maskpack pull with several references: one that fails does not stop the others, and none overwrites another."""

import json
from pathlib import Path

import pytest
from maskpack_cli.main import app
from typer.testing import CliRunner, Result

from .helpers_hub import CONFIG, MODEL, contents, read_folder, write_adapter
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer


def pull(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pull", *map(str, arguments)])


@pytest.fixture
def commits(hub: HubServer) -> dict[str, str]:
    names = ("alice/birds", "alice/boats", "bob/birds")
    return {name: hub.add(name, contents(seed)) for seed, name in enumerate(names)}


def test_all_are_pulled(commits: dict[str, str], tmp_path: Path) -> None:
    done = pull(*commits)
    assert done.exit_code == 0
    folders = [line.removeprefix("✓ ") for line in done.stdout.splitlines() if line.startswith("✓ ")]
    assert [Path(folder).name for folder in folders] == list(commits.values())
    for name, commit in commits.items():
        assert f"Pinned: {name}@{commit}" in done.stderr
    found = json.loads(pull(*commits, "--json").stdout)
    assert [(one["repo_id"], one["commit"]) for one in found["adapters"]] == list(commits.items())
    assert found["errors"] == []
    assert [read_folder(Path(one["path"]))[MODEL] for one in found["adapters"]] == [
        contents(seed)[MODEL] for seed in range(3)
    ]
    paths = pull(*commits, "-q")
    assert (paths.stdout.split(), paths.stderr) == ([one["path"] for one in found["adapters"]], "")


def test_one_keeps_its_own_form(commits: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(pull("alice/birds", "--json").stdout)
    assert (found["repo_id"], found["commit"]) == ("alice/birds", commits["alice/birds"])
    assert pull("alice/birds", "--output", tmp_path / "copy").exit_code == 0
    assert set(read_folder(tmp_path / "copy")) == {CONFIG, MODEL}
    failed = pull("alice/none", "--json")
    assert (failed.exit_code, failed.stdout) == (1, "")


def test_one_that_fails_does_not_stop_the_others(hub: HubServer, commits: dict[str, str], tmp_path: Path) -> None:
    hub.add("alice/damaged", contents() | {MODEL: contents(1)[MODEL]})
    refs = ["alice/none", "alice/birds", "alice/damaged", "no-name", "./nowhere", "bob/birds"]
    done = pull(*refs)
    assert done.exit_code == 1
    assert done.stdout.count("✓") == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert [line.split(": ")[1] for line in errors] == ["alice/none", "alice/damaged", "no-name", "./nowhere"]
    for line, words in zip(
        errors,
        ("has no such repository", "one of them was replaced", "is not a reference to an adapter", "does not exist"),
        strict=True,
    ):
        assert words in line
    assert done.stderr.endswith("4 of 6 adapters could not be pulled.\n")
    assert "Traceback" not in done.stderr
    found = pull(*refs, "--json", "-q")
    assert found.exit_code == 1
    listed = json.loads(found.stdout)
    assert [one["repo_id"] for one in listed["adapters"]] == ["alice/birds", "bob/birds"]
    assert [one["ref"] for one in listed["errors"]] == ["alice/none", "alice/damaged", "no-name", "./nowhere"]
    assert "could not be pulled" not in found.stderr


def test_each_has_its_folder(commits: dict[str, str], tmp_path: Path) -> None:
    write_adapter(tmp_path / "local", contents(3))
    alone = write_adapter(tmp_path / "files", {"alone.safetensors": contents(4)[MODEL]}) / "alone.safetensors"
    out = tmp_path / "out"
    assert pull(*commits, "bad-name", tmp_path / "local", alone, "--output", out).exit_code == 1
    assert {path.name: read_folder(path)[MODEL] for path in out.iterdir()} == {
        "alice--birds": contents()[MODEL],
        "alice--boats": contents(1)[MODEL],
        "bob--birds": contents(2)[MODEL],
        "local": contents(3)[MODEL],
        "alone": contents(4)[MODEL],
    }


@pytest.mark.parametrize(
    "refs",
    [
        ("alice/birds", "alice/birds@main"),
        ("alice/birds", "alice/Birds"),
        ("alice/birds", "alice/boats", "./alice--birds"),
        ("./a/mask", "./b/mask.safetensors"),
    ],
)
def test_two_that_would_share_a_folder(
    hub: HubServer, commits: dict[str, str], refs: tuple[str, ...], tmp_path: Path
) -> None:
    done = pull(*refs, "--output", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"{refs[0]} and {refs[-1]} would both be copied to {tmp_path / 'out'}" in done.stderr
    assert "nothing was fetched: pull them one at a time" in done.stderr
    assert hub.log == []
    assert not (tmp_path / "out").exists()


def test_none_at_all() -> None:
    done = pull()
    assert done.exit_code == 2
    assert "Missing argument 'REF'" in done.stderr


def test_debug_shows_the_traceback_of_the_first(commits: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKPACK_DEBUG", "1")
    assert type(pull("no-name", "alice/birds").exception).__name__ == "AdapterError"
