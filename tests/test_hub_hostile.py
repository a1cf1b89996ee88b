"""A server that lies or goes silent: nothing is written where it says, and the caller gets an error of ours."""

import json
import threading
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import huggingface_hub.constants as constants
import pytest

from maskpack.errors import AdapterError, HubError, MaskpackError
from maskpack.hub.pull import pull
from maskpack.hub.push import push

from .helpers_hub import CONFIG, MODEL, NAMES, contents, read_folder, write_adapter
from .helpers_hub_fixtures import BIRDS, CONTENT
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer, lies

LISTING = "/(paths-info|tree)/"


def lie_about_files(server: HubServer, change: lies.Change) -> None:
    for method in ("GET", "POST"):
        server.fail("lie", method, LISTING, times=99, change=change)


def outside_of_the_caches(folder: Path) -> set[Path]:
    caches = {folder / "home", folder / "hub/home"}
    return {path for path in folder.rglob("*") if not caches & {path, *path.parents}}


# names
def test_files_of_hostile_names_are_not_asked_for(birds: HubServer, tmp_path: Path) -> None:
    lie_about_files(birds, lies.more_names(*lies.NAMES))
    before = outside_of_the_caches(tmp_path)
    assert read_folder(pull(BIRDS).path) == contents()
    asked = {line.rpartition("/")[2] for line in birds.requests(path="/resolve/")}
    assert asked == {CONFIG, MODEL}
    assert outside_of_the_caches(tmp_path) == before


@pytest.mark.transport("lfs")
@pytest.mark.parametrize("name", lies.NAMES)
def test_model_file_under_a_hostile_name(birds: HubServer, name: str) -> None:
    lie_about_files(birds, lies.other_name(MODEL, name))
    with pytest.raises(AdapterError, match=r"it lacks maskpack_model\.safetensors"):
        pull(BIRDS)
    assert not birds.requests(path="/resolve/")


@pytest.mark.transport("lfs")
@pytest.mark.parametrize("name", lies.NAMES)
def test_push_does_not_touch_hostile_names(birds: HubServer, adapter: Path, name: str) -> None:
    lie_about_files(birds, lies.more_names(name))
    pushed = push(write_adapter(adapter, contents(1)), BIRDS, token=WRITE_TOKEN)
    sent = [json.loads(line) for line in birds.log[-1].body.splitlines()]
    assert birds.log[-1].target.endswith("/commit/main")
    assert {line["value"]["path"] for line in sent[1:]} == set(NAMES)
    assert birds.repositories[BIRDS].head("main") == pushed.commit


# listings that are none
@pytest.mark.transport("lfs")
@pytest.mark.parametrize(
    "listing",
    [
        None,
        "text",
        [1],
        [{"type": "file"}],
        [{"type": "file", "path": MODEL}],
        [{"type": "file", "path": name, "size": -1, "oid": "x"} for name in (MODEL, CONFIG)],
        [{"type": "file", "path": name, "size": 1 << 70, "oid": "x"} for name in (MODEL, CONFIG)],
    ],
    ids=["null", "text", "numbers", "nameless", "bare", "negative", "huge"],
)
def test_listing_that_is_none(birds: HubServer, listing: object) -> None:
    lie_about_files(birds, lies.body(listing))
    with pytest.raises(MaskpackError):
        pull(BIRDS)
    assert not birds.requests("GET", CONTENT)


# ETags, which the client uses as file names: nobody stops it (HF_ENDPOINT is trusted), but the bytes are verified
@pytest.mark.parametrize("etag", lies.ETAGS)
def test_hostile_etag(birds: HubServer, etag: str) -> None:
    right = contents()
    for name in (MODEL, CONFIG):
        birds.fail("lie", "HEAD", name, times=99, change=lies.headers(ETag=etag + name, X_Linked_Etag=etag + name))
    address = f"{birds.endpoint}/{BIRDS}/resolve/main/{CONFIG}"
    with urlopen(Request(address, method="HEAD")) as answer:
        assert answer.headers["ETag"] == etag + CONFIG
    try:
        found = read_folder(pull(BIRDS).path)
    except MaskpackError:
        return
    assert found == right


# parents that are not the head
@pytest.mark.transport("lfs")
@pytest.mark.parametrize("times", [1, 99])
def test_stale_head(birds: HubServer, adapter: Path, times: int) -> None:
    stale = birds.repositories[BIRDS].head("main")
    head = birds.add(BIRDS, contents(2))
    birds.fail("lie", "GET", "/api/models/alice/birds/revision/", times=times, change=lies.field("sha", stale))
    with pytest.raises(HubError, match="somebody else changed"):
        push(write_adapter(adapter, contents(1)), BIRDS, token=WRITE_TOKEN)
    assert birds.repositories[BIRDS].head("main") == head
    assert birds.file(BIRDS, MODEL) == contents(2)[MODEL]


# silence
def ask(address: str, **options: Any) -> bytes:
    with urlopen(Request(address, **options), timeout=0.3) as answer:
        return bytes(answer.read())


@pytest.mark.transport("lfs")
def test_silence_is_what_it_says(birds: HubServer) -> None:
    address = f"{birds.endpoint}/api/models/{BIRDS}/branch/dev"
    body = {"method": "POST", "data": b"{}", "headers": {"Authorization": f"Bearer {WRITE_TOKEN}"}}
    birds.fail("silent", "POST", "/branch/")
    with pytest.raises(TimeoutError):
        ask(address, **body)
    assert birds.repositories[BIRDS].git.ref("refs/heads/dev") is None
    assert ask(address, **body) == b"{}"
    birds.fail("stall", "GET", CONFIG)
    with urlopen(f"{birds.endpoint}/{BIRDS}/resolve/main/{CONFIG}", timeout=0.3) as answer:
        half = answer.read(len(contents()[CONFIG]) // 2)
        assert contents()[CONFIG].startswith(half)
        with pytest.raises(TimeoutError):
            answer.read(1)


@pytest.mark.parametrize("kind", ["silent", "stall"])
def test_download_that_stalls_is_fetched_again(birds: HubServer, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "300ms")
    birds.fail(kind, "GET", CONTENT)
    assert read_folder(pull(BIRDS).path) == contents()
    assert sum(CONTENT in line for line in birds.requests("GET", "store:")) == 2


@pytest.mark.transport("lfs")
def test_head_that_stalls_is_asked_again(birds: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    birds.fail("silent", "HEAD", "/resolve/")
    assert read_folder(pull(BIRDS).path) == contents()


@pytest.mark.transport("lfs")
def test_silence_ends_with_the_server(birds: HubServer) -> None:
    birds.fail("silent", "GET", "/api/models/", times=99)
    end = threading.Timer(0.2, birds.stop)
    end.start()
    with pytest.raises(HubError, match=r"127\.0\.0\.1"):
        pull(BIRDS)
    end.join()


@pytest.mark.parametrize("sha", ["main", "../../../../x", "A" * 40, ""])
def test_commit_that_is_none(birds: HubServer, sha: object) -> None:
    birds.fail("lie", "GET", f"/api/models/{BIRDS}$", times=9, change=lies.field("sha", sha))
    with pytest.raises(
        HubError, match=r"alice/birds is said to be at commit .*, expected 40 hexadecimal digits; check HF_END"
    ):
        pull(BIRDS)


@pytest.mark.parametrize("commit", ["a" * 40, ""])
def test_file_of_another_commit(birds: HubServer, commit: str) -> None:
    birds.fail("lie", "HEAD", "/resolve/", times=99, change=lies.headers(X_Repo_Commit=commit))
    with pytest.raises(HubError, match="came as a file of commit|does not answer like a Hub"):
        pull(BIRDS)
