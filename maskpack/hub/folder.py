"""The files of an adapter folder: their names, limits and digests, and how they are copied."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..adapter.card import BEGIN
from ..adapter.file import CARD_FILE
from ..adapter.read import CONFIG_FILE, MAX_CONFIG, MODEL_FILE
from ..errors import AdapterError, CorruptAdapterError, StateError
from ..tensorfile import replacing

FILES = (CARD_FILE, CONFIG_FILE, MODEL_FILE)
LIMITS = {MODEL_FILE: 16 << 30, CONFIG_FILE: MAX_CONFIG, CARD_FILE: 5 << 20}
CHUNK = 1 << 20


@dataclass(frozen=True)
class Digest:
    """Size, sha256 and git blob id of a content."""

    size: int
    sha256: str
    git: str


def digest(content: Path | bytes) -> Digest:
    """Return the digests of a file or of bytes, in one pass.

    Raises:
        AdapterError: if the file cannot be read.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    if isinstance(content, bytes):
        sha256.update(content)
        git.update(content)
        return Digest(size, sha256.hexdigest(), git.hexdigest())
    read = 0
    with _readable(content), content.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            git.update(chunk)
            read += len(chunk)
    return Digest(read, sha256.hexdigest(), git.hexdigest())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def read_text(path: Path, where: str) -> str:
    """Return a model card's text with its line ends as they are.

    Raises:
        AdapterError: if it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise AdapterError(f"{where} is not UTF-8 text, so it cannot be brought up to date; correct it") from error


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
    with _readable(config):
        check_limit(CONFIG_FILE, config.stat().st_size, where)
        text = config.read_bytes()
    try:
        record = json.loads(text)
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
            f"{MODEL_FILE} of {where} has {model.size} bytes and sha256 {model.sha256[:12]}…, but {CONFIG_FILE} "
            f"records {size} bytes and {sha256[:12]}…; they are damaged or of two adapters; get it again"
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
    """Write an adapter's files into a folder, as plain files; other files of an adapter folder stay.

    What another adapter there had besides, its card or config, goes. Nothing is replaced before everything is
    written. The model file comes last; whatever happens in between is found by the digest in the config file.

    Raises:
        StateError: if the target holds something else than an adapter, or cannot be written.
    """
    _check_target(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot make {target}: {error.strerror or error}; choose another folder") from error
    with replacing(*(target / name for name in contents)) as unfinished:
        for path, content in zip(unfinished, contents.values(), strict=True):
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        for path in _leftovers(contents, target):
            path.unlink()


def _leftovers(contents: dict[str, Path | bytes], target: Path) -> list[Path]:
    """Return what the adapter in `target` has and another one, which takes its place, has not."""
    found = [target / name for name in FILES if name not in contents and (target / name).is_file()]
    model = target / MODEL_FILE
    if not found or not model.is_file() or digest(model) == digest(contents[MODEL_FILE]):
        return []
    # a card without our part was written by hand, and nothing in it tells of the adapter that goes
    return [path for path in found if path.name != CARD_FILE or BEGIN.encode() in path.read_bytes()]


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
