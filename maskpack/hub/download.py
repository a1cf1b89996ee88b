"""Pull: from a reference to a verified adapter, whose bytes are read once."""

import logging
import os
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from ..adapter.adapter import Adapter
from ..adapter.file import CARD_FILE
from ..adapter.read import CONFIG_FILE, MODEL_FILE, check_config, parse_adapter, read_file, read_folder
from ..errors import AdapterError, HubError, HubUnreachableError, MaskpackError
from ..redact import hides_secrets
from .cache import RepositoryCache
from .client import ATTEMPTS, TIMEOUT, Session
from .files import Snapshot
from .folder import FILES, Contents, read_card, write_files
from .reference import Reference, parse_reference
from .refs import check_is_no_branch

log = logging.getLogger("maskpack")


@dataclass(frozen=True)
class PulledAdapter:
    """Where an adapter lies and what it came from.

    Attributes:
        path: the adapter folder, or the model file where a single file was referred to.
        commit: the full commit id; None for a local adapter.
        repo_id: the Hub repository; None for a local adapter.
    """

    path: Path
    commit: str | None = None
    repo_id: str | None = None

    @property
    def pinned(self) -> str:
        """The reference that always means these bytes: `user/name@commit`; the path of a local adapter."""
        return f"{self.repo_id}@{self.commit}" if self.repo_id else str(self.path)


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that was read and verified, and the bytes of its files by name."""

    pulled: PulledAdapter
    adapter: Adapter
    contents: Contents


class PullOptions(TypedDict, total=False):
    """Options of `open_adapter`, for functions that pass them on."""

    revision: str | None
    require_revision: bool
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool


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

    Raises:
        AdapterError: if there is no such adapter, it is larger than accepted, or it is not pinned and has to be.
        CorruptAdapterError: if its bytes are not those that the repository and the config file record.
        HubError: if the login or the permissions failed, or it is offline and not cached.
        HubUnreachableError: if the Hub did not answer, after several attempts.
        StateError: if `output` holds something else.
    """
    opened = open_adapter(ref, **options)
    found = opened.pulled
    if output is None:
        return found
    target = Path(output).expanduser()
    write_files(opened.contents, target)
    path = target / MODEL_FILE if found.path.suffix == ".safetensors" else target
    return PulledAdapter(path, found.commit, found.repo_id)


@hides_secrets
def open_adapter(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    require_revision: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> OpenedAdapter:
    """Fetch, read and verify an adapter: every file is opened once. Arguments and errors as of `pull`."""
    reference = parse_reference(ref, revision)
    if reference.path is not None:
        return open_local(reference.path)
    session = Session(f"pull {reference}", token, reference)
    cache = None if cache_dir is None else Path(cache_dir)
    offline = local_files_only or session.offline
    if require_revision:
        check_is_no_branch(session, reference, offline)
    snapshot = Snapshot(session, str(reference.repo_id), _resolve(session, reference, cache, offline), cache)
    found = _from_cache(snapshot, offline)
    if found is None and offline:
        raise HubError(
            f"cannot pull {reference}: commit {snapshot.commit[:12]} is not in the cache and the Hub may not be asked; "
            "go online (unset HF_HUB_OFFLINE, leave out local_files_only) once"
        )
    return found or _download(snapshot)


def open_local(path: Path) -> OpenedAdapter:
    """Read and verify an adapter on this disk: a folder, or a model file alone. Raises as `read_adapter`."""
    if path.suffix == ".safetensors" and not path.is_dir():
        # the file alone is a whole adapter, which carries its own digests
        if not path.is_file():
            raise AdapterError(f"{path} does not exist; expected an adapter's model file")
        adapter = read_file(path, path)
        return OpenedAdapter(PulledAdapter(path), adapter, {MODEL_FILE: adapter.content})
    if not path.is_dir():
        state = "is not a folder" if path.exists() else "does not exist"
        raise AdapterError(f"{path} {state}; expected a folder with {MODEL_FILE} and {CONFIG_FILE}")
    adapter, config = read_folder(path)
    found = {CARD_FILE: read_card(path), CONFIG_FILE: config, MODEL_FILE: adapter.content}
    return OpenedAdapter(PulledAdapter(path), adapter, {name: one for name, one in found.items() if one is not None})


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


def _from_cache(snapshot: Snapshot, offline: bool) -> OpenedAdapter | None:
    """Return the adapter if the cache has it whole; a damaged one is an error only where it cannot be repaired."""
    try:
        # the model is fetched last, so where it is cached, the card is too or does not exist
        found = {name: snapshot.cached(name) for name in FILES}
        if found[MODEL_FILE] is None or found[CONFIG_FILE] is None:
            return None
        return _verified(snapshot, {name: one for name, one in found.items() if one is not None})
    except (AdapterError, HubError):
        if offline:
            raise
        return None


def _download(snapshot: Snapshot) -> OpenedAdapter:
    listed = snapshot.listed(*FILES)
    missing = [name for name in (MODEL_FILE, CONFIG_FILE) if name not in listed]
    if missing:
        raise AdapterError(
            f"{snapshot} is no maskpack adapter: it lacks {' and '.join(missing)}; check the name and revision"
        )
    return _verified(snapshot, snapshot.fetch(listed[name] for name in FILES if name in listed))


def _verified(snapshot: Snapshot, files: dict[str, tuple[Path, bytes | memoryview]]) -> OpenedAdapter:
    path, content = files[MODEL_FILE]
    adapter = parse_adapter(memoryview(content), path)
    config_path, config = files[CONFIG_FILE]
    check_config(bytes(config), config_path, adapter)
    pulled = PulledAdapter(path.parent, snapshot.commit, snapshot.repo_id)
    adapter.pinned = pulled.pinned
    return OpenedAdapter(pulled, adapter, {name: one for name, (_, one) in files.items()})
