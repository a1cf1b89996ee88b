"""Names, rights, logins and the network: the right class, and words that say what to do."""

import importlib
import logging
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import errors, get_session

from maskpack.errors import AdapterError, HubError, MaskpackError
from maskpack.hub.client import Session
from maskpack.hub.pull import pull
from maskpack.hub.push import push
from maskpack.hub.reference import Reference

from .helpers_hub import CARD, CONFIG, MODEL, contents, write_adapter
from .helpers_hub_fixtures import BIRDS, NoWaiting
from .helpers_hub_fixtures import adapter as adapter
from .helpers_hub_fixtures import birds as birds
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer


# names, revisions, rights
def test_no_such_repository(hub: HubServer) -> None:
    words = r"cannot pull alice/typo: 127\.0\.0\.1 has no such repository, or it is private and you are not logged in"
    with pytest.raises(AdapterError, match=words):
        pull("alice/typo")
    with pytest.raises(AdapterError, match="private and your token's account may not see it; check the name"):
        pull("alice/typo", token=WRITE_TOKEN)
    with pytest.raises(AdapterError, match="no such repository"):
        pull("alice/typo@" + "a" * 40)


def test_private_repository(hub: HubServer) -> None:
    hub.add(BIRDS, contents(), private=True)
    with pytest.raises(AdapterError, match=r"log in with `hf auth login` or set HF_TOKEN"):
        pull(BIRDS)
    with pytest.raises(AdapterError, match="may not see it"):
        pull(BIRDS, token=STRANGER_TOKEN)
    assert pull(BIRDS, token=READ_TOKEN).repo_id == BIRDS


def test_no_such_revision(birds: HubServer, adapter: Path) -> None:
    words = "cannot pull alice/birds@v9: alice/birds has no revision 'v9'; give a branch, tag or commit"
    with pytest.raises(AdapterError, match=words):
        pull("alice/birds@v9")
    with pytest.raises(AdapterError, match="has no revision"):
        pull(BIRDS, revision="a" * 40)
    with pytest.raises(AdapterError, match="has no revision 'refs/pr/7'"):
        push(adapter, BIRDS, revision="refs/pr/7", token=WRITE_TOKEN)


def test_no_adapter_there(hub: HubServer) -> None:
    hub.add(BIRDS, {"model.safetensors": b"x"})
    words = r"is no maskpack adapter: it lacks maskpack_model\.safetensors and maskpack_config\.json"
    with pytest.raises(AdapterError, match=words):
        pull(BIRDS)
    hub.add(BIRDS, {MODEL: b"x", f"{CONFIG}/deep": b"x"})
    with pytest.raises(AdapterError, match=r"it lacks maskpack_config\.json"):
        pull(BIRDS)


@pytest.mark.parametrize("token", [False, STRANGER_TOKEN])
def test_gated(birds: HubServer, token: str | bool) -> None:
    birds.repositories[BIRDS].gated = "manual"
    with pytest.raises(HubError, match=rf"open {birds.endpoint}/alice/birds, accept it, log in with `hf auth login`"):
        pull(BIRDS, token=token)


def test_disabled(birds: HubServer) -> None:
    birds.repositories[BIRDS].disabled = True
    with pytest.raises(HubError, match="access to it was disabled on the Hub; ask its owner"):
        pull(BIRDS)


def test_login_and_rights(birds: HubServer, adapter: Path) -> None:
    with pytest.raises(HubError, match=r"the token is refused \(Invalid credentials .*\); log in with `hf auth login`"):
        pull(BIRDS, token="hf_expiredToken")
    with pytest.raises(HubError, match="cannot push to alice/new: this needs a login; log in with"):
        push(adapter, "alice/new", token=False)
    with pytest.raises(HubError, match="this needs a login; log in with `hf auth login` or set HF_TOKEN"):
        push(adapter, "alice/new", token=True)
    for token in (READ_TOKEN, STRANGER_TOKEN):
        with pytest.raises(HubError, match=r"not allowed \(You don't have the rights .*\); use a token that may write"):
            push(adapter, "alice/new", token=token)
        with pytest.raises(HubError, match=r"not allowed \(You don't have the rights to write to this repository\)"):
            push(write_adapter(adapter, contents(1)), BIRDS, token=token)


def test_refused_card(hub: HubServer, adapter: Path) -> None:
    hub.add(BIRDS, {CARD: b"---\nlicense: free as a bird\n---\n"})
    words = r'the Hub refuses the model card \(Invalid metadata .*"license" must be one of .*\); correct README\.md'
    with pytest.raises(HubError, match=words):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert not hub.requests("POST", "/preupload/")


def test_no_hub(birds: HubServer) -> None:
    birds.fail("status", "HEAD", "/resolve/", status=200)
    with pytest.raises(HubError, match=r"127\.0\.0\.1 does not answer like a Hub; check HF_ENDPOINT, firewall and pr"):
        pull(BIRDS)


def test_file_that_is_gone_after_all(birds: HubServer) -> None:
    birds.fail("status", "HEAD", "/resolve/", status=404, code="EntryNotFound")
    with pytest.raises(AdapterError, match="cannot pull alice/birds: a file that it listed is missing there; try"):
        pull(BIRDS)


def test_name_that_only_the_client_refuses(hub: HubServer) -> None:
    reference = Reference("alice/na--me")  # no such name gets past our own check
    session = Session(f"pull {reference}", False, reference)
    with pytest.raises(AdapterError, match="cannot pull alice/na--me: the Hub accepts no such name; expected user/na"):
        session.call(lambda: session.api.model_info(str(reference.repo_id)))
    assert hub.log == []


def test_branch_that_does_not_appear(birds: HubServer, adapter: Path) -> None:
    birds.fail("status", "POST", "/branch/", status=200, message="done")
    with pytest.raises(HubError, match="the Hub does not say what dev points to; try again"):
        push(adapter, BIRDS, revision="dev", token=WRITE_TOKEN)
    assert not birds.requests("POST", "/commit/")


def test_conflict_without_another_commit(birds: HubServer, adapter: Path) -> None:
    birds.fail("status", "POST", "/commit/", status=409, message="locked")
    words = r"cannot push to alice/birds: somebody else changed it meanwhile \(locked\); pull, look, and try again"
    with pytest.raises(HubError, match=words):
        push(write_adapter(adapter, contents(1)), BIRDS, token=WRITE_TOKEN)


# this machine
def test_cache_that_cannot_be_written(birds: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HubError, match=r"Not a directory \(.*file.*\); check space and permissions of the cache"):
        pull(BIRDS, cache_dir=tmp_path / "file/cache")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_file_that_cannot_be_read(adapter: Path) -> None:
    (adapter / MODEL).unlink()
    (adapter / MODEL).symlink_to("/proc/self/mem")
    with pytest.raises(
        AdapterError, match=r"cannot read .*maskpack_model\.safetensors: .*; check the path and its permissions"
    ):
        pull(adapter)


# offline
def test_offline(birds: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"not in the cache and the Hub may not be asked; go online \(unset HF_HUB_OFFLINE\) once"
    with pytest.raises(HubError, match=words):
        pull(BIRDS, local_files_only=True)
    with pytest.raises(HubError, match=r"commit aaaaaaaaaaaa: it is not in the cache"):
        pull(BIRDS, revision="a" * 40, local_files_only=True)
    commit = pull(BIRDS).commit
    birds.add(BIRDS, contents(1))
    birds.log.clear()
    assert pull(BIRDS, local_files_only=True).commit == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(BIRDS).commit == commit
    with pytest.raises(HubError, match=words):
        pull("alice/fish")
    assert birds.log == []


def test_offline_push(hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot push to alice/birds: .*the Hub may not be asked"):
        push(adapter, BIRDS, token=WRITE_TOKEN)


def test_server_is_gone(birds: HubServer, adapter: Path, waits: NoWaiting) -> None:
    commit = pull(BIRDS).commit
    birds.stop()
    assert pull(BIRDS).commit == commit
    with pytest.raises(
        HubError, match=r"127\.0\.0\.1 cannot be reached \(.*refused.*\); check network, proxy and HF_EN"
    ):
        pull("alice/fish")
    with pytest.raises(HubError, match=r"cannot push to alice/birds: 127\.0\.0\.1 cannot be reached"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert waits.slept == [1, 2]  # what was just tried in vain is not tried again


# whatever the client raises
def _raised() -> list[Exception]:
    """Every error class of the client and of its HTTP library, and what else its calls were seen to raise."""
    http = importlib.import_module(get_session().__class__.__module__.partition(".")[0])
    kinds = [*vars(errors).values(), *vars(http).values(), RuntimeError, OSError, KeyError, TimeoutError, EOFError]
    found = []
    for kind in {one for one in kinds if isinstance(one, type) and issubclass(one, Exception)}:
        error = kind.__new__(kind)  # some want a response or a request, which not every one of them gets
        error.args = ("it went wrong",)
        found.append(error)
    return found


def test_every_error_of_the_client_becomes_ours(hub: HubServer) -> None:
    raised = _raised()
    assert len(raised) > 40
    for error in raised:

        def act(error: Exception = error) -> None:
            raise error

        with pytest.raises(MaskpackError, match=r"^cannot pull alice/birds: .{20}"):
            Session("pull alice/birds", False, Reference("alice/birds")).call(act)


# secrets
def test_token_appears_nowhere(
    birds: HubServer, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        push(write_adapter(adapter, contents(1)), BIRDS, token=WRITE_TOKEN)
        pull(BIRDS, token=WRITE_TOKEN, output=tmp_path / "copy")
    assert WRITE_TOKEN not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if WRITE_TOKEN.encode() in path.read_bytes()] == []
    assert birds.requests("PUT" if birds.transport == "lfs" else "POST", "store:")
    assert WRITE_TOKEN not in birds.log_text()
    odd = "secretWithoutPrefix"
    birds.fail("status", "GET", "/api/models", status=400, message=f"refused {WRITE_TOKEN} and {odd}")
    with pytest.raises(HubError) as caught:
        pull(BIRDS, token=odd)
    assert str(caught.value).endswith(r"answered 400 (refused hf_*** and ***)")
    assert caught.value.__cause__ is None  # the client's error quotes them, so no traceback may print it
    assert caught.value.__suppress_context__
    birds.log.clear()
    for bad in ("with\nline", "", "hf_ö"):
        with pytest.raises(
            HubError, match=r"cannot pull alice/birds: the token is empty or holds spaces, line ends or"
        ):
            pull(BIRDS, token=bad)
    assert birds.log == []
