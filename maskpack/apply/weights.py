"""Masks on a model's weights: in place, one tensor at a time, restored to the bit."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backbone.head import Head, swap_module
from ..backbone.parameters import named_buffers, named_parameters, same_size_int, unwrap
from ..errors import BackboneMismatchError, StateError
from ..mask import PackedMask, masked_weight, unpack


@dataclass(eq=False)
class Applied:
    """What is applied to a model, and what it takes to undo it.

    Attributes:
        mask_id: of the adapter.
        masks: what was applied, in order of application.
        saved: parameter name -> the bits that the mask removed (op zero and replace), or the whole tensor.
        tensors: name -> earlier value of buffers and parameters that were copied over.
        head: (dotted name, earlier module), if the head was swapped.
        restorable: False if nothing was kept.
    """

    mask_id: str
    masks: dict[str, PackedMask] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: tuple[str, nn.Module] | None = None
    restorable: bool = True


# beside the model, not on it: its attributes, state_dict and pickles stay as they are
_APPLIED: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()


def applied(model: nn.Module) -> Applied | None:
    """Return what is applied to the model, or None."""
    return _APPLIED.get(unwrap(model))


def check_masks(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Return the parameters that masks of these shapes are for, by name.

    Raises:
        BackboneMismatchError: if one is missing, has another shape, is not floating point, or has no data.
    """
    parameters = named_parameters(model)
    missing = [name for name in shapes if name not in parameters]
    if missing:
        raise BackboneMismatchError(
            f"the model lacks {len(missing)} of the {len(shapes)} masked parameters, first {missing[0]!r}; it has "
            f"{', '.join(list(parameters)[:3])}, …; load the backbone that the adapter was made for"
        )
    for name, shape in shapes.items():
        parameter = parameters[name]
        if not parameter.is_floating_point() or parameter.is_meta:
            what = "on the meta device" if parameter.is_meta else f"of {parameter.dtype}"
            raise BackboneMismatchError(
                f"{name!r} is {what} and cannot be masked; load float weights, apply the mask, then quantise"
            )
        if tuple(parameter.shape) != shape:
            raise BackboneMismatchError(
                f"the mask of {name!r} has shape {shape}, the model's parameter {tuple(parameter.shape)}; load the "
                f"backbone that the adapter was made for"
            )
    return {name: parameters[name] for name in shapes}


@torch.no_grad()
def apply_masks(
    model: nn.Module,
    masks: Iterable[tuple[str, PackedMask]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    mask_id: str,
    values: Mapping[str, Tensor] | None = None,
    dense: Mapping[str, Tensor] | None = None,
    head: Head | None = None,
    restorable: bool = True,
) -> None:
    """Apply masks one at a time, then dense tensors and head, in place; storage and `requires_grad` stay.

    If anything fails midway, the model is put back before the error goes on.

    Args:
        masks: (name, mask), decoded as they are asked for.
        shapes: of all of them by name, so that everything is checked before the first weight changes.
        values: what op "replace" puts in the place of the weights with a zero bit, flat, by name.
        dense: buffers and parameters to copy over, by name.
        head: a head that is a module of the model, to replace that; None leaves the model's.
        restorable: keep what `restore` needs.

    Raises:
        BackboneMismatchError: if a tensor is missing or has another shape.
        StateError: if something is applied already.
    """
    model = unwrap(model)
    if model in _APPLIED:
        raise StateError("this model has a mask already; call unload_mask(model) first")
    parameters = check_masks(model, shapes)
    state = {**named_buffers(model), **named_parameters(model)}
    for name, tensor in (dense or {}).items():
        if name not in state or state[name].shape != tensor.shape:
            raise BackboneMismatchError(
                f"the adapter has a tensor for {name!r} of shape {tuple(tensor.shape)}, which the model lacks or "
                f"has in another shape; load the backbone that the adapter was made for"
            )
    if head is not None:
        _head_module(model, head)
    record = Applied(mask_id, restorable=restorable)
    _APPLIED[model] = record
    try:
        for name, mask in masks:
            saved = _apply(parameters[name], mask, (values or {}).get(name))
            record.masks[name] = mask
            if saved is not None:
                record.saved[name] = saved
        for name, tensor in (dense or {}).items():
            _copy(record, state, name, tensor)
        if head is not None:
            _apply_head(model, head, record)
    except BaseException:
        record.restorable = True
        restore(model)
        raise
    if not restorable:
        _APPLIED[model] = Applied(mask_id, restorable=False)


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Undo what is applied: weights, statistics and head have the bits that they had.

    Raises:
        StateError: if nothing is applied, or it was applied with restorable=False.
    """
    model = unwrap(model)
    record = _APPLIED.get(model)
    if record is None:
        raise StateError("this model has no mask to unload; load one with load_mask(model, ref)")
    if not record.restorable:
        raise StateError("this model's mask was loaded with restorable=False and cannot be undone; load the base again")
    if record.head is not None:
        name, head = record.head
        own = model.get_submodule(name).weight
        assert isinstance(own, Tensor)
        # the model may have been moved or cast meanwhile
        swap_module(model, name, head.to(own.device, own.dtype))
    state: Mapping[str, Tensor] = {**named_buffers(model), **named_parameters(model)}
    for name, tensor in record.tensors.items():
        same_size_int(state[name].detach()).copy_(same_size_int(tensor.to(state[name])))
    for name, mask in record.masks.items():
        _undo(state[name].detach(), mask, record.saved.get(name))
    del _APPLIED[model]


def _zeros(mask: PackedMask, device: torch.device) -> Tensor:
    return ~unpack(mask.bits).to(device).reshape(mask.shape)


def _partial(mask: PackedMask) -> bool:
    """Whether the mask touches only the weights at its zero bits."""
    return mask.alpha is None and mask.signs is None


def _apply(parameter: Tensor, mask: PackedMask, values: Tensor | None) -> Tensor | None:
    """Apply one mask; return what is needed to undo it: the removed weights, the whole tensor, or nothing."""
    weight = parameter.detach()
    zeros = _zeros(mask, weight.device)
    if _partial(mask):
        bits = same_size_int(weight)
        if mask.op == "flip":
            _flip(weight, zeros)
            return None
        saved = bits[zeros].view(weight.dtype)
        if mask.op == "zero":
            bits.masked_fill_(zeros, 0)
        else:
            assert values is not None
            bits.masked_scatter_(zeros, same_size_int(values.to(weight)))
        return saved
    saved = weight.clone()
    if mask.signs is not None:
        _flip(weight, ~unpack(mask.signs).to(weight.device).reshape(mask.shape))
    alpha = None if mask.alpha is None else torch.tensor(mask.alpha, dtype=torch.float32, device=weight.device)
    weight.copy_(masked_weight(weight, ~zeros, alpha))
    return saved


def _flip(weight: Tensor, where: Tensor) -> None:
    """Invert the sign bit where told: negation would change the payload of some NaNs."""
    bits = same_size_int(weight)
    bits.bitwise_xor_(where.to(bits.dtype) << (8 * weight.element_size() - 1))


def _undo(weight: Tensor, mask: PackedMask, saved: Tensor | None) -> None:
    if saved is None:
        _apply(weight, mask, None)  # a sign flip undoes itself
    elif _partial(mask):
        same_size_int(weight).masked_scatter_(_zeros(mask, weight.device), same_size_int(saved.to(weight)))
    else:
        same_size_int(weight).copy_(same_size_int(saved.to(weight)))


def _copy(record: Applied, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    record.tensors[name] = state[name].detach().clone()
    state[name].detach().copy_(tensor)


def _head_module(model: nn.Module, head: Head) -> nn.Module:
    assert head.module is not None
    try:
        return model.get_submodule(head.module)
    except AttributeError:
        raise BackboneMismatchError(
            f"the model has no module {head.module!r} for the adapter's head; pass head='keep' to leave the head alone"
        ) from None


def _apply_head(model: nn.Module, head: Head, record: Applied) -> None:
    assert head.module is not None
    old = _head_module(model, head)
    same = isinstance(old, nn.Linear) and old.weight.shape == head.weight.shape
    if same and (old.bias is None) == (head.bias is None):
        # in place, so that compiled code and CUDA graphs stay valid
        state = {f"{head.module}.{name}": p for name, p in old.named_parameters()}
        _copy(record, state, f"{head.module}.weight", head.weight)
        if head.bias is not None:
            _copy(record, state, f"{head.module}.bias", head.bias)
        return
    example = next(old.parameters(), next(model.parameters()))
    new = nn.Linear(head.weight.shape[1], head.weight.shape[0], head.bias is not None, example.device, example.dtype)
    new.weight.copy_(head.weight)
    if head.bias is not None:
        new.bias.copy_(head.bias)
    new.requires_grad_(example.requires_grad)
    new.train(old.training)
    record.head = (head.module, swap_module(model, head.module, new))
