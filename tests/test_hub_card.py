"""Real adapters, with the real reader and model card, to the loopback Hub and back."""

from pathlib import Path

import pytest

from maskpack.adapter.file import save_adapter
from maskpack.adapter.read import read_adapter
from maskpack.errors import CorruptAdapterError, DataError
from maskpack.hub import pull, push

from .helpers_adapter import base_of, random_masks
from .hub_adapters import CARD, CONFIG, MODEL, read_folder
from .hub_fixtures import hub as hub
from .hub_fixtures import waits as waits
from .hub_server import WRITE_TOKEN, HubServer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
SHAPES = {"layer.weight": (40, 30), "other.weight": (7,)}


def save(folder: Path, seed: int = 0) -> Path:
    save_adapter(folder, random_masks(SHAPES, seed=seed), base_of(SHAPES), class_names=["finch", "owl"])
    return folder


def test_there_and_back(hub: HubServer, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter")
    pushed = push(adapter, "alice/birds", token=WRITE_TOKEN)
    pulled = pull("alice/birds", output=tmp_path / "copy")
    assert {name: read_folder(pulled.path)[name] for name in (MODEL, CONFIG)} == {
        name: read_folder(adapter)[name] for name in (MODEL, CONFIG)
    }
    assert read_adapter(pulled.path).header.class_names == ("finch", "owl")
    card = read_folder(pulled.path)[CARD].decode()
    assert "library_name" in card
    assert "alice/birds" in card
    assert hub.repositories["alice/birds"].tags(pushed.commit or "")[0] == "maskpack"
    for again in (adapter, tmp_path / "copy"):
        assert push(again, "alice/birds", token=WRITE_TOKEN).unchanged


def test_words_of_the_owner_stay(hub: HubServer, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter")
    push(adapter, "alice/birds", token=WRITE_TOKEN)
    written = hub.file("alice/birds", CARD) + b"\n## How I made it\r\nWith care.\n"
    hub.add("alice/birds", {CARD: written.replace(b"---\n", b"---\nlicense: mit  # mine\n", 1)})
    assert push(adapter, "alice/birds", token=WRITE_TOKEN).unchanged
    save(adapter, seed=1)
    assert not push(adapter, "alice/birds", token=WRITE_TOKEN).unchanged
    card = hub.file("alice/birds", CARD)
    assert card.endswith(b"\n## How I made it\r\nWith care.\n")
    assert b"license: mit  # mine\n" in card


def test_card_that_cannot_be_brought_up_to_date(hub: HubServer, tmp_path: Path) -> None:
    hub.add("alice/birds", {CARD: b"---\na: [\n---\n"})
    with pytest.raises(DataError, match="the front matter of"):
        push(save(tmp_path / "adapter"), "alice/birds", token=WRITE_TOKEN)
    assert not hub.requests("POST", "/commit/")


def test_damaged_adapter_is_not_pushed(hub: HubServer, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter")
    data = bytearray((adapter / MODEL).read_bytes())
    data[-1] ^= 1
    (adapter / MODEL).write_bytes(data)
    with pytest.raises(CorruptAdapterError):
        push(adapter, "alice/birds", token=WRITE_TOKEN)
    assert hub.log == []


def test_folder_as_registry(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter")
    assert push(adapter, tmp_path / "registry/birds").created
    assert push(adapter, tmp_path / "registry/birds").unchanged
    assert read_adapter(pull(tmp_path / "registry/birds").path).header == read_adapter(adapter).header
