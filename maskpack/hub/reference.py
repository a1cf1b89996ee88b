"""References to adapters, and the files of an adapter's folder."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..adapter.card import BEGIN, CARD_FILE
from ..adapter.identity import BUNDLE_FILE, MAX_SIGNATURE
from ..adapter.read import CONFIG_FILE, MAX_CONFIG, MAX_MODEL, MODEL_FILE, read_bytes
from ..adapter.signature import DIGESTS, SIGNATURE_FILE, Contents
from ..errors import AdapterError, ConfigError, StateError, check_argument
from ..safetensors_io import is_leftover, replacing

FORMS = "user/name, user/name@revision, ./folder, /folder, ~/folder or file.safetensors"
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_ID = 96
PATH_STARTS = ("./", "../", "/", "~", ".\\", "..\\")


@dataclass(frozen=True)
class Reference:
    """A parsed reference: either `path` is set, or `repo_id` with an optional `revision`."""

    repo_id: str | None = None
    revision: str | None = None
    path: Path | None = None

    @property
    def is_pinned(self) -> bool:
        """True if the revision is a full commit id, which can never move."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    @property
    def branch(self) -> str:
        """The repository with its branch or tag, `user/name@main` where none is named."""
        return f"{self.repo_id}@{self.revision or 'main'}"

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"{self.repo_id}@{self.revision}" if self.revision else str(self.repo_id)


def parse_reference(ref: str | os.PathLike[str], revision: str | None = None) -> Reference:
    """Read a reference to an adapter, with a revision where it names none itself.

    It is `user/name` or `user/name@revision` on the Hub; `./folder`, `../folder`, `/folder`, `~/folder`, a path that
    ends in `.safetensors`, the name of an adapter's folder here, or any path object for a local adapter. A text that
    could be both is refused.
    """
    advice = "masks become an adapter by save_adapter; a model, where one is needed, comes first"
    check_argument("the reference", ref, str | os.PathLike, FORMS, advice)
    text = os.fspath(ref)
    named_as_path = text in (".", "..") or text.startswith(PATH_STARTS) or text.endswith(".safetensors")
    if not isinstance(ref, str) or named_as_path or Path(text).is_absolute():
        if revision is not None:
            raise ConfigError(f"revision={revision!r} was given with the local path {text!r}; leave it out")
        return Reference(path=Path(text).expanduser())
    repo_id, at, inner = text.partition("@")
    if at and revision is not None and inner != revision:
        raise ConfigError(
            f"{text!r} names the revision {inner!r}, but revision={revision!r} was given; give one of them"
        )
    revision = inner if at else revision
    if wrong := _wrong_id(repo_id):
        if "/" not in text and (Path(text) / MODEL_FILE).is_file():
            return Reference(path=Path(text))
        hint = f"; for the local one write ./{repo_id}" if repo_id and Path(repo_id).exists() else ""
        raise AdapterError(f"{text!r} {wrong}; expected {FORMS}{hint}")
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise AdapterError(f"{revision!r} in {text!r} cannot be a revision; give a branch, tag or commit, as in main")
    if revision is None and (Path(repo_id) / MODEL_FILE).exists():
        raise AdapterError(
            f"{repo_id!r} is ambiguous: write ./{repo_id} for the folder here, or {repo_id}@main for the Hub"
        )
    return Reference(repo_id=repo_id, revision=revision)


def _wrong_id(repo_id: str) -> str:
    """Return why the Hub would refuse the name of a repository, or ""."""
    namespace, slash, name = repo_id.partition("/")
    if not slash:
        return "is not a reference to an adapter"
    if "/" in name:
        return "has too many slashes for a Hub repository"
    for part in (namespace, name):
        if not NAME.fullmatch(part) or "--" in part or ".." in part or part.endswith(".git"):
            rules = "letters, digits, '-', '_' and '.', not first or last '-' or '.', no '--', '..' or final '.git'"
            return f"has {part!r}, which cannot be a name on the Hub: {rules}"
    return (
        f"has {len(repo_id)} characters; a Hub repository has at most {LONGEST_ID}" if len(repo_id) > LONGEST_ID else ""
    )


FILES = (CARD_FILE, CONFIG_FILE, BUNDLE_FILE, SIGNATURE_FILE, MODEL_FILE)
LIMITS = {MODEL_FILE: MAX_MODEL, CONFIG_FILE: MAX_CONFIG, CARD_FILE: 5 << 20} | dict.fromkeys(DIGESTS, MAX_SIGNATURE)


def read_card(folder: Path) -> bytes | None:
    card = folder / CARD_FILE
    return read_bytes(card, card, LIMITS[CARD_FILE]) if card.is_file() else None


def holds(folder: Path, contents: Contents) -> bool:
    """Return True if a folder has just these contents under their names."""
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == content for name, content in contents.items()
    )


def write_files(contents: Contents, target: Path) -> None:
    """Write an adapter's files into a folder, as plain files; other files of an adapter folder stay.

    What another adapter there had besides, its card or config, goes. Nothing is replaced before everything is
    written. The model file comes last; whatever happens in between is found by the digest in the config file.
    """
    if target.exists() and not target.is_dir():
        raise StateError(f"{target} is a file; give a folder")
    # an unfinished file of ours is nobody's: a pull that was killed, or that goes on
    there = target.iterdir() if target.exists() else ()
    others = sorted(path.name for path in there if not any(is_leftover(path, name) for name in FILES))
    if others and MODEL_FILE not in others:
        raise StateError(f"{target} holds other files, first {others[0]}, and no adapter; give a new or empty folder")
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
    """Return the files of the adapter in `target` that the one in its place does not have."""
    found = [target / name for name in FILES if name not in contents and (target / name).is_file()]
    if not found or not (target / MODEL_FILE).is_file():
        return []
    signed = {name: one for name, one in contents.items() if name in (CONFIG_FILE, MODEL_FILE)}
    if holds(target, {MODEL_FILE: contents[MODEL_FILE]}):  # the same adapter, perhaps with another config
        return [path for path in found if path.name in DIGESTS and not holds(target, signed)]
    # a card without our part was written by hand, and nothing in it tells of the adapter that goes
    return [path for path in found if path.name != CARD_FILE or BEGIN.encode() in path.read_bytes()]
