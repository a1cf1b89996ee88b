"""Batches in which every example has an adapter of its own."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backbone.classifier import Inputs, classifier_from, example_count, taken
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from .bank import MaskBank


def mixed_batch(bank: "MaskBank", inputs: Tensor | Mapping[str, Tensor], masks: Sequence[str | None]) -> list[Tensor]:
    """Compute examples in groups of the same adapter, the active one first; see `MaskBank.__call__`."""
    batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
    count = example_count(batch)
    if len(masks) != count:
        raise ConfigError(f"every example needs the name of a mask, or None; got {len(masks)} for {count} examples")
    rows: dict[str | None, list[int]] = {}
    for index, name in enumerate(masks):
        rows.setdefault(name, []).append(index)
    found: list[Tensor | None] = [None] * count
    for name in sorted(rows, key=lambda name: name != bank.active):
        group = taken(batch, torch.tensor(rows[name]))
        with bank.disabled() if name is None else bank.using(name):
            for index, output in zip(rows[name], _forward(bank, name, group), strict=True):
                found[index] = output
    return [output for output in found if output is not None]


def _forward(bank: "MaskBank", name: str | None, inputs: Inputs) -> Tensor:
    """Return the outputs of the model for one group, by the adapter's head where that lies behind the model."""
    head = None if name is None else bank.parts(name).head
    if head is not None and head.kind == "pooled-linear":
        classifier = classifier_from(bank.model, head).train(bank.model.training)
        output: object = classifier(inputs)
    else:
        output = bank.model(**inputs) if isinstance(inputs, dict) else bank.model(inputs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise DataError(
            f"the model gives a {type(output).__name__} without logits, which cannot be taken apart by examples; call "
            f"the model inside `with bank.using({name!r})`"
        )
    return output
