"""Searching the loopback Hub: what was pushed is found by its name, its base and the weights that it fits."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
import torch
from maskpack_cli.main import app
from typer.testing import CliRunner, Result

from maskpack import MaskSet, fingerprint, load_backbone, save_adapter, search_adapters
from maskpack.adapter.card import render_card
from maskpack.adapter.describe import inspect_adapter
from maskpack.errors import ConfigError, HubError
from maskpack.hub.push import push
from maskpack.hub.search import FoundAdapter

from .helpers_adapter import base_of, random_masks
from .helpers_hub import CARD
from .helpers_hub_fixtures import NoWaiting
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import STRANGER_TOKEN, WRITE_TOKEN, HubServer

FACTORY = Path(__file__).parent.parent / "cli/maskpack_cli/digits_backbone.py"
BACKBONE = f"{FACTORY}:digits_cnn"
SHAPES = {"layer.weight": (40,)}
ADAPTERS = {
    "alice/birds": ("timm/resnet50.a1_in1k", "image-classification"),
    "alice/blue-birds": ("torchvision/resnet18", "image-classification"),
    "bob/letters": ("hf/org/encoder", "text-classification"),
}


def card(folder: Path, base: str, task: str | None) -> bytes:
    save_adapter(folder / "x.safetensors", random_masks(SHAPES), base_of(SHAPES, base), task=task)
    return render_card(inspect_adapter(folder / "x.safetensors")).encode()


@pytest.fixture
def shelf(hub: HubServer, tmp_path: Path) -> HubServer:
    """The Hub with three adapters, a private one, and a model that is none."""
    for repo_id, (base, task) in ADAPTERS.items():
        hub.add(repo_id, {CARD: card(tmp_path, base, task)})
    hub.add("alice/hidden-birds", {CARD: card(tmp_path, "timm/resnet50.a1_in1k", None)}, private=True)
    hub.add("alice/birds-resnet", {CARD: b"---\nlibrary_name: timm\nbase_model: timm/resnet50.a1_in1k\n---\n"})
    return hub


def names(*arguments: Any, **options: Any) -> list[str]:
    return [one.repo_id for one in search_adapters(*arguments, **options)]


def test_what_is_found(shelf: HubServer) -> None:
    digits = base_of(SHAPES).digests["float32"][:12]
    rest = {"downloads": 0, "likes": 0, "updated": "2023-11-14", "private": False, "fits": digits}
    images = "image-classification"
    assert search_adapters() == [
        FoundAdapter("alice/birds", "timm/resnet50.a1_in1k", images, **rest),
        FoundAdapter("alice/blue-birds", "torchvision/resnet18", images, **rest),
        FoundAdapter("bob/letters", "org/encoder", "text-classification", **rest),
    ]
    assert search_adapters("hidden", token=WRITE_TOKEN)[0].private
    asked = shelf.requests("GET", "/api/models?")[0]
    assert "filter=maskpack" in asked
    assert "expand=tags" in asked
    assert "full" not in asked


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"query": "birds"}, ["alice/birds", "alice/blue-birds"]),
        ({"query": "BLUE"}, ["alice/blue-birds"]),
        ({"query": ""}, [*ADAPTERS]),
        ({"author": "bob"}, ["bob/letters"]),
        ({"base": "timm/resnet50.a1_in1k"}, ["alice/birds"]),
        ({"base": "timm/resnet50.a1_in1k", "token": WRITE_TOKEN}, ["alice/birds", "alice/hidden-birds"]),
        ({"base": "timm/resnet50.a1_in1k", "token": STRANGER_TOKEN}, ["alice/birds"]),
        ({"base": "torchvision/resnet18"}, ["alice/blue-birds"]),
        ({"base": "hf/org/encoder"}, ["bob/letters"]),
        ({"base": "org/encoder"}, ["bob/letters"]),
        ({"base": "timm/resnet50"}, []),
        ({"query": "birds", "base": "hf/org/encoder"}, []),
        ({"fits": base_of(SHAPES).digests["float32"]}, [*ADAPTERS]),
        ({"fits": base_of(SHAPES).digests["float32"][:12], "author": "alice"}, ["alice/birds", "alice/blue-birds"]),
        ({"fits": "0" * 64}, []),
        ({"limit": 2}, ["alice/birds", "alice/blue-birds"]),
    ],
)
def test_by_what(shelf: HubServer, options: dict[str, Any], found: list[str]) -> None:
    assert names(**options) == found


def test_pages(shelf: HubServer) -> None:
    shelf.page_size = 1
    assert names() == [*ADAPTERS]
    assert len(shelf.requests("GET", "/api/models?")) == 3
    shelf.log.clear()
    assert names(limit=2) == ["alice/birds", "alice/blue-birds"]
    assert len(shelf.requests("GET", "/api/models?")) == 2


def test_what_is_pushed_is_found_by_the_weights(hub: HubServer, tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 4)
    base = fingerprint(model, id="mine")
    save_adapter(tmp_path / "a", MaskSet.from_tensors({"weight": model.weight > 0}), base)
    push(tmp_path / "a", "alice/linear", token=WRITE_TOKEN)
    assert names(fits=base.digests["float32"]) == ["alice/linear"]
    assert search_adapters()[0].base is None
    torch.nn.init.zeros_(model.bias)
    assert names(fits=fingerprint(model, id="mine").digests["float32"]) == []


def test_tags_of_strangers_are_not_repeated(hub: HubServer) -> None:
    evil = b'tags: ["maskpack", "maskpack:base:zz", "maskpack:base-id:\\e[31mx", "base_model:adapter:a b/c", 7]'
    hub.add("bob/evil", {CARD: b"---\n" + evil + b'\npipeline_tag: "\\e[31mred"\n---\n'})
    (found,) = search_adapters()
    assert (found.base, found.task, found.fits) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit must be from 1 to 1000, got 0"),
        ({"limit": 1001}, "limit must be from 1 to 1000, got 1001"),
        ({"fits": "abc"}, "fits must be 12 to 64 lower-case hexadecimal digits of a float32 digest, got 'abc'"),
        ({"fits": "g" * 12}, "fits must be 12 to 64"),
        ({"base": "resnet50"}, "cannot search for adapters of 'resnet50'; expected timm/NAME, hf/USER/NAME"),
        ({"base": "net.py:make"}, "else search by fits"),
    ],
)
def test_what_cannot_be_searched_for(hub: HubServer, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search_adapters(**options)
    assert hub.log == []


def test_offline(shelf: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"cannot search the Hub offline; unset HF_HUB_OFFLINE"):
        search_adapters()


def test_faults(shelf: HubServer, waits: NoWaiting) -> None:
    with pytest.raises(HubError, match="cannot search the Hub: the token is refused"):
        search_adapters(token="hf_expiredToken")
    shelf.fail("status", path="/api/models", status=404)
    with pytest.raises(HubError, match=r"cannot search the Hub: 127\.0\.0\.1 answered 404"):
        search_adapters()
    shelf.stop()
    with pytest.raises(HubError, match=r"cannot search the Hub: 127\.0\.0\.1 cannot be reached"):
        search_adapters()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def test_command(shelf: HubServer) -> None:
    shown = run("birds")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["adapter", "base", "task", "updated", "downloads", "likes", "private"]
    assert lines[1].split() == [
        "alice/birds", "timm/resnet50.a1_in1k", "image-classification", "2023-11-14", "0", "0", "no",
    ]  # fmt: skip
    assert len(lines) == 3
    assert shown.stderr == ""
    assert "There may be more than 2; --limit shows them." in run("--limit", 2).stderr
    one = run("--base", "hf/org/encoder", "--json")
    assert '"repo_id": "bob/letters"' in one.stdout
    assert run("--author", "bob", "-q").stdout.splitlines()[1].startswith("bob/letters")


def test_command_that_finds_nothing(shelf: HubServer) -> None:
    shown = run("flowers")
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "No adapter found; ask for less, as in: maskpack search --base" in shown.stderr
    assert run("flowers", "-q").stderr == ""
    assert run("flowers", "--json").stdout == '{\n  "adapters": []\n}\n'


def test_command_with_a_backbone(hub: HubServer, tmp_path: Path) -> None:
    backbone = load_backbone(BACKBONE, random_weights=0)
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    masks = MaskSet.from_tensors({"0.weight": backbone.model.get_parameter("0.weight") > 0})
    save_adapter(tmp_path / "a", masks, base)
    push(tmp_path / "a", "alice/digits", token=WRITE_TOKEN)
    found = run("--fits", BACKBONE, "--random-weights", 0)
    assert found.stdout.splitlines()[1].startswith("alice/digits")
    digits = base.digests["float32"][:12]
    assert f"Searching for adapters of weights with the digest {digits}…" in found.stderr
    assert "No adapter found" in run("--fits", BACKBONE, "--random-weights", 1).stderr
    assert "alice/digits" in run("--fits", digits).stdout


@pytest.mark.parametrize("options", [["--weights", "x.safetensors"], ["--fits", "0" * 12, "--random-weights", "1"]])
def test_command_with_weights_of_nothing(hub: HubServer, options: list[str]) -> None:
    refused = run(*options)
    assert refused.exit_code == 2
    assert "--weights and --random-weights are weights of the backbone in --fits, which is missing" in refused.stderr
    assert refused.stdout == ""
