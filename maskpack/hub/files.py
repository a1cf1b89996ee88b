"""The files of an adapter in a Hub repository at a commit: listed, fetched, read once and compared."""

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.read import MODEL_FILE, read_bytes, read_model
from ..errors import AdapterError, CorruptAdapterError, HubError, MaskpackError
from .cache import RepositoryCache
from .client import Session
from .folder import LIMITS, check_limit, git_id
from .reference import COMMIT

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
