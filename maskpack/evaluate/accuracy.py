"""Accuracy, in all and by class: of a loaded adapter's head, and of any predictions."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..backbone.classifier import classifier_from, predictions
from ..backbone.load import Backbone
from ..data.base import Examples
from ..data.batches import loader, readable
from ..errors import AdapterError, DataError
from ..preprocess import preprocess_from_json


def confusion(predicted: Tensor, y: Tensor, classes: int) -> Tensor:
    """Return how many rows of each class get each class, [true][predicted], (classes, classes) int64.

    Args:
        predicted, y: class indices, (N,).
    """
    return (y * classes + predicted).bincount(minlength=classes**2).reshape(classes, classes)


def by_class(logits: Tensor, y: Tensor) -> dict[str, Any]:
    """Return what the greatest logit of each row, (N, classes), gets right of the labels, (N,).

    Returns:
        {"accuracy", "per_class": accuracy of each class, None where it has no row, "confusion": rows of counts,
        [true][predicted]}.
    """
    counts = confusion(logits.argmax(1), y, logits.shape[1])
    correct, rows = counts.diagonal().tolist(), counts.sum(1).tolist()
    return {
        "accuracy": sum(correct) / sum(rows),
        "per_class": [right / of if of else None for right, of in zip(correct, rows, strict=True)],
        "confusion": counts.tolist(),
    }


def as_loaded(backbone: Backbone, adapter: Adapter) -> Backbone:
    """Return a backbone that has the adapter loaded, with the adapter's preprocessing and place of the head."""
    head, stored = adapter.head(), adapter.preprocess_config
    if stored is not None:
        backbone = replace(backbone, preprocess=preprocess_from_json(stored))
    if head is not None:
        return replace(backbone, head=head.module, pooling=head.pooling, normalize=head.normalize)
    if set(adapter.base.head) <= set(backbone.outside):
        return backbone
    return replace(backbone, head=adapter.base.head[0], pooling=None)


def adapter_accuracy(
    model: nn.Module, adapter: Adapter, examples: Examples, *, tokenizer: Any = None, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate the head of an adapter on a model that has it loaded.

    Args:
        examples: a split of `load_data(…, class_names=adapter.class_names)`.

    Returns:
        What `by_class` gives over the examples that can be read, and {"examples", "unreadable"}, their numbers.

    Raises:
        AdapterError: if the adapter has no head or preprocessing.
        DataError: if no example can be read, or one has a class that the head lacks.
    """
    head, stored = adapter.head(), adapter.preprocess_config
    if head is None or stored is None:
        raise AdapterError(
            "this adapter has no head or no preprocessing, so it has no accuracy of its own; measure its features by "
            "k-NN or a linear probe (--knn, --probe)"
        )
    batches = loader(examples, preprocess_from_json(stored), tokenizer, batch_size=batch_size)
    logits, y = predictions(classifier_from(model, head), readable(batches))
    if int(y.max()) >= logits.shape[1]:
        raise DataError(
            f"the adapter's head has {logits.shape[1]} classes and no names for them, and the data have a class "
            f"{int(y.max())} (counted from 0); measure it on the data that it was made for"
        )
    return {**by_class(logits, y), "examples": len(y), "unreadable": len(examples.unreadable)}
