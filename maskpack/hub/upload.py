"""Push: from an adapter folder to a Hub repository or a local folder."""

import os
from pathlib import Path
from typing import Any

from ..adapter.card import PICTURE_FILE, render_card, update_card
from ..adapter.describe import config_text, describe
from ..adapter.file import CARD_FILE
from ..adapter.picture import density_picture
from ..adapter.read import CONFIG_FILE, MODEL_FILE
from ..errors import ConfigError
from ..redact import hides_secrets
from .download import OpenedAdapter, open_local
from .folder import Contents, card_text, holds, read_card, write_files
from .reference import REVISION, parse_reference
from .repository import PushedAdapter, RepositoryPush


@hides_secrets
def push(
    folder: str | os.PathLike[str],
    ref: str | os.PathLike[str],
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    tag: str | None = None,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> PushedAdapter:
    """Publish an adapter: its files and nothing else, in one commit.

    A second push of the same adapter writes nothing. What a user wrote into the model card that is already there is
    kept; only our part of it is brought up to date.

    Args:
        folder: the adapter folder, or a model file alone.
        ref: `user/name` on the Hub, or a local folder (`./registry/name`).
        private: True for a private repository; None for the account's default.
        revision: branch to push to, made where it is missing.
        commit_message: None for one that names the adapter.
        create_pr: open a pull request instead of writing to the branch.
        license: identifier for the card, as in "apache-2.0"; None leaves what the card says.
        tag: give the commit this tag.
        dry_run: look and say what would be done, and write nothing.
        token: as everywhere on the Hub: None for the login.

    Raises:
        AdapterError: if the folder is not a whole adapter, or the reference cannot be read.
        HubError: if the login or the permissions failed, the repository is public although `private` was asked for,
            the tag is taken, or somebody else changed the adapter meanwhile.
        HubUnreachableError: if the Hub did not answer, after several attempts.
        ConfigError: if the options contradict each other.
        DataError: if a model card that is there cannot be brought up to date.
        StateError: if the local target holds something else.
    """
    source = Path(folder).expanduser()
    reference = parse_reference(ref, revision)
    opened = open_local(source)
    description = describe(opened.adapter)

    def build(existing: str | None) -> dict[str, bytes | memoryview]:
        return _contents(opened, description, reference.repo_id, license, existing)

    if reference.path is not None:
        if private is not None or create_pr or commit_message is not None or tag is not None:
            raise ConfigError(
                f"private, create_pr, commit_message and tag mean nothing for the local folder {reference}; leave "
                "them out"
            )
        target = reference.path
        if target.suffix == ".safetensors":
            raise ConfigError(f"{target} is a file name; push to a folder")
        return _push_to_folder(build(card_text(read_card(target), str(target / CARD_FILE))), target, dry_run)
    if reference.is_pinned:
        raise ConfigError(f"{reference} names a commit, which cannot be written to; give a branch")
    if create_pr and reference.revision not in (None, "main"):
        raise ConfigError(f"create_pr opens a pull request against main; leave out the revision {reference.revision!r}")
    if create_pr and tag is not None:
        raise ConfigError(f"a pull request cannot be tagged before it is merged; leave out the tag {tag!r}")
    if tag is not None and (not REVISION.fullmatch(tag) or ".." in tag):
        raise ConfigError(f"{tag!r} cannot be a tag: letters, digits, '.', '_', '+', '-' and inner '/' only")
    message = commit_message or f"Upload adapter {source.resolve().stem} with maskpack"
    return RepositoryPush(reference, build, private, message, create_pr, tag, dry_run, token).run()


def _push_to_folder(contents: Contents, target: Path, dry_run: bool) -> PushedAdapter:
    created, unchanged = not target.exists(), holds(target, contents)
    files = {} if unchanged else {name: len(content) for name, content in contents.items()}
    if files and not dry_run:
        write_files(contents, target)
    return PushedAdapter(None, str(target), None, created, unchanged, files)


def _contents(
    opened: OpenedAdapter, description: dict[str, Any], repo_id: str | None, license: str | None, existing: str | None
) -> dict[str, bytes | memoryview]:
    """Return what is to be published: the card is the existing one, else the folder's, with our part renewed.

    A picture goes to the Hub only, whose pages show it; a folder has the three files of an adapter.
    """
    found, picture = opened.contents, {}
    if repo_id is not None:
        picture = {PICTURE_FILE: density_picture(description)}
    card = render_card(description, repo_id, license=license, picture=PICTURE_FILE if picture else None)
    if existing is None and CARD_FILE in found:
        existing = card_text(bytes(found[CARD_FILE]), str(opened.pulled.path / CARD_FILE))
    if existing is not None:
        card = update_card(existing, card)
    config = found.get(CONFIG_FILE) or config_text(description, MODEL_FILE).encode()
    return {**picture, CARD_FILE: card.encode(), CONFIG_FILE: config, MODEL_FILE: found[MODEL_FILE]}
