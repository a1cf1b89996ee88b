"""The model card on its way: rendered for the repository, merged with its owner's words, and never left behind."""

from pathlib import Path

import pytest

from maskpack.adapter.card import BEGIN, END
from maskpack.adapter.read import read_adapter
from maskpack.errors import AdapterError, ConfigError, DataError
from maskpack.hub.pull import pull
from maskpack.hub.push import push

from .helpers_hub import CARD, CONFIG, MODEL, contents, read_folder, saved, write_adapter
from .helpers_hub_fixtures import BIRDS
from .helpers_hub_fixtures import hub as hub
from .helpers_hub_fixtures import waits as waits
from .helpers_hub_server import WRITE_TOKEN, HubServer


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def parts(card: bytes) -> tuple[str, str, str]:
    """Return what stands before our part, our part, and what stands after it."""
    before, _, rest = card.decode().partition(BEGIN)
    ours, end, after = rest.partition(END)
    assert end
    return before, ours, after


def test_card_of_the_user_is_kept(hub: HubServer, adapter: Path) -> None:
    theirs = b"# My birds\r\nDo not touch.\n"
    hub.add(BIRDS, {CARD: b"---\nlicense: mit  # mine\n---\n" + theirs, "notes.txt": b"mine"})
    push(adapter, BIRDS, token=WRITE_TOKEN)
    before, ours, after = parts(hub.file(BIRDS, CARD))
    assert before.startswith("---\nlicense: mit\nlibrary_name: maskpack\n")
    assert before.endswith(f"---\n{theirs.decode()}\n")
    assert after == "\n"
    assert "# alice/birds\n" in ours
    assert '"seed": 0' in ours
    assert hub.file(BIRDS, "notes.txt") == b"mine"
    write_adapter(adapter, contents(1))
    push(adapter, BIRDS, token=WRITE_TOKEN)
    now = parts(hub.file(BIRDS, CARD))
    assert (now[0], now[2]) == (before, after)
    assert '"seed": 1' in now[1]
    assert read_adapter(adapter).mask_id in now[1]


def test_words_of_the_owner_stay(hub: HubServer, adapter: Path) -> None:
    push(adapter, BIRDS, token=WRITE_TOKEN)
    written = hub.file(BIRDS, CARD) + b"\n## How I made it\r\nWith care.\n"
    hub.add(BIRDS, {CARD: written.replace(b"---\n", b"---\nlicense: mit  # mine\n", 1)})
    assert push(adapter, BIRDS, token=WRITE_TOKEN).unchanged
    write_adapter(adapter, contents(1))
    assert not push(adapter, BIRDS, token=WRITE_TOKEN).unchanged
    card = hub.file(BIRDS, CARD)
    assert card.endswith(b"\n## How I made it\r\nWith care.\n")
    assert b"license: mit  # mine\n" in card


def test_card_in_the_folder_is_used_first(hub: HubServer, adapter: Path) -> None:
    (adapter / CARD).write_bytes(b"---\nlicense: mit\n---\n# Written before\n")
    push(adapter, BIRDS, token=WRITE_TOKEN)
    before, ours, _ = parts(hub.file(BIRDS, CARD))
    assert before.startswith("---\nlicense: mit\n")
    assert before.endswith("---\n# Written before\n\n")
    assert "# alice/birds\n" in ours
    assert '"seed": 0' in ours


def test_card_as_it_was_saved(hub: HubServer, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", saved())
    assert "USER/NAME" in parts(saved()[CARD])[1]
    push(adapter, BIRDS, token=WRITE_TOKEN)
    assert hub.file(BIRDS, CARD) == saved()[CARD].replace(b"USER/NAME", b"alice/birds").replace(
        b"# maskpack adapter\n", b"# alice/birds\n"
    )
    assert push(adapter, BIRDS, token=WRITE_TOKEN).unchanged


def test_licence(hub: HubServer, adapter: Path) -> None:
    push(adapter, BIRDS, license="mit", token=WRITE_TOKEN)
    assert hub.repositories[BIRDS].card(hub.repositories[BIRDS].head("main"))["license"] == "mit"
    assert push(adapter, BIRDS, token=WRITE_TOKEN).unchanged  # what is not said again stays
    push(adapter, BIRDS, license="apache-2.0", token=WRITE_TOKEN)
    assert hub.repositories[BIRDS].card(hub.repositories[BIRDS].head("main"))["license"] == "apache-2.0"
    with pytest.raises(ConfigError, match="license must be an identifier as the Hub writes them"):
        push(adapter, BIRDS, license="Free as a bird", token=WRITE_TOKEN)


def test_card_that_is_no_text(hub: HubServer, adapter: Path) -> None:
    hub.add(BIRDS, {CARD: b"\xff\xfe"})
    with pytest.raises(AdapterError, match=r"README\.md of alice/birds is not UTF-8 text"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert not hub.requests("POST", "/commit/")


def test_card_that_cannot_be_brought_up_to_date(hub: HubServer, adapter: Path) -> None:
    hub.add(BIRDS, {CARD: b"---\na: [\n---\n"})
    with pytest.raises(DataError, match="the front matter of"):
        push(adapter, BIRDS, token=WRITE_TOKEN)
    assert not hub.requests("POST", "/commit/")


# a folder that held another adapter
def test_no_stale_card_is_left(hub: HubServer, tmp_path: Path) -> None:
    target = write_adapter(tmp_path / "copy", saved(1) | {"mine.txt": b"kept"})
    hub.add(BIRDS, contents())
    pull(BIRDS, output=target)
    assert read_folder(target) == contents() | {"mine.txt": b"kept"}


def test_card_that_fits_or_is_not_ours_is_left(hub: HubServer, tmp_path: Path) -> None:
    target = write_adapter(tmp_path / "copy", saved())
    hub.add(BIRDS, contents())
    pull(BIRDS, output=target)
    assert read_folder(target) == saved()
    pull(target / MODEL, output=target)
    assert read_folder(target) == saved()
    write_adapter(target, contents(1) | {CARD: b"# My own notes\n"})
    pull(BIRDS, output=target)
    assert read_folder(target) == contents() | {CARD: b"# My own notes\n"}


def test_single_file_leaves_no_stale_config(tmp_path: Path, adapter: Path) -> None:
    target = write_adapter(tmp_path / "copy", saved(1))
    assert pull(adapter / MODEL, output=target).path == target / MODEL
    assert set(read_folder(target)) == {MODEL}
    assert read_adapter(target).mask_id == read_adapter(adapter).mask_id
    assert CONFIG in read_folder(adapter)
