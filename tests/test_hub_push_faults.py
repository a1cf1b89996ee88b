"""Faults on the way of a push: it happens once, or says that it did not."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskpack.errors import HubError
from maskpack.hub.pull import pull
from maskpack.hub.push import push

from .helpers_hub import CARD, CONFIG, MODEL, contents, read_folder, write_adapter
from .helpers_hub_fixtures import BIRDS, CONTENT
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer


@pytest.mark.parametrize("kind", ["lost", "status", "drop"])
def test_commit_after_a_fault_happens_once(birds: HubServer, adapter: Path, kind: str) -> None:
    before = len(birds.repositories[BIRDS].git.history(birds.repositories[BIRDS].head("main")))
    write_adapter(adapter, contents(1))
    birds.fail(kind, "POST", "/commit/")
    pushed = push(adapter, BIRDS, token=WRITE_TOKEN)
    history = birds.repositories[BIRDS].git.history(birds.repositories[BIRDS].head("main"))
    assert (len(history), history[0]) == (before + 1, pushed.commit)
    assert birds.file(BIRDS, MODEL) == contents(1)[MODEL]
    assert len(birds.requests("POST", "/commit/")) == (1 if kind == "lost" else 2)


def push_with_a_fault(hub: HubServer, adapter: Path, kind: str, path: str) -> None:
    faults = [hub.fail(kind, method, path) for method in ("GET", "POST", "PUT")]
    pushed = push(adapter, "alice/new", token=WRITE_TOKEN)
    assert any(fault.met for fault in faults)
    assert len(hub.repositories["alice/new"].git.history(pushed.commit or "")) == 2
    assert hub.file("alice/new", MODEL) == contents()[MODEL]


@pytest.mark.parametrize("kind", ["status", "lost"])
@pytest.mark.parametrize("path", ["create", "preupload", "store:", "/api/models/alice/new", "yaml"])
def test_fault_before_the_commit(hub: HubServer, adapter: Path, path: str, kind: str) -> None:
    push_with_a_fault(hub, adapter, kind, path)


@pytest.mark.transport("lfs")
@pytest.mark.parametrize("kind", ["status", "lost"])
@pytest.mark.parametrize("path", ["batch", CONTENT, "verify"])
def test_fault_of_an_upload_by_lfs(hub: HubServer, adapter: Path, path: str, kind: str) -> None:
    push_with_a_fault(hub, adapter, kind, path)


@pytest.mark.transport("xet")
@pytest.mark.parametrize("kind", ["status", "lost"])
@pytest.mark.parametrize("path", ["xet-write-token", "v1/xorbs", "v2/shards"])
def test_fault_of_an_upload_by_xet(hub: HubServer, adapter: Path, path: str, kind: str) -> None:
    push_with_a_fault(hub, adapter, kind, path)


def test_conflict(birds: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else commits between our look and our commit."""
    other = contents(2)
    answer = birds.hub.application

    def interfere(request):  # type: ignore[no-untyped-def]
        if "/commit/" in request.target:
            birds.add(BIRDS, other)
        return answer(request)

    write_adapter(adapter, contents(1))
    monkeypatch.setattr(birds.hub, "application", interfere)
    with pytest.raises(
        HubError, match=r"somebody else changed main meanwhile \(.* became .*\), and nothing of yours was"
    ):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert birds.file(BIRDS, MODEL) == other[MODEL]
    assert len(birds.requests("POST", "/commit/")) == 1


def test_others_words_do_not_stop_a_push(birds: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody writes the model card and adds a file between our look and our commit: both stay."""
    answer, theirs = birds.hub.application, {CARD: b"their words\n", "notes.txt": b"theirs"}

    def interfere(request):  # type: ignore[no-untyped-def]
        if "/commit/" in request.target and len(birds.requests("POST", "/commit/")) == 1:
            birds.add(BIRDS, theirs)
        return answer(request)

    write_adapter(adapter, contents(1))
    monkeypatch.setattr(birds.hub, "application", interfere)
    pushed = push(adapter, BIRDS, token=WRITE_TOKEN)
    assert birds.file(BIRDS, MODEL, str(pushed.commit)) == contents(1)[MODEL]
    assert birds.file(BIRDS, CARD).startswith(b"---\n")
    assert b"their words" in birds.file(BIRDS, CARD)
    assert birds.file(BIRDS, "notes.txt") == b"theirs"
    assert len(birds.requests("POST", "/commit/")) == 2


@pytest.mark.parametrize("kind", ["lost", "drop"])
def test_lost_pull_request_is_not_opened_twice(birds: HubServer, adapter: Path, kind: str) -> None:
    push(write_adapter(adapter, contents(2)), BIRDS, create_pr=True, token=WRITE_TOKEN)
    write_adapter(adapter, contents(1))
    birds.fail(kind, "POST", "/commit/")
    pushed = push(adapter, BIRDS, create_pr=True, token=WRITE_TOKEN)
    assert birds.repositories[BIRDS].git.refs("refs/pr")["2"] == pushed.commit
    assert len(birds.repositories[BIRDS].git.refs("refs/pr")) == 2
    assert pushed.url.endswith("/alice/birds/discussions/2")


def test_racing_pushes(birds: HubServer, tmp_path: Path) -> None:
    """Every push either lands whole or says that it did not."""
    adapters = [write_adapter(tmp_path / str(seed), contents(seed)) for seed in range(1, 5)]

    with ThreadPoolExecutor(4) as pool:
        attempts = [pool.submit(push, adapter, BIRDS, token=WRITE_TOKEN) for adapter in adapters]
    failed = [attempt.exception() for attempt in attempts if attempt.exception()]
    assert [str(error) for error in failed if "somebody else changed main meanwhile" not in str(error)] == []
    landed = [str(attempt.result().commit) for attempt in attempts if not attempt.exception()]
    git = birds.repositories[BIRDS].git
    assert landed
    assert set(git.history(birds.repositories[BIRDS].head("main"))) >= set(landed)
    assert len(git.history(birds.repositories[BIRDS].head("main"))) == 2 + len(landed)
    assert read_folder(pull(BIRDS).path)[CONFIG] in [contents(seed)[CONFIG] for seed in range(1, 5)]


def test_store_refuses(birds: HubServer, adapter: Path) -> None:
    write_adapter(adapter, contents(1))
    for method, path in (("PUT", CONTENT), ("POST", "store:/v1/xorbs")):
        birds.fail("status", method, path, times=9, status=400, message="no space")
    words = {"lfs": r"127\.0\.0\.1 answered 400 \(no space\)", "xet": ""}
    with pytest.raises(HubError, match=f"cannot push to alice/birds: {words[birds.transport]}"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert birds.file(BIRDS, MODEL) == contents()[MODEL]
