"""A bare git repository written as loose objects, so that `git fsck` and `git clone` can judge it."""

import hashlib
import re
import threading
import zlib
from pathlib import Path

CONFIG = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n"
FULL_SHA = re.compile(r"[0-9a-f]{40}")
REF_NAME = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


def replace_file(file: Path, data: bytes) -> None:
    """Write a file so that a request in another thread sees it whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{threading.get_ident()}.tmp")
    unfinished.write_bytes(data)
    unfinished.replace(file)


class GitStore:
    """Objects and refs of one bare repository."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for folder in ("objects/info", "objects/pack", "refs/heads", "refs/tags"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        (path / "HEAD").write_text("ref: refs/heads/main\n")
        (path / "config").write_text(CONFIG)

    def write(self, kind: str, data: bytes) -> str:
        """Store an object and return its id."""
        raw = f"{kind} {len(data)}\0".encode() + data
        sha = hashlib.sha1(raw).hexdigest()
        file = self.path / "objects" / sha[:2] / sha[2:]
        if not file.exists():
            replace_file(file, zlib.compress(raw, 1))
        return sha

    def read(self, sha: str) -> tuple[str, bytes]:
        """Return an object's kind and data; FileNotFoundError if there is none."""
        raw = zlib.decompress((self.path / "objects" / sha[:2] / sha[2:]).read_bytes())
        head, _, data = raw.partition(b"\0")
        return head.split()[0].decode(), data

    def write_tree(self, files: dict[str, str]) -> str:
        """Store the tree of path -> blob id and return its id."""
        entries: dict[str, tuple[str, str]] = {}
        folders: dict[str, dict[str, str]] = {}
        for path, sha in files.items():
            name, slash, rest = path.partition("/")
            if slash:
                folders.setdefault(name, {})[rest] = sha
            else:
                entries[name] = ("100644", sha)
        for name, inner in folders.items():
            entries[name] = ("40000", self.write_tree(inner))
        # git sorts a folder as if its name ended with a slash
        ordered = sorted(entries.items(), key=lambda item: item[0] + ("/" if item[1][0] == "40000" else ""))
        return self.write("tree", b"".join(f"{m} {n}\0".encode() + bytes.fromhex(s) for n, (m, s) in ordered))

    def read_tree(self, tree: str, prefix: str = "") -> dict[str, str]:
        """Return path -> blob id of all files under a tree."""
        data = self.read(tree)[1]
        files: dict[str, str] = {}
        while data:
            head, _, rest = data.partition(b"\0")
            mode, name = head.decode().split(" ", 1)
            sha, data = rest[:20].hex(), rest[20:]
            files |= self.read_tree(sha, f"{prefix}{name}/") if mode == "40000" else {prefix + name: sha}
        return files

    def write_commit(self, files: dict[str, str], parents: list[str], author: str, message: str, when: int) -> str:
        """Store a commit of the files and return its id."""
        who = f"{author} <{author}@localhost> {when} +0000"
        lines = [f"tree {self.write_tree(files)}", *(f"parent {parent}" for parent in parents)]
        text = "\n".join([*lines, f"author {who}", f"committer {who}", "", message, ""])
        return self.write("commit", text.encode())

    def commit_field(self, commit: str, field: str) -> list[str]:
        """Return the values of a header field of a commit, as in `tree` or `parent`."""
        head = self.read(commit)[1].decode().partition("\n\n")[0]
        return [line[len(field) + 1 :] for line in head.splitlines() if line.startswith(field + " ")]

    def files(self, commit: str) -> dict[str, str]:
        """Return path -> blob id of a commit."""
        return self.read_tree(self.commit_field(commit, "tree")[0])

    def history(self, commit: str) -> list[str]:
        """Return the commit and its first parents, newest first."""
        commits = [commit]
        while parents := self.commit_field(commits[-1], "parent"):
            commits.append(parents[0])
        return commits

    def ref(self, name: str) -> str | None:
        """Return the commit of a full ref name, or None."""
        if not REF_NAME.fullmatch(name) or ".." in name:
            return None
        file = self.path / name
        return file.read_text().strip() if file.is_file() else None

    def set_ref(self, name: str, commit: str) -> None:
        """Point a full ref name at a commit."""
        replace_file(self.path / name, f"{commit}\n".encode())

    def refs(self, prefix: str) -> dict[str, str]:
        """Return short name -> commit of all refs under `refs/heads`, `refs/tags` or `refs/pr`."""
        root = self.path / prefix
        found = sorted(file for file in root.rglob("[!.]*") if file.is_file())
        return {file.relative_to(root).as_posix(): file.read_text().strip() for file in found}

    def resolve(self, revision: str) -> str | None:
        """Return the commit of a branch, tag, `refs/…` name or full id, or None."""
        if FULL_SHA.fullmatch(revision):
            try:
                return revision if self.read(revision)[0] == "commit" else None
            except FileNotFoundError:
                return None
        if revision.startswith("refs/"):
            return self.ref(revision)
        return self.ref(f"refs/heads/{revision}") or self.ref(f"refs/tags/{revision}")
