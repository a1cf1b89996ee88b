"""Checkpoints in several safetensors files (shards), and the index that Hugging Face writes beside them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CorruptAdapterError, DataError
from .tensorheader import strict_json

SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index.json"
MAX_INDEX = 64 << 20  # bytes; names of 500,000 tensors

Names = frozenset[str]


def checkpoint_files(path: Path) -> dict[Path, Names | None]:
    """Return the safetensors files that a path stands for, with the tensors that each must have (None: any).

    Args:
        path: a safetensors file, which need not exist; an index (`*.safetensors.index.json`); or a folder with one
            index, or with one safetensors file.

    Raises:
        DataError: if a folder has none of these or several, or an index cannot be used: damaged, with shards outside
            of its folder, or with shards that are missing.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.name.endswith(INDEX):
        return {path: None}
    shards: dict[str, set[str]] = {}
    for tensor, shard in _weight_map(path).items():
        shards.setdefault(shard, set()).add(tensor)
    missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
    if missing:
        raise DataError(
            f"{path} names {len(shards)} files, of which {len(missing)} are missing, first {missing[0]!r}; fetch the "
            f"checkpoint again, all of it"
        )
    return {path.parent / shard: frozenset(shards[shard]) for shard in sorted(shards)}


def check_shard(path: Path, found: Iterable[str], expected: Names | None) -> None:
    """Raise DataError if a shard has not exactly the tensors that the index says."""
    if expected is None or (names := frozenset(found)) == expected:
        return
    differing = sorted(names ^ expected)
    what = "has no such tensor" if differing[0] in expected else "has that tensor, which the index does not place there"
    raise DataError(
        f"{path} and the index of its checkpoint disagree on {len(differing)} tensors, first {differing[0]!r}: the "
        f"file {what}; fetch the checkpoint again, all of it"
    )


def _in_folder(folder: Path) -> Path:
    """Return the index of a folder, or its only safetensors file."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    files = sorted(folder.glob(f"*{SUFFIX}"))
    whole = [one for one in files if f"{one.name}.index.json" in {index.name for index in indexes}]
    found = [*indexes, *(whole if indexes else files)]
    if len(found) != 1:
        names = ", ".join(one.name for one in found[:5])
        raise DataError(
            f"{folder} has {len(found)} checkpoints{f' ({names})' if found else ''}, expected one {SUFFIX} file or one "
            f"index (*{INDEX}); give the file or the index"
        )
    return found[0]


def _weight_map(path: Path) -> dict[str, str]:
    """Return which shard each tensor is in; names of shards are plain."""
    if not path.is_file():
        raise DataError(f"no file {path}; expected the index of a checkpoint")
    if (size := path.stat().st_size) > MAX_INDEX:
        raise DataError(f"{path} has {size} bytes, an index has at most {MAX_INDEX}; fetch it again")
    try:
        index: Any = strict_json(path.read_bytes(), str(path))
    except (CorruptAdapterError, OSError) as error:
        raise DataError(f"cannot read the index of a checkpoint: {error}") from None
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise DataError(f"{path} has no 'weight_map' from names of tensors to names of files; fetch it again")
    for tensor, shard in found.items():
        # what Hugging Face writes; anything else could name a file elsewhere on this disk
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or ":" in shard or "\0" in shard:
            raise DataError(
                f"{path} places {tensor!r} in {shard!r}, expected the name of a file beside the index; it is not as "
                f"Hugging Face writes it, do not use it"
            )
    return found
