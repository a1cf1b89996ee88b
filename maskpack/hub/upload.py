"""Push: from an adapter folder to a Hub repository or a local folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.card import render_card, update_card
from ..adapter.describe import inspect_adapter
from ..adapter.file import read_adapter
from ..errors import ConfigError, HubError
from .client import Session
from .download import fetch, is_same, list_files, size_of
from .failures import is_passing, status_of
from .folder import CARD_FILE, CONFIG_FILE, MODEL_FILE, Digest, check_folder, check_limit, copy_files, digest
from .reference import Reference, parse_reference

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from huggingface_hub.hf_api import ModelInfo, RepoFile

COMMIT_ATTEMPTS = 3


@dataclass(frozen=True)
class PushedAdapter:
    """Where an adapter went.

    Attributes:
        repo_id: the Hub repository; None for a local folder.
        url: the page of the repository or pull request, or the folder.
        commit: the commit that holds the adapter; None for a local folder.
        created: whether the repository or folder is new.
        unchanged: whether everything was there already, so that nothing was written.
    """

    repo_id: str | None
    url: str
    commit: str | None
    created: bool
    unchanged: bool


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
        StateError: if the local target holds something else.
    """
    source = Path(folder).expanduser()
    reference = parse_reference(ref, revision)
    check_folder(source)
    read_adapter(source)  # verifies every payload, not only the file
    if reference.path is not None:
        if private is not None or create_pr or commit_message is not None:
            raise ConfigError(f"private, create_pr and commit_message mean nothing for the local folder {reference}")
        return _push_to_folder(source, reference.path)
    if reference.is_pinned:
        raise ConfigError(f"{reference} names a commit, which cannot be written to; give a branch")
    if create_pr and reference.revision not in (None, "main"):
        raise ConfigError(f"create_pr opens a pull request against main; leave out the revision {reference.revision!r}")
    return _Push(source, reference, private, commit_message, create_pr, token).run()


def _push_to_folder(source: Path, target: Path) -> PushedAdapter:
    if target.suffix == ".safetensors":
        raise ConfigError(f"{target} is a file name; push to a folder")
    card = target / CARD_FILE
    existing = card.read_bytes().decode() if card.is_file() else None
    contents = _contents(source, None, existing)
    created = not target.exists()
    unchanged = all(
        (target / name).is_file() and digest(target / name) == digest(content) for name, content in contents.items()
    )
    if not unchanged:
        copy_files(contents, target)
    return PushedAdapter(None, str(target), None, created, unchanged)


def _contents(source: Path, repo_id: str | None, existing: str | None) -> dict[str, Path | bytes]:
    """Return what is to be published: the card is the existing one, else the folder's, with our part renewed."""
    card = render_card(inspect_adapter(source), repo_id)
    local = source / CARD_FILE
    if existing is None and local.is_file():
        existing = local.read_bytes().decode()
    if existing is not None:
        card = update_card(existing, card)
    return {CARD_FILE: card.encode(), CONFIG_FILE: source / CONFIG_FILE, MODEL_FILE: source / MODEL_FILE}


class _Push:
    """One push to the Hub."""

    def __init__(
        self,
        source: Path,
        reference: Reference,
        private: bool | None,
        message: str | None,
        create_pr: bool,
        token: str | bool | None,
    ) -> None:
        self.source, self.private, self.create_pr = source, private, create_pr
        self.session = Session("push to", reference, token)
        self.repo_id, self.branch = self.session.repo_id, reference.revision or "main"
        self.message = message or f"Upload adapter {source.resolve().name} with maskpack"

    def run(self) -> PushedAdapter:
        created = self._prepare_repository()
        head = self._prepare_branch()
        listed = list_files(self.session, head)
        self.contents = _contents(self.source, self.repo_id, self._remote_card(listed, head))
        self.digests = {name: digest(content) for name, content in self.contents.items()}
        changed = self._changed(listed)
        if not changed:
            return self._result(head, created, unchanged=True)
        return self._commit(changed, head, created)

    def _prepare_repository(self) -> bool:
        """Make the repository where it is missing, and return whether it was."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def find() -> "ModelInfo | None":
            try:
                return self.session.api.model_info(self.repo_id)
            except RepositoryNotFoundError:
                if self.create_pr:  # a pull request needs somebody's repository
                    raise
                return None

        info = self.session.call(find)
        created = info is None
        if info is None:
            api, private = self.session.api, self.private
            self.session.call(lambda: api.create_repo(self.repo_id, exist_ok=True, private=private))
        if self.private:
            # asking for an existing repository to be private is silently ignored, so look before anything is sent
            info = self.session.call(lambda: self.session.api.model_info(self.repo_id))
            if not info.private:
                raise HubError(
                    f"cannot push to {self.repo_id}: it is public and private=True was asked for; nothing was sent. "
                    "Make it private in its settings, or choose another name"
                )
        return created

    def _prepare_branch(self) -> str:
        """Make the branch where it is missing, and return its head."""
        from huggingface_hub.errors import RevisionNotFoundError

        api = self.session.api

        def head() -> str | None:
            try:
                return api.model_info(self.repo_id, revision=self.branch).sha
            except RevisionNotFoundError:
                if self.branch.startswith("refs/"):
                    raise
                return None

        found = self.session.call(head)
        if found is None:
            self.session.call(lambda: api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
            found = self.session.call(lambda: api.model_info(self.repo_id, revision=self.branch).sha)
        if found is None:
            raise HubError(f"cannot push to {self.repo_id}: the Hub does not say what {self.branch} points to")
        return found

    def _remote_card(self, listed: dict[str, "RepoFile"], head: str) -> str | None:
        if CARD_FILE not in listed:
            return None
        check_limit(CARD_FILE, size_of(listed[CARD_FILE]), self.repo_id)
        return fetch(self.session, listed[CARD_FILE], head, None)[0].read_bytes().decode()

    def _changed(self, listed: dict[str, "RepoFile"]) -> list[str]:
        return [name for name, one in self.digests.items() if name not in listed or not is_same(listed[name], one)]

    def _commit(self, changed: list[str], head: str, created: bool) -> PushedAdapter:
        """Send one commit; after a fault look what became of it before anything is sent again."""
        for attempt in range(1, COMMIT_ATTEMPTS + 1):
            try:
                return self._result_of(self._send(changed, head), created)
            except Exception as error:
                now = self._head_after(error)
                if now != head and not self._changed(list_files(self.session, now)):
                    return self._result(now, created, unchanged=False)  # it landed, only the answer was lost
                if now != head or status_of(error) in (409, 412):
                    raise HubError(
                        f"cannot push to {self.session.reference}: {self.branch} was changed by somebody else meanwhile "
                        f"({head[:12]} became {now[:12]}) and nothing of yours was written; pull, look, and push again"
                    ) from error
                if attempt == COMMIT_ATTEMPTS or not is_passing(error):
                    self.session.call(lambda error=error: _raise(error), retry=False)
            self.session.wait(attempt)
        raise AssertionError("unreachable")
