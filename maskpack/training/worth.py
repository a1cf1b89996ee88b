"""What a mask is worth beside the raw backbone, and its bytes beside LoRA."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..adapter.content import FIGURES
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


def beside_baseline(metrics: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the figures of their baseline, and how much better they are, "SPLIT_over_BASELINE"."""
    over = {
        f"{split}_over_{one.baseline}": one.sign
        * (metrics[f"{split}_{name}"] - found[f"{split}_{one.baseline}_{name}"])
        for name, one in FIGURES.items()
        for split in SPLITS
        if f"{split}_{name}" in metrics and f"{split}_{one.baseline}_{name}" in found
    }
    return {**metrics, **found, **over}


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
    """Return what to warn of at the end of a training: masks without a zero, or no better than the raw backbone."""
    found = []
    if masks and metrics.get("density") == 1.0:
        found.append(
            "the masks keep every weight, so the adapter is a head and what else was trained; raise distance or lr, or "
            "take more steps"
        )
    known = ((split, name, one) for split in SPLITS for name, one in FIGURES.items())
    first = next((one for one in known if f"{one[0]}_{one[2].baseline}_{one[1]}" in metrics), None)
    if first is None:
        return found
    split, name, one = first
    if metrics.get(f"{split}_over_{one.baseline}", 1.0) <= 0:
        found.append(
            f"the {split} {name} is {told(name, metrics[f'{split}_{name}'])}, and {one.words} has "
            f"{told(name, metrics[f'{split}_{one.baseline}_{name}'])}: the mask was not worth it; take more steps, or "
            f"do without it"
        )
    return found


def told(name: str, value: float) -> str:
    """Return a figure as people read it."""
    return f"{100 * value:.2f} %" if name == "accuracy" else f"{value:.4f}"
