"""Accuracy, in all and by class, and what a transfer kept of its source."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapter.content import Parts
from ..adapter.read import Adapter
from ..backbone.classifier import Classifier, accuracy, by_class, classifier_from, predictions
from ..backbone.load import Backbone
from ..backbone.model import Embedding, Head
from ..errors import AdapterError, DataError, escape
from ..mask import MaskSet
from ..preprocess import preprocess_from_json
from ..runtime.apply import masked
from ..runtime.load import Mode, removing
from .data.base import Data, Examples, loader, readable
from .transfer import TransferResult

COLUMNS = ("network", "source", "target")


def as_loaded(backbone: Backbone, adapter: Adapter) -> Backbone:
    """Return a backbone that has the adapter loaded, with the adapter's preprocessing and place of the head."""
    head, stored = adapter.parts(stream=True).head, adapter.about.preprocess
    if stored is not None:
        backbone = replace(backbone, preprocess=preprocess_from_json(stored))
    if head is not None:
        return replace(backbone, embedding=head.embedding)
    if set(adapter.base.head) <= set(backbone.outside):
        return backbone
    return replace(backbone, embedding=Embedding(adapter.base.head[0]))


def adapter_accuracy(
    model: nn.Module, adapter: Adapter, examples: Examples, *, tokenizer: Any = None, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate the head of an adapter on a model that has it loaded.

    Args:
        examples: a split of `load_data(…, class_names=adapter.about.class_names)`.

    Returns:
        What `by_class` gives over the examples that can be read, and {"examples", "unreadable"}, their numbers.
    """
    head, stored = adapter.parts(stream=True).head, adapter.about.preprocess
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


def transfer_table(result: TransferResult, source: Data, target: Data, *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Return accuracies of the networks of a transfer on the source, with its head, and on the target.

    Returns:
        {"network", "source", "target"} for the source network, the source through its mask, the transferred network
        and, if there is one, plain fine-tuning. None where there is nothing to measure; see `held_out_accuracy`.
    """
    backbone = result.backbone

    def on(data: Data, parts: Parts, mode: Mode = "target", head: Head | None = None) -> float | None:
        with applied_parts(backbone.model, parts, mode, head):
            return held_out_accuracy(backbone, data, batch_size)

    rows: list[tuple[str, float | None, float | None]] = [
        ("source", held_out_accuracy(backbone, source, batch_size), None)
    ]
    rows.append(("source through its mask", on(source, result.parts, "source"), None))
    for network, parts in (("transferred", result.parts), ("plain fine-tuning", result.baseline)):
        if parts is not None:
            rows.append((network, on(source, parts), on(target, parts, head=parts.head)))
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def held_out_accuracy(backbone: Backbone, data: Data, batch_size: int = 64) -> float | None:
    """Return the accuracy of a model as it is, with the head that it has, on the test split.

    Without a test split it is that on the validation split, and without that None.
    """
    examples, linear = data.validation if data.test is None else data.test, backbone.linear
    if examples is None:
        return None
    assert linear is not None
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
    return accuracy(Classifier(backbone.model, linear, backbone.embedding), readable(batches))[0]


@contextmanager
def applied_parts(model: nn.Module, parts: Parts, mode: Mode, head: Head | None = None) -> Iterator[None]:
    """As long as this lasts, a model is what `load_mask` makes of it in this mode; its head stays without `head`."""
    if mode == "source":
        parts = Parts(MaskSet(dict(removing(parts.masks.items()))))
    with masked(model, replace(parts, head=head)):
        yield


def source_classes(adapter: Adapter) -> tuple[str, ...] | None:
    """Return the class names of the source of a transfer, as its training record has them, or None."""
    found: Any = adapter.about.training
    for name in ("transfer", "source", "class_names"):
        found = found.get(name) if isinstance(found, Mapping) else None
    named = isinstance(found, list) and found and all(isinstance(one, str) for one in found)
    return tuple(found) if named else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `transfer_table` as a Markdown table, in per cent."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: |"]
    for row in rows:
        cells = ["-" if row[name] is None else f"{100 * row[name]:.2f}" for name in COLUMNS[1:]]
        lines.append(f"| {escape(row['network'], 'markdown')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
