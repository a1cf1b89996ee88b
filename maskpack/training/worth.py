"""What a mask is worth beside the linear probe of the raw backbone, and its bytes beside LoRA."""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..backbone.load import Backbone
from .data.base import Data
from .features import by_class, embed, fit_probe

BITS = 4  # of a number of LoRA's matrices
SPLITS = ("test", "validation")


def probe_metrics(backbone: Backbone, data: Data, metrics: Mapping[str, float], batch_size: int) -> dict[str, float]:
    """Return the accuracy of the linear probe of a raw backbone, "SPLIT_probe_accuracy", and "SPLIT_over_probe".

    The latter is how much more a run with these metrics has, on the validation and test splits that there are.
    """
    features = {name: embed(backbone, examples, batch_size=batch_size) for name, examples in data.splits.items()}
    probe = fit_probe(*features.pop("train"), len(data.class_names))
    found = {}
    for name, (x, y) in features.items():
        found[f"{name}_probe_accuracy"] = by_class(probe.logits(x), y)["accuracy"]
        found[f"{name}_over_probe"] = metrics[f"{name}_accuracy"] - found[f"{name}_probe_accuracy"]
    return found


def lora_bytes(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Return the bytes of LoRA matrices of a rank on weights of these shapes, at 4 bits a number; vectors have none."""
    return sum(rank * (shape[0] + math.prod(shape[1:])) * BITS // 8 for shape in shapes if len(shape) > 1)


def worth_warnings(metrics: Mapping[str, float]) -> list[str]:
    """Return what to warn of at the end of a training: masks without a zero, or no better than the probe."""
    found = []
    if metrics.get("density") == 1.0:
        found.append(
            "the masks keep every weight, so the adapter is a head and what else was trained; raise distance or lr, or "
            "take more steps"
        )
    split = next((name for name in SPLITS if f"{name}_over_probe" in metrics), None)
    if split is not None and metrics[f"{split}_over_probe"] <= 0:
        found.append(
            f"the {split} accuracy is {metrics[f'{split}_accuracy']:.4f}, and a linear probe of the raw backbone has "
            f"{metrics[f'{split}_probe_accuracy']:.4f}: the mask was not worth it; take more steps, or keep the probe"
        )
    return found
