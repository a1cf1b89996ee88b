"""Pull: from a reference to a verified adapter, whose bytes are read once."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from ..adapter.card import CARD_FILE
from ..adapter.read import CONFIG_FILE, MODEL_FILE, Adapter, read_bytes, read_files, read_model
from ..adapter.signature import (
    Contents,
    Keys,
    Signed,
    parse_signed,
    read_signatures,
    signature_path,
    trusted_keys,
)
from ..errors import AdapterError, CorruptAdapterError, HubError, HubUnreachableError, MaskpackError, SignatureError
from ..network import hides_secrets
from .cache import RepositoryCache, check_newest
from .client import ATTEMPTS, TIMEOUT, Session, check_is_no_branch
from .reference import COMMIT, FILES, LIMITS, Reference, check_limit, git_id, parse_reference, read_card, write_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


class Snapshot:
    """A repository at one commit.

    Args:
        cache: another cache than the Hub's.

    Attributes:
        look: whether the model file's beginning is looked at when it is read; see `read_model`.

    Raises:
        HubError: if what the Hub or the cache gave is no commit; it would become part of a path.
    """

    def __init__(self, session: Session, repo_id: str, commit: str, cache: Path | None = None) -> None:
        if not COMMIT.fullmatch(commit):
            raise HubError(
                f"{repo_id} is said to be at commit {commit!r}, expected 40 hexadecimal digits; check HF_ENDPOINT, "
                "firewall and proxy, or who can write to the cache"
            )
        self.session, self.repo_id, self.commit, self.cache = session, repo_id, commit, cache
        self.look = True
        self.store = RepositoryCache(repo_id, cache)

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.commit[:12]}"

    def listed(self, *names: str) -> dict[str, "RepoFile"]:
        """Return those of some files that are there, with sizes and digests; other names are never looked at."""
        from huggingface_hub.hf_api import RepoFile

        api = self.session.api
        found = self.session.call(lambda: api.get_paths_info(self.repo_id, list(names), revision=self.commit))
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile) and entry.path in names}

    def fetch(self, entries: "Iterable[RepoFile]") -> dict[str, tuple[Path, bytes | memoryview]]:
        """Bring files into the cache; return path and bytes of each by name. The bytes are those that are listed.

        The client compares nothing but the length, and takes what it finds in the cache: a file that differs, or
        cannot be read, is fetched a second time.

        Raises:
            AdapterError: if one is too large; then none is fetched. CorruptAdapterError: if one differs twice.
        """
        found = list(entries)
        for entry in found:
            check_limit(entry.path, size_of(entry), str(self))
        self.store.mend_folders(self.commit)
        self.store.clear_leftovers()
        return {entry.path: self._fetch(entry) for entry in found}

    def _fetch(self, entry: "RepoFile") -> tuple[Path, bytes | memoryview]:
        blob = entry.lfs.sha256 if entry.lfs else entry.blob_id
        refused: MaskpackError | None = None
        # what the cache has already is no attempt
        for force in (False, True, True) if self.store.has(self.commit, entry.path, blob) else (False, True):
            path = self._download(entry.path, force)
            try:
                content = self._read(path)
                if is_same(entry, content):
                    return path, content
                refused = None
            except (AdapterError, HubError) as error:  # no file, or not even the beginning of an adapter
                refused = error
            self.store.discard(self.commit, entry.path, blob)
        raise refused or CorruptAdapterError(
            f"{entry.path} of {self} arrived twice with other bytes than the repository lists; it is damaged on the "
            "way or on the server: try another network, or tell the owner"
        )

    def cached(self, name: str) -> tuple[Path, bytes | memoryview] | None:
        """Return path and bytes of a file in the cache, or None if it is not there; nothing is asked or compared."""
        path = self.store.entry(self.commit, name)
        return (path, self._read(path)) if os.path.lexists(path) else None

    def _download(self, name: str, force: bool) -> Path:
        download: Callable[[], str] = partial(
            self.session.api.hf_hub_download,
            self.repo_id,
            name,
            revision=self.commit,
            cache_dir=self.cache,
            force_download=force,
        )
        path = Path(self.session.call(download))
        if path.parent.name != self.commit:  # where the client puts a file follows from what the server says
            raise HubError(
                f"{name} of {self} was answered as a file of commit {path.parent.name!r}; check HF_ENDPOINT, firewall "
                "and proxy"
            )
        return path

    def _read(self, path: Path) -> bytes | memoryview:
        self._check_inside(path)
        return (
            read_model(path, path, self.look) if path.name == MODEL_FILE else read_bytes(path, path, LIMITS[path.name])
        )

    def _check_inside(self, path: Path) -> None:
        """Refuse a cache entry that leads out of the cache: links within it are normal, others were planted."""
        root = os.path.realpath(self.store.root)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise HubError(
                f"{path} leads out of the cache {root}, to {os.path.realpath(path)}; delete that entry and pull again"
            )


def size_of(entry: "RepoFile") -> int:
    """Return the size of a listed file's content."""
    return entry.lfs.size if entry.lfs else entry.size


def is_same(entry: "RepoFile", content: bytes | memoryview) -> bool:
    """Tell whether a content is the one that the repository lists."""
    if size_of(entry) != len(content):
        return False
    if entry.lfs:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == git_id(content)


log = logging.getLogger("maskpack")

Files = dict[str, tuple[Path, bytes | memoryview]]  # path and bytes of each by name


@dataclass(frozen=True)
class PulledAdapter:
    """Where an adapter lies and what it came from.

    Attributes:
        path: the adapter folder, or the model file where a single file was referred to.
        commit: the full commit id; None for a local adapter.
        repo_id: the Hub repository; None for a local adapter.
        signed_by: ids of the trusted keys that signed it; none where no signature was required.
    """

    path: Path
    commit: str | None = None
    repo_id: str | None = None
    signed_by: tuple[str, ...] = ()

    @property
    def pinned(self) -> str:
        """The reference that always means these bytes: `user/name@commit`; the path of a local adapter."""
        return f"{self.repo_id}@{self.commit}" if self.repo_id else str(self.path)


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that was read and verified, and the bytes of its files by name.

    Attributes:
        signed: what was signed, and by whom; None where no signature was required.
    """

    pulled: PulledAdapter
    adapter: Adapter
    contents: Contents
    signed: Signed | None = None


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
        revision: branch, tag or commit on the Hub.
        require_revision: refuse what moves: a reference without a revision, and branches.
        token: as everywhere on the Hub: None for the login, False for none.
        cache_dir: another cache than the Hub's.
        local_files_only: never ask the Hub.
        require_signature: PEM file of a public key, folder of such files, or an identity NAME@https://ISSUER: one of
            these must have signed the adapter, for this repository, and none older than what was seen there before.
            None for what the environment variable MASKPACK_REQUIRE_SIGNATURE names; where that is not set, signatures
            are not looked at.

    Raises:
        AdapterError: if there is no such adapter, it is larger than accepted, or it is not pinned and has to be.
        CorruptAdapterError: if its bytes are not those that the repository and the config file record.
        HubError: if the login or the permissions failed, or it is offline and not cached.
        HubUnreachableError: if the Hub did not answer, after several attempts.
        SignatureError: if it is not signed as required.
        StateError: if `output` holds something else.
    """
    opened = open_adapter(ref, **options)
    found = opened.pulled
    if output is None:
        return found
    target = Path(output).expanduser()
    write_files(opened.contents, target)
    path = target / MODEL_FILE if found.path.suffix == ".safetensors" else target
    return replace(found, path=path)


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
) -> OpenedAdapter:
    """Fetch, read and verify an adapter: every file is opened once. Arguments and errors as of `pull`."""
    reference, keys = parse_reference(ref, revision), trusted_keys(require_signature)
    if reference.path is not None:
        return open_local(reference.path, keys)
    session = Session(f"pull {reference}", token, reference)
    cache = None if cache_dir is None else Path(cache_dir)
    offline = local_files_only or session.offline
    if require_revision:
        check_is_no_branch(session, reference, offline)
    snapshot = Snapshot(session, str(reference.repo_id), _resolve(session, reference, cache, offline), cache)
    snapshot.look = keys is None
    found = _from_cache(snapshot, offline, keys)
    if found is None and offline:
        raise HubError(
            f"cannot pull {reference}: commit {snapshot.commit[:12]} is not in the cache and the Hub may not be asked; "
            "go online (unset HF_HUB_OFFLINE, leave out local_files_only) once"
        )
    found = found or _download(snapshot, keys)
    if keys is not None and found.signed is not None:
        check_newest(found.signed, keys, reference, snapshot.commit)
    return found


def open_local(path: Path, keys: Keys | None = None) -> OpenedAdapter:
    """Read and verify an adapter on this disk: a folder, or a model file alone. Raises as `read_adapter`.

    Args:
        keys: one of which must have signed it; None if that is not required.
    """
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
    return OpenedAdapter(PulledAdapter(path, signed_by=signed.by if signed else ()), adapter, ordered, signed)


def _resolve(session: Session, reference: Reference, cache: Path | None, offline: bool) -> str:
    """Return the commit that a reference means now; if the Hub does not answer, the one that it meant last time."""
    if reference.is_pinned:
        return str(reference.revision)
    repo_id, revision, api = str(reference.repo_id), reference.revision, session.api
    RepositoryCache(repo_id, cache).mend_ref(revision or "main")

    def known() -> str:
        return api.resolve_revision(repo_id, revision=revision, cache_dir=cache, local_files_only=True).resolved

    if offline:
        return session.call(known, local=True)
    try:
        remembered = session.call(known, attempts=1, local=True)
    except MaskpackError:
        remembered = None
    try:
        info = session.call(
            lambda: api.model_info(repo_id, revision=revision, timeout=TIMEOUT), attempts=2 if remembered else ATTEMPTS
        )
    except HubUnreachableError as error:
        if remembered is None:
            raise
        log.warning("%s; going on with commit %s, which the cache knows", error, remembered)
        return remembered
    commit = str(info.sha)
    if commit != remembered:
        # the client writes down what it is told, for a time without a Hub; it is told what was answered just now
        told = copy(api)
        told.repo_info = lambda *_, **__: info  # type: ignore[method-assign]
        try:
            session.call(lambda: told.resolve_revision(repo_id, revision=revision, cache_dir=cache))
        except HubError as error:
            log.warning("the cache cannot remember commit %s for a time without a Hub: %s", commit, error)
    log.info("%s is at commit %s", reference, commit)
    return commit


def _from_cache(snapshot: Snapshot, offline: bool, keys: Keys | None) -> OpenedAdapter | None:
    """Return the adapter if the cache has it whole; a damaged one is an error only where it cannot be repaired."""
    try:
        # the model is fetched last, so where it is cached, the others are too or do not exist
        found = {name: snapshot.cached(name) for name in FILES}
        if found[MODEL_FILE] is None or found[CONFIG_FILE] is None:
            return None
        return _opened(snapshot, {name: one for name, one in found.items() if one is not None}, keys)
    except (AdapterError, HubError):
        if offline:
            raise
        return None


def _download(snapshot: Snapshot, keys: Keys | None) -> OpenedAdapter:
    listed = snapshot.listed(*FILES)
    missing = [name for name in (MODEL_FILE, CONFIG_FILE) if name not in listed]
    if missing:
        raise AdapterError(
            f"{snapshot} is no maskpack adapter: it lacks {' and '.join(missing)}; check the name and revision"
        )
    return _opened(snapshot, snapshot.fetch(listed[name] for name in FILES if name in listed), keys)


def _opened(snapshot: Snapshot, files: Files, keys: Keys | None) -> OpenedAdapter:
    adapter, signed = parse_signed(files, keys, snapshot.repo_id)
    by = signed.by if signed else ()
    pulled = PulledAdapter(files[MODEL_FILE][0].parent, snapshot.commit, snapshot.repo_id, by)
    adapter.pinned = pulled.pinned
    return OpenedAdapter(pulled, adapter, {name: one for name, (_, one) in files.items()}, signed)
