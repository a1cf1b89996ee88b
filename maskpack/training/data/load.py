"""Load a data set: columns, class names, validation split, label fractions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ...adapter.content import FEATURES
from ...errors import ConfigError, DataError, check_argument
from .base import SOURCES, TEST_NAMES, TRAIN_NAMES, VALIDATION_NAMES, Data, Examples, column_kind

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


def find_input(features: Mapping[str, Any], label: str | None, kind: str = "text") -> str:
    """Return the column of images, or else of texts, or of another kind of `column_kind`; DataError if none is."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    texts = [name for name, feature in features.items() if column_kind(feature) == kind and name != label]
    found = images or [n for n in TEXT_NAMES if n in texts][:1] or texts
    if len(found) != 1:
        raise DataError(
            f"cannot tell which column holds the inputs among {', '.join(features)}; name it with --input-column"
        )
    return found[0]


def find_label(features: Mapping[str, Any]) -> str:
    """Return the column of labels, or raise DataError."""
    import datasets

    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = [n for n in LABEL_NAMES if n in typed] or typed or [n for n in LABEL_NAMES if n in features]
    if not found:
        raise DataError(
            f"cannot tell which column holds the labels among {', '.join(features)}; name it with --label-column, or "
            f"put the images of each class into a folder of its own; without labels train with --objective "
            f"self-supervised, a cascade also with --no-labels"
        )
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
    """Keep a share of the examples, drawn by `seed`; return these without a share, and that share of them."""
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
