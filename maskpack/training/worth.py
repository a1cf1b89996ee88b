"""What a mask is worth beside the linear probe of the raw backbone."""

from collections.abc import Mapping

from torch import Tensor

from ..backbone.load import Backbone
from .data.base import Data
from .features import Probe, embed, fit_probe

SPLITS = ("test", "validation")


def probe_metrics(backbone: Backbone, data: Data, batch_size: int) -> dict[str, float]:
    """Return the accuracy of the linear probe on the validation and test splits that there are; features are cached."""
    assert data.train is not None
    probe = fit_probe(*embed(backbone, data.train, batch_size=batch_size), len(data.class_names))
    held = {name: examples for name in SPLITS if (examples := getattr(data, name)) is not None}
    return {
        f"{name}_probe_accuracy": _accuracy(probe, *embed(backbone, examples, batch_size=batch_size))
        for name, examples in held.items()
    }


def _accuracy(probe: Probe, x: Tensor, y: Tensor) -> float:
    return float((probe.logits(x).argmax(1) == y).double().mean())


def worth_warnings(metrics: Mapping[str, float]) -> list[str]:
    """Return what to warn of at the end of a training: masks without a zero, or no better than the probe.

    Args:
        metrics: of the run, with those of `probe_metrics` on the same splits.
    """
    found = []
    if metrics.get("density") == 1.0:
        found.append(
            "the masks keep every weight, so the adapter is a head and what else was trained; raise distance or lr, or "
            "take more steps"
        )
    for name in SPLITS:
        accuracy, probe = metrics.get(f"{name}_accuracy"), metrics.get(f"{name}_probe_accuracy")
        if accuracy is not None and probe is not None:
            if accuracy <= probe:
                found.append(
                    f"{name} accuracy is {accuracy:.4f}, and a linear probe of the raw backbone has {probe:.4f}: the "
                    f"mask was not worth it; take more steps, train norms, or keep the probe"
                )
            break
    return found
