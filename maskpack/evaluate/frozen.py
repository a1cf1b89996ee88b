"""What frozen features are worth: k-NN and a probe that know the training rows, measured on the test rows."""

from collections.abc import Sequence
from typing import Any, Literal

from ..backbone.load import Backbone
from ..data.base import Data, Examples
from ..data.load import few_labels
from ..errors import DataError
from .accuracy import by_class
from .features import embed
from .knn import knn_scores
from .linear_probe import fit_probe

Measure = Literal["knn", "probe"]


def measure_features(
    backbone: Backbone,
    data: Data,
    measures: Sequence[Measure],
    fractions: Sequence[float] = (1.0,),
    *,
    batch_size: int = 64,
    cache: bool = True,
) -> list[dict[str, Any]]:
    """Measure the features of a backbone as it is now, a mask loaded or not.

    The bank of k-NN and the rows of the probe are the training split, or the share of it that `few_labels` draws;
    what they are measured on is the test split, always. `cache` is that of `embed`.

    Returns:
        For each fraction and measure what `by_class` gives, and {"measure", "labels_fraction", "labels": training rows
        that could be read, "examples": test rows that could}.

    Raises:
        DataError: if there is no training or no test split, or a row is in both. ConfigError: if a fraction is not in
            (0, 1]. What `embed` raises.
    """
    train, test = disjoint(data)
    few = [few_labels(train, fraction) for fraction in fractions]
    classes = len(data.class_names)
    test_x, test_y = embed(backbone, test, batch_size=batch_size, cache=cache)
    rows = []
    for fraction, examples in zip(fractions, few, strict=True):
        x, y = embed(backbone, examples, batch_size=batch_size, cache=cache)
        for measure in measures:
            scores = knn_scores(x, y, test_x, classes) if measure == "knn" else fit_probe(x, y, classes).logits(test_x)
            about = {"measure": measure, "labels_fraction": fraction, "labels": len(y), "examples": len(test_y)}
            rows.append({**about, **by_class(scores, test_y)})
    return rows


def disjoint(data: Data) -> tuple[Examples, Examples]:
    """Return the training and the test split, which have no row in common.

    Raises:
        DataError: if one is missing, has no labels, or a row is in both.
    """
    train, test = data.train, data.test
    if train is None or test is None:
        raise DataError(
            f"k-NN and probe learn from the train split and are measured on the test split; {data.id!r} has no "
            f"{'train' if train is None else 'test'} split"
        )
    if not data.class_names:
        raise DataError(f"k-NN and probe need labels, and the data {data.id!r} have none; name their column")
    if train.rows is test.rows or (train.digest and train.digest == test.digest):
        both = len(set(train.indices) & set(test.indices))
        if both:
            raise DataError(
                f"{both} rows of {data.id!r} are in the training and in the test split; measured on them, k-NN and "
                f"probe would know the answers"
            )
    return train, test
