"""What a mask is worth beside the linear probe of the raw backbone, and its bytes beside LoRA."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..backbone.load import Backbone
from .data.base import Data
from .features import by_class, embed, fit_probe

BITS = 4  # of a number of LoRA's matrices
SPLITS = ("test", "validation")


def probe_accuracies(backbone: Backbone, data: Data, batch_size: int) -> dict[str, float]:
    """Return the accuracy of the linear probe of a raw backbone, "SPLIT_probe_accuracy", of the splits held out."""
    if data.train is None or not data.class_names or len(data.splits) < 2:
        return {}
    features = {name: embed(backbone, examples, batch_size=batch_size) for name, examples in data.splits.items()}
    probe = fit_probe(*features.pop("train"), len(data.class_names))
    return {f"{name}_probe_accuracy": by_class(probe.logits(x), y)["accuracy"] for name, (x, y) in features.items()}


def beside_probe(metrics: Mapping[str, float], probe: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the accuracies of the probe, and how much more the mask has, "SPLIT_over_probe"."""
    found = {**metrics, **probe}
    both = [name for name in SPLITS if f"{name}_accuracy" in metrics and f"{name}_probe_accuracy" in probe]
    return {**found, **{f"{one}_over_probe": found[f"{one}_accuracy"] - found[f"{one}_probe_accuracy"] for one in both}}


def worth(metrics: Mapping[str, float], shapes: Iterable[Sequence[int]], masks: bool = True) -> dict[str, Any]:
    """Return what the training record says beside the metrics: the bytes of LoRA, and warnings if there are any.

    Args:
        shapes: of the masked weights. masks: whether masks were to learn.
    """
    shapes = list(shapes)
    found: dict[str, Any] = {"lora_bytes": {f"rank_{rank}_4bit": lora_bytes(shapes, rank) for rank in (1, 8)}}
    warnings = worth_warnings(metrics, masks)
    return {**found, "warnings": warnings} if warnings else found


def lora_bytes(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Return the bytes of LoRA matrices of a rank on weights of these shapes, at 4 bits a number; vectors have none."""
    return sum(rank * (shape[0] + math.prod(shape[1:])) * BITS // 8 for shape in shapes if len(shape) > 1)


def worth_warnings(metrics: Mapping[str, float], masks: bool = True) -> list[str]:
    """Return what to warn of at the end of a training: masks without a zero, or no better than the probe."""
    found = []
    if masks and metrics.get("density") == 1.0:
        found.append(
            "the masks keep every weight, so the adapter is a head and what else was trained; raise distance or lr, or "
            "take more steps"
        )
    split = next((name for name in SPLITS if f"{name}_over_probe" in metrics), None)
    if split is not None and metrics[f"{split}_over_probe"] <= 0:
        found.append(
            f"the {split} accuracy is {100 * metrics[f'{split}_accuracy']:.2f} %, and a linear probe of the raw "
            f"backbone has {100 * metrics[f'{split}_probe_accuracy']:.2f} %: the mask was not worth it; take more "
            f"steps, or keep the probe"
        )
    return found
