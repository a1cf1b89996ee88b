"""The loopback Hub itself: judged by git, and by the unmodified client, before anything is tested with it."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from huggingface_hub.utils import _http
from packaging.requirements import Requirement
from packaging.version import Version

from .helpers_hub_fixtures import TRANSPORTS
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer

BOTH = pytest.mark.parametrize("hub", TRANSPORTS, indirect=True)
CARD = b"---\nlibrary_name: maskpack\nbase_model: timm/resnet18\nbase_model_relation: adapter\n---\n# Birds\n"


def as_user(token: str | bool = WRITE_TOKEN) -> HfApi:
    return HfApi(token=token)


def commit(api: HfApi, files: dict[str, bytes], **options: Any) -> str:
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    return str(api.create_commit("alice/birds", operations, commit_message="add", **options).oid)


def git(*arguments: object, env: dict[str, str] | None = None) -> str:
    command = ["git", *map(str, arguments)]
    quiet = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "HOME": "/nonexistent", "GIT_LFS_SKIP_SMUDGE": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=quiet | (env or {})).stdout


@BOTH
def test_git_accepts_the_repository_and_clones_the_pointer(hub: HubServer, tmp_path: Path) -> None:
    api = as_user()
    api.create_repo("alice/birds")
    data = os.urandom(10_000)
    commit(
        api, {"m.safetensors": data, "README.md": CARD, "notes/a-b/deep.txt": b"x", "notes/a": b"y", "notes.txt": b""}
    )
    commit(api, {"pr.txt": b"1"}, create_pr=True)
    api.create_branch("alice/birds", branch="dev/one")
    api.create_tag("alice/birds", tag="v1")
    repository = hub.repositories["alice/birds"].git.path
    assert git("-C", repository, "fsck", "--strict", "--no-dangling") == ""
    git("-c", "filter.lfs.smudge=", "clone", "-q", repository, tmp_path / "clone")
    pointer = (tmp_path / "clone/m.safetensors").read_text()
    assert pointer.startswith("version https://git-lfs.github.com/spec/v1\noid sha256:")
    assert pointer.endswith("size 10000\n")
    assert (tmp_path / "clone/notes/a-b/deep.txt").read_text() == "x"
    refs = git("-C", repository, "for-each-ref", "--format=%(refname)").split()
    assert refs == ["refs/heads/dev/one", "refs/heads/main", "refs/pr/1", "refs/tags/v1"]


@BOTH
def test_client_reads_back_what_it_wrote(hub: HubServer) -> None:
    api = as_user()
    api.create_repo("alice/birds")
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/birds", exist_ok=True)
    data = os.urandom(10_000)
    made = commit(api, {"m.safetensors": data, "README.md": CARD, "sub/x.txt": b"x"})
    assert api.model_info("alice/birds").sha == made
    assert api.list_repo_commits("alice/birds")[0].commit_id == made
    tree = {one.path for one in api.list_repo_tree("alice/birds", recursive=True)}
    assert tree == {".gitattributes", "README.md", "m.safetensors", "sub/x.txt"}
    assert {one.path for one in api.get_paths_info("alice/birds", ["sub", "nothing"])} == {"sub"}
    assert Path(api.hf_hub_download("alice/birds", "m.safetensors")).read_bytes() == data
    assert (Path(api.snapshot_download("alice/birds")) / "sub/x.txt").read_bytes() == b"x"
    assert api.verify_repo_checksums("alice/birds").checked_count == 4
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo("alice/birds")
    api.create_commit("alice/birds", [CommitOperationDelete("sub/", is_folder=True)], commit_message="delete")
    assert not api.file_exists("alice/birds", "sub/x.txt")
    api.delete_repo("alice/birds")
    assert not api.repo_exists("alice/birds")


def test_large_upload_in_parts_and_its_token_stays_here(hub: HubServer) -> None:
    api = as_user()
    api.create_repo("alice/birds")
    hub.multipart_over = 1_000_000
    data = os.urandom(9_000_000)
    commit(api, {"m.safetensors": data})
    assert hub.file("alice/birds", "m.safetensors") == data
    assert len(hub.requests("PUT", "store:")) == 2
    assert WRITE_TOKEN not in hub.log_text()


def test_models_are_found_by_tag_in_pages(hub: HubServer) -> None:
    for name in "abc":
        hub.add(f"alice/{name}", {"README.md": CARD})
    hub.add("alice/hidden", {"README.md": CARD}, private=True)
    hub.add("alice/other", {"README.md": b"no metadata"})
    hub.page_size = 2
    found = [one.id for one in as_user(False).list_models(filter="base_model:adapter:timm/resnet18")]
    assert found == ["alice/a", "alice/b", "alice/c"]
    assert [one.id for one in as_user().list_models(filter="maskpack", search="hid")] == ["alice/hidden"]


def test_stale_parent_and_pull_request(hub: HubServer) -> None:
    first = hub.add("alice/birds", {"a.txt": b"1"})
    second = hub.add("alice/birds", {"a.txt": b"2"})
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as caught:
        commit(as_user(), {"a.txt": b"3"}, parent_commit=first)
    assert caught.value.response.status_code == 412
    commit(as_user(STRANGER_TOKEN), {"a.txt": b"3"}, parent_commit=first, create_pr=True)
    assert hub.file("alice/birds", "a.txt") == b"2"
    assert hub.file("alice/birds", "a.txt", "refs/pr/1") == b"3"
    commit(as_user(), {"a.txt": b"4"}, parent_commit=second)
    assert hub.file("alice/birds", "a.txt") == b"4"


# section 1.6 of the notes on the client: what the server says, what the client raises
def test_revision_not_found(hub: HubServer) -> None:
    hub.add("alice/birds", {})
    with pytest.raises(errors.RevisionNotFoundError):
        as_user().model_info("alice/birds", revision="nowhere")


def test_entry_not_found(hub: HubServer) -> None:
    hub.add("alice/birds", {})
    with pytest.raises(errors.RemoteEntryNotFoundError):
        as_user().hf_hub_download("alice/birds", "nothing.txt")


@pytest.mark.parametrize(("token", "status"), [(False, 401), (STRANGER_TOKEN, 403)])
def test_gated(hub: HubServer, token: str | bool, status: int) -> None:
    hub.add("alice/birds", {"a.txt": b"1"})
    hub.repositories["alice/birds"].gated = "manual"
    with pytest.raises(errors.GatedRepoError) as caught:
        as_user(token).hf_hub_download("alice/birds", "a.txt")
    assert caught.value.response.status_code == status
    assert as_user().hf_hub_download("alice/birds", "a.txt")


@pytest.mark.parametrize("repo_id", ["alice/hidden", "alice/missing"])
@pytest.mark.parametrize(("token", "status"), [(False, 401), (STRANGER_TOKEN, 404)])
def test_private_looks_like_missing(hub: HubServer, repo_id: str, token: str | bool, status: int) -> None:
    hub.add("alice/hidden", {}, private=True)
    with pytest.raises(errors.RepositoryNotFoundError) as caught:
        as_user(token).model_info(repo_id)
    assert (caught.value.response.status_code, caught.value.repo_id) == (status, repo_id)


def test_wrong_token_is_no_missing_repository(hub: HubServer) -> None:
    hub.add("alice/birds", {})
    with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials") as caught:
        as_user("hf_unknown").model_info("alice/birds")
    assert not isinstance(caught.value, errors.RepositoryNotFoundError)


def test_disabled(hub: HubServer) -> None:
    hub.add("alice/birds", {})
    hub.repositories["alice/birds"].disabled = True
    with pytest.raises(errors.DisabledRepoError):
        as_user().model_info("alice/birds")


@pytest.mark.parametrize(
    ("status", "kind"), [(400, errors.BadRequestError), (403, errors.HfHubHTTPError), (503, errors.HfHubHTTPError)]
)
def test_status(hub: HubServer, status: int, kind: type[Exception]) -> None:
    hub.add("alice/birds", {})
    hub.fail("status", "GET", "/api/models", status=status)
    with pytest.raises(kind) as caught:
        as_user().model_info("alice/birds")
    assert caught.value.response.status_code == status  # type: ignore[attr-defined]
    assert as_user().model_info("alice/birds")


def test_bad_card_is_refused(hub: HubServer) -> None:
    hub.add("alice/birds", {})
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        commit(as_user(), {"README.md": b"---\na: [\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(as_user(), {"README.md": b"text"})


@pytest.mark.parametrize("token", [READ_TOKEN, STRANGER_TOKEN])
def test_writing_is_refused(hub: HubServer, token: str) -> None:
    hub.add("alice/birds", {})
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden"):
        commit(as_user(token), {"a.txt": b"1"})
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden"):
        as_user(token).create_repo("alice/new")


def test_range_and_what_lies_outside(hub: HubServer) -> None:
    hub.add("alice/birds", {"a.txt": b"0123456789"})
    address = f"{hub.endpoint}/alice/birds/resolve/main/a.txt"
    with urlopen(Request(address, headers={"Range": "bytes=3-5"})) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"345", "bytes 3-5/10")
    with pytest.raises(HTTPError, match="416") as caught:
        urlopen(Request(address, headers={"Range": "bytes=10-"}))
    caught.value.close()


def test_faults_are_what_they_say(hub: HubServer) -> None:
    data = os.urandom(2_000_000)
    hub.add("alice/birds", {"m.safetensors": data})
    http: Any = getattr(_http, "httpx2", None) or _http.httpx  # which one depends on the client's version
    expected = {"drop": http.RemoteProtocolError, "close": http.RemoteProtocolError, "reset": http.ReadError}
    address = f"{hub.endpoint}/alice/birds/resolve/main/m.safetensors"
    with http.Client(follow_redirects=True, trust_env=False) as client:
        for kind, error in expected.items():
            hub.fail(kind, "GET", "store:")
            with pytest.raises(error):
                client.get(address)
        hub.fail("short", "GET", "store:")
        assert client.get(address).content == data[:1_000_000]
        hub.fail("norange", "GET", "store:")
        assert client.get(address, headers={"Range": "bytes=5-"}).content == data
        hub.fail("corrupt", "GET", "store:")
        wrong = client.get(address).content
        assert sum(a != b for a, b in zip(wrong, data, strict=True)) == 1
        assert client.get(address).content == data
    with pytest.raises(ValueError, match="no fault kind 'typo'"):
        hub.fail("typo")


@BOTH
def test_client_of_another_process(hub: HubServer) -> None:
    hub.add("alice/birds", {"m.safetensors": b"bits"})
    file = "open(h.hf_hub_download('alice/birds', 'm.safetensors'))"
    code = f"import huggingface_hub as h; print({file}.read(), h.__version__)"
    environment = hub.env(READ_TOKEN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.returncode) == (f"bits {huggingface_hub.__version__}\n", 0), done.stderr


def test_which_client_this_is() -> None:
    """`make test` runs the tests of the Hub on two clients: each must be the one that is meant."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    allowed = next(Requirement(one) for one in project["dependencies"] if one.startswith("huggingface-hub"))
    version = Version(huggingface_hub.__version__)
    assert version in allowed.specifier
    assert version == Version(os.environ.get("MASKPACK_CLIENT", metadata.version("huggingface_hub")))
