"""Masks on a model's weights: in place, one tensor at a time, restored to the bit."""

import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backbone.head import Head, swap_module
from ..backbone.parameters import named_buffers, named_parameters, same_size_int, unwrap
from ..errors import BackboneMismatchError, StateError
from ..mask import PackedMask
from .heads import head_fits, head_module, head_tensors, new_head
from .patch import exchange, located, rewritten, write


@dataclass(eq=False)
class Applied:
    """What is applied to a model, and what it takes to undo it.

    Attributes:
        mask_id: of the adapter.
        masks: what was applied, in order of application.
        saved: parameter name -> the bits that the mask removed (op zero and replace), or the whole tensor.
        tensors: name -> earlier value of buffers and parameters that were copied over.
        head: (dotted name, earlier module), if the head was swapped.
        restorable: False if nothing was kept. held: a bank has the model, and nothing of this record is used.
    """

    mask_id: str
    masks: dict[str, PackedMask] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    head: tuple[str, nn.Module] | None = None
    restorable: bool = True
    held: bool = False


# beside the model, not on it: its attributes, state_dict and pickles stay as they are
_APPLIED: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()


def applied(model: nn.Module) -> Applied | None:
    """Return what is applied to the model, or None."""
    return _APPLIED.get(unwrap(model))


def hold(model: nn.Module) -> None:
    """Note that a bank has the model, so that nothing else puts masks on it.

    Raises:
        StateError: if it has a mask, belongs to a bank, or is compiled with frozen weights.
    """
    check_compiled()
    _check_free(model)
    _APPLIED[unwrap(model)] = Applied("", held=True)


def release(model: nn.Module) -> None:
    """Note that a bank has given the model back."""
    del _APPLIED[unwrap(model)]


def _check_free(model: nn.Module) -> None:
    record = applied(model)
    if record is not None and record.held:
        raise StateError("this model belongs to a MaskBank; use the bank, or close it first: bank.close()")
    if record is not None:
        raise StateError("this model has a mask already; call unload_mask(model) first")


def check_compiled() -> None:
    """Raise StateError if compiled code has weights in it, so that it would not see others."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and config.freezing:
        raise StateError(
            "torch._inductor.config.freezing is on: compiled code has copies of the weights in it and would go on with "
            "the old ones; set it to False, call torch.compiler.reset(), and compile anew"
        )


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


def check_dense(dense: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise BackboneMismatchError if a model lacks a tensor that an adapter writes as a whole."""
    for name, tensor in dense.items():
        if name not in state or state[name].shape != tensor.shape:
            raise BackboneMismatchError(
                f"the adapter has a tensor for {name!r} of shape {tuple(tensor.shape)}, which the model lacks or "
                f"has in another shape; load the backbone that the adapter was made for"
            )


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
    check_compiled()
    _check_free(model)
    parameters = check_masks(model, shapes)
    state = {**named_buffers(model), **named_parameters(model)}
    check_dense(dense or {}, state)
    if head is not None:
        head_module(model, head)
    record = Applied(mask_id, restorable=restorable)
    _APPLIED[model] = record
    try:
        for name, mask, at in located(masks, parameters):
            saved = _apply(parameters[name], mask, at, (values or {}).get(name))
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
    if record.held:
        _check_free(model)
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
    for name, mask, at in located(record.masks.items(), state):
        _undo(state[name].detach(), mask, at, record.saved.get(name))
    del _APPLIED[model]


def _apply(parameter: Tensor, mask: PackedMask, at: Tensor | None, values: Tensor | None) -> Tensor | None:
    """Apply one mask; return what is needed to undo it: the changed weights, the whole tensor, or nothing."""
    weight = parameter.detach()
    if at is not None:
        old = exchange(weight, mask, at, values)
        return None if mask.op == "flip" else old.view(weight.dtype)
    saved = weight.clone()
    weight.copy_(rewritten(weight, mask))
    return saved


def _undo(weight: Tensor, mask: PackedMask, at: Tensor | None, saved: Tensor | None) -> None:
    if saved is None:
        _apply(weight, mask, at, None)  # a sign flip undoes itself
    elif at is not None:
        write(weight, at, same_size_int(saved.to(weight)))
    else:
        same_size_int(weight).copy_(same_size_int(saved.to(weight)))


def _copy(record: Applied, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    record.tensors[name] = state[name].detach().clone()
    state[name].detach().copy_(tensor)


def _apply_head(model: nn.Module, head: Head, record: Applied) -> None:
    assert head.module is not None
    old = head_module(model, head)
    if head_fits(old, head):
        state = {f"{head.module}.{name}": p for name, p in old.named_parameters()}
        for name, tensor in head_tensors(head).items():
            _copy(record, state, name, tensor)
        return
    record.head = (head.module, swap_module(model, head.module, new_head(model, old, head)))
