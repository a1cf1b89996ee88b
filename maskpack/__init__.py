"""Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo.

from maskpack import load_mask, unload_mask

load_mask(model, "user/mask-cifar100")   # in place: the task's network, no extra work at inference
unload_mask(model)                       # the base again, to the bit
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.adapter import Adapter
    from .adapter.describe import inspect_adapter
    from .adapter.file import save_adapter
    from .algebra import combine
    from .apply.bank import MaskBank
    from .apply.cascade import load_cascade
    from .apply.identify import identify
    from .apply.load import load_adapter, load_mask, unload_mask
    from .apply.stream import load_masked
    from .backbone.fingerprint import fingerprint
    from .backbone.load import load_backbone
    from .data.load import load_data
    from .errors import MaskpackError
    from .evaluate.cascade import fit_cascade_head
    from .evaluate.compare import compare
    from .evaluate.multitask import train_tasks
    from .hub import pull, push, search_adapters
    from .mask import MaskSet
    from .training.cascade import train_cascade
    from .training.config import TrainConfig
    from .training.gated import attach_gates
    from .training.loop import train_mask
    from .training.scored import attach_scores, extract_masks
    from .training.transfer import train_transfer

# read when first used: loading an adapter never imports training, methods or data
_WHERE = {
    "Adapter": "adapter.adapter",
    "MaskBank": "apply.bank",
    "MaskSet": "mask",
    "MaskpackError": "errors",
    "TrainConfig": "training.config",
    "attach_gates": "training.gated",
    "attach_scores": "training.scored",
    "combine": "algebra",
    "compare": "evaluate.compare",
    "extract_masks": "training.scored",
    "fingerprint": "backbone.fingerprint",
    "fit_cascade_head": "evaluate.cascade",
    "identify": "apply.identify",
    "inspect_adapter": "adapter.describe",
    "load_adapter": "apply.load",
    "load_backbone": "backbone.load",
    "load_cascade": "apply.cascade",
    "load_data": "data.load",
    "load_mask": "apply.load",
    "load_masked": "apply.stream",
    "pull": "hub",
    "push": "hub",
    "save_adapter": "adapter.file",
    "search_adapters": "hub",
    "train_cascade": "training.cascade",
    "train_mask": "training.loop",
    "train_tasks": "evaluate.multitask",
    "train_transfer": "training.transfer",
    "unload_mask": "apply.load",
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
