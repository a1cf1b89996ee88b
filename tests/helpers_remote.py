"""A device "remote", as a GPU is one: its tensors are in memory of their own, and what comes and goes is counted."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from maskpack.backbone.model import same_size_int

backend_registration._setup_privateuseone_for_python_backend("remote")
DEVICE = torch.device("remote", 0)
CROSSED: Counter[str] = Counter()  # bytes "to" the device and "from" it


class Remote(Tensor):
    """A tensor of that device; `inner` is where its numbers are, which kernels of Triton alone may read."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Remote":
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: Remote = Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **place)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Remote({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        there = torch.device(kwargs.get("device") or DEVICE).type == "remote"
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        name, given = (
            func.overloadpacket.__name__,
            [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)],
        )
        found = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        if name == "copy_":
            crossing = {isinstance(one, Remote) for one in given}
            if len(crossing) > 1:
                CROSSED["to" if isinstance(args[0], Remote) else "from"] += args[0].nbytes
        elif name == "_local_scalar_dense":
            CROSSED["from"] += args[0].nbytes
        elif name == "_to_copy" and not there:
            CROSSED["from"] += found.nbytes
        else:
            assert all(isinstance(one, Remote) or not one.ndim for one in given), f"{name} of tensors on two devices"
        if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(lambda one: Remote(one) if isinstance(one, Tensor) and there else one, found)


def inner_of(one: Any) -> Any:
    return one.inner if isinstance(one, Remote) else one


LIBRARY = torch.library.Library("aten", "IMPL")


def _implements(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    return lambda function: LIBRARY.impl(name, function, "PrivateUse1") or function


@_implements("empty.memory_format")
def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Remote(torch.empty(size, dtype=dtype))


@_implements("empty_strided")
def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return Remote(torch.empty_strided(size, stride, dtype=dtype))


@_implements("_copy_from")
def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Tensor:
    CROSSED["to" if isinstance(target, Remote) else "from"] += target.nbytes
    inner_of(target).copy_(inner_of(source))
    return target  # type: ignore[no-any-return]


def moved(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers there; the model in its place, of which nothing is counted."""
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                module._parameters[name] = nn.Parameter(Remote(one.detach().clone()), one.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Remote(buffer.clone())
    CROSSED.clear()
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's tensors as integers, of which nothing is counted."""
    return {name: same_size_int(inner_of(one).clone()) for name, one in model.state_dict().items()}
