"""Signed adapters on the Hub: pushed with a counter, pulled by trusted keys, and never older than before."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from maskpack import load_adapter
from maskpack.adapter.signature import public_keys, sign_adapter, statement_in
from maskpack.errors import AdapterError, HubError, SignatureError, StateError
from maskpack.hub.cache import remember
from maskpack.hub.client import Session
from maskpack.hub.pull import pull
from maskpack.hub.push import push

from .helpers_hub import CARD, CONFIG, MODEL, NAMES, contents, read_folder, saved, write_adapter
from .helpers_hub_fixtures import BIRDS, NoWaiting
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer
from .helpers_signing import SIGNATURE, write_key

pytestmark = pytest.mark.transport("lfs")


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path / "keys", "alice")


def counter(hub: HubServer, repo_id: str = BIRDS) -> int:
    return statement_in(SIGNATURE, hub.file(repo_id, SIGNATURE)).counter


def publish(folder: Path, seed: int, private: Path, ref: str = BIRDS) -> str:
    """Push another version, signed, and return its commit."""
    return str(push(write_adapter(folder, contents(seed)), ref, sign=private, token=WRITE_TOKEN).commit)


def test_push_and_pull(hub: HubServer, adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = key
    first = publish(adapter, 0, private)
    (id_,) = public_keys(public)
    found = pull(BIRDS, require_signature=public, output=tmp_path / "copy")
    assert found.signed_by == (id_,)
    assert set(read_folder(tmp_path / "copy")) == {*NAMES, SIGNATURE}
    assert pull(tmp_path / "copy", require_signature=public).signed_by == (id_,)
    assert load_adapter(found.pinned, require_signature=public, local_files_only=True)
    # what is there already is not signed again
    assert push(adapter, BIRDS, sign=private, token=WRITE_TOKEN).unchanged
    assert push(adapter, BIRDS, token=WRITE_TOKEN).unchanged
    # another card is another commit of the same signed adapter
    Session("card", WRITE_TOKEN).api.upload_file(
        path_or_fileobj=hub.file(BIRDS, CARD) + b"\nMy own words.\n", path_in_repo=CARD, repo_id=BIRDS
    )
    pushed = push(adapter, BIRDS, sign=private, license="mit", token=WRITE_TOKEN)
    assert (set(pushed.files), counter(hub)) == ({CARD}, 1)
    assert b"My own words." in hub.file(BIRDS, CARD)
    assert pull(BIRDS, require_signature=public).commit == pushed.commit != first
    # each other version has the next counter
    for version in (2, 3):
        publish(adapter, version, private)
        assert counter(hub) == version
        assert pull(BIRDS, require_signature=public).signed_by == (id_,)
    dry = push(write_adapter(adapter, contents(9)), BIRDS, sign=private, dry_run=True, token=WRITE_TOKEN)
    assert SIGNATURE in dry.files
    assert counter(hub) == 3


def test_older_version(hub: HubServer, adapter: Path, key: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    private, public = key
    first, second = (publish(adapter, seed, private) for seed in range(2))
    old = {name: hub.file(BIRDS, name, first) for name in (*NAMES, SIGNATURE)}
    assert pull(BIRDS, require_signature=public).commit == second
    again = hub.add(BIRDS, old)
    with pytest.raises(SignatureError, match=f"version 1 now, and 2 was seen .*{BIRDS}@{again}"):
        pull(BIRDS, require_signature=public)
    assert pull(BIRDS).commit == again  # nobody asked for a signature
    # what a reference names itself may be old, and does not make the newer one forgotten
    for commit in (first, again):
        assert pull(f"{BIRDS}@{commit}", require_signature=public).commit == commit
    with pytest.raises(SignatureError, match="version 1 now"):
        pull(BIRDS, require_signature=public)
    with pytest.raises(SignatureError, match="version 1 now"):
        pull(BIRDS, require_signature=public, local_files_only=True)
    # other branches and tags are other names
    Session("tag", WRITE_TOKEN).api.create_tag(BIRDS, tag="v1", revision=first)
    assert pull(f"{BIRDS}@v1", require_signature=public).commit == first
    # who signs knows the counter, whatever the repository says now
    publish(adapter, 2, private)
    assert counter(hub) == 3
    assert pull(BIRDS, require_signature=public).signed_by


def test_older_version_by_another_trusted_key(
    hub: HubServer, adapter: Path, key: tuple[Path, Path], tmp_path: Path
) -> None:
    new, _ = write_key(tmp_path / "keys", "new")
    trusted = tmp_path / "trusted"
    trusted.mkdir()
    for public in (tmp_path / "keys").glob("*.pem"):
        if "private" not in public.name:
            shutil.copy(public, trusted)
    first = publish(adapter, 0, key[0])
    pull(BIRDS, require_signature=trusted)
    with pytest.raises(SignatureError, match="cannot be believed"):  # of a key that is not ours
        publish(adapter, 1, new)
    push(adapter, BIRDS, sign=[key[0], new], token=WRITE_TOKEN)  # one version by both, then by the new one alone
    publish(adapter, 2, new)
    assert counter(hub) == 3
    pull(BIRDS, require_signature=trusted)
    hub.add(BIRDS, {name: hub.file(BIRDS, name, first) for name in (*NAMES, SIGNATURE)})
    with pytest.raises(SignatureError, match="and 3 was seen"):
        pull(BIRDS, require_signature=trusted)
    (trusted / "new.pem").unlink()  # what a key signed that is not trusted any more does not count
    with pytest.raises(SignatureError, match="and 2 was seen"):
        pull(BIRDS, require_signature=trusted)


def test_what_is_not_signed_for_this(
    hub: HubServer, adapter: Path, key: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(adapter, 0, key[0])
    files = {name: hub.file(BIRDS, name) for name in (*NAMES, SIGNATURE)}
    other = write_key(tmp_path / "keys", "mallory")
    hub.add("mallory/birds", files)
    hub.add("mallory/unsigned", contents())
    hub.add("mallory/none", files | {SIGNATURE: b""})
    hub.add("mallory/huge", files | {SIGNATURE: files[SIGNATURE] + b" " * (64 << 10)})
    hub.add("mallory/other", contents(1) | {SIGNATURE: files[SIGNATURE]})
    hub.add("mallory/config", files | {CONFIG: files[CONFIG] + b"\n"})
    publish(tmp_path / "theirs", 1, other[0], "alice/theirs")
    for repo_id, words in (
        ("mallory/birds", "signed for alice/birds, and this is mallory/birds"),
        ("mallory/unsigned", "not signed"),
        ("mallory/none", "is no signature"),
        ("mallory/huge", "at most 65536"),
        ("mallory/other", f"{MODEL}: changed"),
        ("mallory/config", f"{CONFIG}: changed"),
        ("alice/theirs", "none of the trusted keys"),
    ):
        for _ in range(2):  # the second time from the cache
            with pytest.raises(AdapterError, match=words):
                pull(repo_id, require_signature=key[1], output=tmp_path / "out")
            with monkeypatch.context() as patch:
                patch.setenv("MASKPACK_REQUIRE_SIGNATURE", str(key[1]))
                with pytest.raises(AdapterError, match=words):
                    load_adapter(repo_id)
        assert not (tmp_path / "out").exists()
    assert pull("mallory/birds").signed_by == ()
    any_ = write_adapter(tmp_path / "any", contents())
    sign_adapter(any_, key[0])
    hub.add("bob/any", read_folder(any_))
    assert pull("bob/any", require_signature=key[1]).signed_by


def test_files_that_nobody_asked_for(hub: HubServer, adapter: Path, key: tuple[Path, Path], tmp_path: Path) -> None:
    publish(adapter, 0, key[0])
    hub.add(BIRDS, {name: hub.file(BIRDS, name) for name in (*NAMES, SIGNATURE)} | {"model.safetensors": b"planted"})
    pull(BIRDS, require_signature=key[1], output=tmp_path / "copy")
    assert set(read_folder(tmp_path / "copy")) == {*NAMES, SIGNATURE}


def test_damage_in_the_cache_is_repaired(hub: HubServer, adapter: Path, key: tuple[Path, Path]) -> None:
    publish(adapter, 0, key[0])
    path = pull(BIRDS, require_signature=key[1]).path / SIGNATURE
    content = path.read_bytes()
    path.resolve().write_bytes(content.replace(b"a", b"b"))
    with pytest.raises(SignatureError):
        pull(BIRDS, require_signature=key[1], local_files_only=True)
    assert pull(BIRDS, require_signature=key[1]).signed_by
    assert path.read_bytes() == content
    path.unlink()  # as a cache of an older release
    assert pull(BIRDS, local_files_only=True)
    with pytest.raises(SignatureError, match="not signed"):
        pull(BIRDS, require_signature=key[1], local_files_only=True)
    assert pull(BIRDS, require_signature=key[1]).signed_by


def test_offline(hub: HubServer, adapter: Path, key: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    commit = publish(adapter, 0, key[0])
    with pytest.raises(HubError, match="not in the cache"):
        pull(BIRDS, require_signature=key[1], local_files_only=True)
    pull(BIRDS, require_signature=key[1])
    hub.stop()
    assert pull(BIRDS, require_signature=key[1], local_files_only=True).commit == commit
    assert pull(BIRDS, require_signature=key[1]).commit == commit


def test_memory_that_cannot_be_used(
    hub: HubServer,
    adapter: Path,
    key: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(adapter, 0, key[0])
    memory = Path(constants.HF_HOME) / "maskpack_counters.json"
    (id_,) = public_keys(key[1])
    assert json.loads(memory.read_text()) == {id_: {f"{BIRDS}@main": 1}}
    for damaged in ("", "[]", '{"x": 5}', '{"x": {"y": "z"}}', '{"x": {"y": 1}, "x": {}}'):
        memory.write_text(damaged)
        with pytest.raises(StateError, match=r"maskpack_counters\.json.*delete it"):
            pull(BIRDS, require_signature=key[1])
    pull(BIRDS)  # looks at no signature
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))  # where nothing can be written
    with caplog.at_level(logging.WARNING, "maskpack"):
        assert pull(BIRDS, require_signature=key[1]).signed_by
    assert f"cannot remember that {BIRDS}@main is at the signed version 1" in caplog.text


def test_remembering_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))

    def count(number: int) -> None:
        for counter in range(1, 11):
            remember(["k" * 64], f"a/{number}@main", counter)
            remember(["k"], "a/b@main", 11 - counter)

    with ThreadPoolExecutor(4) as pool:  # each call has a lock of its own, as in processes
        list(pool.map(count, range(4)))
    found = json.loads((tmp_path / "maskpack_counters.json").read_text())
    assert found == {"k" * 64: {f"a/{number}@main": 10 for number in range(4)}, "k": {"a/b@main": 10}}


# push
def test_signature_of_the_folder_goes_with_it(hub: HubServer, adapter: Path, key: tuple[Path, Path]) -> None:
    sign_adapter(adapter, key[0], repository=BIRDS, counter=4)
    assert SIGNATURE in push(adapter, BIRDS, token=WRITE_TOKEN).files
    assert counter(hub) == 4
    assert pull(BIRDS, require_signature=key[1]).signed_by
    with pytest.raises(SignatureError, match=f"is for {BIRDS}, and this is alice/boats"):
        push(adapter, "alice/boats", token=WRITE_TOKEN)
    write_adapter(adapter, contents(1))
    with pytest.raises(SignatureError, match="is not of these files"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    sign_adapter(adapter, key[0], repository=BIRDS, counter=4)
    with pytest.raises(SignatureError, match="has the counter 4, and the version there has 4"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    (adapter / SIGNATURE).write_bytes(b"{}")
    with pytest.raises(SignatureError, match="is no signature"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    (adapter / SIGNATURE).unlink()
    with pytest.raises(SignatureError, match="is signed, and "):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert counter(hub) == 4
    assert [line.split()[0] for line in hub.requests("POST", "/commit/")] == ["POST"]
    push(adapter, BIRDS, sign=key[0], token=WRITE_TOKEN)
    assert counter(hub) == 5


@pytest.mark.parametrize("kind", ["lost", "status", "drop"])
def test_fault_of_the_commit(
    hub: HubServer, adapter: Path, key: tuple[Path, Path], waits: NoWaiting, kind: str
) -> None:
    publish(adapter, 0, key[0])
    hub.fail(kind, "POST", "/commit/")
    commit = publish(adapter, 1, key[0])
    assert counter(hub) == 2
    assert pull(BIRDS, require_signature=key[1]).commit == commit
    assert len(hub.repositories[BIRDS].git.refs("refs/heads")) == 1


def test_pull_request(hub: HubServer, adapter: Path, key: tuple[Path, Path]) -> None:
    publish(adapter, 0, key[0])
    write_adapter(adapter, saved(1))
    hub.fail("lost", "POST", "/commit/")
    push(adapter, BIRDS, sign=key[0], create_pr=True, token=WRITE_TOKEN)
    assert counter(hub) == 1
    assert pull(f"{BIRDS}@refs/pr/1", require_signature=key[1]).signed_by
    with pytest.raises(AdapterError):
        pull(f"{BIRDS}@refs/pr/2")
