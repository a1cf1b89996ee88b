"""What a pull and a push promise: pinned, read once, checked before anything is sent, and hints for wrong names."""

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import get_session

from maskpack.errors import AdapterError, ConfigError, HubError, HubUnreachableError
from maskpack.hub.client import Session
from maskpack.hub.pull import pull
from maskpack.hub.push import push
from maskpack.network import CONNECT, SILENCE

from .helpers_hub import CARD, CONFIG, MODEL, NAMES, contents, read_folder, saved, write_adapter
from .helpers_hub_fixtures import BIRDS, NoWaiting
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer

opened: list[str] | None = None


def _remember(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(Path(str(arguments[0])).name)


sys.addaudithook(_remember)


@pytest.fixture
def opens() -> Iterator[list[str]]:
    """Names of all files that this process opens, from the moment that the list is asked for."""
    global opened
    opened = []
    yield opened
    opened = None


# a pull is pinned and read once
def test_every_file_is_opened_once(birds: HubServer, adapter: Path, tmp_path: Path, opens: list[str]) -> None:
    birds.add(BIRDS, saved())
    commit = pull(BIRDS).commit
    blobs = {path.readlink().name for path in pull(BIRDS).path.iterdir()}
    for number, ref in enumerate((f"{BIRDS}@{commit}", adapter)):
        opens.clear()
        pull(ref, output=tmp_path / f"copy-{number}")
        names = [name for name in opens if name in NAMES or name in blobs]
        assert sorted(names) == sorted(set(names))
        assert MODEL in names


def test_what_moves_is_refused_where_a_revision_is_required(birds: HubServer) -> None:
    commit = pull(BIRDS).commit or ""
    Session("tag", WRITE_TOKEN).api.create_tag(BIRDS, tag="v1")
    words = r"alice/birds names no revision, and one is required; give a tag or commit, as `mask"
    with pytest.raises(AdapterError, match=words):
        pull(BIRDS, require_revision=True)
    for name in ("main", "refs/pr/1", "v2"):
        with pytest.raises(AdapterError, match=f"alice/birds@{name} is no tag and no commit, so it can change"):
            pull(f"{BIRDS}@{name}", require_revision=True)
    assert pull(f"{BIRDS}@v1", require_revision=True).commit == commit
    Session("branch", WRITE_TOKEN).api.create_branch(BIRDS, branch="v1")  # a name that means two things
    with pytest.raises(AdapterError, match="alice/birds@v1 is no tag"):
        pull(f"{BIRDS}@v1", require_revision=True)
    with pytest.raises(AdapterError, match="may be a branch, and the Hub may not be asked"):
        pull(f"{BIRDS}@main", require_revision=True, local_files_only=True)
    birds.stop()
    pulled = pull(f"{BIRDS}@{commit}", require_revision=True)
    assert pulled.pinned == f"{BIRDS}@{commit}"


def test_hub_that_is_down_means_the_known_commit(birds: HubServer, caplog: pytest.LogCaptureFixture) -> None:
    commit = pull(BIRDS).commit
    birds.add(BIRDS, contents(1))
    birds.fail("status", "GET", "/api/models", times=99)
    with caplog.at_level(logging.WARNING, "maskpack"):
        assert pull(BIRDS).commit == commit
    assert f"answered 503 (injected fault), also when asked again; try later; going on with commit {commit}" in (
        caplog.text
    )
    with pytest.raises(HubUnreachableError, match="cannot pull alice/birds@dev: .* answered 503"):
        pull(f"{BIRDS}@dev")
    birds.faults.rules.clear()
    birds.fail("status", "GET", "/api/models", status=401, times=99)
    with pytest.raises(HubError, match="this needs a login"):  # a refusal is an answer
        pull(BIRDS)


def test_entry_that_leads_out_of_the_cache(birds: HubServer, tmp_path: Path) -> None:
    pulled = pull(BIRDS)
    planted = pulled.path / MODEL
    outside = write_adapter(tmp_path / "elsewhere") / MODEL
    planted.unlink()
    planted.symlink_to(outside)
    with pytest.raises(HubError, match=r"leads out of the cache .*, to .*elsewhere.*; delete that entry and pull agai"):
        pull(pulled.pinned, local_files_only=True)
    assert read_folder(pull(pulled.pinned).path) == contents()
    assert not planted.resolve().is_relative_to(tmp_path / "elsewhere")
    assert outside.read_bytes() == contents()[MODEL]


@pytest.mark.parametrize("planted", [b"../../x", b"\xff\xfe", b""])
def test_spoiled_memory_of_a_branch(birds: HubServer, planted: bytes) -> None:
    pulled = pull(BIRDS)
    (pulled.path.parents[1] / "refs/main").write_bytes(planted)
    with pytest.raises(HubError, match="it is not in the cache and the Hub may not be asked"):
        pull(BIRDS, local_files_only=True)
    assert pull(BIRDS).commit == pulled.commit
    assert pull(BIRDS, local_files_only=True).commit == pulled.commit


def test_silent_server_is_not_waited_for_ever(birds: HubServer) -> None:
    limits: list[dict[str, float | None]] = []

    def ask(timeout: float | None) -> None:
        hook = lambda request: limits.append(dict(request.extensions["timeout"]))  # noqa: E731
        hooks = get_session().event_hooks
        get_session().event_hooks = hooks | {"request": [*hooks["request"], hook]}
        get_session().get(birds.endpoint, timeout=timeout)
        get_session().event_hooks = hooks

    def listed() -> int:
        return len(get_session().event_hooks["request"])

    before = listed()
    for timeout in (None, 90.0, 5.0):  # those that somebody set are kept, if they are shorter
        Session("look", False).call(partial(ask, timeout))
    assert [one["read"] for one in limits] == [SILENCE, SILENCE, 5]
    assert [one["connect"] for one in limits] == [CONNECT, CONNECT, 5]
    assert listed() == before


def test_rate_limit_says_how_long_to_wait(birds: HubServer, waits: NoWaiting, caplog: pytest.LogCaptureFixture) -> None:
    birds.fail("status", "POST", "paths-info", status=429, headers={"RateLimit": '"api";r=0;t=42'})
    pull(BIRDS)
    assert waits.slept == [43]
    assert "the Hub asks to wait 43 seconds before it goes on to pull alice/birds" in caplog.text


# names
def test_nearest_names(birds: HubServer) -> None:
    birds.add("alice/bats", contents())
    with pytest.raises(AdapterError, match=r"has no such repository.*; did you mean alice/birds or alice/bats\?"):
        pull("alice/brids")
    birds.add("team/birds-of-prey", {CARD: b"---\nlibrary_name: maskpack\n---\n"})
    with pytest.raises(AdapterError, match=r"; did you mean team/birds-of-prey\?"):
        pull("tean/birds-of-prey")
    with pytest.raises(AdapterError, match=r"check the name$"):
        pull("nobody/unlike")
    with pytest.raises(AdapterError, match=r"has no revision 'mian'.*; did you mean main\?"):
        pull(f"{BIRDS}@mian")
    birds.fail("status", "GET", "author=", status=500, times=9)
    with pytest.raises(AdapterError, match=r"check the name$"):  # no hint, and no other error
        pull("alice/brids")


# push
def test_dry_run_writes_nothing(hub: HubServer, adapter: Path) -> None:
    pushed = push(adapter, "alice/new", dry_run=True, private=True, token=WRITE_TOKEN)
    assert (pushed.created, pushed.unchanged, pushed.commit) == (True, False, None)
    assert pushed.files.keys() == set(NAMES)
    assert pushed.files[MODEL] == len(contents()[MODEL])
    hub.add(BIRDS, {CARD: b"theirs\n"})
    assert push(adapter, f"{BIRDS}@dev", dry_run=True, token=WRITE_TOKEN).files.keys() == set(NAMES)
    done = push(adapter, BIRDS, token=WRITE_TOKEN)
    again = push(adapter, BIRDS, dry_run=True, token=WRITE_TOKEN)
    assert (again.unchanged, again.commit, again.files) == (True, done.commit, {})
    assert push(adapter, "./registry", dry_run=True).created
    assert not Path("registry").exists()
    assert hub.repositories.keys() == {BIRDS}
    assert list(hub.repositories[BIRDS].git.refs("refs/heads")) == ["main"]
    assert [line.split()[0] for line in hub.requests("POST", "/commit/")] == ["POST"]


def test_tag(birds: HubServer, adapter: Path) -> None:
    write_adapter(adapter, contents(1))
    birds.fail("lost", "POST", "/tag/")
    pushed = push(adapter, BIRDS, tag="v1", token=WRITE_TOKEN)
    assert birds.repositories[BIRDS].git.refs("refs/tags") == {"v1": pushed.commit}
    assert push(adapter, BIRDS, tag="v1", token=WRITE_TOKEN).unchanged
    assert push(adapter, BIRDS, tag="v2", token=WRITE_TOKEN).unchanged
    assert birds.repositories[BIRDS].git.refs("refs/tags") == {"v1": pushed.commit, "v2": pushed.commit}
    write_adapter(adapter, contents(2))
    words = r"alice/birds has a tag 'v1' at commit .* already, and tags are not moved; choose another tag, or delete it"
    with pytest.raises(HubError, match=words):
        push(adapter, BIRDS, tag="v1", token=WRITE_TOKEN)
    assert birds.file(BIRDS, MODEL) == contents(1)[MODEL]
    for bad in ("", "a b", "../x", "a..b"):
        with pytest.raises(ConfigError, match="cannot be a tag: letters, digits"):
            push(adapter, BIRDS, tag=bad, token=WRITE_TOKEN)
    with pytest.raises(ConfigError, match="cannot be tagged before it is merged; leave out the tag 'v3'"):
        push(adapter, BIRDS, tag="v3", create_pr=True, token=WRITE_TOKEN)
    with pytest.raises(ConfigError, match="tag for the local folder"):
        push(adapter, "./registry", tag="v3")


def test_model_file_alone_is_pushed_whole(hub: HubServer, adapter: Path) -> None:
    push(adapter / MODEL, BIRDS, token=WRITE_TOKEN)
    found = read_folder(pull(BIRDS).path)
    assert set(found) == set(NAMES)
    assert found[CONFIG] == contents()[CONFIG]
