"""The files of an adapter folder: their names, limits and digests, and how they are written."""

import hashlib
from pathlib import Path

from ..adapter.card import BEGIN
from ..adapter.file import CARD_FILE
from ..adapter.read import CONFIG_FILE, MAX_CONFIG, MAX_MODEL, MODEL_FILE, read_bytes
from ..adapter.signature import MAX_SIGNATURE, SIGNATURE_FILE, Contents
from ..errors import AdapterError, StateError
from ..leftovers import is_leftover
from ..tensorfile import replacing

FILES = (CARD_FILE, CONFIG_FILE, SIGNATURE_FILE, MODEL_FILE)
LIMITS = {MODEL_FILE: MAX_MODEL, CONFIG_FILE: MAX_CONFIG, SIGNATURE_FILE: MAX_SIGNATURE, CARD_FILE: 5 << 20}


def git_id(content: bytes | memoryview) -> str:
    """Return the id that git gives a blob of these bytes, hex sha1."""
    digest = hashlib.sha1(f"blob {len(content)}\0".encode(), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()


def read_card(folder: Path) -> bytes | None:
    """Return the bytes of a folder's model card, or None if it has none."""
    card = folder / CARD_FILE
    return read_bytes(card, card, LIMITS[CARD_FILE]) if card.is_file() else None


def card_text(content: bytes | None, where: str) -> str | None:
    """Return a model card's text with its line ends as they are.

    Raises:
        AdapterError: if it is not UTF-8.
    """
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError as error:
        raise AdapterError(f"{where} is not UTF-8 text, so it cannot be brought up to date; correct it") from error


def check_limit(name: str, size: int, where: str) -> None:
    """Refuse a file that is larger than any honest one.

    Raises:
        AdapterError: with the size and the limit.
    """
    if size > LIMITS[name]:
        raise AdapterError(f"{name} of {where} has {size} bytes; at most {LIMITS[name]} are accepted")


def holds(folder: Path, contents: Contents) -> bool:
    """Tell whether a folder has just these contents under their names."""
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == len(content)
        and (folder / name).read_bytes() == content
        for name, content in contents.items()
    )


def write_files(contents: Contents, target: Path) -> None:
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
            path.write_bytes(content)
        for path in _leftovers(contents, target):
            path.unlink()


def _leftovers(contents: Contents, target: Path) -> list[Path]:
    """Return what the adapter in `target` has and another one, which takes its place, has not."""
    found = [target / name for name in FILES if name not in contents and (target / name).is_file()]
    if not found or not (target / MODEL_FILE).is_file():
        return []
    signed = {name: one for name, one in contents.items() if name in (CONFIG_FILE, MODEL_FILE)}
    if holds(target, {MODEL_FILE: contents[MODEL_FILE]}):  # the same adapter, perhaps with another config
        return [path for path in found if path.name == SIGNATURE_FILE and not holds(target, signed)]
    # a card without our part was written by hand, and nothing in it tells of the adapter that goes
    return [path for path in found if path.name != CARD_FILE or BEGIN.encode() in path.read_bytes()]


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StateError(f"{target} is a file; give a folder")
    # an unfinished file of ours is nobody's: a pull that was killed, or that goes on
    others = sorted(path.name for path in target.iterdir() if not any(is_leftover(path, name) for name in FILES))
    if others and MODEL_FILE not in others:
        raise StateError(
            f"{target} holds other files ({', '.join(others[:3])}{', …' if len(others) > 3 else ''}) and no adapter; "
            "give a new or empty folder, or one with an adapter to replace"
        )
