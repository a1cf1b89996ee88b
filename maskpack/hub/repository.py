"""One push to a Hub repository: look, commit once, and after a fault look again before anything is repeated."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.file import CARD_FILE
from ..errors import HubError
from .client import Session
from .download import fetch, is_same, list_files, size_of
from .failures import PASSING_STATUSES, status_of
from .folder import check_limit, digest, read_text
from .reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from huggingface_hub.hf_api import ModelInfo, RepoFile

CONFLICTS = frozenset({409, 412})


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


class RepositoryPush:
    """One push to a Hub repository.

    Args:
        reference: the repository and its branch.
        build: returns what is to be there, given the model card that is there (or None).
        private, message, create_pr, token: as of `push`.
    """

    def __init__(
        self,
        reference: Reference,
        build: Callable[[str | None], dict[str, Path | bytes]],
        private: bool | None,
        message: str,
        create_pr: bool,
        token: str | bool | None,
    ) -> None:
        self.session = Session(f"push to {reference}", token, reference)
        self.repo_id, self.branch = str(reference.repo_id), reference.revision or "main"
        self.build, self.private, self.message, self.create_pr = build, private, message, create_pr

    def run(self) -> PushedAdapter:
        created = self._prepare_repository()
        head = self._prepare_branch()
        listed = list_files(self.session, self.repo_id, head)
        self.contents = self.build(self._remote_card(listed, head))
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

    def _head(self) -> str | None:
        """Return the branch's head, or None if there is no such branch."""
        from huggingface_hub.errors import RevisionNotFoundError

        def find() -> str | None:
            try:
                return self.session.api.model_info(self.repo_id, revision=self.branch).sha
            except RevisionNotFoundError:
                if self.branch.startswith("refs/"):  # a pull request cannot be made by its name
                    raise
                return None

        return self.session.call(find)

    def _prepare_branch(self) -> str:
        """Make the branch where it is missing, and return its head."""
        found = self._head()
        if found is None:
            api = self.session.api
            self.session.call(lambda: api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
            found = self._head()
        if found is None:
            raise HubError(
                f"cannot push to {self.repo_id}: the Hub does not say what {self.branch} points to; try again"
            )
        return found

    def _remote_card(self, listed: dict[str, "RepoFile"], head: str) -> str | None:
        if CARD_FILE not in listed:
            return None
        check_limit(CARD_FILE, size_of(listed[CARD_FILE]), self.repo_id)
        return read_text(
            fetch(self.session, self.repo_id, listed[CARD_FILE], head, None)[0], f"{CARD_FILE} of {self.repo_id}"
        )

    def _changed(self, listed: dict[str, "RepoFile"]) -> list[str]:
        return [name for name, one in self.digests.items() if name not in listed or not is_same(listed[name], one)]

    def _commit(self, changed: list[str], head: str, created: bool) -> PushedAdapter:
        """Send one commit; after a fault look what became of it before anything is sent again."""
        attempt = 1
        while True:
            try:
                info = self._send(changed, head)
                return self._result(info.oid, created, unchanged=False, url=info.pr_url)
            except Exception as error:
                landed = self._find_after(error, head)
                if landed is not None:
                    return self._result(landed, created, unchanged=False)
                self.session.wait_or_fail(error, attempt)
            attempt += 1

    def _send(self, changed: list[str], head: str) -> "CommitInfo":
        from huggingface_hub import CommitOperationAdd

        return self.session.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(name, self.contents[name]) for name in changed],
            commit_message=self.message,
            revision=self.branch,
            create_pr=self.create_pr,
            parent_commit=head,
        )

    def _find_after(self, error: Exception, head: str) -> str | None:
        """Return the commit if it landed although the answer says otherwise or never came."""
        status = status_of(error)
        if status is not None and status not in PASSING_STATUSES | CONFLICTS:
            return None
        if self.create_pr:
            # the client does not say which pull request would be ours, and a second one must not be opened
            raise HubError(
                f"cannot tell whether the pull request to {self.repo_id} was opened, as the answer was lost; "
                f"look at {self._page()}/discussions before pushing again"
            ) from self.session.cause(error)
        now = self._head()
        if now is None or now == head:
            return None
        if not self._changed(list_files(self.session, self.repo_id, now)):
            return now
        raise HubError(
            f"cannot push to {self.session.reference}: somebody else changed {self.branch} meanwhile ({head[:12]} "
            f"became {now[:12]}), and nothing of yours was written; pull, look, and push again"
        ) from self.session.cause(error)

    def _page(self) -> str:
        return f"{self.session.api.endpoint}/{self.repo_id}"

    def _result(self, commit: str, created: bool, unchanged: bool, url: str | None = None) -> PushedAdapter:
        page = self._page() if self.branch == "main" else f"{self._page()}/tree/{self.branch}"
        return PushedAdapter(self.repo_id, url or page, commit, created, unchanged)
