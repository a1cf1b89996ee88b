"""What a transfer kept of its source and learned of its target."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapter.adapter import Adapter
from ..apply.load import Mode, removing
from ..apply.weights import masked
from ..backbone.classifier import Classifier, accuracy
from ..backbone.head import Head
from ..backbone.load import Backbone
from ..data.base import Data
from ..data.batches import loader, readable
from ..parts import Parts
from ..text import escape
from ..training.heads import own_linear
from ..training.transfer import TransferResult

COLUMNS = ("network", "source", "target")


def transfer_table(result: TransferResult, source: Data, target: Data, *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Return accuracies of the networks of a transfer on the source, with its head, and on the target.

    Returns:
        {"network", "source", "target"} for the source network, the source through its mask, the transferred network
        and, if there is one, plain fine-tuning. None where there is nothing to measure; see `held_out_accuracy`.
    """
    backbone = result.backbone
    rows: list[dict[str, Any]] = []

    def add(network: str, on_source: float | None, on_target: float | None) -> None:
        rows.append(dict(zip(COLUMNS, (network, on_source, on_target), strict=True)))

    add("source", held_out_accuracy(backbone, source, batch_size), None)
    with applied_parts(backbone.model, result.parts, "source"):
        add("source through its mask", held_out_accuracy(backbone, source, batch_size), None)
    for network, parts in (("transferred", result.parts), ("plain fine-tuning", result.baseline)):
        if parts is not None:
            with applied_parts(backbone.model, parts, "target"):
                on_source = held_out_accuracy(backbone, source, batch_size)
            with applied_parts(backbone.model, parts, "target", parts.head):
                add(network, on_source, held_out_accuracy(backbone, target, batch_size))
    return rows


def held_out_accuracy(backbone: Backbone, data: Data, batch_size: int = 64) -> float | None:
    """Return the accuracy of a model as it is, with the head that it has, on the test split.

    Without a test split it is that on the validation split, and without that None.
    """
    examples, linear = data.validation if data.test is None else data.test, own_linear(backbone)
    if examples is None:
        return None
    assert linear is not None
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
    return accuracy(Classifier(backbone.model, linear, backbone.head), readable(batches))[0]


@contextmanager
def applied_parts(model: nn.Module, parts: Parts, mode: Mode, head: Head | None = None) -> Iterator[None]:
    """As long as this lasts, a model is what `load_mask` makes of it in this mode; its head stays without `head`."""
    target, masks = mode == "target", parts.masks.items()
    with masked(
        model,
        masks if target else removing(masks),
        parts.masks.shapes,
        mask_id="",
        values=parts.values if target else {},
        dense={**parts.statistics, **parts.parameters} if target else {},
        head=head,
    ):
        yield


def source_classes(adapter: Adapter) -> tuple[str, ...] | None:
    """Return the class names of the source of a transfer, as its training record has them, or None."""
    found: Any = adapter.training
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
