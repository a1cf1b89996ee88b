"""Push: from an adapter folder to a Hub repository or a local folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapter.card import PICTURE_FILE, render_card, update_card
from ..adapter.describe import config_text, describe
from ..adapter.file import CARD_FILE
from ..adapter.keys import Keys, private_keys
from ..adapter.picture import density_picture
from ..adapter.read import CONFIG_FILE, MODEL_FILE, read_bytes
from ..adapter.sign import renewed
from ..adapter.signature import SIGNATURE_FILE, Contents, Envelope
from ..errors import ConfigError, SignatureError
from ..redact import hides_secrets
from .counters import highest, name_of, remember
from .download import OpenedAdapter, open_local
from .folder import LIMITS, card_text, holds, read_card, write_files
from .reference import REVISION, Reference, parse_reference
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
    sign: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    token: str | bool | None = None,
) -> PushedAdapter:
    """Publish an adapter: its files and nothing else, in one commit.

    A second push of the same adapter writes nothing. What a user wrote into the model card that is already there is
    kept; only our part of it is brought up to date. A signature in the folder goes with it, if it is of these files.

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
        sign: PEM file of a private key, or several, to sign it with: for this repository, with a counter that is one
            more than that of the version that is there.
        token: as everywhere on the Hub: None for the login.

    Raises:
        AdapterError: if the folder is not a whole adapter, or the reference cannot be read.
        HubError: if the login or the permissions failed, the repository is public although `private` was asked for,
            the tag is taken, or somebody else changed the adapter meanwhile.
        HubUnreachableError: if the Hub did not answer, after several attempts.
        SignatureError: if the folder's signature is not of its files, for this repository, and newer than the one
            there; if the adapter there is signed and this one would not be; or if nobody of `sign` signed that one.
        ConfigError: if the options contradict each other, or a key cannot be used.
        DataError: if a model card that is there cannot be brought up to date.
        StateError: if the local target holds something else.
    """
    source = Path(folder).expanduser()
    reference = parse_reference(ref, revision)
    opened, keys = open_local(source), private_keys(sign) if sign else {}
    description = describe(opened.adapter)

    def build(there: Mapping[str, bytes]) -> dict[str, bytes | memoryview]:
        return _contents(opened, description, reference, license, keys, there)

    if reference.path is not None:
        if private is not None or create_pr or commit_message is not None or tag is not None:
            raise ConfigError(
                f"private, create_pr, commit_message and tag mean nothing for the local folder {reference}; leave "
                "them out"
            )
        target = reference.path
        if target.suffix == ".safetensors":
            raise ConfigError(f"{target} is a file name; push to a folder")
        signature = target / SIGNATURE_FILE
        there = {CARD_FILE: read_card(target)}
        if signature.is_file():
            there[SIGNATURE_FILE] = read_bytes(signature, signature, LIMITS[SIGNATURE_FILE])
        return _push_to_folder(build({n: one for n, one in there.items() if one is not None}), target, dry_run)
    if reference.is_pinned:
        raise ConfigError(f"{reference} names a commit, which cannot be written to; give a branch")
    if create_pr and reference.revision not in (None, "main"):
        raise ConfigError(f"create_pr opens a pull request against main; leave out the revision {reference.revision!r}")
    if create_pr and tag is not None:
        raise ConfigError(f"a pull request cannot be tagged before it is merged; leave out the tag {tag!r}")
    if tag is not None and (not REVISION.fullmatch(tag) or ".." in tag):
        raise ConfigError(f"{tag!r} cannot be a tag: letters, digits, '.', '_', '+', '-' and inner '/' only")
    message = commit_message or f"Upload adapter {source.resolve().stem} with maskpack"
    task = RepositoryPush(reference, build, private, message, create_pr, tag, dry_run, token)
    pushed = task.run()
    if keys and not dry_run and not create_pr:
        signed = Envelope.from_bytes(bytes(task.contents[SIGNATURE_FILE])).statement()
        remember(keys, name_of(reference), signed.counter)
    return pushed


def _push_to_folder(contents: Contents, target: Path, dry_run: bool) -> PushedAdapter:
    created, unchanged = not target.exists(), holds(target, contents)
    files = {} if unchanged else {name: len(content) for name, content in contents.items()}
    if files and not dry_run:
        write_files(contents, target)
    return PushedAdapter(None, str(target), None, created, unchanged, files)


def _contents(
    opened: OpenedAdapter,
    description: dict[str, Any],
    reference: Reference,
    license: str | None,
    keys: Keys,
    there: Mapping[str, bytes],
) -> dict[str, bytes | memoryview]:
    """Return what is to be published: the card is the existing one, else the folder's, with our part renewed.

    A picture goes to the Hub only, whose pages show it; a folder has the files of an adapter.
    """
    found, picture, repo_id = opened.contents, {}, reference.repo_id
    if repo_id is not None:
        picture = {PICTURE_FILE: density_picture(description)}
    card = render_card(description, repo_id, license=license, picture=PICTURE_FILE if picture else None)
    place = f"{CARD_FILE} of {repo_id}" if repo_id else f"{reference.path}/{CARD_FILE}"
    existing = card_text(there.get(CARD_FILE), place)
    if existing is None and CARD_FILE in found:
        existing = card_text(bytes(found[CARD_FILE]), str(opened.pulled.path / CARD_FILE))
    if existing is not None:
        card = update_card(existing, card)
    config = found.get(CONFIG_FILE) or config_text(description, MODEL_FILE).encode()
    files = {CONFIG_FILE: config, MODEL_FILE: found[MODEL_FILE]}
    signature = _signature(opened, files, reference, keys, there.get(SIGNATURE_FILE))
    signed = {} if signature is None else {SIGNATURE_FILE: signature}
    return {**picture, CARD_FILE: card.encode(), CONFIG_FILE: config, **signed, MODEL_FILE: found[MODEL_FILE]}


def _signature(
    opened: OpenedAdapter, files: Contents, reference: Reference, keys: Keys, there: bytes | None
) -> bytes | None:
    """Return the signature to publish: by these keys, else the folder's; None if neither is there.

    Raises:
        SignatureError: rather than that a signature is published, or stays, which readers would refuse.
    """
    repo_id = reference.repo_id
    if keys:
        least = highest(keys, name_of(reference)) if repo_id else 0
        return renewed(there, files, opened.adapter, keys, repo_id, least=least)
    before = None if there is None else Envelope.from_bytes(there).statement()
    if SIGNATURE_FILE not in opened.contents:
        if before is not None and not before.covers(files):
            raise SignatureError(
                f"{reference} holds a signed adapter, and {opened.pulled.path} has no signature; sign it with --sign "
                f"KEY.pem, or remove {SIGNATURE_FILE} there first"
            )
        return None
    content = bytes(opened.contents[SIGNATURE_FILE])
    own = Envelope.from_bytes(content).statement()
    wrong = None
    if not own.covers(files):
        wrong = "is not of these files: they were changed since"
    elif repo_id is not None and own.repository not in (None, repo_id):
        wrong = f"is for {own.repository}, and this is {repo_id}"
    elif before is not None and not before.covers(files) and before.counter >= own.counter:
        wrong = f"has the counter {own.counter}, and the version there has {before.counter}"
    if wrong is not None:
        raise SignatureError(f"the signature of {opened.pulled.path} {wrong}; sign it anew: --sign KEY.pem")
    return content
