"""What the rows with masks share."""

from collections.abc import Mapping
from typing import Any

from ...adapter.adapter import Adapter
from ...adapter.describe import describe
from ...adapter.file import save_adapter
from ...parts import Parts
from ...training.checkpoint import FILE
from ...training.config import TrainConfig
from ...training.loop import TrainResult, train_mask
from .base import Trial

RATES = {"adam": (0.003, 0.01, 0.03), "sgd": (3.0, 10.0, 30.0)}  # of scores without labels, by optimiser


def train(trial: Trial, config: TrainConfig, labelled: bool) -> tuple[TrainResult, Adapter]:
    """Train a mask, with labels or without, and write it as an adapter."""
    folder = trial.folder / "training"
    result = train_mask(
        trial.backbone,
        trial.data if labelled else trial.unlabelled,
        config,
        output=folder,
        resume=(folder / FILE).exists(),
        longer=False,
        report=trial.report,
    )
    return result, write(trial, result.parts, result.base, result.about)


def write(trial: Trial, parts: Any, base: Any, about: Mapping[str, Any]) -> Adapter:
    """Write an adapter of the profile "default" into the folder of a trial."""
    return save_adapter(trial.folder / "mask.safetensors", parts, base, weights=trial.backbone.model, **about)


def learned(parts: Parts) -> int:
    """Return how many numbers of a mask set learned: a score of every weight, and parameters themselves."""
    return parts.masks.total + sum(one.numel() for one in parts.parameters.values())


def stored(adapter: Adapter) -> dict[str, int]:
    """Return the bytes of an adapter file by what they are; together they are the file."""
    about = describe(adapter)
    sets = about["sets"].values()
    sizes = {"masks": sum(one["payload_bytes"] + one["table_bytes"] for one in sets), "head": 0, "statistics": 0}
    for one in sets:
        for role, size in one["dense_bytes"].items():
            sizes[role] = sizes.get(role, 0) + size
    for role, size in (about["cascade"]["bytes"] if about["cascade"] else {}).items():
        sizes[role] = sizes.get(role, 0) + size
    return {**sizes, "index": about["size"] - sum(sizes.values())}
