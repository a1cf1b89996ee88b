"""Contract of a data source, and the examples and batches that training and evaluation read.

A data source is a class in a file of this folder that reads references of one form. Columns, class names, validation
split and label fractions are handled by `load_data`, for all sources.
"""

import io
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from blake3 import blake3
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ...adapter.content import FEATURES
from ...backbone.classifier import IGNORED
from ...errors import ConfigError, DataError, check_argument, short_repr
from ...preprocess import Augment, ImagePreprocess, Preprocess, TextPreprocess, collate_text, open_image
from ...registry import Registry

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")
HELD = 0.2  # share of rows with labels that settings are chosen on
TEST_NAMES = ("test", *VALIDATION_NAMES)  # without a test split, the validation split is one


@dataclass(frozen=True, slots=True)
class Splits:
    """The data of a source: a `datasets.Dataset` by split, an id without a path, and their BLAKE3."""

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

    def split(self, name: str) -> Examples:
        """Return a split, which must exist."""
        if name not in self.splits:
            raise DataError(f"the data {self.id!r} have no {name} split; choose one of: {', '.join(self.splits)}")
        return self.splits[name]

    def labelled(self, split: str, use: str) -> Examples:
        """Return a split, which must exist and have labels, for a use as in "a comparison"."""
        if split not in self.splits or not self.class_names:
            lacking = "labels" if split in self.splits else f"{split} split"
            raise DataError(f"the data {self.id!r} have no {lacking}, which {use} needs; give data that have")
        return self.splits[split]


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
    transform: Callable[[Any], Any] | None
    sampler: EpochSampler | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        item = self.examples[index]
        if self.sampler is not None:  # what is drawn follows from epoch and example, in whichever process
            torch.default_generator.manual_seed(draw_seed(self.sampler.seed, self.sampler.epoch, "example", index))
        if item is None:
            return self.examples.indices[index]
        return item if self.transform is None else (self.transform(item[0]), item[1])


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
    if join is None:
        images, kind = isinstance(preprocess, ImagePreprocess), column_kind(examples.rows.features[examples.column])
        if images != (kind not in ("text", "words")):
            raise DataError(
                f"the backbone expects {preprocess.kind} inputs, and column {examples.column!r} holds "
                f"{'texts' if images else 'images'}"
            )
        if isinstance(preprocess, ImagePreprocess):
            transform = transform or preprocess.transform(augment)
        elif kind == "words":
            join = join_words(tokenizer, preprocess)
        else:
            stack = collate_text(tokenizer, preprocess)
    return DataLoader(
        _Transformed(examples, transform, sampler),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None and len(examples) >= batch_size,
        num_workers=workers,
        collate_fn=partial(_collate, join or partial(_joined, stack)),
        worker_init_fn=_ignore_signals if workers else None,
    )


def column_kind(feature: Any) -> str:
    """Return the kind of a column of a data set: "text", "words" (lists of texts), "chat" (of messages), else ""."""
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
    """Yield batches as `readable` does, each with its number among all batches, from 1."""
    examples: Examples = batches.dataset.examples  # type: ignore[attr-defined]
    watcher = None if batches.dataset.sampler is not None else _watcher.get()  # type: ignore[attr-defined]
    for number, (inputs, labels, unreadable) in enumerate(_started(batches), 1):
        examples.unreadable.update(unreadable)  # here, since rows may be read in another process
        if watcher is not None:
            watcher(number, len(batches))
        if inputs is not None:
            yield number, (inputs, labels)


LABEL_NAMES = ("label", "labels", "category", "class", "target", "intent", "fine_label", "tags", "ner_tags")
LABELS_SEED = 42  # draws the rows that keep their labels, in every evaluation
TEXT_NAMES = ("text", "sentence", "content", "query", "utterance")


def load_data(
    reference: str | Path,
    *,
    input_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float | None = None,
    labels_fraction: float = 1.0,
    labelled: bool = True,
    seed: int = 0,
    task: str | None = None,
) -> Data:
    """Load a data set.

    Args:
        reference: a Hub data set id, a local folder (parquet, csv, JSON lines, plain text, or one folder of images per
            class), a file of these, or `digits:0-9` (the images that scikit-learn ships).
        input_column, label_column: names, if they cannot be found.
        class_names: of an adapter, whose numbering labels follow; default: the data's own.
        validation_fraction: share of the training rows that are kept, chosen by `seed`, that becomes the validation
            split. Default: the validation split that the data have beside a test split, or none.
        labels_fraction: share of the training rows, chosen by `seed`, that is kept.
        labelled: False reads no labels and leaves `class_names` empty.
        task: as of `load_backbone`; default: classification of images or texts, as the data are.

    Raises:
        DataError: if it cannot be read, a column cannot be found, or labels do not fit the class names.

    Example:
        data = load_data("digits:0-4", validation_fraction=0.1)
        print(data)
    """
    forms = "a Hub data set id, a folder or digits:0-9"
    check_argument("the data", reference, str | Path, forms, "what is loaded already goes to train_mask")
    reference = str(reference)
    if not 0 <= (validation_fraction or 0) < 1 or not 0 < labels_fraction <= 1:
        raise ConfigError(
            f"validation_fraction must be in [0, 1) and labels_fraction in (0, 1]; got {validation_fraction} and "
            f"{labels_fraction}"
        )
    source = next((s for s in sorted(SOURCES.all(), key=lambda s: s.priority) if s.matches(reference)), None)
    if source is None:
        raise DataError(
            f"cannot read the data {reference!r}; expected a Hub data set id, a parquet, csv, JSON lines or text file, "
            f"a folder of such files or with one folder of images per class, or digits:0-9"
        )
    loaded, splits = source.load(reference), dict[str, Any]()
    own = dict(loaded.splits)
    for kind, known in (("train", TRAIN_NAMES), ("test", TEST_NAMES), ("validation", VALIDATION_NAMES)):
        name = next((name for name in known if name in own), None)
        if name is not None and (kind != "validation" or validation_fraction is None):
            splits[kind] = own.pop(name)
    if not splits:
        raise DataError(f"the data {reference!r} have neither a train nor a test split: {', '.join(loaded.splits)}")
    from ..objectives.base import Objective, find_objective  # whose module imports this one

    features = next(iter(splits.values())).features
    for given in (input_column, label_column if labelled else None):
        if given is not None and given not in features:
            raise DataError(f"the data have no column {given!r}; they have: {', '.join(features)}")
    task = None if task in FEATURES else task
    reader = Objective if task is None else find_objective("supervised", task)
    if labelled:
        column, label = reader.columns(features, input_column, label_column, task)
    else:
        column, label = input_column or find_input(features, None), None
    images = _is_image(features[column])
    found: dict[str, Examples] = {}
    names: Sequence[str] = ()
    for kind, rows in splits.items():
        labels, names = reader.targets(rows, label, names if found else class_names, kind)
        if not labels:
            raise DataError(f"the {kind} split of {reference!r} has no rows")
        rows = rows.select_columns([column])
        if images:  # as bytes, so that one broken image costs only itself
            rows = rows.cast_column(column, type(features[column])(decode=False))
        found[kind] = Examples(rows, column, labels, range(len(rows)), digest=f"{loaded.digest} {kind}")
    train, validation = found.get("train"), found.get("validation")
    if train is not None:
        train, held = hold_out(train, validation_fraction or 0.0, seed, labels_fraction)
        validation = validation or held
    task = task or ("image-classification" if images else "text-classification")
    return Data(train, validation, found.get("test"), tuple(names), task, loaded.id, loaded.digest, source.id)


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Image)


def no_column(what: str, features: Mapping[str, Any], remedy: str) -> DataError:
    """Return the error for data of which no column, or more than one, could be meant."""
    return DataError(f"cannot tell which column holds the {what} among {', '.join(features)}; {remedy}")


def find_input(features: Mapping[str, Any], label: str | None, kind: str = "text") -> str:
    """Return the column of images, or else of texts, or of another kind of `column_kind`; DataError if none is."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    texts = [name for name, feature in features.items() if column_kind(feature) == kind and name != label]
    found = images or [n for n in TEXT_NAMES if n in texts][:1] or texts
    if len(found) != 1:
        raise no_column("inputs", features, "name it with --input-column")
    return found[0]


def find_label(features: Mapping[str, Any]) -> str:
    """Return the column of labels, or raise DataError."""
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = [n for n in LABEL_NAMES if n in typed] or typed or [n for n in LABEL_NAMES if n in features]
    if not found:
        remedy = (
            "name it with --label-column, or put the images of each class into a folder of its own; without labels "
            "train with --objective self-supervised, a cascade also with --no-labels"
        )
        raise no_column("labels", features, remedy)
    return found[0]


def read_labels(
    rows: Any, column: str | None, names: Sequence[str] | None, split: str
) -> tuple[list[Any], tuple[str, ...]]:
    """Return the class index of each row, or of each of its words, and the class names: `names`, or this split's."""
    if column is None:
        return [0] * len(rows), ()
    values, feature = rows[column][:], rows.features[column]
    lengths = [len(value) for value in values] if values and isinstance(values[0], list) else None
    if lengths is not None:
        values, feature = [one for value in values for one in value], feature.feature
    own = tuple(str(name) for name in getattr(feature, "names", ()))
    # -1 stands for no label where the schema names the classes
    if any(value is None or (own and value < 0) for value in values):
        raise DataError(f"the {split} split has rows without a label in column {column!r}; remove them")
    texts = [own[value] if own else str(value) for value in values]
    if names is None:
        # numbers by value, everything else alphabetically
        numbers = all(isinstance(value, int) for value in values)
        names = own or sorted(set(texts), key=int if numbers else str)
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(texts) - index.keys())
    if unknown:
        raise DataError(
            f"the {split} split has labels that the class names lack: {', '.join(unknown[:5])}; known are "
            f"{', '.join(list(names)[:5])}, … ({len(names)} in all)"
        )
    found = [index[text] for text in texts]
    if lengths is None:
        return found, tuple(names)
    taken = iter(found)
    return [list(islice(taken, length)) for length in lengths], tuple(names)


def hold_out(
    examples: Examples, fraction: float, seed: int, labels_fraction: float = 1.0
) -> tuple[Examples, Examples | None]:
    """Keep a share `labels_fraction` of the examples, drawn by `seed`; split off a share `fraction` of these."""
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = [examples.indices[i] for i in drawn[: max(1, int(len(drawn) * labels_fraction))]]
    held = round(len(kept) * fraction)
    rest = replace(examples, indices=sorted(kept[held:]), unreadable=set())
    return rest, replace(examples, indices=sorted(kept[:held]), unreadable=set()) if held else None


def few_labels(examples: Examples, fraction: float, seed: int = LABELS_SEED) -> Examples:
    """Return a share of the examples, drawn by `seed` regardless of class: int(n * fraction), at least one.

    Of a whole training split these are all rows that `load_data(…, labels_fraction=fraction, seed=seed)` keeps.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"the share of labels must be in (0, 1], got {fraction}")
    return hold_out(examples, 0.0, seed, fraction)[0]
