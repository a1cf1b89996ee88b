"""The loopback Hub's Xet store, spoken to by the unmodified client: what went in by one way comes out by both."""

import hashlib
import json
import os
import random
import struct
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import huggingface_hub.constants as constants
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer
from .helpers_hub_server.chunks import GROUPED_LZ4, LZ4, PLAIN

XET = pytest.mark.parametrize("hub", ["xet"], indirect=True)
FLOATS = b"".join(struct.pack("<f", random.Random(seed).gauss(0, 1)) for seed in range(30_000)) + b"abc"
CONTENTS = {LZ4: b"the same words again and again. " * 20_000, GROUPED_LZ4: FLOATS, PLAIN: os.urandom(300_000)}
pytestmark = XET


def commit(api: HfApi, name: str, data: bytes) -> None:
    api.create_commit("alice/birds", [CommitOperationAdd(name, data)], commit_message="add")


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    client = HfApi(token=WRITE_TOKEN)
    client.create_repo("alice/birds")
    return client


def download(name: str, folder: Path) -> bytes:
    return Path(HfApi(token=False).hf_hub_download("alice/birds", name, cache_dir=folder)).read_bytes()


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("scheme", CONTENTS, ids=["lz4", "grouped", "plain"])
def test_upload_is_read_both_ways(
    hub: HubServer, api: HfApi, scheme: int, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHARD", "RECONSTRUCTION"):
        monkeypatch.setenv(f"HF_XET_CLIENT_{name}_API_VERSION", version)
    data = CONTENTS[scheme]
    commit(api, "m.safetensors", data)
    assert {xorb.data[4] for xorb in hub.xet.xorbs.values()} == {scheme}
    assert hub.requests("POST", f"store:/v{version}/shards")
    assert not hub.requests("POST", "/objects/batch")
    assert hub.file("alice/birds", "m.safetensors") == data
    assert download("m.safetensors", tmp_path / "xet") == data
    assert hub.requests("GET", f"store:/v{version}/reconstructions/")
    assert len(hub.requests("GET", "store:/xorbs/")) == 1
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert download("m.safetensors", tmp_path / "lfs") == data
    assert len(hub.requests("GET", "store:/xorbs/")) == 1
    assert hub.requests("GET", f"store:/{hashlib.sha256(data).hexdigest()}")


def test_chunks_that_are_there_are_not_sent_again(hub: HubServer, api: HfApi) -> None:
    data = CONTENTS[PLAIN]
    commit(api, "a.safetensors", data)
    changed = data[:-10] + b"x" * 500
    commit(api, "b.safetensors", changed)
    assert hub.file("alice/birds", "b.safetensors") == changed
    first, second = (len(xorb.data) for xorb in hub.xet.xorbs.values())
    assert second < first


def test_contents_that_no_client_cut(
    hub: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(20_000_000)  # more than one xorb
    hub.add("alice/birds", {"m.safetensors": data})
    assert download("m.safetensors", tmp_path / "xet") == data
    assert len(hub.requests("GET", "store:/xorbs/")) == 2
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    commit(api, "lfs.safetensors", b"by LFS")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert download("lfs.safetensors", tmp_path / "xet") == b"by LFS"


def test_file_in_the_listing(hub: HubServer, api: HfApi) -> None:
    commit(api, "m.safetensors", CONTENTS[PLAIN])
    (listed,) = api.get_paths_info("alice/birds", ["m.safetensors"])
    assert listed.xet_hash == hub.xet.names[listed.lfs.sha256]  # type: ignore[union-attr]


# who may speak to the store
def ask(address: str, token: str | None = None, data: bytes | None = None, span: str = "") -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urlopen(Request(address, data, headers | ({"Range": span} if span else {}))) as answer:
        return bytes(answer.read())


def refused(address: str, token: str | None = None, data: bytes | None = None, span: str = "") -> int:
    with pytest.raises(HTTPError) as caught:
        ask(address, token, data, span)
    caught.value.close()
    return int(caught.value.code)


def test_the_users_token_stays_at_the_hub(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    commit(api, "m.safetensors", CONTENTS[PLAIN])
    api.hf_hub_download("alice/birds", "m.safetensors", cache_dir=tmp_path)
    assert "Bearer xet_write_" in hub.log_text()
    assert "Bearer xet_read_" in hub.log_text()
    assert "hf_alice" not in hub.log_text()
    (name,) = hub.xet.files
    assert refused(f"{hub.store_endpoint}/v1/reconstructions/{name}", WRITE_TOKEN) == 401


def test_tokens_are_for_those_who_may(hub: HubServer, api: HfApi) -> None:
    page = f"{hub.endpoint}/api/models/alice/birds/xet-"
    assert json.loads(ask(f"{page}read-token/main"))["accessToken"].startswith("xet_read_")
    assert refused(f"{page}read-token/nowhere") == 404
    assert refused(f"{page}write-token/main") == 401
    for token in (READ_TOKEN, STRANGER_TOKEN):
        assert refused(f"{page}write-token/main", token) == 403
    assert ask(f"{page}write-token/None?create_pr=1", STRANGER_TOKEN)
    hub.repositories["alice/birds"].private = True
    assert refused(f"{page}read-token/main") == 401
    for place in ("xorbs/default/" + "0" * 64, "shards"):
        assert refused(f"{hub.store_endpoint}/v1/{place}", hub.xet.new_token("read"), b"data") == 403


# what the store refuses
def test_what_does_not_fit_is_refused(hub: HubServer, api: HfApi) -> None:
    commit(api, "m.safetensors", CONTENTS[PLAIN])
    token, store = hub.xet.new_token("write"), hub.store_endpoint
    shard = next(one.body for one in hub.log if one.target == "/v2/shards")
    (xorb,) = hub.xet.xorbs
    wrong = hashlib.sha256(b"other").digest()
    right = struct.pack(">4Q", *struct.unpack("<4Q", hashlib.sha256(CONTENTS[PLAIN]).digest()))
    assert refused(f"{store}/v1/shards", token, b"no shard" * 10) == 400
    assert refused(f"{store}/v1/shards", token, shard[:100]) == 400
    assert right in shard
    assert refused(f"{store}/v1/shards", token, shard.replace(right, wrong)) == 400
    address, data = f"{store}/v1/xorbs/default/{xorb}", hub.xet.xorbs[xorb].data
    assert refused(address, token, b"no xorb") == 400
    assert refused(address, token, data[:-1]) == 400
    assert refused(f"{store}/xorbs/{xorb}?signature=loopback") == 403
    assert refused(f"{store}/xorbs/{xorb}", span="bytes=0-9") == 403
    hub.xet.xorbs.clear()
    assert refused(f"{store}/v1/shards", token, shard) == 400
    assert ask(address, token, data) == b'{"was_inserted": true}'
    assert ask(address, token, data) == b'{"was_inserted": false}'
    assert ask(f"{store}/v1/shards", token, shard)


def test_ranges_of_a_file(hub: HubServer, api: HfApi) -> None:
    hub.add("alice/birds", {"m.safetensors": os.urandom(20_000_000)})
    (name,) = hub.xet.files
    address, token = f"{hub.store_endpoint}/v1/reconstructions/{name}", hub.xet.new_token("read")
    whole = json.loads(ask(address, token))
    assert [term["unpacked_length"] for term in whole["terms"]] == [1 << 24, 20_000_000 - (1 << 24)]
    tail = json.loads(ask(address, token, span="bytes=17000000-30000000"))
    assert (tail["terms"], tail["offset_into_first_range"]) == (whole["terms"][1:], 17_000_000 - (1 << 24))
    assert json.loads(ask(address, token, span="bytes=5-9"))["offset_into_first_range"] == 5
    assert refused(address, token, span="bytes=20000000-20000009") == 416
