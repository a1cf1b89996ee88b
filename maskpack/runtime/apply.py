"""Masks on a model's weights: in place, one tensor at a time, restored to the bit."""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from bitarray import bitarray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..backbone.fingerprint import has_again, versions
from ..backbone.model import Head, named_buffers, named_parameters, same_size_int, swap_module, unwrap
from ..errors import BackboneMismatchError, StateError
from ..mask import PackedMask, masked_weight, packed_bits, unpack
from ..threads import in_order


class Written(NamedTuple):
    """A tensor as somebody left it: PyTorch counts in `version` how often it was written in place."""

    tensor: weakref.ref[Tensor]
    version: int
    dtype: torch.dtype
    device: torch.device


class Changed(NamedTuple):
    """A parameter under a mask: its dtype, and the bits that the mask changed, in pieces, or all in one piece."""

    mask: PackedMask
    dtype: torch.dtype
    saved: list[Tensor]


@dataclass(eq=False)
class Applied:
    """What is applied to a model, and what it takes to undo it, each piece noted before it is overwritten.

    Attributes:
        mask_id: of the adapter.
        masked: what masks changed, by name of the parameter, in order of application.
        tensors: names and earlier values of buffers and parameters that were copied over, in order.
        head: (dotted name, earlier module), if the head was swapped.
        restorable: False if nothing is kept once the mask is on.
        complete: the whole mask is on the model. False while it is applied or undone, and after one of these was
            interrupted: then the model has a part of it.
        before, after: parameters that the mask changes, by name, as they were found and as they were left.
        found, left: counts of writes of the base's measured tensors, before and after the mask was put on.
        held: a bank has the model, and nothing of this record is used.
    """

    mask_id: str
    masked: dict[str, Changed] = field(default_factory=dict)
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    head: tuple[str, nn.Module] | None = None
    restorable: bool = True
    complete: bool = False
    before: dict[str, Written] = field(default_factory=dict)
    after: dict[str, Written] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    held: bool = False


# beside the model, not on it: its attributes, state_dict and pickles stay as they are
_APPLIED: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()


def applied(model: nn.Module) -> Applied | None:
    """Return what is applied to the model, or None."""
    return _APPLIED.get(unwrap(model))


def note(model: nn.Module, record: Applied) -> None:
    """Make a record the model's."""
    _APPLIED[unwrap(model)] = record


def forget(model: nn.Module, record: Applied) -> None:
    """Drop a record if it is the model's."""
    if applied(model) is record:
        del _APPLIED[unwrap(model)]


def written(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Written]:
    """Return how some parameters are now, by name; buffers and tensors without a version are left out."""
    found = {}
    for name in names:
        tensor = tensors.get(name)
        if isinstance(tensor, nn.Parameter) and not tensor.is_inference():
            found[name] = Written(weakref.ref(tensor), tensor._version, tensor.dtype, tensor.device)
    return found


def check_unwritten(noted: Mapping[str, Written], tensors: Mapping[str, Tensor], way_out: str) -> None:
    """Raise StateError if somebody else wrote parameters in place, or put others of the same kind in their places.

    A parameter that was moved or cast is the same object and keeps its version. Where it is another object, of another
    dtype or device, it was moved too, by a library that makes new ones.
    """
    others = []
    for name, (ref, version, dtype, device) in sorted(noted.items()):
        now = tensors.get(name)
        if now is None or ((now.dtype, now.device) == (dtype, device) if now is not ref() else now._version != version):
            others.append(name)
    if others:
        raise StateError(
            f"{len(others)} of the {len(noted)} parameters that the mask changes were written by something else since, "
            f"first {others[0]!r}, for instance by an optimizer step or load_state_dict; {way_out}"
        )


def follow(record: Applied) -> None:
    """Note in the records of models that share weights that those are again as they were before this record."""
    mine = {id(found.tensor()): found.version for found in record.before.values()}
    for other in list(_APPLIED.values()):
        for name, was in list(other.after.items()):
            tensor = was.tensor()
            if other is not record and tensor is not None and mine.get(id(tensor)) == was.version:
                other.after.update(written({name: tensor}, [name]))


FEW = 0.1  # share of places up to which it is faster to leave out the bytes without any
WORTH = 1 << 22  # bytes of places
FEW_PLACES = 1 << 14  # that are read, then written: the weights around them are still in the core's cache


def places(bits: bitarray, device: torch.device) -> Tensor:
    """Return where zero bits are, as flat row-major positions in order, int64.

    Places are what everything else works on: reading and writing a few weights by place takes a tenth of the time that
    going through all of them with a tensor of bool takes.
    """
    packed = ~packed_bits(bits)
    if device.type == "cpu":
        zeros = bits.count(0)  # the padding of the last byte comes behind them
        if zeros > FEW * len(bits):
            return torch.from_numpy(np.flatnonzero(np.unpackbits(packed, bitorder="little").view(np.bool_))[:zeros])
        some = np.flatnonzero(packed != 0)
        inner = np.flatnonzero(np.unpackbits(packed[some], bitorder="little").view(np.bool_))[:zeros]
        return torch.from_numpy((some[inner >> 3] << 3) + (inner & 7))
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    zeros_there = (torch.from_numpy(packed).to(device).unsqueeze(1) >> shifts & 1).flatten()[: len(bits)]
    return zeros_there.nonzero()[:, 0]


def at_places(mask: PackedMask) -> bool:
    """Whether a mask changes only the weights at its zero bits: neither scale nor signs change the others."""
    return mask.alpha is None and mask.signs is None


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Weights at some places, before and after; the tensor may have any strides.

    Attributes:
        at: flat row-major positions, int32 where that is enough. old, new: bits there, as integers; a `new` of None
            stands for zeros.
    """

    at: Tensor
    old: Tensor
    new: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory that the patch takes."""
        return self.at.nbytes + self.old.nbytes + (0 if self.new is None else self.new.nbytes)

    def put(self, weight: Tensor) -> None:
        """Write the new bits into a weight that has the old ones."""
        write(weight, self.at, self.new)

    def undo(self, weight: Tensor) -> None:
        """Write the old bits."""
        write(weight, self.at, self.old)


def read(weight: Tensor, at: Tensor) -> Tensor:
    """Return the bits at flat positions (int64) of a weight."""
    whole = same_size_int(weight.detach())
    if whole.is_cpu and whole.is_contiguous():  # one thread of numpy does it as fast as all of torch's
        # a mask has the weight's shape, so that numpy need not look for positions outside
        return torch.from_numpy(whole.view(-1).numpy().take(at.numpy(), mode="clip"))
    return whole.take(at)


# No mode of autograd is switched around these: a Ctrl-C on the way into or out of `torch.no_grad` can leave it on.
def write(weight: Tensor, at: Tensor, bits: Tensor | None) -> None:
    """Write bits, or zeros, at flat positions of a weight."""
    whole, at = same_size_int(weight.detach()), at.long()
    if whole.is_cpu and whole.is_contiguous():
        whole.view(-1).numpy()[at.numpy()] = 0 if bits is None else bits.numpy()
        if not whole.is_inference():  # those have no version
            increment_version(whole)  # numpy does not, and a backward pass is to see that a weight is another one
    elif whole.is_inference():
        with torch.inference_mode():
            whole.put_(at, whole.new_zeros(()).expand(len(at)) if bits is None else bits)
    elif whole.is_contiguous():  # takes half to two thirds of the time of put_
        whole.view(-1).scatter_(0, at, 0 if bits is None else bits)
    else:
        whole.put_(at, whole.new_zeros(()).expand(len(at)) if bits is None else bits)


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy bits, whatever they stand for."""
    if target.is_inference():
        with torch.inference_mode():
            same_size_int(target).copy_(same_size_int(source))
    else:
        same_size_int(target.detach()).copy_(same_size_int(source))


def exchange(weight: Tensor, mask: PackedMask, at: Tensor, values: Tensor | None, before: list[Tensor]) -> None:
    """Apply a mask at its places; `values` as of `patch_of`.

    The bits there are added to `before` piece by piece, each piece before it is overwritten. So `put_back` leads back
    from wherever this was interrupted.
    """
    few = FEW_PLACES if weight.is_cpu else max(len(at), 1)
    for start in range(0, len(at), few):
        part = slice(start, start + few)
        old, new = changes(weight, mask, at[part], None if values is None else values[part])
        before.append(old)
        write(weight, at[part], new)
    if len(before) > 1:  # one piece is written back faster; the others are dropped in the same step
        before[:] = [torch.cat(before)]


def put_back(weight: Tensor, at: Tensor, before: list[Tensor], dtype: torch.dtype) -> None:
    """Undo `exchange`, or a part of it, on a weight that had this dtype then; can be repeated."""
    start = 0
    for old in before:
        if old.device != weight.device or dtype != weight.dtype:  # moved or cast meanwhile
            old = same_size_int(old.view(dtype).to(weight))
        write(weight, at[start : start + len(old)], old)
        start += len(old)


def inverted(bits: Tensor) -> Tensor:
    """Invert the sign bit of floats that are given as integers: negation would change the payload of some NaNs."""
    return bits ^ (torch.iinfo(bits.dtype).min or 0x80)


def patch_of(weight: Tensor, mask: PackedMask, values: Tensor | None) -> Patch:
    """Return the patch of a mask for a weight that has its base's bits; the mask must be one with `at_places`.

    Args:
        values: what op "replace" puts at the zeros of the mask, flat.
    """
    at = places(mask.bits, weight.device)
    old, new = changes(weight, mask, at, values)
    return Patch(at.to(torch.int32) if len(mask.bits) < 2**31 else at, old, new)


def changes(weight: Tensor, mask: PackedMask, at: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the bits at the places of a mask, before and after, as `Patch` has them."""
    old = read(weight, at)
    if mask.op == "flip":
        return old, inverted(old)
    if mask.op == "replace":
        assert values is not None
        return old, same_size_int(values.to(weight))
    return old, None


def located(
    masks: Iterable[tuple[str, PackedMask]], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, PackedMask, Tensor | None]]:
    """Yield names and masks with the places of those that have `at_places`, which threads look for ahead."""

    def find(item: tuple[str, PackedMask]) -> tuple[str, PackedMask, Tensor | None]:
        (name, mask), device = item, weights[item[0]].device
        kept = replace(mask, zeros=None)  # by whoever undoes it
        if not at_places(mask):
            return name, kept, None
        at = places(mask.bits, device) if mask.zeros is None else torch.from_numpy(mask.zeros).to(device).long()
        return name, kept, at

    def worth(item: tuple[str, PackedMask]) -> int:
        return 8 * item[1].bits.count(0) if item[1].zeros is None and at_places(item[1]) else 0

    return in_order(find, masks, worth, WORTH)


def rewritten(weight: Tensor, mask: PackedMask) -> Tensor:
    """Return a weight with a mask on it that has a scale or signs, which change every weight that is kept."""
    device = weight.device
    if mask.signs is not None:
        weight = weight.clone()
        at = places(mask.signs, device)
        write(weight, at, inverted(read(weight, at)))
    alpha = None if mask.alpha is None else torch.tensor(mask.alpha, dtype=torch.float32, device=device)
    return masked_weight(weight, unpack(mask.bits).to(device).reshape(mask.shape), alpha)


def head_module(model: nn.Module, head: Head) -> nn.Module:
    """Return the module that a head is for; raises BackboneMismatchError if the model has none there."""
    assert head.module is not None
    try:
        return model.get_submodule(head.module)
    except AttributeError:
        raise BackboneMismatchError(
            f"the model has no module {head.module!r} for the adapter's head; pass head='keep' to leave the head alone"
        ) from None


def head_fits(module: nn.Module, head: Head) -> bool:
    """Whether a head's tensors can be copied into a module, so that compiled code and CUDA graphs stay valid."""
    same = isinstance(module, nn.Linear) and module.weight.shape == head.weight.shape
    return same and (module.bias is None) == (head.bias is None)


def new_head(model: nn.Module, old: nn.Module, head: Head) -> nn.Linear:
    """Return a layer for a head that does not fit into the module `old`, of its device, dtype and modes."""
    example = next(old.parameters(), next(model.parameters()))
    classes, features = head.weight.shape
    with torch.inference_mode(False):  # it may be trained later
        new = nn.Linear(features, classes, head.bias is not None, example.device, example.dtype)
    new.weight.detach().copy_(head.weight)
    if head.bias is not None:
        new.bias.detach().copy_(head.bias)
    new.requires_grad_(example.requires_grad)
    return new.train(old.training)


def head_tensors(head: Head) -> Mapping[str, Tensor]:
    """Return the tensors of a head that is a module of the model, by dotted name."""
    found = {f"{head.module}.weight": head.weight}
    return found if head.bias is None else {**found, f"{head.module}.bias": head.bias}


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
