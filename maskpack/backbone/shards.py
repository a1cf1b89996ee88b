"""Tensors that several processes share (DTensor): this process's part, the whole, and where FSDP keeps them.

All other code sees plain tensors. What gathers a tensor has to be called by all of its processes, in the same order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..mask import PackedMask

if TYPE_CHECKING:
    from torch import Tensor, nn

Places = Mapping[tuple["nn.Module", str], tuple["nn.Module", str]]  # of parameters: module and name there


def shared(tensor: object) -> bool:
    """Return True if processes share a tensor; without an import, since then nobody has made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_shared(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if processes share one of a model's tensors; mappings that read files are not asked for theirs."""
    return isinstance(tensors, dict) and any(shared(one) for one in tensors.values())


def layout_of(tensor: Any) -> str | None:
    """Return the placements of a tensor whose parts cannot be read here, else None."""
    if not shared(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard

    known = all(type(one) in (Replicate, Shard) for one in tensor.placements)
    return None if known else f"shared as {tensor.placements}"


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory."""
    found: Tensor = tensor._local_tensor if shared(tensor) else tensor  # to_local() would be a node for autograd
    return found


def whole(tensor: Any) -> Tensor:
    """Return a whole tensor, gathered if it is shared."""
    found: Tensor = tensor.detach().full_tensor() if shared(tensor) else tensor
    return found


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """Return what this process holds of a tensor, whole or shared, if it is shared as `like` is; no data are sent."""
    if shared(tensor) or not shared(like):
        return local(tensor)
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.detach().to(like.device)
    return local(distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None))


def shared_like(tensor: Tensor, like: Any) -> Tensor:
    """Share a whole tensor among the processes of another, along the first dimension; the first one's values count."""
    if not shared(like) or not tensor.numel():
        return tensor
    from torch.distributed.tensor import Shard, distribute_tensor

    placements = [Shard(0) if isinstance(one, Shard) else one for one in like.placements]
    return distribute_tensor(tensor.detach(), like.device_mesh, placements)


def gathered(tensor: Any) -> Tensor:
    """Return a whole tensor, differentiably: the gradient is the mean over the processes, as in FSDP."""
    if not shared(tensor):
        found: Tensor = tensor
        return found
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    found = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if found.requires_grad:
        found.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return found


def own_mask(mask: PackedMask, like: Tensor) -> PackedMask:
    """Return the part of a mask for this process's part of a weight, without positions."""
    return mask.part(lambda tensor: part_of(tensor, like)) if shared(like) else mask


def own_values(mask: PackedMask, values: Tensor, like: Tensor) -> Tensor:
    """Return those of a weight's values, flat at the zeros of a mask, that are for this process's part of it."""
    return mask.values_of_part(values, lambda tensor: part_of(tensor, like)) if shared(like) else values


def own_saved(saved: list[Tensor], mask: PackedMask | None, now: Tensor) -> tuple[list[Tensor], PackedMask | None]:
    """Return earlier bits of a tensor, at the zeros of a mask or whole, for this process's part if it is shared now.

    They are that already if it was shared when they were read.
    """
    import torch

    if not shared(now) or tuple(saved[0].shape if mask is None else mask.shape) == tuple(local(now).shape):
        return saved, mask
    if mask is None:
        return [part_of(saved[0], now)], None
    return [own_values(mask, torch.cat(saved), now)], own_mask(mask, now)


def first_process(tensors: Iterable[object]) -> bool:
    """Return True in one of the processes that share some tensors, which writes files; True where none is shared."""
    if not any(shared(one) for one in tensors):
        return True
    from torch import distributed

    return distributed.get_rank() == 0


def _managers(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return (one for one in model.modules() if isinstance(one, kind)) if kind is not None else iter(())


def put_away(model: nn.Module) -> None:
    """Drop the whole copies that FSDP gathered for a forward pass: the model's parameters are the shared ones again."""
    for one in _managers(model):
        one.reshard()


def is_managed(model: nn.Module) -> bool:
    """Return True if `fully_shard` was called for a model."""
    return next(_managers(model), None) is not None


def moved(model: nn.Module, places: Places, gone: Iterable[nn.Module] = ()) -> None:
    """Tell FSDP that parameters stand elsewhere now, old place -> new one, and that modules are gone.

    It notes module and name of each parameter, and has no public way to change them.
    """
    dropped = {id(one) for one in gone}
    known = {(id(module), name): place for (module, name), place in places.items()}
    for manager in _managers(model):
        state = manager._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
            group.fsdp_params = [one for one in group.fsdp_params if id(one._module_info.module) not in dropped]
            for info in (one._module_info for one in group.fsdp_params):
                info.module, info.param_name = known.get(
                    (id(info.module), info.param_name), (info.module, info.param_name)
                )
                for index, old in enumerate(zip(info.shared_modules, info.shared_param_names, strict=True)):
                    new = known.get((id(old[0]), old[1]), old)
                    info.shared_modules[index], info.shared_param_names[index] = new
