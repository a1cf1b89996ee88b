"""Faults on the way of a pull: damaged bytes are noticed, and passing faults waited for."""

from pathlib import Path

import pytest

from maskpack.adapter import read
from maskpack.errors import AdapterError, CorruptAdapterError, HubError, HubUnreachableError
from maskpack.hub import reference as folder_module
from maskpack.hub.pull import pull

from .helpers_hub import CONFIG, MODEL, contents, read_folder, size
from .helpers_hub_fixtures import BIRDS, CONTENT, NoWaiting
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import HubServer


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
