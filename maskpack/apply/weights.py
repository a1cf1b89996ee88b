"""Masks on a model's weights: in place, one tensor at a time, restored to the bit."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..backbone.fingerprint import has_again, versions
from ..backbone.head import Head, swap_module
from ..backbone.parameters import named_buffers, named_parameters, unwrap
from ..errors import BackboneMismatchError, StateError
from ..mask import PackedMask
from .applied import Applied, Changed, applied, check_unwritten, follow, forget, note, written
from .heads import head_fits, head_module, head_tensors, new_head
from .patch import copy_bits, exchange, located, put_back, rewritten


def hold(model: nn.Module, record: Applied) -> None:
    """Note that a bank has the model, so that nothing else puts masks on it.

    Raises:
        StateError: if it has a mask, belongs to a bank, or is compiled with frozen weights.
    """
    check_compiled()
    check_free(model)
    note(model, record)


def check_free(model: nn.Module) -> None:
    """Raise StateError if a model has a mask or belongs to a bank; a load or undo that was interrupted is undone."""
    record = applied(model)
    if record is not None and record.held:
        raise StateError("this model belongs to a MaskBank; use the bank, or close it first: bank.close()")
    if record is not None and record.complete:
        raise StateError("this model has a mask already; call unload_mask(model) first")
    if record is not None:
        restore(model)


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

    If anything fails midway, the model is put back before the error goes on. If that is interrupted as well, `restore`
    finishes it, and so does whatever puts a mask on the model next.

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
    check_free(model)
    parameters, values, dense = check_masks(model, shapes), values or {}, dense or {}
    state: dict[str, Tensor] = {**named_buffers(model), **named_parameters(model)}
    names = {*shapes, *dense}
    check_dense(dense, state)
    if head is not None:
        head_module(model, head)
        names |= head_tensors(head).keys()
    record = Applied(mask_id, restorable=restorable, before=written(state, names), found=versions(model, state))
    try:
        note(model, record)
        for name, mask, at in located(masks, parameters):
            _apply(record, name, parameters[name].detach(), mask, at, values.get(name))
        for name, tensor in dense.items():
            _copy(record, state, name, tensor)
        if head is not None:
            _apply_head(model, head, record)
        record.after = written(state if record.head is None else named_parameters(model), names)
        record.left = versions(model, state)
        record.complete = True
    except BaseException:
        _undo(model, record, state)
        raise
    if not restorable:
        note(model, Applied(mask_id, restorable=False, complete=True))


def restore(model: nn.Module, *, force: bool = False) -> None:
    """Undo what is applied, to the bit. If it fails or is interrupted, the next call finishes it.

    Args:
        force: also where something else wrote the weights since.

    Raises:
        StateError: if nothing is applied, it was applied with restorable=False, or something else wrote parameters that
            the mask changes.
    """
    model = unwrap(model)
    record = applied(model)
    if record is None:
        raise StateError("this model has no mask to unload; load one with load_mask(model, ref)")
    if record.held:
        check_free(model)
    if record.complete and not record.restorable:
        raise StateError("this model's mask was loaded with restorable=False and cannot be undone; load the base again")
    state = {**named_buffers(model), **named_parameters(model)}
    if record.complete and not force:
        check_unwritten(
            record.after,
            state,
            "unload_mask(model, force=True) puts back what the mask changed and leaves the rest as it was written",
        )
    _undo(model, record, state)


@contextmanager
def masked(
    model: nn.Module, masks: Iterable[tuple[str, PackedMask]], shapes: Mapping[str, tuple[int, ...]], **how: Any
) -> Iterator[None]:
    """Put masks on a model, as `apply_masks` does, as long as this lasts; then it is what it was, to the bit."""
    check_free(model)
    try:
        apply_masks(model, masks, shapes, **how)
        yield
    finally:
        if applied(model) is not None:
            restore(model)


def _apply(
    record: Applied, name: str, weight: Tensor, mask: PackedMask, at: Tensor | None, values: Tensor | None
) -> None:
    """Apply one mask; what it takes to undo it is noted before."""
    changed = record.masked[name] = Changed(mask, weight.dtype, [])
    if at is not None:
        exchange(weight, mask, at, values, changed.saved)
        return
    changed.saved.append(weight.clone())
    copy_bits(weight, rewritten(weight, mask))


def _undo(model: nn.Module, record: Applied, state: Mapping[str, Tensor]) -> None:
    """Put back all that a record has, the last first, so that the earliest values win; can be repeated."""
    record.complete = False
    now = versions(model, state)
    unwritten = {name: count for name, count in record.found.items() if now.get(name, -1) == record.left.get(name)}
    try:
        if record.head is not None:
            name, head = record.head
            own = model.get_submodule(name).weight
            assert isinstance(own, Tensor)
            tensors = (tensor for tensor in head.state_dict().values() if tensor.is_floating_point())
            if any((tensor.device, tensor.dtype) != (own.device, own.dtype) for tensor in tensors):
                head.to(own.device, own.dtype)  # as the model was meanwhile
            swap_module(model, name, head)
            state = {**named_buffers(model), **named_parameters(model)}
        for name, tensor in reversed(record.tensors):
            copy_bits(state[name].detach(), tensor.to(state[name]))
        masks = ((name, changed.mask) for name, changed in reversed(record.masked.items()))
        for name, _, at in located(masks, state):
            weight, (_, dtype, saved) = state[name].detach(), record.masked[name]
            if at is not None:
                put_back(weight, at, saved, dtype)
            elif saved:
                copy_bits(weight, saved[0].to(weight))
        follow(record)
        has_again(model, unwritten, versions(model, state))
    except BaseException as error:
        error.add_note("maskpack: the model still has a part of the mask; unload_mask(model) removes it")
        raise
    forget(model, record)


def _copy(record: Applied, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    target = state[name].detach()
    record.tensors.append((name, target.clone()))
    copy_bits(target, tensor.to(target))


def _apply_head(model: nn.Module, head: Head, record: Applied) -> None:
    assert head.module is not None
    old = head_module(model, head)
    if head_fits(old, head):
        state = {f"{head.module}.{name}": p for name, p in old.named_parameters()}
        for name, tensor in head_tensors(head).items():
            _copy(record, state, name, tensor)
        return
    new = new_head(model, old, head)
    record.head = (head.module, old)
    swap_module(model, head.module, new)
