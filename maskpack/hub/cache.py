"""What is cached from the Hub."""

from dataclasses import dataclass
from pathlib import Path

from ..adapter.fields import PATH, Fields
from ..adapter.read import CONFIG_FILE, MAX_CONFIG, MODEL_FILE, read_bytes
from ..errors import AdapterError, StateError
from ..tensorheader import strict_json

MOST = 1 << 53  # weights or bytes that a config file may state; more is no honest number


@dataclass(frozen=True)
class CachedAdapter:
    """An adapter in the Hub's cache, once for each commit that is there.

    Attributes:
        size: bytes of its files. path: the folder of that commit.
        base, density, bits_per_weight: as the config file says, over all sets; None if it cannot be read. Nothing of
            the masks is read or verified here.
    """

    repo_id: str
    commit: str
    size: int
    path: Path
    base: str | None = None
    density: float | None = None
    bits_per_weight: float | None = None


def cached_adapters(cache_dir: str | Path | None = None) -> list[CachedAdapter]:
    """Return the adapters in the Hub's cache, sorted by name and commit; none if there is no cache.

    Raises:
        StateError: if the cache cannot be read.
    """
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        scanned = scan_cache_dir(cache_dir or constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    except (OSError, ValueError) as error:
        raise StateError(
            f"cannot read the Hub's cache: {error}; check what HF_HOME or HF_HUB_CACHE name, and its permissions"
        ) from error
    found = []
    for repo in scanned.repos:
        for revision in repo.revisions:
            folder = Path(revision.snapshot_path)
            if repo.repo_type == "model" and any(folder / MODEL_FILE == file.file_path for file in revision.files):
                about = _about(folder / CONFIG_FILE)
                found.append(CachedAdapter(repo.repo_id, revision.commit_hash, revision.size_on_disk, folder, *about))
    return sorted(found, key=lambda one: (one.repo_id, one.commit))


def _about(config: Path) -> tuple[str, float, float] | tuple[None, None, None]:
    """Return base, density and bits per weight from a config file, which a stranger may have written."""
    try:
        about = Fields.of(strict_json(read_bytes(config, config, MAX_CONFIG), CONFIG_FILE), CONFIG_FILE)
        base = about.object("base").text("id")
        sets = [about.object("sets").object(name) for name in about.object("sets").members]
        weights, kept = (sum(_count(one, key) for one in sets) for key in ("weights", "kept"))
        coded = sum(_count(one, key) for one in sets for key in ("payload_bytes", "table_bytes"))
    except AdapterError:
        return None, None, None
    if PATH.match(base) or not 0 < weights >= kept:
        return None, None, None
    return base, kept / weights, 8 * coded / weights


def _count(one: Fields, key: str) -> int:
    value = one.get(key)
    if type(value) is not int or not 0 <= value < MOST:
        raise one.refuse(key, f"an integer from 0 to {MOST - 1}")
    return value
