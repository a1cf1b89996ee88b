"""Pull: from a reference to a verified adapter on this disk."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.read import CONFIG_FILE, MODEL_FILE
from ..errors import AdapterError, CorruptAdapterError, HubError
from .client import Session
from .folder import FILES, Digest, check_folder, check_limit, check_record, copy_files, digest
from .reference import Reference, parse_reference

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


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


def pull(
    ref: str | os.PathLike[str],
    *,
    revision: str | None = None,
    output: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PulledAdapter:
    """Fetch an adapter, verify it and say where it lies.

    The revision is resolved to a commit once, and only the files of an adapter are fetched, at that commit. A
    commit that is already in the cache costs no request.

    Args:
        ref: `user/name`, `user/name@revision`, a local folder or a `.safetensors` file.
        revision: branch, tag or commit on the Hub.
        output: folder to copy the adapter into, instead of using it from the cache.
        token: as everywhere on the Hub: None for the login, False for none.
        cache_dir: another cache than the Hub's.
        local_files_only: never ask the Hub.

    Raises:
        AdapterError: if there is no such adapter, or it is larger than accepted.
        CorruptAdapterError: if its bytes are not those that the repository and the config file record.
        HubError: if the network, the login or the permissions failed, or it is offline and not cached.
        StateError: if `output` holds something else.
    """
    reference = parse_reference(ref, revision)
    if reference.path is not None:
        found = _find_local(reference.path)
    else:
        session = Session(f"pull {reference}", token, reference)
        cache = None if cache_dir is None else Path(cache_dir)
        found = _find_on_hub(session, reference, cache, local_files_only or session.offline)
    if output is None:
        return found
    target = Path(output).expanduser()
    if found.path.is_file():
        copy_files({MODEL_FILE: found.path}, target)
        return PulledAdapter(target / MODEL_FILE)
    copy_files({name: found.path / name for name in FILES if (found.path / name).is_file()}, target)
    return PulledAdapter(target, found.commit, found.repo_id)


def _find_local(path: Path) -> PulledAdapter:
    if path.suffix == ".safetensors" and not path.is_dir():
        # the file alone is a whole adapter, which carries its own digests; they are checked when it is read
        if not path.is_file():
            raise AdapterError(f"{path} does not exist; expected an adapter's model file")
        check_limit(MODEL_FILE, path.stat().st_size, str(path.parent))
        return PulledAdapter(path)
    check_folder(path)
    return PulledAdapter(path)


def _find_on_hub(session: Session, reference: Reference, cache: Path | None, offline: bool) -> PulledAdapter:
    repo_id = str(reference.repo_id)
    if reference.is_pinned:
        commit = str(reference.revision)
    else:
        resolved = session.call(
            lambda: session.api.resolve_revision(
                repo_id, revision=reference.revision, cache_dir=cache, local_files_only=offline
            )
        )
        commit = resolved.resolved
    folder = _find_cached(repo_id, commit, cache, offline)
    if folder is None and offline:
        raise HubError(
            f"cannot pull {reference}: commit {commit[:12]} is not in the cache and the Hub may not be asked; "
            "go online (unset HF_HUB_OFFLINE, leave out local_files_only) once"
        )
    return PulledAdapter(folder or _download(session, repo_id, commit, cache), commit, repo_id)


def _find_cached(repo_id: str, commit: str, cache: Path | None, offline: bool) -> Path | None:
    """Return the snapshot folder if it is whole; a damaged one is an error only where it cannot be repaired."""
    from huggingface_hub import try_to_load_from_cache

    # the model is fetched last, so where it is cached, the card is too or does not exist
    model = try_to_load_from_cache(repo_id, MODEL_FILE, cache_dir=cache, revision=commit)
    config = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=cache, revision=commit)
    if not isinstance(model, str) or not isinstance(config, str):
        return None
    try:
        check_record(Path(config), digest(Path(model)), f"{repo_id} in the cache")
    except AdapterError:
        if offline:
            raise
        return None
    return Path(model).parent


def _download(session: Session, repo_id: str, commit: str, cache: Path | None) -> Path:
    listed = list_files(session, repo_id, commit)
    where = f"{repo_id}@{commit[:12]}"
    missing = [name for name in (MODEL_FILE, CONFIG_FILE) if name not in listed]
    if missing:
        raise AdapterError(
            f"{where} is no maskpack adapter: it lacks {' and '.join(missing)}; check the name and revision"
        )
    for name, entry in listed.items():
        check_limit(name, size_of(entry), where)
    fetched = {name: fetch(session, repo_id, listed[name], commit, cache) for name in FILES if name in listed}
    check_record(fetched[CONFIG_FILE][0], fetched[MODEL_FILE][1], where)
    return fetched[MODEL_FILE][0].parent


def list_files(session: Session, repo_id: str, commit: str) -> dict[str, "RepoFile"]:
    """Return those of an adapter's files that a commit has, with sizes and digests."""
    from huggingface_hub.hf_api import RepoFile

    found = session.call(lambda: session.api.get_paths_info(repo_id, list(FILES), revision=commit))
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile) and entry.path in FILES}


def size_of(entry: "RepoFile") -> int:
    """Return the size of a listed file's content."""
    return entry.lfs.size if entry.lfs else entry.size


def is_same(entry: "RepoFile", content: Digest) -> bool:
    """Tell whether a content is the one that the repository lists."""
    if entry.lfs:
        return (entry.lfs.size, entry.lfs.sha256) == (content.size, content.sha256)
    return (entry.size, entry.blob_id) == (content.size, content.git)


def fetch(session: Session, repo_id: str, entry: "RepoFile", commit: str, cache: Path | None) -> tuple[Path, Digest]:
    """Bring a file into the cache and verify it; the client compares nothing but the length.

    Raises:
        CorruptAdapterError: if a second download differs as well.
    """
    for force in (False, True):
        download = partial(
            session.api.hf_hub_download,
            repo_id,
            entry.path,
            revision=commit,
            cache_dir=cache,
            force_download=force,
        )
        path = Path(session.call(download))
        content = digest(path)
        if is_same(entry, content):
            return path, content
    raise CorruptAdapterError(
        f"{entry.path} of {repo_id}@{commit[:12]} arrived twice with other bytes than the repository lists; "
        "it is damaged on the way or on the server: try another network, or tell the owner"
    )
