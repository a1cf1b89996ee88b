"""The training record that travels with an adapter; no times, so that equal runs give equal bytes."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from ..data.base import Data, empty_classes
from .config import TrainConfig


def training_record(
    config: TrainConfig,
    data: Data,
    steps: int,
    processes: int,
    metrics: Mapping[str, float],
    extended: Sequence[str] = (),
) -> dict[str, Any]:
    """Return settings, steps, data, versions and metrics of a run as JSON values.

    Args:
        extended: what is to be said of steps that were added when the run went on.
    """
    assert data.train is not None
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "settings": config.to_json(),
        "steps": steps,
        **({"extended": list(extended)} if extended else {}),
        "processes": processes,
        "data": {
            "id": data.id,
            "source": data.source,
            "digest": data.digest,
            "rows": {name: len(split) for name, split in splits.items() if split is not None},
            "unreadable": sum(len(split.unreadable) for split in splits.values() if split is not None),
            "empty_classes": empty_classes(data.train, data.class_names),
        },
        "versions": {
            "maskpack": version("maskpack"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "metrics": dict(metrics),
    }
