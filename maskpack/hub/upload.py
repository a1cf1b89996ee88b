"""Push: from an adapter folder to a Hub repository or a local folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.card import render_card, update_card
from ..adapter.describe import inspect_adapter
from ..adapter.file import CARD_FILE
from ..adapter.read import CONFIG_FILE, MODEL_FILE, read_adapter
from ..errors import ConfigError
from .folder import check_folder, copy_files, digest, read_text
from .reference import parse_reference
from .repository import PushedAdapter, RepositoryPush


def push(
    folder: str | os.PathLike[str],
    ref: str | os.PathLike[str],
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> PushedAdapter:
    """Publish an adapter folder: its files and nothing else, in one commit.

    A second push of the same adapter writes nothing. What a user wrote into the model card that is already there is
    kept; only our part of it is brought up to date.

    Args:
        folder: the adapter folder.
        ref: `user/name` on the Hub, or a local folder (`./registry/name`).
        private: True for a private repository; None for the account's default.
        revision: branch to push to, made where it is missing.
        commit_message: None for one that names the adapter.
        create_pr: open a pull request instead of writing to the branch.
        token: as everywhere on the Hub: None for the login.

    Raises:
        AdapterError: if the folder is not a whole adapter, or the reference cannot be read.
        HubError: if the network, the login or the permissions failed, the repository is public although `private`
            was asked for, or somebody else changed it meanwhile.
        ConfigError: if the options contradict each other.
        DataError: if a model card that is there cannot be brought up to date.
        StateError: if the local target holds something else.
    """
    source = Path(folder).expanduser()
    reference = parse_reference(ref, revision)
    check_folder(source)
    description = inspect_adapter(read_adapter(source))  # verifies every payload, not only the file
    if reference.path is not None:
        if private is not None or create_pr or commit_message is not None:
            raise ConfigError(f"private, create_pr and commit_message mean nothing for the local folder {reference}")
        return _push_to_folder(source, reference.path, description)
    if reference.is_pinned:
        raise ConfigError(f"{reference} names a commit, which cannot be written to; give a branch")
    if create_pr and reference.revision not in (None, "main"):
        raise ConfigError(f"create_pr opens a pull request against main; leave out the revision {reference.revision!r}")

    def build(existing: str | None) -> dict[str, Path | bytes]:
        return _contents(source, description, reference.repo_id, existing)

    message = commit_message or f"Upload adapter {source.resolve().name} with maskpack"
    return RepositoryPush(reference, build, private, message, create_pr, token).run()


def _push_to_folder(source: Path, target: Path, description: Mapping[str, Any]) -> PushedAdapter:
    if target.suffix == ".safetensors":
        raise ConfigError(f"{target} is a file name; push to a folder")
    card = target / CARD_FILE
    existing = read_text(card, str(card)) if card.is_file() else None
    contents = _contents(source, description, None, existing)
    created = not target.exists()
    unchanged = all(
        (target / name).is_file() and digest(target / name) == digest(content) for name, content in contents.items()
    )
    if not unchanged:
        copy_files(contents, target)
    return PushedAdapter(None, str(target), None, created, unchanged)


def _contents(
    source: Path, description: Mapping[str, Any], repo_id: str | None, existing: str | None
) -> dict[str, Path | bytes]:
    """Return what is to be published: the card is the existing one, else the folder's, with our part renewed."""
    card = render_card(description, repo_id)
    local = source / CARD_FILE
    if existing is None and local.is_file():
        existing = read_text(local, str(local))
    if existing is not None:
        card = update_card(existing, card)
    return {CARD_FILE: card.encode(), CONFIG_FILE: source / CONFIG_FILE, MODEL_FILE: source / MODEL_FILE}
