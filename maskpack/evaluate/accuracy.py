"""Accuracy of a loaded adapter on a data set."""

from typing import Any

from torch import nn

from ..adapter.adapter import Adapter
from ..backbone.classifier import accuracy, classifier_from
from ..data.base import Examples
from ..data.batches import loader, readable
from ..errors import AdapterError
from ..preprocess import preprocess_from_json


def adapter_accuracy(
    model: nn.Module, adapter: Adapter, examples: Examples, *, tokenizer: Any = None, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate a model that has the adapter loaded.

    Args:
        examples: a split of `load_data(…, class_names=adapter.class_names)`.

    Returns:
        {"accuracy": share of the readable examples classified correctly, "examples", "unreadable"}.

    Raises:
        AdapterError: if the adapter has no head or preprocessing.
    """
    head, stored = adapter.head(), adapter.preprocess_config
    if head is None or stored is None:
        raise AdapterError("this adapter has no head or no preprocessing, so its accuracy cannot be measured")
    batches = loader(examples, preprocess_from_json(stored), tokenizer, batch_size=batch_size)
    correct, count = accuracy(classifier_from(model, head), readable(batches))
    return {"accuracy": correct, "examples": count, "unreadable": len(examples.unreadable)}
