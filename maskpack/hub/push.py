"""Push: from an adapter folder to a Hub repository or a local folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import signature
from ..adapter.card import CARD_FILE, render_card, update_card
from ..adapter.describe import config_text, inspect_adapter
from ..adapter.read import CONFIG_FILE, MODEL_FILE
from ..errors import AdapterError, ConfigError, HubError, SignatureError, check_argument
from ..network import hides_secrets, quietly
from .cache import RepositoryCache, highest, remember
from .client import ATTEMPTS, PASSING, Session, status_of
from .pull import PulledAdapter, Snapshot, open_local
from .reference import REVISION, Reference, holds, parse_reference, read_card, write_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

CONFLICTS = frozenset({409, 412})


@dataclass(frozen=True)
class PushedAdapter:
    """The target of a push, or of a dry run, with the bytes of each file that was written.

    `url` is the page of the repository or pull request, or a folder, which has neither repository nor commit. After a
    dry run that found changes there is no commit.
    """

    repo_id: str | None
    url: str
    commit: str | None
    created: bool
    unchanged: bool
    files: dict[str, int]


@dataclass
class RepositoryPush:
    """One push to a branch of a Hub repository. `build` returns what is to be there, given card and signatures there.

    Attributes:
        there: the branch, as it was last seen; None where there is no such branch.
        contents: what is to be there. changed: what of it is not.
    """

    reference: Reference
    build: Callable[[Mapping[str, bytes]], dict[str, bytes | memoryview]]
    private: bool | None
    message: str
    create_pr: bool
    tag: str | None
    dry_run: bool
    token: str | bool | None

    def __post_init__(self) -> None:
        self.session = Session(f"push to {self.reference}", self.token, self.reference)
        self.api, self.repo_id = self.session.api, str(self.reference.repo_id)
        self.store = RepositoryCache(self.repo_id)
        self.branch, self.page = self.reference.revision or "main", f"{self.api.endpoint}/{self.repo_id}"
        self.there: Snapshot | None = None

    @property
    def head(self) -> str | None:
        return None if self.there is None else self.there.commit

    def run(self) -> PushedAdapter:
        created, head = self._prepare()
        self._look(head)
        changed = self.changed  # as it is now: after a fault there is another look
        commit, url = None if changed else self.head, None
        if self.tag and self.head:
            self._check_tag(commit)
        if changed and not self.dry_run:
            commit, url = self._commit()
        if self.tag and commit and not self.dry_run:
            create = partial(self.api.create_tag, self.repo_id, tag=self.tag, revision=commit, exist_ok=True)
            self.session.call(create)
            self._check_tag(commit)
        page = self.page if self.branch == "main" else f"{self.page}/tree/{self.branch}"
        files = {name: len(content) for name, content in changed.items()}
        return PushedAdapter(self.repo_id, url or page, commit, created, not changed, files)

    def _prepare(self) -> tuple[bool, str | None]:
        """Make repository and branch where they are missing; return whether the repository is new, and the head."""
        info = self._info(None, may_lack=not self.create_pr)  # a pull request needs somebody's repository
        created = info is None
        if created and not self.dry_run:
            self.session.call(partial(self.api.create_repo, self.repo_id, exist_ok=True, private=self.private))
            info = self._info(None, may_lack=False) if self.private else None
        # asking for an existing repository to be private is silently ignored, so look before anything is sent
        if self.private and info is not None and not info.private:
            raise HubError(
                f"cannot push to {self.repo_id}: it is public and private=True was asked for; nothing was sent, "
                "change one of them"
            )
        head = None if created and self.dry_run else self._find_head()
        if head is None and not self.dry_run:
            self.session.call(partial(self.api.create_branch, self.repo_id, branch=self.branch, exist_ok=True))
            head = self._find_head()
            if head is None:
                raise HubError(
                    f"cannot push to {self.repo_id}: the Hub does not say what {self.branch} points to; try again"
                )
        return created, head

    def _find_head(self) -> str | None:
        """Return the branch's head, or None if there is no such branch; a pull request cannot be made by its name."""
        info = self._info(self.branch, may_lack=not self.branch.startswith("refs/"))
        return None if info is None else info.sha

    def _info(self, revision: str | None, may_lack: bool) -> "ModelInfo | None":
        """Return the Hub's description of the repository or of a revision; None if it is missing and may be."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        missing = RepositoryNotFoundError if revision is None else RevisionNotFoundError

        def find() -> "ModelInfo | None":
            try:
                return self.session.info(self.repo_id, revision)
            except missing:
                if may_lack:
                    return None
                raise

        return self.session.call(find)

    def _check_tag(self, wanted: str | None) -> None:
        """Refuse to go on where the tag points to another commit than the wanted one; None means a commit to come."""
        found = next((one.target_commit for one in self.session.refs(self.repo_id).tags if one.name == self.tag), None)
        if found is not None and found != wanted:
            raise HubError(
                f"{self.repo_id} has a tag {self.tag!r} at commit {found[:12]} already, and tags are not moved; choose "
                f"another tag, or delete it: hf repos tag delete {self.repo_id} {self.tag}"
            )

    def _look(self, head: str | None) -> None:
        """Read what is at a commit, and build what is to be there."""
        self.there = None if head is None else Snapshot(self.session, self.store, head)
        found = {} if self.there is None else self.there.fetch(CARD_FILE, *signature.DIGESTS)
        self.contents = self.build({name: bytes(content) for name, (_, content) in found.items()})
        kept = [name for name, one in self.contents.items() if self.there and self.there.has(name, one)]
        self.changed = {name: one for name, one in self.contents.items() if name not in kept}

    def _commit(self) -> tuple[str, str | None]:
        """Send one commit and return it, with the page of its pull request; after a fault look before the next."""
        from huggingface_hub import CommitOperationAdd

        before = self._requests() if self.create_pr else {}
        attempt = 1
        while True:
            parent = self.head
            try:
                with quietly("own"):
                    done = self.api.create_commit(
                        self.repo_id,
                        [CommitOperationAdd(name, bytes(content)) for name, content in self.changed.items()],
                        commit_message=self.message,
                        revision=self.branch,
                        create_pr=self.create_pr,
                        parent_commit=parent,
                    )
                return done.oid, done.pr_url
            except Exception as error:
                failed = error
            status = status_of(failed)
            if status is None or status in PASSING | CONFLICTS:
                found = self._find_request(before) if self.create_pr else self._find_commit(failed)
                if found is not None:
                    return found
            if status not in CONFLICTS or self.head == parent or attempt == ATTEMPTS:
                self.session.wait_or_fail(failed, attempt)
            attempt += 1

    def _requests(self) -> dict[str, str]:
        """Return the head of every pull request by its number."""
        found = self.session.refs(self.repo_id, pull_requests=True).pull_requests or []
        return {one.ref.removeprefix("refs/pr/"): one.target_commit for one in found}

    def _find_request(self, before: Mapping[str, str]) -> tuple[str, str] | None:
        """Return our pull request if it was opened although the answer says otherwise or never came."""
        for number, commit in self._requests().items():
            there = Snapshot(self.session, self.store, commit)
            if number not in before and all(there.has(name, one) for name, one in self.contents.items()):
                return commit, f"{self.page}/discussions/{number}"
        return None

    def _find_commit(self, error: Exception) -> tuple[str, None] | None:
        """Return the commit if it landed although the answer says otherwise or never came; else prepare for another."""
        before, now = self.there, self._find_head()
        if before is None or now is None or now == before.commit:
            return None
        self._look(now)
        if not self.changed:
            return now, None
        for name in (MODEL_FILE, CONFIG_FILE, *signature.DIGESTS):
            earlier, later = (getattr(at.listed.get(name), "blob_id", None) for at in (before, self.there) if at)
            if earlier != later:
                raise HubError(
                    f"cannot push to {self.reference}: somebody else changed {self.branch} meanwhile "
                    f"({before.commit[:12]} became {now[:12]}), and nothing of yours was written; pull and push again"
                ) from error
        return None


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
        create_pr: open a pull request instead of writing to the branch.
        license: identifier for the card, as in "apache-2.0"; None leaves what the card says.
        tag: give the commit this tag.
        dry_run: look and say what would be done, and write nothing.
        sign: PEM file of a private key to sign it with, "sigstore" for an identity, or several: for this repository,
            with a counter that is one more than that of the version that is there.
        token: as everywhere on the Hub: None for the login.

    Raises:
        HubError: if login or permissions failed, the repository is public although `private` was asked for, the tag is
            taken, or somebody else changed the adapter meanwhile. HubUnreachableError: if the Hub did not answer.
        SignatureError: if the folder's signature does not fit files, repository or the version there; if the adapter
            there is signed and this one would not be; or if nobody of `sign` signed that one.
        ConfigError: if the options contradict each other. StateError: if the local target holds something else.

    Example:
        print(push("./my-mask", "user/new-mask", license="apache-2.0").url)
    """
    advice = "an adapter in memory is written first, by save_adapter; the folder comes before the reference"
    check_argument("the folder", folder, str | os.PathLike, "an adapter's folder or model file", advice)
    source = Path(folder).expanduser()
    reference = parse_reference(ref, revision)
    opened = open_local(source)
    if dry_run and signature.SIGSTORE in ([sign] if isinstance(sign, str | os.PathLike) else sign):
        raise ConfigError("a dry run cannot sign with sigstore, which writes to a public log; leave out one of them")
    keys = signature.private_keys(sign) if sign else {}
    description = inspect_adapter(opened.adapter)

    def build(there: Mapping[str, bytes]) -> dict[str, bytes | memoryview]:
        return _contents(opened, description, reference, license, keys, there)

    if reference.path is not None:
        if private is not None or create_pr or commit_message is not None or tag is not None:
            raise ConfigError(f"leave out private, create_pr, commit_message and tag for the local folder {reference}")
        target = reference.path
        if target.suffix == ".safetensors":
            raise ConfigError(f"{target} is a file name; push to a folder")
        card, there = read_card(target), signature.read_signatures(target / MODEL_FILE)
        contents = build(there | ({} if card is None else {CARD_FILE: card}))
        created, unchanged = not target.exists(), holds(target, contents)
        if not unchanged and not dry_run:
            write_files(contents, target)
        files = {} if unchanged else {name: len(content) for name, content in contents.items()}
        return PushedAdapter(None, str(target), None, created, unchanged, files)
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
        file = next(iter(signature.files_by(keys)))  # where there are two, they have one counter
        remember(keys, reference.branch, signature.statement_in(file, bytes(task.contents[file])).counter)
    return pushed


def _contents(
    opened: PulledAdapter,
    description: dict[str, Any],
    reference: Reference,
    license: str | None,
    keys: signature.Keys,
    there: Mapping[str, bytes],
) -> dict[str, bytes | memoryview]:
    """Return the files to publish: the card is the existing one, else the folder's, with our part renewed."""
    found = opened.contents
    card = render_card(description, reference.repo_id, license=license)
    earlier, place = there.get(CARD_FILE), str(reference)
    if earlier is None and CARD_FILE in found:
        earlier, place = bytes(found[CARD_FILE]), str(opened.path)
    try:
        card = card if earlier is None else update_card(earlier.decode(), card)
    except UnicodeDecodeError as error:
        raise AdapterError(
            f"{CARD_FILE} of {place} is not UTF-8 text, so it cannot be brought up to date; correct it"
        ) from error
    config = found.get(CONFIG_FILE) or config_text(description, MODEL_FILE).encode()
    files = {CONFIG_FILE: config, MODEL_FILE: found[MODEL_FILE]}
    signatures = _signatures(opened, files, reference, keys, there)
    return {CARD_FILE: card.encode(), CONFIG_FILE: config, **signatures, MODEL_FILE: found[MODEL_FILE]}


def _signatures(
    opened: PulledAdapter,
    files: signature.Contents,
    reference: Reference,
    keys: signature.Keys,
    there: signature.Contents,
) -> dict[str, bytes]:
    """Return the signature files to publish: made with these keys, else the folder's.

    None is published, or stays, that readers would refuse: that is a SignatureError.
    """
    repo_id = reference.repo_id
    least = highest(keys, reference.branch) if repo_id else 0
    made = signature.renewed(there, files, opened.adapter, keys, repo_id, least=least) if keys else {}
    for name in (name for name in signature.DIGESTS if name not in made):
        before = signature.statement_in(name, bytes(there[name])) if name in there else None
        replaces = before is not None and not before.covers(files)
        if name not in opened.contents:
            if replaces:
                raise SignatureError(
                    f"{reference} is signed, and {opened.path} has no {name}; sign it, or remove it there"
                )
            continue
        content, wrong = bytes(opened.contents[name]), None
        own = signature.statement_in(name, content)
        if not own.covers(files):
            wrong = "is not of these files: they were changed since"
        elif repo_id is not None and own.repository not in (None, repo_id):
            wrong = f"is for {own.repository}, and this is {repo_id}"
        elif before is not None and replaces and before.counter >= own.counter:
            wrong = f"has the counter {own.counter}, and the version there has {before.counter}"
        if wrong is not None:
            raise SignatureError(f"the signature of {opened.path}, {name}, {wrong}; sign it anew: --sign")
        made[name] = content
    return made
