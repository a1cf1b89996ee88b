"""The contract of a data source, and the examples that training and evaluation read.

A data source is a class in a file of this folder with

- `id`, a docstring and a `reference` (the library or page that defines it),
- `matches(reference)`: does this source read that reference? Sources are asked in the order of their `priority`
  (smallest first), and the first that says yes reads it,
- `load(reference)`: the splits as `datasets.Dataset` objects, with the digest of the data's bytes.

Columns, class names, validation split and label fractions are found and made in `load.py`, once for every source.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from blake3 import blake3

from ..errors import DataError
from ..preprocess import open_image
from ..registry import Registry

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Splits:
    """What a source reads: split name -> `datasets.Dataset`, an id without a path, and the BLAKE3 of the data."""

    splits: Mapping[str, Any]
    id: str
    digest: str


class DataSource(Protocol):
    """What every data source has (see the module's docstring)."""

    id: ClassVar[str]
    reference: ClassVar[str]
    priority: ClassVar[int]

    @staticmethod
    def matches(reference: str) -> bool: ...

    @staticmethod
    def load(reference: str) -> Splits: ...


SOURCES: Registry[DataSource] = Registry("data source", "maskpack.data")


@dataclass
class Examples(Sequence[tuple[Any, int]]):
    """Rows of one split as (PIL image or text, label); an item that cannot be read is None.

    Attributes:
        rows: a `datasets.Dataset`.
        labels: class index per row.
        indices: which rows belong to this split, in order.
        unreadable: indices into `rows` that could not be decoded so far; whoever reads batches adds them.
        digest: what `rows` are: the digest of the data and the split's name; "" where it is not known.
    """

    rows: Any
    column: str
    labels: Sequence[int]
    indices: Sequence[int]
    unreadable: set[int] = field(default_factory=set)
    digest: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        row = self.indices[index]
        if row in self.unreadable:
            return None
        value = self.rows[row][self.column]
        if isinstance(value, str):
            return value, self.labels[row]
        image = decode_image(value)
        return None if image is None else (image, self.labels[row])


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """A data set for classification.

    Attributes:
        train, validation, test: None where there is no such split. Validation is split off the training rows.
        task: "image-classification" or "text-classification".
        id, digest: what it is and the BLAKE3 of its bytes, for the training record.
        source: id of the data source that read it, as in "hub", so that a card can name a data set of the Hub.
    """

    train: Examples | None
    validation: Examples | None
    test: Examples | None
    class_names: tuple[str, ...]
    task: str
    id: str
    digest: str
    source: str = ""


def decode_image(value: Any) -> Any:
    """Return a PIL image in RGB from the undecoded column's {"bytes", "path"}, or None if it cannot be decoded."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return None
    try:
        return open_image(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
    except DataError:
        return None


def digest_files(files: Iterable[Path], root: Path) -> str:
    """Return the BLAKE3 over the names (relative to `root`) and bytes of files, in sorted order."""
    whole = blake3()
    for file in sorted(files):
        content = blake3().update_mmap(file).hexdigest()
        whole.update(f"{file.relative_to(root).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def empty_classes(examples: Examples, class_names: Sequence[str]) -> list[str]:
    """Return the classes that have no example."""
    present = {examples.labels[i] for i in examples.indices}
    return [name for i, name in enumerate(class_names) if i not in present]
