"""One model repository: its git store, its LFS pointers and who may see it."""

import fnmatch
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from .git_store import GitStore
from .messages import HttpError

ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
POINTER = re.compile(rb"version https://git-lfs.github.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
REGULAR_LIMIT = 10_000_000  # our reading of the docs, not checked on the real Hub
LICENSES = ("apache-2.0", "mit", "other")  # a few of the many that the Hub knows
START = 1_700_000_000


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `sha256` is set where the content lies in the LFS store."""

    path: str
    oid: str
    size: int
    sha256: str | None
    pointer_size: int

    def as_json(self) -> dict[str, Any]:
        listed: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": self.path}
        if self.sha256:
            listed["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return listed


def pointer(sha256: str, size: int) -> bytes:
    """Return the text that git keeps in the place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Repository:
    """A model repository with a first commit, as the Hub makes it."""

    def __init__(self, root: Path, repo_id: str, private: bool = False) -> None:
        self.repo_id, self.private = repo_id, private
        self.gated: str | bool = False
        self.disabled = False
        self.lock = threading.RLock()
        self.git = GitStore(root / f"{repo_id}.git")
        self.clock = START
        self.commit(
            "refs/heads/main", {".gitattributes": self.git.write("blob", ATTRIBUTES.encode())}, "system", "start"
        )

    def commit(self, ref: str, files: dict[str, str], author: str, message: str, parent: str | None = None) -> str:
        """Add a commit of the files to a ref and return its id."""
        self.clock += 1
        commit = self.git.write_commit(files, [parent] if parent else [], author, message, self.clock)
        self.git.set_ref(ref, commit)
        return commit

    def head(self, revision: str) -> str:
        """Return the commit of a revision, or refuse as the Hub does."""
        commit = self.git.resolve(revision)
        if commit is None:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def entries(self, commit: str) -> dict[str, Entry]:
        """Return the files of a commit by path."""
        found = {}
        for path, oid in sorted(self.git.files(commit).items()):
            data = self.git.read(oid)[1]
            match = POINTER.fullmatch(data)
            if match:
                found[path] = Entry(path, oid, int(match[2]), match[1].decode(), len(data))
            else:
                found[path] = Entry(path, oid, len(data), None, 0)
        return found

    def wants_lfs(self, commit: str, path: str, size: int, sample: bytes) -> bool:
        """Decide how a file is stored, by .gitattributes, size and its first bytes."""
        oid = self.git.files(commit).get(".gitattributes")
        lines = self.git.read(oid)[1].decode().splitlines() if oid else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        return any(fnmatch.fnmatch(path, one) for one in patterns) or size > REGULAR_LIMIT or b"\0" in sample

    def card(self, commit: str) -> dict[str, Any]:
        """Return the front matter of the model card, or an empty one."""
        oid = self.git.files(commit).get("README.md")
        try:
            return card_data(self.git.read(oid)[1].decode()) or {} if oid else {}
        except ValueError:
            return {}

    def tags(self, commit: str) -> list[str]:
        """Return the tags that the Hub derives from the card (our reading)."""
        card = self.card(commit)
        base = card.get("base_model") or []
        bases = [base] if isinstance(base, str) else base
        relation = card.get("base_model_relation", "finetune")
        tags = [str(card["library_name"])] if "library_name" in card else []
        tags += [str(tag) for tag in card.get("tags") or []]
        for one in bases:
            tags += [f"base_model:{one}", f"base_model:{relation}:{one}"]
        return list(dict.fromkeys(tags))


def card_data(text: str) -> dict[str, Any] | None:
    """Return the YAML between the first two `---` lines, None without one; ValueError if the Hub refuses it."""
    match = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return None
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"bad YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError("the metadata must be a mapping")
    if data and data.get("license", "other") not in LICENSES:
        raise ValueError(f'"license" must be one of [{", ".join(LICENSES)}]')
    return data or {}
