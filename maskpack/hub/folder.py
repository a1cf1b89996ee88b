"""The files of an adapter folder: their names, limits and digests, and how they are copied."""

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import AdapterError, CorruptAdapterError, StateError

MODEL_FILE = "maskpack_model.safetensors"
CONFIG_FILE = "maskpack_config.json"
CARD_FILE = "README.md"
FILES = (CARD_FILE, CONFIG_FILE, MODEL_FILE)
LIMITS = {MODEL_FILE: 16 << 30, CONFIG_FILE: 1 << 20, CARD_FILE: 5 << 20}
CHUNK = 1 << 20


@dataclass(frozen=True)
class Digest:
    """Size, sha256 and git blob id of a content."""

    size: int
    sha256: str
    git: str


def digest(content: Path | bytes) -> Digest:
    """Return the digests of a file or of bytes, in one pass."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    if isinstance(content, bytes):
        sha256.update(content)
        git.update(content)
        return Digest(size, sha256.hexdigest(), git.hexdigest())
    read = 0
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            git.update(chunk)
            read += len(chunk)
    return Digest(read, sha256.hexdigest(), git.hexdigest())


def check_limit(name: str, size: int, where: str) -> None:
    """Refuse a file that is larger than any honest one.

    Raises:
        AdapterError: with the size and the limit.
    """
    if size > LIMITS[name]:
        raise AdapterError(f"{name} of {where} has {size} bytes; at most {LIMITS[name]} are accepted")


def check_record(config: Path, model: Digest, where: str) -> None:
    """Compare the model file with what the config file records about it.

    Raises:
        CorruptAdapterError: if the record is missing or differs.
    """
    check_limit(CONFIG_FILE, config.stat().st_size, where)
    try:
        record = json.loads(config.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(f"{CONFIG_FILE} of {where} is not valid JSON; get the adapter again") from error
    sha256 = record.get("sha256") if isinstance(record, dict) else None
    size = record.get("size") if isinstance(record, dict) else None
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256) or type(size) is not int:
        raise CorruptAdapterError(
            f"{CONFIG_FILE} of {where} does not record the sha256 and size of {MODEL_FILE}, so it cannot be verified; "
            "save the adapter again, or give the path of the model file itself"
        )
    if (model.sha256, model.size) != (sha256, size):
        raise CorruptAdapterError(
            f"{MODEL_FILE} of {where} has {model.size} bytes and sha256 {model.sha256[:12]}…, but {CONFIG_FILE} records "
            f"{size} bytes and {sha256[:12]}…; the files do not belong together or are damaged: get the adapter again"
        )


def check_folder(folder: Path) -> None:
    """Verify that a local folder is a whole adapter.

    Raises:
        AdapterError: if a file is missing or too large.
        CorruptAdapterError: if the model file is not the one that the config file records.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise AdapterError(f"{folder} {state}; expected a folder with {MODEL_FILE} and {CONFIG_FILE}")
    for name in (MODEL_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} lacks {name}; an adapter folder has {MODEL_FILE} and {CONFIG_FILE}")
    for name in FILES:
        if (folder / name).is_file():
            check_limit(name, (folder / name).stat().st_size, str(folder))
    check_record(folder / CONFIG_FILE, digest(folder / MODEL_FILE), str(folder))


def copy_files(contents: dict[str, Path | bytes], target: Path) -> None:
    """Write an adapter's files into a folder: whole or not at all, as plain files.

    A new folder appears under its name when it is complete. In an existing adapter folder each file is replaced at
    once and other files stay; a crash in between is found by the digest in the config file.

    Raises:
        StateError: if the target holds something else than an adapter, or cannot be written.
    """
    try:
        _check_target(target)
        if target.exists():
            _write_all(contents, target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
        unfinished.mkdir()
        try:
            _write_all(contents, unfinished)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except StateError:
        raise
    except OSError as error:
        raise StateError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StateError(f"{target} is a file; give a folder")
    others = sorted(path.name for path in target.iterdir())
    if others and MODEL_FILE not in others:
        raise StateError(
            f"{target} holds other files ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}) and no adapter; "
            "give a new or empty folder, or one with an adapter to replace"
        )


def _write_all(contents: dict[str, Path | bytes], folder: Path) -> None:
    unfinished = {name: folder / f".{name}.{secrets.token_hex(4)}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            with unfinished[name].open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, file, CHUNK)
                file.flush()
                os.fsync(file.fileno())
        for name, path in unfinished.items():
            path.replace(folder / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
