"""Contract of a data source, and the examples and batches that training and evaluation read.

A data source is a class in a file of this folder that reads references of one form. Columns, class names, validation
split and label fractions are handled in `load.py`, for all sources.
"""

import io
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from blake3 import blake3
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...backbone.classifier import IGNORED
from ...errors import DataError, short_repr
from ...preprocess import Augment, ImagePreprocess, Preprocess, TextPreprocess, collate_text, open_image
from ...registry import Registry

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
TEST_NAMES = ("test", *VALIDATION_NAMES)  # without a test split, the validation split is one


@dataclass(frozen=True, slots=True)
class Splits:
    """What a source reads: a `datasets.Dataset` by split, an id without a path, and the BLAKE3 of the data."""

    splits: Mapping[str, Any]
    id: str
    digest: str


class DataSource(Protocol):
    """A data source. Sources are asked in the order of `priority`, the smallest first."""

    id: ClassVar[str]
    reference: ClassVar[str]
    priority: ClassVar[int]

    @staticmethod
    def matches(reference: str) -> bool:
        """Return True if the reference has this source's form; nothing is downloaded."""

    @staticmethod
    def load(reference: str) -> Splits:
        """Read the data, or raise DataError."""


SOURCES: Registry[DataSource] = Registry("data source", "maskpack.training.data")


@dataclass
class Examples(Sequence[tuple[Any, int]]):
    """Rows of one split as (PIL image, text, …, target); None for a row that cannot be read."""

    rows: Any  # a `datasets.Dataset`, images as undecoded bytes
    column: str
    labels: Sequence[Any]  # target of each row, as a class index
    indices: Sequence[int]  # rows of this split, in order
    unreadable: set[int] = field(default_factory=set)  # could not be decoded so far; readers of batches add them
    digest: str = ""  # of the data, with the split's name; "" if unknown

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        row = self.indices[index]
        if row in self.unreadable:
            return None
        value = self.rows[row][self.column]
        if value is not None and not isinstance(value, dict):
            return value, self.labels[row]
        if value is None or (value["bytes"] is None and value["path"] is None):
            return None
        try:
            image = open_image(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
        except DataError:
            return None
        return image, self.labels[row]


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """A data set.

    Attributes:
        train, validation, test: None if there is no such split.
        class_names: those of labels; for a regression the name of the number; else none.
        task: as of `Backbone`.
        id, digest: name without a path, and BLAKE3 of the bytes, for the training record.
        source: id of the data source, as in "hub".

    Example:
        data = load_data("digits:0-4")
        print(data, data.class_names, len(data.train))
    """

    train: Examples | None
    validation: Examples | None
    test: Examples | None
    class_names: tuple[str, ...]
    task: str
    id: str
    digest: str
    source: str = ""

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        return f"Data({self.id!r}, {self.task}, {len(self.class_names)} classes, {rows})"

    @property
    def splits(self) -> dict[str, Examples]:
        """The splits that exist, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: examples for name, examples in found.items() if examples is not None}


def digest_files(files: Iterable[Path], root: Path) -> str:
    """Return the BLAKE3 over the names (relative to `root`) and bytes of files, in sorted order."""
    whole = blake3()
    for file in sorted(files):
        content = blake3().update_mmap(file).hexdigest()
        whole.update(f"{file.relative_to(root).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def empty_classes(examples: Examples, class_names: Sequence[str]) -> list[str]:
    """Return the classes that have no example."""
    labels = [examples.labels[i] for i in examples.indices] if class_names else []
    if not labels or isinstance(labels[0], float):  # numbers are no classes
        return []
    present = {own for one in labels for own in (one if isinstance(one, list) else [one])}
    return [name for i, name in enumerate(class_names) if i not in present]


class EpochSampler(Sampler[int]):
    """Permutation that depends on seed and epoch alone, so that a resumed run sees the same order."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's order."""
    return (seed * 1_000_003 + epoch) % 2**63


def draw_seed(seed: int, epoch: int, *place: str | int) -> int:
    """Return the seed of random draws at a place in an epoch, such as a batch."""
    return int.from_bytes(blake3(repr((seed, epoch, *place)).encode()).digest(7), "little")


@dataclass
class _Transformed(Dataset[Any]):
    """Transformed examples; of an unreadable one the row number."""

    examples: Examples
    transform: Callable[[Any], Any]
    sampler: EpochSampler | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        item = self.examples[index]
        if self.sampler is not None:  # what is drawn follows from epoch and example, in whichever process
            torch.default_generator.manual_seed(draw_seed(self.sampler.seed, self.sampler.epoch, "example", index))
        return self.examples.indices[index] if item is None else (self.transform(item[0]), item[1])


_FOR_TRAINING = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)}


def _ignore_signals(_: int) -> None:
    # in processes that read data: a signal to the process group is for the one that trains
    for one in _FOR_TRAINING:
        signal.signal(one, signal.SIG_IGN)


def _started(batches: DataLoader[Any]) -> Iterator[Any]:
    """Return the iterator of a loader, its processes started with those signals held back until they ignore them."""
    if not batches.num_workers or not hasattr(signal, "pthread_sigmask"):
        return iter(batches)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_TRAINING)
    try:
        return iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


Join = Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, Tensor]]  # of examples' inputs and targets to a batch


def _collate(join: Join, items: list[Any]) -> tuple[Any, Tensor | None, list[int]]:
    unreadable = [item for item in items if isinstance(item, int)]
    pairs = [item for item in items if not isinstance(item, int)]
    if not pairs:
        return None, None, unreadable
    return *join(*zip(*pairs, strict=True)), unreadable


def _joined(stack: Callable[[tuple[Any, ...]], Any], inputs: tuple[Any, ...], labels: tuple[Any, ...]) -> Any:
    return stack(inputs), torch.tensor(labels)


def join_words(tokenizer: Any, preprocess: TextPreprocess) -> Join:
    """Return a function from lists of words, and of their classes, to a batch: a word's class is its first token's."""
    options = {"padding": True, "truncation": True, "max_length": preprocess.max_length, "return_tensors": "pt"}
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("classes of words need a fast tokenizer, which says where each word begins; load another one")

    def join(rows: tuple[Any, ...], labels: tuple[Any, ...]) -> tuple[Any, Tensor]:
        encoded = tokenizer(list(rows), is_split_into_words=True, **options)
        targets = torch.full(encoded["input_ids"].shape, IGNORED)
        for row, classes in enumerate(labels):
            places = encoded.word_ids(row)
            for at, word in enumerate(places):
                if word is not None and (at == 0 or places[at - 1] != word):
                    targets[row, at] = classes[word]
        return dict(encoded), targets

    return join


def loader(
    examples: Examples,
    preprocess: Preprocess,
    tokenizer: Any = None,
    *,
    batch_size: int = 64,
    augment: Augment = "none",
    sampler: EpochSampler | None = None,
    workers: int = 0,
    transform: Callable[[Any], Any] | None = None,
    stack: Callable[[tuple[Any, ...]], Any] = torch.stack,
    join: Join | None = None,
) -> DataLoader[Any]:
    """Return batches of (inputs, targets, unreadable rows), to be read by `readable`.

    Args:
        sampler: order for training, without an incomplete last batch; None: all examples in order.
        transform: from a PIL image, in place of the preprocessing. stack: from its results to the inputs of a batch.
        join: from examples as they are to a batch, in place of all that.
    """
    if join is not None:
        transform = _same
    else:
        images, kind = isinstance(preprocess, ImagePreprocess), column_kind(examples.rows.features[examples.column])
        if images != (kind not in ("text", "words")):
            raise DataError(
                f"the backbone expects {preprocess.kind} inputs, and column {examples.column!r} holds "
                f"{'texts' if images else 'images'}"
            )
        if isinstance(preprocess, ImagePreprocess):
            transform = transform or preprocess.transform(augment)
        elif kind == "words":
            transform, join = _same, join_words(tokenizer, preprocess)
        else:
            transform, stack = _same, collate_text(tokenizer, preprocess)
    return DataLoader(
        _Transformed(examples, transform, sampler),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None and len(examples) >= batch_size,
        num_workers=workers,
        collate_fn=partial(_collate, join or partial(_joined, stack)),
        worker_init_fn=_ignore_signals if workers else None,
    )


def _same(one: Any) -> Any:
    return one


def column_kind(feature: Any) -> str:
    """Return what a column of a data set holds: "text", "words" (lists of texts), "chat" (of messages), else ""."""
    if getattr(feature, "dtype", "") in ("string", "large_string"):
        return "text"
    inner = getattr(feature, "feature", None)
    if isinstance(inner, dict):
        return "chat" if inner.keys() >= {"role", "content"} else ""
    return "words" if inner is not None and column_kind(inner) == "text" else ""


_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(report: Callable[[int, int], None]) -> Iterator[None]:
    """Report the batches that are read, and how many there are, of every pass over data but those of training."""
    token = _watcher.set(report)
    try:
        yield
    finally:
        _watcher.reset(token)


def readable(batches: DataLoader[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yield (inputs, labels) of all batches with a readable row, and note the unreadable ones."""
    return (batch for _, batch in numbered(batches))


def numbered(batches: DataLoader[Any]) -> Iterator[tuple[int, tuple[Any, Tensor]]]:
    """Yield what `readable` does, each with its number from 1 among all batches."""
    examples: Examples = batches.dataset.examples  # type: ignore[attr-defined]
    watcher = None if batches.dataset.sampler is not None else _watcher.get()  # type: ignore[attr-defined]
    for number, (inputs, labels, unreadable) in enumerate(_started(batches), 1):
        examples.unreadable.update(unreadable)  # here, since rows may be read in another process
        if watcher is not None:
            watcher(number, len(batches))
        if inputs is not None:
            yield number, (inputs, labels)
