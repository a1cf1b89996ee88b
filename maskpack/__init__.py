"""Binary weight masks on frozen PyTorch backbones: train, pack, push, pull, apply, undo.

from maskpack import load_mask, unload_mask

load_mask(model, "user/mask-cifar100")   # in place: the task's network, no extra work at inference
unload_mask(model)                       # the base again, to the bit

Training is in `maskpack.training`, research in `maskpack.lab`.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .adapter.content import Parts as Parts
    from .adapter.describe import inspect_adapter as inspect_adapter
    from .adapter.predict import Prediction as Prediction
    from .adapter.read import Adapter as Adapter
    from .adapter.write import save_adapter as save_adapter
    from .algebra import combine as combine
    from .backbone.fingerprint import fingerprint as fingerprint
    from .backbone.load import Backbone as Backbone
    from .backbone.load import load_backbone as load_backbone
    from .errors import MaskpackError as MaskpackError
    from .hub.pull import pull as pull
    from .hub.push import push as push
    from .hub.search import search_adapters as search_adapters
    from .mask import MaskSet as MaskSet
    from .runtime.apply import unload_mask as unload_mask
    from .runtime.bank import MaskBank as MaskBank
    from .runtime.cascade import load_cascade as load_cascade
    from .runtime.exchange import PatchReader as PatchReader
    from .runtime.exchange import PatchWriter as PatchWriter
    from .runtime.identify import identify as identify
    from .runtime.load import load_adapter as load_adapter
    from .runtime.load import load_mask as load_mask
    from .runtime.stream import load_masked as load_masked


def lazily(package: str, modules: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__all__`, `__getattr__` and `__dir__` of a package that imports its names when they are first used.

    `modules` has the names, with blanks between them, by module.
    """
    where = {name: module for module, names in modules.items() for name in names.split()}
    names = sorted(where)

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{where[name]}", package), name)

    return names, get, lambda: names


__all__, _get, __dir__ = lazily(
    __name__,
    {
        "adapter.content": "Parts",
        "adapter.describe": "inspect_adapter",
        "adapter.predict": "Prediction",
        "adapter.read": "Adapter",
        "adapter.write": "save_adapter",
        "algebra": "combine",
        "backbone.fingerprint": "fingerprint",
        "backbone.load": "Backbone load_backbone",
        "errors": "MaskpackError",
        "hub.pull": "pull",
        "hub.push": "push",
        "hub.search": "search_adapters",
        "mask": "MaskSet",
        "runtime.apply": "unload_mask",
        "runtime.bank": "MaskBank",
        "runtime.cascade": "load_cascade",
        "runtime.exchange": "PatchReader PatchWriter",
        "runtime.identify": "identify",
        "runtime.load": "load_adapter load_mask",
        "runtime.stream": "load_masked",
    },
)
__all__ += ["__version__"]
__all__.sort()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("maskpack")
    return _get(name)
