"""What is cached from the Hub."""

from dataclasses import dataclass
from pathlib import Path

from ..adapter.read import MODEL_FILE


@dataclass(frozen=True)
class CachedAdapter:
    """An adapter in the Hub's cache.

    Attributes:
        size: bytes of its files. path: the folder of that commit.
    """

    repo_id: str
    commit: str
    size: int
    path: Path


def cached_adapters(cache_dir: str | Path | None = None) -> list[CachedAdapter]:
    """Return the adapters in the Hub's cache, sorted by name and commit; none if there is no cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        scanned = scan_cache_dir(cache_dir)
    except CacheNotFound:
        return []
    found = [
        CachedAdapter(repo.repo_id, revision.commit_hash, revision.size_on_disk, Path(revision.snapshot_path))
        for repo in scanned.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        if any(file.file_name == MODEL_FILE for file in revision.files)
    ]
    return sorted(found, key=lambda one: (one.repo_id, one.commit))
