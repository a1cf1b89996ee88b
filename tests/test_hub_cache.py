"""What became of a cache: damage of any kind is repaired online and refused offline, leftovers of killed pulls go."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from maskpack.errors import MaskpackError
from maskpack.hub.cache import RepositoryCache
from maskpack.hub.pull import pull

from .helpers_hub import MODEL, contents, read_folder
from .helpers_hub_fixtures import BIRDS, CONTENT
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(path.parent)  # its address may have 100 characters
        one.bind(path.name)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def _outward(path: Path) -> None:
    elsewhere = Path(constants.HF_HOME) / "elsewhere"
    elsewhere.write_bytes(contents()[MODEL])
    path.symlink_to(elsewhere)


def _unreadable(path: Path) -> None:
    path.write_bytes(contents()[MODEL])
    path.chmod(0)


KINDS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "socket": _socket,
    "folder": _folder,
    "dangling link": lambda path: path.symlink_to("gone"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "outward link": _outward,
    "empty": lambda path: path.touch(),
    "no adapter": lambda path: path.write_bytes(b"\0" * 5000),
    "another adapter": lambda path: path.write_bytes(contents(1)[MODEL]),
    "one bit": lambda path: path.write_bytes(contents()[MODEL][:-1] + bytes([contents()[MODEL][-1] ^ 1])),
    "unreadable": _unreadable,
}


def _places(folder: Path, name: str) -> dict[str, Path]:
    """The snapshot's entry and every file that it leads to."""
    found, path = [folder / name], folder / name
    while path.is_symlink():
        path = Path(os.path.normpath(path.parent / path.readlink()))
        found.append(path)
    return dict(zip(("entry", "blob", "shared store"), found, strict=False))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_entry(birds: HubServer, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("nothing is unreadable for root")
    found = pull(BIRDS)
    places = _places(found.path, MODEL)
    assert len(places) >= 2  # newer clients keep files of Xet in a store that repositories share
    for place, path in places.items():
        _remove(path)
        KINDS[kind](path)
        with pytest.raises(MaskpackError):
            pull(BIRDS, local_files_only=True)
        assert read_folder(pull(BIRDS).path) == contents(), place
        birds.log.clear()
        assert read_folder(pull(found.pinned).path) == contents(), place
        assert birds.log == [], f"{place} was not repaired"
    assert not (Path(constants.HF_HOME) / "elsewhere").exists() or kind == "outward link"


@pytest.mark.parametrize("place", ["snapshots", "snapshots/COMMIT", "blobs", "refs", "refs/main", "."])
@pytest.mark.parametrize("kind", ["fifo", "empty", "dangling link", "no adapter"])
@pytest.mark.transport("lfs")
def test_damaged_folder(birds: HubServer, place: str, kind: str) -> None:
    found = pull(BIRDS)
    path = found.path.parents[1] / place.replace("COMMIT", found.path.name)
    _remove(path)
    KINDS[kind](path)
    if place != "refs":
        with pytest.raises(MaskpackError):
            pull(BIRDS, local_files_only=True)
    assert read_folder(pull(BIRDS).path) == contents()
    assert read_folder(pull(BIRDS, local_files_only=True).path) == contents()


# what a killed pull leaves
KILLED = """
import sys, time
from pathlib import Path
from maskpack.hub.pull import pull
def killed(self, content, write=Path.write_bytes):
    if self.parent.name != "output":
        return write(self, content)
    write(self, content[:1000])
    print("writing", flush=True)
    time.sleep(60)
if "output" in sys.argv[2]:
    Path.write_bytes = killed
pull(sys.argv[1], output=sys.argv[2] if "output" in sys.argv[2] else None)
"""


@contextmanager
def pull_that_stops(hub: HubServer, tmp_path: Path, output: str) -> Iterator[subprocess.Popen[str]]:
    """A process that pulls and stands still with half of a file, in its output folder or in the cache."""
    environment = hub.env() | {"HF_HOME": constants.HF_HOME}
    command = [sys.executable, "-c", KILLED, BIRDS, output]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.transport("lfs")
def test_leftovers_in_the_output_folder(birds: HubServer, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pull_that_stops(birds, tmp_path, str(output)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        unfinished = {path for path in output.iterdir() if path.suffix == ".tmp"}
        assert len(unfinished) == 2
        pull(BIRDS, output=output)
        assert {path for path in output.iterdir() if path.suffix == ".tmp"} == unfinished  # its process lives
        process.kill()
        process.wait()
    for path in unfinished:
        os.utime(path, (1, 1))  # those that are new and empty stay for a moment
    pull(BIRDS, output=output)
    assert read_folder(output) == contents()


@pytest.mark.transport("lfs")
def test_leftovers_in_the_cache(birds: HubServer, tmp_path: Path) -> None:
    birds.fail("stall", "GET", CONTENT)
    blobs = Path(constants.HF_HUB_CACHE) / "models--alice--birds/blobs"
    with pull_that_stops(birds, tmp_path, "-") as process:
        deadline = time.monotonic() + 60
        while not (birds.requests("GET", CONTENT) and [*blobs.glob("*.incomplete")]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        RepositoryCache(BIRDS).mend()
        assert len([*blobs.glob("*.incomplete")]) == 1  # its process lives
        process.kill()
        process.wait()
    assert len([*blobs.glob("*.incomplete")]) == 1
    assert read_folder(pull(BIRDS).path) == contents()
    assert [*blobs.glob("*.incomplete")] == []
