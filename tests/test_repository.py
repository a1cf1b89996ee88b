"""What surrounds the code: workflows, the lock file, the audit, and a wheel that anybody can build again."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOCK = ROOT / "requirements-dev.txt"


def parsed(path: Path) -> dict[Any, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def locked() -> dict[str, list[str]]:
    """Each requirement of the lock with its continuation lines: name -> its entries."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"^(?=[a-z0-9])", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        found.setdefault(entry.split("==")[0], []).append(entry)
    return found


def normal(requirement: str) -> str:
    """The name of a requirement as package indexes write it."""
    name = re.match(r"[\w.-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path: Path) -> None:
    workflow, text = parsed(path), path.read_text(encoding="utf-8")
    assert workflow["permissions"] == {}, "each job says what it needs"
    assert "pull_request_target" not in text
    assert all("permissions" in job for job in workflow["jobs"].values())
    for used in re.findall(r"uses: *(.*)", text):
        # $/: a workflow of this repository, at the commit that runs
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+|\$/\.github/workflows/\w+\.yml", used), used
    for step in (step for job in workflow["jobs"].values() for step in job.get("steps", ())):
        assert "${{" not in step.get("run", ""), "an expression in a script can bring in code: pass it by env"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_one_digest_for_an_action() -> None:
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: *(\S+@.*)", path.read_text(encoding="utf-8"))}
    assert used
    assert len({line.split("@")[0] for line in used}) == len(used)


def test_who_may_sign() -> None:
    """Only what runs nothing of a package that was downloaded may sign and publish."""
    for path in WORKFLOWS:
        for name, job in parsed(path)["jobs"].items():
            assert set(job["permissions"]) <= {"contents", "id-token", "attestations"}
            assert job["permissions"].get("contents", "read") == "read"
            if "id-token" in job["permissions"]:
                assert (path.name, name) in {("release.yml", "attest"), ("release.yml", "publish")}
                assert not any("run" in step for step in job["steps"])


def test_lock_has_hashes_and_comes_from_nowhere_else() -> None:
    text = LOCK.read_text(encoding="utf-8")
    for name, entries in locked().items():
        for entry in entries:
            pinned = rf"{name}==[\w.!+]+ (; .+ )?\\\n( +--hash=sha256:[0-9a-f]{{64}}( \\)?\n)+"
            assert re.match(pinned, entry), entry[:80]
    assert not re.search(r"://|^-|@ ", text, re.MULTILINE), "an index, an option or an address"


def test_lock_names_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["release"]]
    wanted += [one for extra in ("train", "lab", "sign", "dev") for one in optional[extra]]
    names = {normal(one) for one in wanted} - {"maskpack"}
    assert names <= set(locked()), f"make lock: {sorted(names - set(locked()))} are missing"


@pytest.mark.parametrize("pure", ["0", "1"])
def test_the_same_tree_gives_the_same_wheel(tmp_path: Path, pure: str) -> None:
    wheels = []
    for number, umask in enumerate((0o022, 0o077)):
        copy, out = tmp_path / f"copy{number}", tmp_path / f"out{number}"
        for name in ("maskpack", "cli"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy / name)
        for path in copy.rglob("*"):
            os.utime(path, (1_600_000_000 + number, 1_600_000_000 + number))
            path.chmod(path.stat().st_mode & ~umask)
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
        environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
        environment["MASKPACK_PURE"] = pure
        subprocess.run(command, cwd=copy, check=True, capture_output=True, umask=umask, env=environment)
        (wheel,) = out.glob("*.whl")
        assert pure == "0" or wheel.name.endswith("-py3-none-any.whl")
        wheels.append((wheel.name, wheel.read_bytes()))
    assert wheels[0] == wheels[1]


FINDING = '{"name": "b", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}'
SOUND = '{"name": "a", "version": "1", "vulns": []}'
SKIPPED = '{"name": "c", "skip_reason": "not found"}'


@pytest.mark.parametrize(
    ("stdout", "stderr", "status", "said"),
    [
        (f'{{"dependencies": [{SOUND}]}}', "", 0, "no known vulnerability in 1 packages"),
        (f'{{"dependencies": [{SOUND}, {FINDING}, {SKIPPED}]}}', "", 1, "b 1: CVE-1, fixed in 2"),
        # what pip-audit itself calls "No known vulnerabilities found"
        (f'{{"dependencies": [{SKIPPED}]}}', "", 3, "database cannot be reached"),
        (f'{{"dependencies": [{SOUND}, {SKIPPED}]}}', "", 3, "c"),
        ("", "Traceback\nrequests.exceptions.ConnectionError: no route", 3, "database cannot be reached"),
        ("", "invalid requirements input: lock", 2, "invalid requirements input"),
    ],
)
def test_audit(tmp_path: Path, stdout: str, stderr: str, status: int, said: str) -> None:
    (tmp_path / "pip_audit.py").write_text(f"import sys\nsys.stderr.write({stderr!r})\nprint({stdout!r})\n")
    run = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit.py", "lock"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == status
    assert said in run.stdout
    assert "Traceback" not in run.stdout + run.stderr


def test_help_lists_all_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", text, re.MULTILINE)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  ([a-z-]+) +\S", shown, re.MULTILINE) == targets
    assert len(set(targets)) == len(targets)


def test_citation_names_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = parsed(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_hooks_use_the_environment() -> None:
    for repository in parsed(ROOT / ".pre-commit-config.yaml")["repos"]:
        assert repository["repo"] == "local", "no version is pinned twice"
        for hook in repository["hooks"]:
            assert (hook["language"], hook["entry"].split("/")[:2]) == ("system", [".venv", "bin"])


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_form(name: str) -> None:
    form = parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
