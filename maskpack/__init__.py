"""Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo.

from maskpack import load_mask, unload_mask

load_mask(model, "user/mask-cifar100")   # in place: the task's network, no extra work at inference
unload_mask(model)                       # the base again, to the bit
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.describe import inspect_adapter
    from .adapter.read import Adapter
    from .adapter.write import save_adapter
    from .algebra import combine
    from .backbone.fingerprint import fingerprint
    from .backbone.load import load_backbone
    from .errors import MaskpackError
    from .hub.pull import pull
    from .hub.push import push
    from .hub.search import search_adapters
    from .lab.comparison import compare
    from .mask import MaskSet
    from .runtime.bank import MaskBank
    from .runtime.cascade import load_cascade
    from .runtime.identify import identify
    from .runtime.load import load_adapter, load_mask, unload_mask
    from .runtime.stream import load_masked
    from .training.cascade import fit_cascade_head, train_cascade
    from .training.config import TrainConfig
    from .training.data.load import load_data
    from .training.gates import attach_gates
    from .training.multitask import train_tasks
    from .training.scores import attach_scores, extract_masks
    from .training.trainer import train_mask
    from .training.transfer import train_transfer

# read when first used: loading an adapter never imports training, methods or data
_WHERE = {
    "Adapter": "adapter.read",
    "MaskBank": "runtime.bank",
    "MaskSet": "mask",
    "MaskpackError": "errors",
    "TrainConfig": "training.config",
    "attach_gates": "training.gates",
    "attach_scores": "training.scores",
    "combine": "algebra",
    "compare": "lab.comparison",
    "extract_masks": "training.scores",
    "fingerprint": "backbone.fingerprint",
    "fit_cascade_head": "training.cascade",
    "identify": "runtime.identify",
    "inspect_adapter": "adapter.describe",
    "load_adapter": "runtime.load",
    "load_backbone": "backbone.load",
    "load_cascade": "runtime.cascade",
    "load_data": "training.data.load",
    "load_mask": "runtime.load",
    "load_masked": "runtime.stream",
    "pull": "hub.pull",
    "push": "hub.push",
    "save_adapter": "adapter.write",
    "search_adapters": "hub.search",
    "train_cascade": "training.cascade",
    "train_mask": "training.trainer",
    "train_tasks": "training.multitask",
    "train_transfer": "training.transfer",
    "unload_mask": "runtime.load",
}

__all__ = [
    "Adapter",
    "MaskBank",
    "MaskSet",
    "MaskpackError",
    "TrainConfig",
    "attach_gates",
    "attach_scores",
    "combine",
    "compare",
    "extract_masks",
    "fingerprint",
    "fit_cascade_head",
    "identify",
    "inspect_adapter",
    "load_adapter",
    "load_backbone",
    "load_cascade",
    "load_data",
    "load_mask",
    "load_masked",
    "pull",
    "push",
    "save_adapter",
    "search_adapters",
    "train_cascade",
    "train_mask",
    "train_tasks",
    "train_transfer",
    "unload_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
