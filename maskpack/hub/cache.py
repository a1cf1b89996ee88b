"""The Hub's cache: what it holds, damage and leftovers that are cleared away, and counters of signatures."""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.fields import PATH, TEXT, Check, integer, record, values
from ..adapter.read import CONFIG_FILE, MAX_CONFIG, MODEL_FILE, read_bytes
from ..adapter.signature import Keys, Signed
from ..errors import AdapterError, MaskpackError, SignatureError, StateError
from ..safetensors_io import lock, strict_json, write_file
from .reference import COMMIT, Reference

MOST = 1 << 53  # weights or bytes that a config file may state; more is no honest number
COUNTERS = "maskpack_counters.json"
MAX_COUNTERS = 16 << 20  # bytes; a hundred thousand names fit

log = logging.getLogger("maskpack")


@dataclass(frozen=True)
class CachedAdapter:
    """An adapter in the Hub's cache, once for each commit that is there, with the bytes of its files.

    Base, density and bits per weight are what the config file says, over all sets; None if it cannot be read.
    """

    repo_id: str
    commit: str
    size: int
    path: Path
    base: str | None = None
    density: float | None = None
    bits_per_weight: float | None = None


def cached_adapters(cache_dir: str | Path | None = None) -> list[CachedAdapter]:
    """Return the adapters in the Hub's cache, sorted by name and commit; StateError if it cannot be read."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(cache_dir or constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    except (OSError, ValueError) as error:
        raise StateError(
            f"cannot read the Hub's cache: {error}; check HF_HOME, HF_HUB_CACHE and permissions"
        ) from error
    found = []
    for repo in repositories:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            folder = Path(revision.snapshot_path)
            if any(file.file_path == folder / MODEL_FILE for file in revision.files):
                about = _about(folder / CONFIG_FILE)
                found.append(CachedAdapter(repo.repo_id, revision.commit_hash, revision.size_on_disk, folder, *about))
    return sorted(found, key=lambda one: (one.repo_id, one.commit))


def _about(config: Path) -> tuple[str, float, float] | tuple[None, None, None]:
    """Return base, density and bits per weight from a config file, which a stranger may have written."""
    try:
        one = values(record(dict.fromkeys(("weights", "kept", "payload_bytes"), integer(0, MOST - 1))))
        about = _read(config, MAX_CONFIG, record({"base": record({"id": TEXT}), "sets": one}))
        base, sets = about["base"]["id"], about["sets"].values()
        weights, kept, coded = (sum(one[key] for one in sets) for key in ("weights", "kept", "payload_bytes"))
    except AdapterError:
        return None, None, None
    if PATH.match(base) or not 0 < weights >= kept:
        return None, None, None
    return base, kept / weights, 8 * coded / weights


def _read(path: Path, limit: int, check: Check) -> Any:
    return check(strict_json(read_bytes(path, path, limit), str(path)), str(path))


class RepositoryCache:
    """The cache of one repository, in another folder than the Hub's if `root` is given.

    Clearing never raises: where it is not allowed, the download after it says why. Nothing outside of the cache is
    ever removed, and nothing through a link.
    """

    def __init__(self, repo_id: str, root: str | os.PathLike[str] | None = None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self.repo_id, self.root = repo_id, Path(root or constants.HF_HUB_CACHE).expanduser().absolute()
        name = repo_folder_name(repo_id=repo_id, repo_type="model")
        self.folder, self.locks = self.root / name, self.root / ".locks" / name
        self.blobs, self.snapshots, self.refs = (self.folder / one for one in ("blobs", "snapshots", "refs"))

    def known(self, revision: str) -> str | None:
        """Return the commit that a branch or tag meant when the Hub was last asked; None if none is noted."""
        with suppress(OSError):
            commit = (self.refs / revision).read_text(errors="replace") if (self.refs / revision).is_file() else ""
            return commit if COMMIT.fullmatch(commit) else None
        return None

    def note(self, revision: str, commit: str) -> None:
        """Note what a branch or tag means, as the client does. Raises OSError or StateError."""
        path = self.refs / revision
        if path.exists() and not path.is_file():
            _remove(path)
        write_file(path, commit)

    def mend(self, revision: str = "main") -> None:
        """Remove what stands where the cache needs a folder and is none, and unfinished downloads.

        A living process holds the lock of its download.
        """
        ways = [one for one in reversed((self.refs / revision).parents) if one.is_relative_to(self.folder)]
        for path in (*ways, self.blobs, self.snapshots, *self.snapshots.glob("*"), self.locks.parent, self.locks):
            if os.path.lexists(path) and not path.is_dir():
                _remove(path)
        with suppress(OSError):
            for path in self.blobs.glob("*.incomplete"):
                self.locks.mkdir(parents=True, exist_ok=True)
                with suppress(OSError), (self.locks / f"{path.name.partition('.')[0]}.lock").open("ab") as file:
                    if lock(file.fileno()):
                        _remove(path)

    def discard(self, commit: str, name: str, blob: str) -> None:
        """Remove a file of a commit and its bytes, even damaged ones, so that the next pull fetches them."""
        path, stores = (
            self.snapshots / commit / name,
            (self.blobs, self.root / "blobs"),
        )  # repositories share the second
        found = [path, self.blobs / blob, self.folder / f"trees/{commit}.json"]
        for _ in stores:
            if path.is_symlink():
                path = Path(os.path.normpath(path.parent / path.readlink()))
                found += [path] if any(path.is_relative_to(store) for store in stores) else []
        lockfile = self.locks / f"{blob}.lock"
        for path in found if lockfile.is_file() else (*found, lockfile):
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_newest(signed: Signed, keys: Keys, reference: Reference, commit: str) -> None:
    """Compare a signature's counter with the highest that was seen for this repository and revision; remember it.

    A commit that the reference itself names may be of any age. What was signed by keys that are not trusted any more
    does not count. Where the counter cannot be written down, that is a warning.
    """
    if reference.is_pinned:
        return
    name, counter = reference.branch, signed.statement.counter
    seen = highest(keys, name)
    if counter < seen:
        raise SignatureError(
            f"{name} has the signed version {counter} now, and {seen} was seen before: an older one was put in its "
            f"place. To use it nevertheless name its commit, {reference.repo_id}@{commit}; to forget it delete "
            f"{_counters()}"
        )
    if counter > seen:
        remember(signed.by, name, counter)


def highest(keys: Iterable[str], name: str) -> int:
    """Return the highest counter that was seen under a name, signed by one of some keys; 0 if there is none."""
    known = _read_counters()
    return max((known.get(key, {}).get(name, 0) for key in keys), default=0)


def remember(keys: Iterable[str], name: str, counter: int) -> None:
    """Write down that a counter was seen; one process after another, and never a lower one over a higher."""
    path = _counters()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("ab") as file:
            if lock(file.fileno(), wait=10.0) is False:
                raise TimeoutError("another process writes it")
            known = _read_counters()
            for key in keys:
                names = known.setdefault(key, {})
                names[name] = max(counter, names.get(name, 0))
            write_file(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    except (OSError, MaskpackError) as error:
        what = f"{name} is at the signed version {counter}, so an older one will not be noticed"
        log.warning("cannot remember that %s: %s", what, error)


def _counters() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / COUNTERS


def _read_counters() -> dict[str, dict[str, int]]:
    path = _counters()
    if not path.exists():
        return {}
    try:
        found: dict[str, dict[str, int]] = _read(path, MAX_COUNTERS, values(values(integer(0, MOST - 1))))
        return found
    except AdapterError as error:
        raise StateError(f"cannot read the signed versions seen so far, {path}: {error}; mend or delete it") from None
