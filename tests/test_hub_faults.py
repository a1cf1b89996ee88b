"""Faults on the way: damaged bytes are noticed, passing faults waited for, and a push happens once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskpack.adapter import read
from maskpack.errors import AdapterError, CorruptAdapterError, HubError, HubUnreachableError
from maskpack.hub import folder as folder_module
from maskpack.hub import pull, push

from .hub_adapters import CARD, CONFIG, MODEL, contents, read_folder, size, write_adapter
from .hub_fixtures import BIRDS, CONTENT, NoWaiting
from .hub_fixtures import adapter as adapter
from .hub_fixtures import birds as birds
from .hub_fixtures import hub as hub
from .hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .hub_fixtures import waits as waits
from .hub_server import WRITE_TOKEN, HubServer


def sent_contents(server: HubServer) -> list[str]:
    """The requests for a large file's bytes."""
    return [line for line in server.requests("GET", "store:") if CONTENT in line]


# bytes that are not what they should be
def test_flipped_bit_is_fetched_again(birds: HubServer) -> None:
    birds.fail("corrupt", "GET", CONTENT)
    assert read_folder(pull(BIRDS).path)[MODEL] == contents()[MODEL]
    assert len(sent_contents(birds)) == 2


@pytest.mark.parametrize(("path", "name"), [(CONTENT, MODEL), (CONFIG, CONFIG)])
def test_flipped_bit_twice(birds: HubServer, path: str, name: str) -> None:
    birds.fail("corrupt", "GET", path, times=2)
    with pytest.raises(CorruptAdapterError, match=f"{name} of alice/birds@.* arrived twice with other bytes"):
        pull(BIRDS)
    assert len([line for line in birds.requests("GET") if path in line]) == 2


def test_damaged_cache_is_repaired_or_named(birds: HubServer) -> None:
    found = pull(BIRDS)
    (found.path / MODEL).resolve().write_bytes(b"\0" * size())
    words = rf"maskpack_model\.safetensors has {size()} bytes and states a header of 0"
    with pytest.raises(CorruptAdapterError, match=words):
        pull(BIRDS, local_files_only=True)
    assert read_folder(pull(BIRDS, revision=found.commit).path)[MODEL] == contents()[MODEL]


def test_record_that_does_not_fit(hub: HubServer) -> None:
    hub.add(BIRDS, contents() | {CONFIG: contents(1)[CONFIG]})
    with pytest.raises(
        CorruptAdapterError, match=r"one of them was replaced; fetch both again, tell their owner, or delete"
    ):
        pull(BIRDS)
    assert len(sent_contents(hub)) == 1


def test_shortened_download(birds: HubServer) -> None:
    birds.fail("short", "GET", CONTENT)
    assert read_folder(pull(BIRDS).path)[MODEL] == contents()[MODEL]
    birds.add(BIRDS, contents(1))
    birds.fail("short", "GET", CONTENT, times=99)
    words = {"lfs": "a download ended before the file was whole; try again", "xet": ""}
    with pytest.raises(HubError, match=f"cannot pull alice/birds: {words[birds.transport]}"):
        pull(BIRDS)


def test_too_large_is_not_fetched(birds: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folder_module.LIMITS, MODEL, size() - 1)
    words = f"safetensors of alice/birds@.* has {size()} bytes; at most {size() - 1} are accepted"
    with pytest.raises(AdapterError, match=words):
        pull(BIRDS)
    assert not birds.requests(path="/resolve/")


def test_too_large_here(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_MODEL", size() - 1)
    for path in (adapter, adapter / MODEL):
        with pytest.raises(AdapterError, match=f"has {size()} bytes; at most {size() - 1} are accepted; fetch it aga"):
            pull(path)


# faults that pass
@pytest.mark.parametrize("kind", ["status", "drop"])
@pytest.mark.parametrize("path", ["hub:/api/models/alice/birds$", "paths-info", "/resolve/", "store:", CONTENT])
def test_passing_fault_is_waited_for(birds: HubServer, kind: str, path: str) -> None:
    for method in ("GET", "POST", "HEAD"):
        birds.fail(kind, method, path)
    assert read_folder(pull(BIRDS).path) == contents()


@pytest.mark.parametrize("kind", ["close", "reset"])
def test_broken_body_is_fetched_again(hub: HubServer, kind: str) -> None:
    large = contents(weights=16_000_000)
    assert len(large[MODEL]) > 2_000_000
    hub.add(BIRDS, large)
    hub.fail(kind, "GET", CONTENT)
    assert read_folder(pull(BIRDS).path)[MODEL] == large[MODEL]


def test_lasting_fault(birds: HubServer, waits: NoWaiting) -> None:
    birds.fail("status", "POST", "paths-info", times=99, message="maintenance")
    with pytest.raises(HubError, match=r"127\.0\.0\.1 answered 503 \(maintenance\), also when asked again; try later"):
        pull(BIRDS)
    assert waits.slept == [1, 2, 4, 8]
    birds.fail("reset", "GET", CONTENT, times=99)
    birds.faults.rules[0].times = 0
    words = {"lfs": r"the connection to 127\.0\.0\.1 broke \(Re\w+Error.*\); try again", "xet": ""}
    with pytest.raises(HubError, match=f"cannot pull alice/birds: {words[birds.transport]}"):
        pull(BIRDS)


def test_server_says_how_long_to_wait(birds: HubServer, waits: NoWaiting) -> None:
    birds.fail("status", "POST", "paths-info", status=429, headers={"Retry-After": "7"})
    pull(BIRDS)
    assert waits.slept == [7]
    birds.add(BIRDS, contents(1))
    birds.fail("status", "POST", "paths-info", status=429, headers={"Retry-After": "900"}, times=9)
    with pytest.raises(HubError, match=r"too many requests .*wait 900 seconds and try again"):
        pull(BIRDS)
    assert waits.slept == [7]
    birds.faults.rules.clear()
    birds.fail("status", "POST", "paths-info", status=429, times=9)
    with pytest.raises(HubError, match=r"too many requests .*wait some minutes and try again"):
        pull(BIRDS)


def test_other_answers(birds: HubServer) -> None:
    birds.fail("status", "POST", "paths-info", status=400, message="no such thing")
    with pytest.raises(HubError, match=r"127\.0\.0\.1 answered 400 \(no such thing\)"):
        pull(BIRDS)
    birds.fail("status", "POST", "paths-info", status=200, message="not what was asked for")
    with pytest.raises(
        HubError, match=r"127\.0\.0\.1 does not answer like a Hub \(TypeError: .*\); check HF_ENDPOINT and proxy"
    ):
        pull(BIRDS)
    birds.fail("short", "POST", "paths-info")
    pull(BIRDS)
    birds.add(BIRDS, contents(1))
    birds.fail("short", "POST", "paths-info", times=99)
    with pytest.raises(HubUnreachableError, match=r"does not answer like a Hub; check HF_ENDPOINT, firewall and proxy"):
        pull(BIRDS)


# a push happens once
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
