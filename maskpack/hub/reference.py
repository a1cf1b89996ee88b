"""What a reference to an adapter stands for: a Hub repository at a revision, or a local path."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..adapter.read import MODEL_FILE
from ..errors import AdapterError, ConfigError

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
        """Whether the revision is a full commit id, which can never move."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"{self.repo_id}@{self.revision}" if self.revision else str(self.repo_id)


def parse_reference(ref: str | os.PathLike[str], revision: str | None = None) -> Reference:
    """Read a reference to an adapter.

    Args:
        ref: `user/name` or `user/name@revision` on the Hub; `./folder`, `../folder`, `/folder`, `~/folder`, a
            path that ends in `.safetensors`, or any path object for a local adapter.
        revision: branch, tag or commit, where the reference itself names none.

    Raises:
        AdapterError: if the text fits no form, or could be a Hub repository and a local adapter alike.
        ConfigError: if a revision is given twice with different values, or for a local path.
    """
    text = os.fspath(ref)
    if not isinstance(ref, str) or _looks_like_path(text):
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} was given with the local path {text!r}, which has no revisions; leave it out"
            )
        return Reference(path=Path(text).expanduser())
    repo_id, at, inner = text.partition("@")
    if at and revision is not None and inner != revision:
        raise ConfigError(
            f"{text!r} names the revision {inner!r}, but revision={revision!r} was given; give one of them"
        )
    revision = inner if at else revision
    _check_repo_id(repo_id, text)
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise AdapterError(f"{revision!r} in {text!r} cannot be a revision; give a branch, tag or commit, as in main")
    if revision is None and (Path(repo_id) / MODEL_FILE).exists():
        raise AdapterError(
            f"{repo_id!r} is ambiguous: it could be the repository on the Hub or the folder of that name here; "
            f"write ./{repo_id} for the folder, or {repo_id}@main for the Hub"
        )
    return Reference(repo_id=repo_id, revision=revision)


def _looks_like_path(text: str) -> bool:
    return (
        text in (".", "..") or text.startswith(PATH_STARTS) or text.endswith(".safetensors") or Path(text).is_absolute()
    )


def _check_repo_id(repo_id: str, text: str) -> None:
    """Refuse what the Hub would refuse, with the forms that are expected."""
    hint = f"; for the local one write ./{repo_id}" if repo_id and Path(repo_id).exists() else ""
    namespace, slash, name = repo_id.partition("/")
    if not slash:
        raise AdapterError(f"{text!r} is not a reference to an adapter; expected {FORMS}{hint}")
    if "/" in name:
        raise AdapterError(f"{text!r} has too many slashes for a Hub repository; expected {FORMS}{hint}")
    for part in (namespace, name):
        if not NAME.fullmatch(part) or "--" in part or ".." in part or part.endswith(".git"):
            raise AdapterError(
                f"{part!r} in {text!r} cannot be a name on the Hub: letters, digits, '-', '_' and '.' only, not first "
                f"or last '-' or '.', no '--', '..' or final '.git'; expected {FORMS}{hint}"
            )
    if len(repo_id) > LONGEST_ID:
        raise AdapterError(f"{text!r} has {len(repo_id)} characters; a Hub repository has at most {LONGEST_ID}")
