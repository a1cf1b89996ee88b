"""Names and tensors of a model as adapters see them: wrappers removed, ties counted once, head set apart."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, DataParallel and DistributedDataParallel wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
            assert inner is not None
            model = inner
        else:
            return model


def canonical(name: str) -> str:
    """Return a dotted name without the `_orig_mod.` of compiled submodules."""
    return name.replace("_orig_mod.", "")


def inside(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a dotted name lies in one of the named modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    """Key that equal views of one storage share; tensors without data are told apart by identity."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter under each of its canonical names, sorted."""
    found = {canonical(name): p for name, p in unwrap(model).named_parameters(remove_duplicate=False)}
    return dict(sorted(found.items()))


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every buffer by its canonical name."""
    return {canonical(name): buffer for name, buffer in unwrap(model).named_buffers()}


def slots(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Tensor], str]]]:
    """Yield where a model keeps each parameter and buffer: canonical name, and a dictionary with its key there."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for owner in (module._parameters, module._buffers):
            for leaf, tensor in owner.items():
                if tensor is not None:
                    yield canonical(f"{prefix}.{leaf}" if prefix else leaf), (owner, leaf)


def aliases(model: nn.Module) -> dict[str, str]:
    """Map every parameter name to the first, in sorted order, of the names of the same tensor."""
    first: dict[tuple[object, ...], str] = {}
    return {name: first.setdefault(_storage(p), name) for name, p in named_parameters(model).items()}


def body(model: nn.Module, head: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the floating-point parameters and persistent buffers outside `head`, sorted, ties once."""
    head = tuple(head)
    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    state = unwrap(model).state_dict(keep_vars=True)
    for name, tensor in sorted((canonical(name), tensor) for name, tensor in state.items()):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or inside(name, head):
            continue
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            found[name] = tensor.detach()
    return found


def same_size_int(tensor: Tensor) -> Tensor:
    """View a floating-point tensor as integers of the same size, so that copies and comparisons are of bits."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])
