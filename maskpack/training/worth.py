"""What a mask is worth beside the linear probe of the raw backbone, and its bytes beside LoRA."""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..backbone.load import Backbone
from .data.base import Data
from .features import embed, fit_probe

BITS = 4  # of a number of LoRA's matrices
SPLITS = ("test", "validation")


def probe_metrics(backbone: Backbone, data: Data, metrics: Mapping[str, float], batch_size: int) -> dict[str, float]:
    """Return the accuracy of the linear probe of a raw backbone, and how much more a run has; features are cached.

    Args:
        metrics: of the run.

    Returns:
        For the validation and test splits that there are "SPLIT_probe_accuracy" and "SPLIT_over_probe".
    """
    assert data.train is not None
    probe = fit_probe(*embed(backbone, data.train, batch_size=batch_size), len(data.class_names))
    found = {}
    for name in SPLITS:
        examples = getattr(data, name)
        if examples is not None:
            x, y = embed(backbone, examples, batch_size=batch_size)
            accuracy = float((probe.logits(x).argmax(1) == y).double().mean())
            found[f"{name}_probe_accuracy"] = accuracy
            found[f"{name}_over_probe"] = metrics[f"{name}_accuracy"] - accuracy
    return found


def lora_bytes(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Return the bytes of LoRA matrices of a rank on weights of these shapes, at 4 bits a number; vectors have none."""
    return sum(rank * (shape[0] + math.prod(shape[1:])) * BITS // 8 for shape in shapes if len(shape) > 1)


def worth_warnings(metrics: Mapping[str, float]) -> list[str]:
    """Return what to warn of at the end of a training: masks without a zero, or no better than the probe.

    Args:
        metrics: of the run, with those of `probe_metrics`.
    """
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
