"""Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo.

from maskpack import load_mask, unload_mask

load_mask(model, "user/mask-cifar100")   # in place: the task's network, no extra work at inference
unload_mask(model)                       # the base again, to the bit

Training is in `maskpack.training`, research in `maskpack.lab`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .adapter.content import Parts
    from .adapter.describe import inspect_adapter
    from .adapter.predict import Prediction
    from .adapter.read import Adapter
    from .adapter.write import save_adapter
    from .algebra import combine
    from .backbone.fingerprint import fingerprint
    from .backbone.load import Backbone, load_backbone
    from .errors import MaskpackError
    from .hub.pull import pull
    from .hub.push import push
    from .hub.search import search_adapters
    from .mask import MaskSet
    from .runtime.apply import unload_mask
    from .runtime.bank import MaskBank
    from .runtime.cascade import load_cascade
    from .runtime.exchange import PatchReader, PatchWriter
    from .runtime.identify import identify
    from .runtime.load import load_adapter, load_mask
    from .runtime.stream import load_masked

# imported when first used: `import maskpack` imports no torch
_WHERE = {
    "Adapter": "adapter.read",
    "Backbone": "backbone.load",
    "MaskBank": "runtime.bank",
    "MaskSet": "mask",
    "MaskpackError": "errors",
    "Parts": "adapter.content",
    "PatchReader": "runtime.exchange",
    "PatchWriter": "runtime.exchange",
    "Prediction": "adapter.predict",
    "combine": "algebra",
    "fingerprint": "backbone.fingerprint",
    "identify": "runtime.identify",
    "inspect_adapter": "adapter.describe",
    "load_adapter": "runtime.load",
    "load_backbone": "backbone.load",
    "load_cascade": "runtime.cascade",
    "load_mask": "runtime.load",
    "load_masked": "runtime.stream",
    "pull": "hub.pull",
    "push": "hub.push",
    "save_adapter": "adapter.write",
    "search_adapters": "hub.search",
    "unload_mask": "runtime.apply",
}

__all__ = [
    "Adapter",
    "Backbone",
    "MaskBank",
    "MaskSet",
    "MaskpackError",
    "Parts",
    "PatchReader",
    "PatchWriter",
    "Prediction",
    "__version__",
    "combine",
    "fingerprint",
    "identify",
    "inspect_adapter",
    "load_adapter",
    "load_backbone",
    "load_cascade",
    "load_mask",
    "load_masked",
    "pull",
    "push",
    "save_adapter",
    "search_adapters",
    "unload_mask",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("maskpack")
    if name not in _WHERE:
        raise AttributeError(f"module 'maskpack' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
