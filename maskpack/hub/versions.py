"""A folder of versions of weights: on a disk, or wherever fsspec goes (docs/format.md section 4.5)."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

from ..adapter.read import MODEL_FILE, Adapter, parse_adapter, read_model
from ..errors import AdapterError, HubError, MaskpackError, StateError, require
from ..network import hides_secrets
from ..safetensors_io import writing
from .pull import PullOptions, earlier_adapters, open_adapter

NAME = re.compile(r"(\d{8})(\.full)?\.safetensors")


def patch_name(number: int) -> str:
    return f"{number:08}.safetensors"


def whole_name(number: int) -> str:
    return f"{number:08}.full.safetensors"


class Versions:
    """The versions in a folder, by number: patches, and whole checkpoints.

    `where` is a path, or a URL that fsspec knows: `s3://bucket/run`, `hf://user/name`, `hf://buckets/user/name/run`.
    Each version is one request, and so is a list of them.

    Attributes:
        patches, wholes: numbers of those that were there when `look` was called.
    """

    @hides_secrets
    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.where, self.patches, self.wholes = os.fspath(where), frozenset[int](), frozenset[int]()
        self._folder = None if "://" in self.where else Path(self.where).expanduser()
        self._files: Any = None
        if self._folder is None:
            core = require("fsspec.core", "serve", "reading and writing URLs")
            with self._remote("open"):
                self._files, self._root = core.url_to_fs(self.where)

    def __repr__(self) -> str:
        return f"Versions({self.where!r}, newest={self.newest})"

    @property
    def newest(self) -> int:
        """The highest number; 0 if there is none."""
        return max(self.patches | self.wholes, default=0)

    def look(self) -> "Versions":
        """List what is there now, and return self."""
        if self._folder is not None:
            names = [one.name for one in self._folder.iterdir()] if self._folder.is_dir() else []
        else:
            with self._remote("list"):
                self._files.invalidate_cache()
                try:
                    names = [str(one).rpartition("/")[2] for one in self._files.ls(self._root, detail=False)]
                except FileNotFoundError:
                    names = []
        found = [match for name in names if (match := NAME.fullmatch(name))]
        self.patches = frozenset(int(one[1]) for one in found if not one[2])
        self.wholes = frozenset(int(one[1]) for one in found if one[2])
        return self

    def patch(self, number: int) -> Adapter:
        """Read and verify a patch; CorruptAdapterError if it is damaged."""
        name = patch_name(number)
        if self._folder is not None:
            return parse_adapter(read_model(self._folder / name, self._folder / name), self._folder / name)
        with self._remote("read", name):
            content = self._files.cat_file(f"{self._root}/{name}")
        return parse_adapter(memoryview(content), Path(name))

    @contextmanager
    def whole(self, number: int) -> Iterator[Path]:
        """Give the file of a whole checkpoint within the context."""
        name = whole_name(number)
        if self._folder is not None:
            yield self._folder / name
            return
        with tempfile.TemporaryDirectory() as folder:
            with self._remote("read", name):
                self._files.get_file(f"{self._root}/{name}", str(Path(folder) / name))
            yield Path(folder) / name

    @contextmanager
    def adding(self, name: str) -> Iterator[Path]:
        """Give the path of a new file, which joins the versions if the block ends without an error."""
        if self._folder is not None:
            with writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            yield self._folder / name
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / name
            with self._remote("write", name):
                self._files.put_file(str(Path(folder) / name), f"{self._root}/{name}")

    @contextmanager
    def _remote(self, what: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except MaskpackError:
            raise
        except Exception as error:  # each file system has errors of its own
            place = f"{self.where}/{name}".rstrip("/")
            raise HubError(
                f"cannot {what} {place}: {type(error).__name__}: {error}; check address, login and network, and that "
                "the library for such addresses is installed"
            ) from error


def patches_behind(ref: str | os.PathLike[str], **options: Unpack[PullOptions]) -> Iterator[Adapter]:
    """Yield the adapters that a reference leads to, newest first: of a folder of versions, or of a Hub's commits."""
    text = os.fspath(ref)
    if "://" in text or (Path(text).is_dir() and not (Path(text) / MODEL_FILE).exists()):
        versions = Versions(text).look()
        if not versions.patches:
            raise AdapterError(f"{text} has no versions, expected files named as {patch_name(1)}; check the address")
        yield from map(versions.patch, sorted(versions.patches, reverse=True))
        return
    newest = open_adapter(ref, **options).adapter
    yield newest
    if newest.pinned != newest.path:
        yield from earlier_adapters(newest, **options)


def refuse_second_writer(versions: Versions, number: int) -> None:
    """Raise StateError if a version is there that is about to be written."""
    if versions.look().newest >= number:
        raise StateError(
            f"{versions.where} has a version {versions.newest}, and this writer was to write {number}: somebody else "
            f"writes there; stop one of the writers, or give each a folder"
        )
