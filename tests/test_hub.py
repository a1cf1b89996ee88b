"""Push and pull against the loopback Hub: what arrives, what is kept, and what is asked of the server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskpack.adapter.read import read_adapter
from maskpack.errors import AdapterError, ConfigError, CorruptAdapterError, HubError, StateError
from maskpack.hub.cache import CachedAdapter, cached_adapters
from maskpack.hub.pull import pull
from maskpack.hub.push import PushedAdapter, push

from .helpers_hub import CARD, CLASSES, CONFIG, MODEL, NAMES, contents, read_folder, with_record, write_adapter
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import pytest_generate_tests as pytest_generate_tests
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def test_what_is_pushed_is_pulled(hub: HubServer, adapter: Path) -> None:
    (adapter / "secret.env").write_text("not ours")
    pushed = push(adapter, "alice/birds", token=WRITE_TOKEN)
    assert pushed.created
    assert not pushed.unchanged
    assert (pushed.repo_id, pushed.url) == ("alice/birds", f"{hub.endpoint}/alice/birds")
    pulled = pull("alice/birds", token=False)
    assert (pulled.repo_id, pulled.commit) == ("alice/birds", pushed.commit)
    files = read_folder(pulled.path)
    assert set(files) == set(NAMES)
    assert {name: files[name] for name in (MODEL, CONFIG)} == contents()
    assert read_adapter(pulled.path).about.class_names == CLASSES
    assert files[CARD].startswith(b"---\nlibrary_name: maskpack\n")
    assert b"# alice/birds\n" in files[CARD]
    assert hub.repositories["alice/birds"].tags(pushed.commit or "")[0] == "maskpack"
    assert len(hub.requests("POST", "/commit/")) == 1
    assert all(one.headers["user-agent"].startswith("maskpack/") for one in hub.log if one.origin == "hub")


def test_same_again_makes_no_commit(hub: HubServer, adapter: Path, tmp_path: Path) -> None:
    first = push(adapter, "alice/birds", token=WRITE_TOKEN)
    again = push(adapter, "alice/birds", token=WRITE_TOKEN)
    assert again == PushedAdapter("alice/birds", first.url, first.commit, created=False, unchanged=True, files={})
    copy = pull("alice/birds", output=tmp_path / "copy").path
    assert push(copy, "alice/birds", token=WRITE_TOKEN) == again
    assert len(hub.requests("POST", "/commit/")) == 1


def test_other_adapter_replaces_it(hub: HubServer, adapter: Path) -> None:
    first = push(adapter, "alice/birds", token=WRITE_TOKEN, commit_message="first")
    write_adapter(adapter, contents(1))
    second = push(adapter, "alice/birds", token=WRITE_TOKEN)
    assert (second.created, second.unchanged) == (False, False)
    assert read_folder(pull("alice/birds").path)[MODEL] == contents(1)[MODEL]
    assert read_folder(pull("alice/birds", revision=first.commit).path)[MODEL] == contents()[MODEL]
    git = hub.repositories["alice/birds"].git
    titles = [git.read(commit)[1].decode().rpartition("\n\n")[2] for commit in git.history(second.commit or "")]
    assert titles == ["Upload adapter adapter with maskpack\n", "first\n", "start\n"]


def test_private(hub: HubServer, adapter: Path) -> None:
    push(adapter, "alice/hidden", private=True, token=WRITE_TOKEN)
    assert hub.repositories["alice/hidden"].private
    push(adapter, "alice/hidden", private=True, token=WRITE_TOKEN)
    push(adapter, "alice/public", token=WRITE_TOKEN)
    write_adapter(adapter, contents(1))
    with pytest.raises(HubError, match=r"cannot push to alice/public: it is public and private=True was asked for"):
        push(adapter, "alice/public", private=True, token=WRITE_TOKEN)
    assert hub.file("alice/public", MODEL) == contents()[MODEL]


def test_branch_is_made_and_pulled_by_name(hub: HubServer, adapter: Path) -> None:
    push(adapter, "alice/birds", token=WRITE_TOKEN)
    write_adapter(adapter, contents(1))
    pushed = push(adapter, "alice/birds", revision="dev/one", token=WRITE_TOKEN)
    assert pushed.url == f"{hub.endpoint}/alice/birds/tree/dev/one"
    assert push(adapter, "alice/birds@dev/one", token=WRITE_TOKEN).unchanged
    assert read_folder(pull("alice/birds@dev/one").path)[MODEL] == contents(1)[MODEL]
    assert read_folder(pull("alice/birds").path)[MODEL] == contents()[MODEL]


def test_pull_request_of_a_stranger(hub: HubServer, adapter: Path) -> None:
    push(adapter, "alice/birds", token=WRITE_TOKEN)
    write_adapter(adapter, contents(1))
    pushed = push(adapter, "alice/birds", create_pr=True, token=STRANGER_TOKEN)
    assert pushed.url == f"{hub.endpoint}/alice/birds/discussions/1"
    assert hub.file("alice/birds", MODEL) == contents()[MODEL]
    assert read_folder(pull("alice/birds@refs/pr/1").path)[MODEL] == contents(1)[MODEL]
    with pytest.raises(AdapterError, match="has no such repository"):
        push(adapter, "alice/missing", create_pr=True, token=STRANGER_TOKEN)


def test_options_that_contradict(hub: HubServer, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="names a commit, which cannot be written to; give a branch"):
        push(adapter, "alice/birds@" + "a" * 40)
    with pytest.raises(ConfigError, match="create_pr opens a pull request against main; leave out the revision 'dev'"):
        push(adapter, "alice/birds@dev", create_pr=True)
    with pytest.raises(ConfigError, match="for the local folder"):
        push(adapter, "./registry", private=True)
    with pytest.raises(ConfigError, match=r"x\.safetensors is a file name; push to a folder"):
        push(adapter, "./x.safetensors")
    assert hub.log == []


def test_pinned_and_cached_asks_nothing(hub: HubServer) -> None:
    commit = hub.add("alice/birds", contents())
    pull("alice/birds", revision=commit)
    pull("alice/birds")
    hub.log.clear()
    assert pull(f"alice/birds@{commit}").commit == commit
    assert hub.log == []
    assert pull("alice/birds").commit == commit
    assert hub.requests() == ["GET hub:/api/models/alice/birds"]


def test_only_our_files_at_one_commit_are_fetched(hub: HubServer) -> None:
    commit = hub.add("alice/birds", contents() | {"huge.bin": b"0" * 100, "model.pkl": b"x", "sub/" + MODEL: b"y"})
    pull("alice/birds")
    assert hub.requests().count("GET hub:/api/models/alice/birds") == 1
    assert hub.requests(path="/resolve/") == [
        f"{method} hub:/alice/birds/resolve/{commit}/{name}"
        for method, name in [("HEAD", CONFIG), ("GET", CONFIG), ("HEAD", MODEL)]
    ]


def test_output_is_a_plain_copy(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("alice/birds", contents() | {CARD: b"card"})
    target = tmp_path / "deep/copy"
    pulled = pull("alice/birds", output=target)
    assert (pulled.path, pulled.commit, pulled.repo_id) == (target, commit, "alice/birds")
    assert read_folder(target) == contents() | {CARD: b"card"}
    assert not any(path.is_symlink() for path in target.iterdir())
    (target / "mine.txt").write_text("kept")
    hub.add("alice/birds", contents(1))
    pull("alice/birds", output=str(target))
    assert read_folder(target) == contents(1) | {CARD: b"card", "mine.txt": b"kept"}
    (tmp_path / "empty").mkdir()
    pull("alice/birds", output=tmp_path / "empty")
    assert set(read_folder(tmp_path / "empty")) == set(NAMES)
    assert sorted(path.name for path in tmp_path.glob("*/.*.tmp")) == []


def test_output_that_holds_something_else(hub: HubServer, tmp_path: Path) -> None:
    hub.add("alice/birds", contents())
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "work").mkdir()
    for name in "abcd":
        (tmp_path / "work" / name).touch()
    with pytest.raises(StateError, match=r"work holds other files, first a, and no adapter"):
        pull("alice/birds", output=tmp_path / "work")
    with pytest.raises(StateError, match="a is a file; give a folder"):
        pull("alice/birds", output=tmp_path / "work/a")
    with pytest.raises(StateError, match=r"cannot make .*Not a directory; choose another folder"):
        pull("alice/birds", output=tmp_path / "work/a/b")


def test_folder_is_verified_before_a_push(hub: HubServer, adapter: Path) -> None:
    (adapter / MODEL).write_bytes(b"other")
    with pytest.raises(CorruptAdapterError, match="has 5 bytes and states a header"):
        push(adapter, "alice/birds", token=WRITE_TOKEN)
    data = bytearray(contents()[MODEL])
    data[-1] ^= 1
    write_adapter(adapter, {MODEL: bytes(data)})
    with pytest.raises(CorruptAdapterError, match=r"its bytes have the digest \w+, and it states"):
        push(adapter, "alice/birds", token=WRITE_TOKEN)
    write_adapter(adapter, with_record(bytes(data)))
    with pytest.raises(
        CorruptAdapterError, match=r"adapter/maskpack_model\.safetensors: its bytes have the digest \w+, and it"
    ):
        push(adapter, "alice/birds", token=WRITE_TOKEN)
    assert hub.log == []


def test_other_cache_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.add("alice/birds", contents())
    assert pull("alice/birds", cache_dir=tmp_path / "cache").path.is_relative_to(tmp_path / "cache")
    assert pull("alice/birds", cache_dir=str(tmp_path / "cache"), local_files_only=True).repo_id == "alice/birds"


def test_cached_adapters(hub: HubServer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert cached_adapters(cache) == []
    commits = [hub.add("alice/birds", contents()), hub.add("alice/birds", contents(1))]
    paths = [pull("alice/birds", revision=commit, cache_dir=cache).path for commit in commits]
    sizes = [sum(map(len, contents(seed).values())) for seed in (0, 1)]
    one = [json.loads(contents(seed)[CONFIG])["sets"]["default"] for seed in (0, 1)]
    about = [("timm/resnet18.a1_in1k", sets["density"], sets["bits_per_weight"]) for sets in one]
    rows = zip(commits, sizes, paths, about, strict=True)
    found = [CachedAdapter("alice/birds", commit, size, path, *rest) for commit, size, path, rest in rows]
    assert cached_adapters(cache) == sorted(found, key=lambda one: one.commit)


def test_cached_adapters_are_adapters(hub: HubServer, tmp_path: Path) -> None:
    hub.add("alice/birds", contents() | {"sub/x": b"x"})
    found = pull("alice/birds").path
    (found / "sub").mkdir()
    (found / "sub" / MODEL).write_bytes((found / MODEL).read_bytes())
    assert len(cached_adapters()) == 1
    (found / MODEL).unlink()
    assert cached_adapters() == [], "a folder inside is not where an adapter lies"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"id": "timm/resnet18.a1_in1k"', '"id": "/home/me/net"'),
        ('"id": "timm/resnet18.a1_in1k"', '"id": "\\u001b[31mred"'),
        ('"id": "timm/resnet18.a1_in1k"', '"id": 7'),
        ('"kept": ', '"kept": -'),
        ('"kept": ', '"kept": 9'),
        ('"weights": ', '"weights": 1e'),
        ('"weights": ', '"weights": 9' + "9" * 5000),
        ('"sets": {', '"sets": {"more": [], '),
        ('{\n  "base"', '{"base": {}, "base"'),
        ("{", "[" * 100_000),
        ('"sets": {', '"sets": {}, "other": {'),
    ],
)
def test_cached_adapters_with_a_config_of_a_stranger(hub: HubServer, old: str, new: str) -> None:
    hub.add("alice/birds", contents())
    config = pull("alice/birds").path / CONFIG
    text = config.read_text()
    assert old in text
    config.unlink()
    config.write_text(text.replace(old, new, 1))
    (found,) = cached_adapters()
    assert (found.repo_id, found.base, found.density, found.bits_per_weight) == ("alice/birds", None, None, None)


def test_cached_adapters_with_a_config_that_is_none(hub: HubServer) -> None:
    hub.add("alice/birds", contents())
    config = pull("alice/birds").path / CONFIG
    text = config.read_bytes()
    config.unlink()
    assert cached_adapters()[0].base is None
    os.mkfifo(config)
    assert cached_adapters()[0].base is None, "nothing is waited for"
    config.unlink()
    config.write_bytes(text + b" " * (1 << 20))
    assert cached_adapters()[0].base is None
    config.write_bytes(text + b" ")
    assert cached_adapters()[0].base == "timm/resnet18.a1_in1k"


def test_cache_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StateError, match=r"cannot read the Hub's cache: .*; check HF_HOME, HF_HUB_CACHE"):
        cached_adapters(tmp_path / "cache")


def test_pull_in_another_process(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("alice/birds", contents(), private=True)
    code = (
        "import json, sys; from maskpack.hub.pull import pull; lazy = 'huggingface_hub' not in sys.modules; "
        "found = pull('alice/birds'); print(json.dumps([str(found.path), found.commit, lazy]))"
    )
    environment = hub.env(READ_TOKEN)
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    path, found, lazy = json.loads(done.stdout)
    assert (found, lazy) == (commit, True)
    assert read_folder(Path(path)) == contents()
    assert Path(path).is_relative_to(hub.root / "home/hub")
