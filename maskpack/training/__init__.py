"""Learning the scores of a mask while the weights stay frozen."""

from typing import TYPE_CHECKING

from .. import lazily

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

__all__, __getattr__, __dir__ = lazily(
    __name__,
    {
        "auto": "train_auto",
        "cascade": "train_cascade",
        "config": "TrainConfig",
        "data.base": "Data load_data",
        "gates": "attach_gates",
        "multitask": "Task train_tasks",
        "own_loop": "attach_scores count_trainable extract_masks extract_parts settle",
        "trainer": "TrainResult train_mask",
        "transfer": "train_transfer",
    },
)
