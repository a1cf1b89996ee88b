"""Learning the scores of a mask while the weights stay frozen."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cascade import train_cascade
    from .config import TrainConfig
    from .data.load import load_data
    from .gates import attach_gates
    from .multitask import train_tasks
    from .scores import attach_scores, extract_masks, extract_parts
    from .trainer import train_mask
    from .transfer import train_transfer

# imported when first used: a plug-in's file imports this package
_WHERE = {
    "TrainConfig": "config",
    "attach_gates": "gates",
    "attach_scores": "scores",
    "extract_masks": "scores",
    "extract_parts": "scores",
    "load_data": "data.load",
    "train_cascade": "cascade",
    "train_mask": "trainer",
    "train_tasks": "multitask",
    "train_transfer": "transfer",
}

__all__ = [
    "TrainConfig",
    "attach_gates",
    "attach_scores",
    "extract_masks",
    "extract_parts",
    "load_data",
    "train_cascade",
    "train_mask",
    "train_tasks",
    "train_transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
