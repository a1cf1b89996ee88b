"""One push to a Hub repository: look, commit once, and after a fault look again before anything is repeated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..adapter.card import PICTURE_FILE
from ..adapter.file import CARD_FILE
from ..adapter.read import CONFIG_FILE, MODEL_FILE
from ..adapter.signature import SIGNATURE_FILE, Contents
from ..errors import HubError
from ..network import own_retries
from .client import ATTEMPTS, TIMEOUT, Session
from .failures import PASSING_STATUSES, status_of
from .files import Snapshot, is_same
from .folder import FILES
from .reference import Reference
from .refs import check_tag, pull_requests, read_tag, set_tag

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoFile

CONFLICTS = frozenset({409, 412})


@dataclass(frozen=True)
class PushedAdapter:
    """Where an adapter went, or after a dry run would go.

    Attributes:
        repo_id: the Hub repository; None for a local folder.
        url: the page of the repository or pull request, or the folder.
        commit: the commit that holds the adapter; None for a local folder, and after a dry run that found changes.
        created: whether the repository or folder is new.
        unchanged: whether everything was there already, so that nothing was written.
        files: bytes of each file that was written, by name.
    """

    repo_id: str | None
    url: str
    commit: str | None
    created: bool
    unchanged: bool
    files: dict[str, int]


class RepositoryPush:
    """One push to a Hub repository.

    Args:
        reference: the repository and its branch.
        build: returns what is to be there, given the model card and the signature that are there.
        private, message, create_pr, tag, dry_run, token: as of `push`.

    What was last seen of the branch is `head` (None where there is no such branch) and `listed`, its files of ours;
    `contents` is what is to be there, and `changed` what of it is not.
    """

    def __init__(
        self,
        reference: Reference,
        build: Callable[[Mapping[str, bytes]], dict[str, bytes | memoryview]],
        private: bool | None,
        message: str,
        create_pr: bool,
        tag: str | None,
        dry_run: bool,
        token: str | bool | None,
    ) -> None:
        self.session = Session(f"push to {reference}", token, reference)
        self.repo_id, self.branch = str(reference.repo_id), reference.revision or "main"
        self.build, self.private, self.message, self.create_pr = build, private, message, create_pr
        self.tag, self.dry_run = tag, dry_run
        self.head: str | None = None
        self.listed: dict[str, RepoFile] = {}

    def run(self) -> PushedAdapter:
        created = self._prepare_repository()
        if not (created and self.dry_run):
            self._prepare_branch()
        self._look(self.head)
        changed = self.changed  # as it is now: after a fault there is another look
        if self.tag and self.head:
            tagged = read_tag(self.session, self.repo_id, self.tag)
            check_tag(self.repo_id, self.tag, tagged, None if changed else self.head)
        if self.dry_run:
            return self._result(None if changed else self.head, created, changed)
        commit, url = self._commit() if changed else (str(self.head), None)
        if self.tag:
            set_tag(self.session, self.repo_id, self.tag, commit)
        return self._result(commit, created, changed, url)

    def _prepare_repository(self) -> bool:
        """Make the repository where it is missing, and return whether it was."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def find() -> "ModelInfo | None":
            try:
                return self.session.api.model_info(self.repo_id, timeout=TIMEOUT)
            except RepositoryNotFoundError:
                if self.create_pr:  # a pull request needs somebody's repository
                    raise
                return None

        info = self.session.call(find)
        created = info is None
        if created and not self.dry_run:
            api, private = self.session.api, self.private
            self.session.call(lambda: api.create_repo(self.repo_id, exist_ok=True, private=private))
            info = self.session.call(lambda: api.model_info(self.repo_id, timeout=TIMEOUT)) if self.private else None
        # asking for an existing repository to be private is silently ignored, so look before anything is sent
        if self.private and info is not None and not info.private:
            raise HubError(
                f"cannot push to {self.repo_id}: it is public and private=True was asked for; nothing was sent. "
                "Make it private in its settings, or choose another name"
            )
        return created

    def _find_head(self) -> str | None:
        """Return the branch's head, or None if there is no such branch."""
        from huggingface_hub.errors import RevisionNotFoundError

        def find() -> str | None:
            try:
                return self.session.api.model_info(self.repo_id, revision=self.branch, timeout=TIMEOUT).sha
            except RevisionNotFoundError:
                if self.branch.startswith("refs/"):  # a pull request cannot be made by its name
                    raise
                return None

        return self.session.call(find)

    def _prepare_branch(self) -> None:
        """Find the branch's head, making the branch where it is missing."""
        self.head = self._find_head()
        if self.head is None and not self.dry_run:
            api = self.session.api
            self.session.call(lambda: api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
            self.head = self._find_head()
            if self.head is None:
                raise HubError(
                    f"cannot push to {self.repo_id}: the Hub does not say what {self.branch} points to; try again"
                )

    def _look(self, head: str | None) -> None:
        """Read what is at a commit, and build what is to be there."""
        self.head, there = head, dict[str, bytes]()
        if head is None:
            self.listed = {}
        else:
            snapshot = Snapshot(self.session, self.repo_id, head)
            self.listed = snapshot.listed(*FILES, PICTURE_FILE)
            wanted = [self.listed[name] for name in (CARD_FILE, SIGNATURE_FILE) if name in self.listed]
            there = {name: bytes(content) for name, (_, content) in snapshot.fetch(wanted).items()}
        self.contents = self.build(there)
        self.changed = self._changed()

    def _changed(self) -> Contents:
        """Return the files that are not there as they are wanted; hashes all of them."""
        changed = {
            name: content
            for name, content in self.contents.items()
            if name not in self.listed or not is_same(self.listed[name], content)
        }
        if MODEL_FILE not in changed and PICTURE_FILE in self.listed:
            changed.pop(PICTURE_FILE, None)  # the same picture has other bytes where zlib is another one
        return changed

    def _commit(self) -> tuple[str, str | None]:
        """Send one commit and return it, with the page of its pull request; after a fault look before the next."""
        before = pull_requests(self.session, self.repo_id) if self.create_pr else {}
        attempt = 1
        while True:
            parent = self.head
            try:
                with own_retries():
                    return self._send()
            except Exception as error:
                failed = error
            status = status_of(failed)
            if status is None or status in PASSING_STATUSES | CONFLICTS:
                found = self._find_request(before) if self.create_pr else self._find_commit(failed)
                if found is not None:
                    return found
            if status not in CONFLICTS or self.head == parent or attempt == ATTEMPTS:
                self.session.wait_or_fail(failed, attempt)
            attempt += 1

    def _send(self) -> tuple[str, str | None]:
        from huggingface_hub import CommitOperationAdd

        info = self.session.api.create_commit(
            self.repo_id,
            [CommitOperationAdd(name, bytes(content)) for name, content in self.changed.items()],
            commit_message=self.message,
            revision=self.branch,
            create_pr=self.create_pr,
            parent_commit=self.head,
        )
        return info.oid, info.pr_url

    def _find_request(self, before: dict[str, str]) -> tuple[str, str] | None:
        """Return our pull request if it was opened although the answer says otherwise or never came."""
        for number, commit in pull_requests(self.session, self.repo_id).items():
            there = Snapshot(self.session, self.repo_id, commit).listed(*FILES) if number not in before else {}
            ours = [name for name in FILES if name in self.contents]
            if all(name in there and is_same(there[name], self.contents[name]) for name in ours):
                return commit, f"{self._page()}/discussions/{number}"
        return None

    def _find_commit(self, error: Exception) -> tuple[str, None] | None:
        """Return the commit if it landed although the answer says otherwise or never came; else prepare for another.

        Raises:
            HubError: if somebody else changed the adapter meanwhile.
        """
        head, listed = self.head, self.listed
        now = self._find_head()
        if now is None or now == head:
            return None
        self._look(now)
        if not self.changed:
            return now, None
        if any(_id(self.listed, name) != _id(listed, name) for name in (MODEL_FILE, CONFIG_FILE, SIGNATURE_FILE)):
            raise HubError(
                f"cannot push to {self.session.reference}: somebody else changed {self.branch} meanwhile "
                f"({str(head)[:12]} became {now[:12]}), and nothing of yours was written; pull, look, and push again"
            ) from error
        return None

    def _page(self) -> str:
        return f"{self.session.api.endpoint}/{self.repo_id}"

    def _result(self, commit: str | None, created: bool, changed: Contents, url: str | None = None) -> PushedAdapter:
        page = self._page() if self.branch == "main" else f"{self._page()}/tree/{self.branch}"
        files = {name: len(content) for name, content in changed.items()}
        return PushedAdapter(self.repo_id, url or page, commit, created, not changed, files)


def _id(listed: "dict[str, RepoFile]", name: str) -> str | None:
    return listed[name].blob_id if name in listed else None
