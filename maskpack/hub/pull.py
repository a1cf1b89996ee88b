"""Pull: from a reference to a verified adapter, whose bytes are read once."""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from ..adapter.card import CARD_FILE
from ..adapter.read import CONFIG_FILE, MODEL_FILE, Adapter, parse_adapter, read_bytes, read_files, read_model
from ..adapter.signature import Contents, Keys, Signed, parse_signed, read_signatures, signature_path, trusted_keys
from ..errors import AdapterError, CorruptAdapterError, HubError, HubUnreachableError, MaskpackError, SignatureError
from ..network import hides_secrets
from ..safetensors_io import write_file
from .cache import RepositoryCache, check_newest
from .client import ATTEMPTS, OFFLINE, Session
from .reference import COMMIT, FILES, LIMITS, Reference, parse_reference, read_card, write_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger("maskpack")

Files = dict[str, tuple[Path, bytes | memoryview]]  # path and bytes of each by name


class Snapshot:
    """A repository at one commit, on the Hub and in a cache. `look` is an argument of `read_model`."""

    def __init__(self, session: Session, store: RepositoryCache, commit: str, look: bool = True) -> None:
        self.session, self.store, self.commit, self.look = session, store, commit, look
        self.repo_id = store.repo_id
        if not COMMIT.fullmatch(commit):
            raise HubError(
                f"{self.repo_id} is said to be at commit {commit!r}, expected 40 hexadecimal digits; check HF_ENDPOINT "
                "and the cache"
            )

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"

    @cached_property
    def listed(self) -> "dict[str, RepoFile]":
        """The adapter's files in the repository, with sizes and digests, the model last."""
        from huggingface_hub.hf_api import RepoFile

        api = self.session.api
        entries = self.session.call(lambda: api.get_paths_info(self.repo_id, list(FILES), revision=self.commit))
        found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return {name: found[name] for name in FILES if name in found}

    def has(self, name: str, content: bytes | memoryview) -> bool:
        """Return True if a file is there and has this content."""
        entry = self.listed.get(name)
        if entry is None:
            return False
        if entry.lfs:
            return (entry.lfs.size, entry.lfs.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        digest = hashlib.sha1(f"blob {len(content)}\0".encode(), usedforsecurity=False)  # git's id
        digest.update(content)
        return (entry.size, entry.blob_id) == (len(content), digest.hexdigest())

    def fetch(self, *names: str) -> Files:
        """Bring files that the repository lists into the cache; return path and bytes of each.

        The client compares nothing but the length, and takes what it finds in the cache: a file that differs, or
        cannot be read, is fetched a second time. If one is too large, none is fetched.
        """
        found = {name: self.listed[name] for name in names if name in self.listed}
        for name, entry in found.items():
            size, limit = entry.lfs.size if entry.lfs else entry.size, LIMITS[name]
            if size > limit:
                raise AdapterError(f"{name} of {self} has {size} bytes; at most {limit} are accepted")
        self.store.mend()
        return {name: self._fetch(name, entry) for name, entry in found.items()}

    def _fetch(self, name: str, entry: "RepoFile") -> tuple[Path, bytes | memoryview]:
        blob = entry.lfs.sha256 if entry.lfs else entry.blob_id
        cached = any(map(os.path.lexists, (self.store.snapshots / self.commit / name, self.store.blobs / blob)))
        download = partial(
            self.session.api.hf_hub_download, self.repo_id, name, revision=self.commit, cache_dir=self.store.root
        )
        refused: MaskpackError | None = None
        for force in (False, True, True) if cached else (False, True):  # what the cache has already is no attempt
            path = Path(self.session.call(partial(download, force_download=force)))
            if path.parent.name != self.commit:  # where the client puts a file follows from what the server says
                other = path.parent.name
                raise HubError(f"{name} of {self} came as a file of commit {other!r}; check HF_ENDPOINT and proxy")
            try:
                content, refused = self.read(path), None
                if self.has(name, content):
                    return path, content
            except (AdapterError, HubError) as error:  # no file, or not even the beginning of an adapter
                refused = error
            self.store.discard(self.commit, name, blob)
        raise refused or CorruptAdapterError(
            f"{name} of {self} arrived twice with other bytes than the repository lists; try another network, or tell "
            "the owner"
        )

    def cached(self) -> Files:
        """Return path and bytes of the adapter's files in the cache; nothing is asked or compared."""
        paths = [self.store.snapshots / self.commit / name for name in FILES]
        return {path.name: (path, self.read(path)) for path in paths if os.path.lexists(path)}

    def read(self, path: Path) -> bytes | memoryview:
        """Read a file of the cache, which may be a link within it; HubError if it leads out of it."""
        root, target = os.path.realpath(self.store.root), os.path.realpath(path)
        if os.path.commonpath([root, target]) != root:
            raise HubError(f"{path} leads out of the cache {root}, to {target}; delete that entry and pull again")
        if path.name == MODEL_FILE:
            return read_model(path, path, self.look)
        return read_bytes(path, path, LIMITS[path.name])


@dataclass(frozen=True)
class PulledAdapter:
    """An adapter that was read and verified, with its folder or file, and repository and commit if it is of the Hub.

    Attributes:
        contents: the bytes of its files by name.
        signed: what was signed, if a signature was required.
    """

    path: Path
    adapter: Adapter = field(repr=False)
    contents: Contents = field(repr=False)
    commit: str | None = None
    repo_id: str | None = None
    signed: Signed | None = field(default=None, repr=False)

    @property
    def signed_by(self) -> tuple[str, ...]:
        """Ids of the trusted keys that signed it; none where no signature was required."""
        return self.signed.by if self.signed else ()

    @property
    def pinned(self) -> str:
        """The reference that always means these bytes: `user/name@commit`; the path of a local adapter."""
        return f"{self.repo_id}@{self.commit}" if self.repo_id else str(self.path)


class PullOptions(TypedDict, total=False):
    """Options of `open_adapter`, for functions that pass them on."""

    revision: str | None
    require_revision: bool
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    require_signature: str | os.PathLike[str] | None


@hides_secrets
def pull(
    ref: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None, **options: Unpack[PullOptions]
) -> PulledAdapter:
    """Fetch an adapter, verify it and say where it lies.

    The revision is resolved to a commit once, and only the files of an adapter are fetched, at that commit. A
    commit that is already in the cache costs no request.

    Args:
        ref: `user/name`, `user/name@revision`, a local folder or a `.safetensors` file.
        output: folder to copy the adapter into, instead of using it from the cache.
        require_revision: refuse what moves: a reference without a revision, and branches.
        token: as everywhere on the Hub: None for the login, False for none.
        local_files_only: never ask the Hub.
        require_signature: PEM file of a public key, folder of such files, or an identity NAME@https://ISSUER: one of
            these must have signed the adapter, for this repository, and none older than what was seen there before.
            None for what the environment variable MASKPACK_REQUIRE_SIGNATURE names, if it is set.

    Raises:
        AdapterError: if there is no such adapter, it is larger than accepted, or it is not pinned and has to be.
        CorruptAdapterError: if its bytes are not those that repository and config record. SignatureError: if it is
            not signed as required. StateError: if `output` holds something else.
        HubError: if the login or the permissions failed, or it is offline and not cached.
        HubUnreachableError: if the Hub did not answer, after several attempts.

    Example:
        print(pull("user/my-mask", output="./copy").commit)
    """
    pulled = open_adapter(ref, **options)
    if output is None:
        return pulled
    target = Path(output).expanduser()
    write_files(pulled.contents, target)
    return replace(pulled, path=target / MODEL_FILE if pulled.path.suffix == ".safetensors" else target)


@hides_secrets
def open_adapter(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    require_revision: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    require_signature: str | os.PathLike[str] | None = None,
) -> PulledAdapter:
    """Fetch, read and verify an adapter, opening each file once. Arguments and errors are those of `pull`."""
    reference, keys = parse_reference(ref, revision), trusted_keys(require_signature)
    if reference.path is not None:
        return open_local(reference.path, keys)
    session = Session(f"pull {reference}", token, reference)
    store = RepositoryCache(str(reference.repo_id), cache_dir)
    offline = local_files_only or session.offline
    if require_revision:
        _check_is_no_branch(session, reference, offline)
    snapshot = Snapshot(session, store, _resolve(session, reference, store, offline), look=keys is None)
    found = _opened_at(snapshot, offline, keys)
    if keys is not None and found.signed is not None:
        check_newest(found.signed, keys, reference, snapshot.commit)
    return found


def earlier_adapters(newest: Adapter, **options: Unpack[PullOptions]) -> Iterator[Adapter]:
    """Yield the adapters at the commits before that of a pulled one, newest first.

    Each is one request, and none if it is in the cache; with a signature it is a whole pull. It ends before the first
    commit without an adapter. Commits that left the adapter as it was are passed over.
    """
    reference, options = parse_reference(newest.pinned), {**options, "revision": None}
    session = Session(f"list the versions of {reference.repo_id}", options.get("token"), reference)
    repo_id, revision, last = str(reference.repo_id), reference.revision, newest.digest
    for commit in session.call(lambda: session.api.list_repo_commits(repo_id, revision=revision))[1:]:
        try:
            found = _version(session, commit.commit_id, options)
        except CorruptAdapterError:
            raise
        except AdapterError:
            return
        if found.digest != last:
            yield found
        last = found.digest


def _version(session: Session, commit: str, options: PullOptions) -> Adapter:
    """Return the adapter at a commit from its model file alone, which has its own digests; it stays in the cache."""
    repo_id, name = str(session.reference and session.reference.repo_id), MODEL_FILE
    snapshot = Snapshot(session, RepositoryCache(repo_id, options.get("cache_dir")), commit)
    path, signed = snapshot.store.snapshots / commit / name, trusted_keys(options.get("require_signature")) is not None
    there, found = os.path.lexists(path), None
    with suppress(AdapterError, HubError):  # a damaged file is fetched again by what follows
        found = parse_adapter(memoryview(snapshot.read(path)), path) if there and not signed else None
    if found is None:
        if there or signed or options.get("local_files_only") or session.offline:
            return open_adapter(f"{repo_id}@{commit}", **options).adapter
        content = session.call(partial(session.content, repo_id, name, commit, LIMITS[name]))
        found = parse_adapter(memoryview(content), path)
        with suppress(OSError, MaskpackError):
            write_file(path, content)
    found.pinned = f"{repo_id}@{commit}"
    return found


def open_local(path: Path, keys: Keys | None = None) -> PulledAdapter:
    """Read and verify an adapter on this disk: a folder, or a model file alone; with `keys`, one of them signed it."""
    alone = path.suffix == ".safetensors" and not path.is_dir()  # a whole adapter, which carries its own digests
    if not (path.is_file() if alone else path.is_dir()):
        state = "is not a folder" if path.exists() and not alone else "does not exist"
        what = "an adapter's model file" if alone else f"a folder with {MODEL_FILE} and {CONFIG_FILE}"
        raise AdapterError(f"{path} {state}; expected {what}")
    files = read_files(path, look=keys is None)
    model = files[MODEL_FILE][0]
    for name, content in read_signatures(model).items():
        files[name] = signature_path(model, name), content
    if not alone and (card := read_card(path)) is not None:
        files[CARD_FILE] = path / CARD_FILE, card
    if keys is not None and not alone:
        others = sorted({one.name for one in path.glob("maskpack_*")} - set(FILES))
        if others:
            raise SignatureError(f"{path} has the unknown file {others[0]!r}, which nobody signed; remove it")
    adapter, signed = parse_signed(files, keys, None, alone)
    ordered = {name: files[name][1] for name in FILES if name in files}
    return PulledAdapter(path, adapter, ordered, signed=signed)


def _check_is_no_branch(session: Session, reference: Reference, offline: bool) -> None:
    """Refuse a reference that may mean other bytes tomorrow: no revision, a branch, a pull request."""
    if reference.is_pinned:
        return
    name, why = reference.revision, "is no tag and no commit, so it can change, and a revision is required"
    if name is None:
        why = "names no revision, and one is required"
    elif offline:
        why = "may be a branch, and the Hub may not be asked"
    else:
        refs = session.refs(str(reference.repo_id))
        if name in {tag.name for tag in refs.tags} and name not in {branch.name for branch in refs.branches}:
            return
    raise AdapterError(f"{reference} {why}; give a tag or commit, as `maskpack pull {reference.repo_id}` prints it")


def _resolve(session: Session, reference: Reference, store: RepositoryCache, offline: bool) -> str:
    """Return the commit that a reference means now; if the Hub does not answer, the one that it meant last time."""
    if reference.is_pinned:
        return str(reference.revision)
    revision = reference.revision or "main"
    store.mend(revision)
    known = store.known(revision)
    if offline:
        if known is None:
            raise HubError(f"cannot pull {reference}: {OFFLINE}")
        return known
    try:
        answer = session.call(lambda: session.info(store.repo_id, reference.revision), 2 if known else ATTEMPTS)
    except HubUnreachableError as error:
        if known is None:
            raise
        log.warning("%s; going on with commit %s, which the cache knows", error, known)
        return known
    commit = str(answer.sha)
    if commit != known and COMMIT.fullmatch(commit):
        try:
            store.note(revision, commit)
        except (OSError, MaskpackError) as error:
            log.warning("the cache cannot remember commit %s for a time without a Hub: %s", commit, error)
    log.info("%s is at commit %s", reference, commit)
    return commit


def _opened_at(snapshot: Snapshot, offline: bool, keys: Keys | None) -> PulledAdapter:
    """Return the adapter from the cache if it is there whole; a damaged one is fetched, unless offline."""
    try:
        found = snapshot.cached()
        # the model is fetched last, so where it is cached, the others are too or do not exist
        if MODEL_FILE in found and CONFIG_FILE in found:
            return _opened(snapshot, found, keys)
    except (AdapterError, HubError):
        if offline:
            raise
    if offline:
        raise HubError(f"cannot {snapshot.session.task}: commit {snapshot.commit[:12]}: {OFFLINE}")
    missing = [name for name in (MODEL_FILE, CONFIG_FILE) if name not in snapshot.listed]
    if missing:
        raise AdapterError(
            f"{snapshot} is no maskpack adapter: it lacks {' and '.join(missing)}; check the name and revision"
        )
    return _opened(snapshot, snapshot.fetch(*snapshot.listed), keys)


def _opened(snapshot: Snapshot, files: Files, keys: Keys | None) -> PulledAdapter:
    adapter, signed = parse_signed(files, keys, snapshot.repo_id)
    folder, contents = files[MODEL_FILE][0].parent, {name: one for name, (_, one) in files.items()}
    pulled = PulledAdapter(folder, adapter, contents, snapshot.commit, snapshot.repo_id, signed)
    adapter.pinned = pulled.pinned
    return pulled
