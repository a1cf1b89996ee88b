"""Learning the scores of a mask while the weights stay frozen."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import train_auto as train_auto
    from .cascade import train_cascade as train_cascade
    from .config import TrainConfig as TrainConfig
    from .data.base import Data as Data
    from .data.base import load_data as load_data
    from .gates import attach_gates as attach_gates
    from .multitask import Task as Task
    from .multitask import train_tasks as train_tasks
    from .own_loop import attach_scores as attach_scores
    from .own_loop import count_trainable as count_trainable
    from .own_loop import extract_masks as extract_masks
    from .own_loop import extract_parts as extract_parts
    from .own_loop import settle as settle
    from .trainer import TrainResult as TrainResult
    from .trainer import train_mask as train_mask
    from .transfer import train_transfer as train_transfer

# imported when first used: a plug-in's file imports this package
_WHERE = {
    "Data": "data.base",
    "Task": "multitask",
    "TrainConfig": "config",
    "TrainResult": "trainer",
    "attach_gates": "gates",
    "attach_scores": "own_loop",
    "count_trainable": "own_loop",
    "extract_masks": "own_loop",
    "extract_parts": "own_loop",
    "load_data": "data.base",
    "settle": "own_loop",
    "train_auto": "auto",
    "train_cascade": "cascade",
    "train_mask": "trainer",
    "train_tasks": "multitask",
    "train_transfer": "transfer",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
