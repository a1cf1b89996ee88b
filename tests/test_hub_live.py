"""Push and pull at the real Hub, once, in a temporary private repository: `make hub-live`. Nothing else contacts it."""

import os
import uuid
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_token

from maskpack.hub.pull import pull
from maskpack.hub.push import push

from .helpers_hub import CONFIG, MODEL, contents, read_folder, write_adapter

pytestmark = [
    pytest.mark.skipif(os.environ.get("MASKPACK_HUB_LIVE") != "1", reason="contacts the real Hub: make hub-live"),
    pytest.mark.skipif(not get_token(), reason="no token: log in with `hf auth login` or set HF_TOKEN"),
]


@pytest.fixture
def only_loopback() -> None:
    """Takes the place of the guard that keeps the other tests on this machine."""


@pytest.mark.parametrize("transport", ["xet", "lfs"])
def test_push_and_pull(tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transport == "lfs")
    api = HfApi()
    repo_id = f"{api.whoami()['name']}/maskpack-test-{uuid.uuid4().hex[:12]}"
    adapter, cache = write_adapter(tmp_path / "adapter"), tmp_path / "cache"
    try:
        first = push(adapter, repo_id, private=True)
        assert first.created
        assert api.model_info(repo_id).private
        assert push(adapter, repo_id).unchanged
        api.create_tag(repo_id, tag="v1")
        write_adapter(adapter, contents(1))
        second = push(adapter, repo_id)
        assert read_folder(pull(repo_id, cache_dir=cache).path)[MODEL] == contents(1)[MODEL]
        for revision in (first.commit, "v1"):
            found = pull(repo_id, revision=revision, cache_dir=cache)
            assert found.commit == first.commit
            assert {name: read_folder(found.path)[name] for name in (MODEL, CONFIG)} == contents()
        assert [one.commit_id for one in api.list_repo_commits(repo_id)][:2] == [second.commit, first.commit]
        listed = [one.id for one in api.list_models(author=repo_id.split("/")[0], filter="maskpack", limit=1000)]
        if repo_id not in listed:
            print(f"{repo_id} is not found by its tag yet; the Hub's index may be behind")  # noqa: T201
    finally:
        api.delete_repo(repo_id, missing_ok=True)
