"""Masks on a model's weights: in place, one tensor at a time, restored to the bit.

Whatever is overwritten is noted first, in the model's `Applied` record, so that an undo leads back from anywhere.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from bitarray import bitarray
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..adapter.content import LEARNING, Parts
from ..adapter.values import Steps
from ..backbone.fingerprint import has_again
from ..backbone.model import Head, named_buffers, named_parameters, same_size_int, swap_module, unusable, unwrap
from ..backbone.shards import local, own_mask, own_saved, own_values, part_of, shared, whole
from ..codecs.base import flipped, where_ones
from ..errors import BackboneMismatchError, StateError
from ..mask import PackedMask, masked_weight, packed_bits, unpacked
from ..threads import in_order
from .place import TOP, Place, view

Model = TypeVar("Model", bound=nn.Module)


class Written(NamedTuple):
    """State of a tensor after its last known write; `version` is PyTorch's count of in-place writes.

    Of a tensor that processes share it is that of this process's part, here and in all that follows.
    """

    tensor: weakref.ref[Tensor]
    version: int
    kind: tuple[torch.dtype, torch.device, bool]

    def same(self, tensor: Tensor) -> bool:
        """Return True if nothing wrote this tensor since."""
        return tensor is self.tensor() and local(tensor)._version == self.version


def kind_of(tensor: Tensor) -> tuple[torch.dtype, torch.device, bool]:
    """Return the properties of a tensor that a move, a cast or `fully_shard` changes."""
    return tensor.dtype, tensor.device, shared(tensor)


class Changed(NamedTuple):
    """The earlier bits of a tensor, which had this dtype then.

    Attributes:
        saved: in pieces, those at the zeros of `mask`; the whole tensor where there is no mask.
        at: flat positions of the zeros, kept by a bank; None: they are found again from the mask.
    """

    dtype: torch.dtype
    saved: list[Tensor]
    mask: PackedMask | None = None
    at: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.saved) + (0 if self.at is None else self.at.nbytes)


@dataclass(eq=False)
class Applied:
    """Record of what is applied to a model, with what is needed to undo it.

    Attributes:
        mask_id: of the adapter; in a bank the adapter's name there.
        changed: names and earlier bits of tensors, in order. head: (dotted name, earlier module), if it was swapped.
        restorable: False if nothing is kept once the mask is on.
        complete: the whole mask is on the model. False while it is applied or undone, and after one of these was
            interrupted: then the model has a part of it.
        before, after: tensors that the adapter changes, by name, as they were found and as they were left.
        place: where the adapter's names stand in the model; all names here are the adapter's.
        base: a bank's notes of all tensors of the base, which an undo updates.
        notes: a bank's notes of what masks change, by name: used where they are there, else made.
    """

    mask_id: str
    changed: list[tuple[str, Changed]] = field(default_factory=list)
    head: tuple[str, nn.Module] | None = None
    restorable: bool = True
    complete: bool = False
    place: Place = TOP
    before: dict[str, Written] = field(default_factory=dict)
    after: dict[str, Written] = field(default_factory=dict)
    base: dict[str, Written] = field(default_factory=dict)
    notes: dict[str, Changed] | None = None


# beside the model, not on it: its attributes, state_dict and pickles stay as they are
_APPLIED: weakref.WeakKeyDictionary[nn.Module, Applied] = weakref.WeakKeyDictionary()
_HOLDERS: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()  # of models that have a bank


def applied(model: nn.Module) -> Applied | None:
    """Return what is applied to the model, or None."""
    return _APPLIED.get(unwrap(model))


def forget(model: nn.Module) -> None:
    _APPLIED.pop(unwrap(model), None)


def hold(model: nn.Module, holder: object) -> None:
    """Reserve a model without a mask for a bank: nothing else puts masks on it."""
    check_compiled()
    check_free(model)
    _HOLDERS[unwrap(model)] = holder


def held_by(model: nn.Module, holder: object) -> bool:
    return _HOLDERS.get(unwrap(model)) is holder


def release(model: nn.Module) -> None:
    del _HOLDERS[unwrap(model)]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**named_buffers(model), **named_parameters(model)}


def written(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Written]:
    """Return the state of some tensors by name; those made in inference mode have no count and are left out."""
    found = ((name, one, local(one)) for name in names if (one := tensors.get(name)) is not None)
    return {name: Written(weakref.ref(t), own._version, kind_of(t)) for name, t, own in found if not own.is_inference()}


def check_unwritten(noted: Mapping[str, Written], tensors: Mapping[str, Tensor], way_out: str) -> None:
    """Raise StateError if something else wrote parameters in place, or put others of the same kind in their places.

    A parameter that was moved or cast is the same object and keeps its version. Where it is another object, of another
    dtype or device, or sharded, it was moved too, by a library that makes new ones. Buffers are not looked at: a
    forward pass in training mode writes them.
    """
    noted = {name: was for name, was in noted.items() if isinstance(tensors.get(name), nn.Parameter | None)}
    others = []
    for name, was in sorted(noted.items()):
        now = tensors.get(name)
        moved = now is not None and now is not was.tensor() and kind_of(now) != was.kind
        if now is None or not (was.same(now) or moved):
            others.append(name)
    if others:
        raise StateError(
            f"{len(others)} of the {len(noted)} parameters that the mask changes were written by something else since, "
            f"as an optimizer step or load_state_dict does, first {others[0]!r}; {way_out}"
        )


OTHER_BASE = "load the backbone that the adapter was made for, before it is quantised"
WORTH = 1 << 22  # bytes of places
FEW_PLACES = 1 << 14  # that are read, then written: the weights around them are still in the core's cache


def places(bits: bitarray, device: torch.device) -> Tensor:
    """Return where zero bits are, as flat row-major positions in order, int64.

    Reading and writing a few weights by place takes a tenth of the time of going through all with a tensor of bool.
    """
    if device.type == "cpu":
        return torch.from_numpy(where_ones(flipped(packed_bits(bits), len(bits))).astype(np.int64, copy=False))
    packed = ~packed_bits(bits)
    return unpacked(torch.from_numpy(packed).to(device), len(bits)).nonzero()[:, 0]


def zeros_of(mask: PackedMask, device: torch.device, of: Literal["bits", "signs"] = "bits") -> Tensor:
    """Return where the zero bits of a mask, or of its signs, are, as `places`; bits on a device stay there."""
    return places(getattr(mask, of), device) if mask.there is None else (~mask.on(device, of)).nonzero()[:, 0]


def at_places(mask: PackedMask | None) -> bool:
    """Return True if a mask changes only the weights at its zero bits: neither scale nor signs change the others."""
    return mask is not None and mask.alpha is None and not mask.has_signs


def read(weight: Tensor, at: Tensor) -> Tensor:
    whole = same_size_int(weight.detach())
    if whole.is_cpu and whole.is_contiguous():  # one thread of numpy does it as fast as all of torch's
        # a mask has the weight's shape, so that numpy need not look for positions outside
        return torch.from_numpy(whole.view(-1).numpy().take(at.numpy(), mode="clip"))
    return whole.take(at)


# No mode of autograd is switched around these: a Ctrl-C on the way into or out of `torch.no_grad` can leave it on.
def write(weight: Tensor, at: Tensor, bits: Tensor | None) -> None:
    """Write bits, or zeros, at flat positions of a weight."""
    whole = same_size_int(weight.detach())
    if whole.is_cpu and whole.is_contiguous():
        whole.view(-1).numpy()[at.numpy()] = 0 if bits is None else bits.numpy()
        if not whole.is_inference():  # those have no version
            increment_version(whole)  # numpy does not, and a backward pass is to see that a weight is another one
    elif whole.is_contiguous() and not whole.is_inference():  # takes half to two thirds of the time of put_
        whole.view(-1).scatter_(0, at.long(), 0 if bits is None else bits)
    else:
        with _writable(whole):
            whole.put_(at.long(), whole.new_zeros(()).expand(len(at)) if bits is None else bits)


def copy_bits(target: Tensor, source: Tensor) -> None:
    with _writable(target):
        same_size_int(target.detach()).copy_(same_size_int(source))


def _writable(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.inference_mode() if tensor.is_inference() else nullcontext()


def values_at(values: Tensor | Steps | None, weight: Tensor, at: Tensor) -> Tensor | None:
    """Return stored values, flat; `weight` has the base's bits at their places."""
    if not isinstance(values, Steps):
        return values
    return values.values(read(weight, at.long()).view(weight.dtype))


def exchange(weight: Tensor, mask: PackedMask, at: Tensor, values: Tensor | None, before: list[Tensor]) -> None:
    """Apply a mask at the places of its zeros; `values` are what op "replace" puts there, flat.

    The bits there are added to `before` piece by piece, each piece before it is overwritten. So `put_back` leads back
    from wherever this was interrupted.
    """
    few = FEW_PLACES if weight.is_cpu else max(len(at), 1)
    for start in range(0, len(at), few):
        part = slice(start, start + few)
        old = read(weight, at[part])
        new = changed_bits(weight, mask, old, None if values is None else values[part])
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


def changed_bits(weight: Tensor, mask: PackedMask, old: Tensor, values: Tensor | None) -> Tensor | None:
    """Return the new bits at a mask's zeros, given the old ones, as integers; None stands for all zeros."""
    if mask.op == "flip":
        return inverted(old)
    if mask.op == "replace":
        assert values is not None
        return same_size_int(values.to(weight))
    return None


Located = tuple[str, PackedMask | None, Tensor | None]


def located(
    masks: Iterable[tuple[str, PackedMask | None]], weights: Mapping[str, Tensor], known: Mapping[str, Changed]
) -> Iterator[Located]:
    """Yield names and masks with the places of their zeros; None for masks that change every weight.

    Places that are not in the mask or in `known` are found by threads, ahead of the consumer.
    """

    def kept(name: str) -> Tensor | None:
        at = known[name].at if name in known else None
        return at if at is not None and at.device == weights[name].device else None

    def find(item: tuple[str, PackedMask | None]) -> Located:
        name, mask = item
        if mask is None or not at_places(mask):
            return name, mask, None
        at, device = kept(name), weights[name].device
        if at is None:
            at = zeros_of(mask, device) if mask.zeros is None else torch.as_tensor(mask.zeros, device=device)
        return name, mask, at

    def size(item: tuple[str, PackedMask | None]) -> int:
        name, mask = item
        searched = mask is not None and at_places(mask) and mask.zeros is None and kept(name) is None
        return 8 * (mask.total - mask.kept) if mask is not None and searched else 0

    return in_order(find, masks, size, WORTH)


def rewritten(weight: Tensor, mask: PackedMask) -> Tensor:
    """Return a weight with a mask on it that has a scale or signs, which change every weight that is kept."""
    device = weight.device
    if mask.has_signs:
        weight = weight.clone()
        at = zeros_of(mask, device, "signs")
        write(weight, at, inverted(read(weight, at)))
    alpha = None if mask.alpha is None else torch.tensor(mask.alpha, dtype=torch.float32, device=device)
    return masked_weight(weight, mask.on(device).reshape(mask.shape), alpha)


def head_tensors(head: Head | None) -> dict[str, Tensor]:
    """Return the tensors of a head that is a module of the model, by dotted name; else nothing."""
    return {} if head is None or head.module is None else head.named_tensors(head.module)


def check_free(model: nn.Module) -> None:
    """Raise StateError if a model has a mask or scores, or belongs to a bank; what was interrupted is undone."""
    check_not_held(model)
    if LEARNING and any(one in LEARNING for one in model.modules()):
        raise StateError(
            "this model has scores that learn; save_adapter(path, model) saves what they learned, and "
            "extract_parts(model) takes them off, so that a mask can be loaded"
        )
    record = applied(model)
    if record is not None and record.complete:
        raise StateError("this model has a mask already; call unload_mask(model) first")
    if record is not None:
        undo(model, record)


def check_not_held(model: nn.Module) -> None:
    if unwrap(model) in _HOLDERS:
        raise StateError("this model belongs to a MaskBank; use the bank, or close it first: bank.close()")


def check_compiled() -> None:
    """Raise StateError if compiled code has weights in it, so that it would not see others."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None and config.freezing:
        raise StateError(
            "torch._inductor.config.freezing is on: compiled code would go on with its copies of the weights; set it "
            "to False, call torch.compiler.reset(), and compile anew"
        )


def own_parts(
    masks: Iterable[tuple[str, PackedMask]], weights: Mapping[str, Tensor], values: dict[str, Tensor | Steps]
) -> Iterator[tuple[str, PackedMask]]:
    """Yield this process's parts of masks by name; those of stored values take the place of the whole ones."""
    for name, mask in masks:
        if shared(weights[name]) and mask.op == "replace":
            at = places(mask.bits, torch.device("cpu"))
            found = values_at(values[name], whole(weights[name]).cpu(), at)
            assert found is not None
            values[name] = own_values(mask, found, weights[name])
        yield name, own_mask(mask, weights[name])


def check_masks(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Return the parameters that masks of these shapes are for, by name; BackboneMismatchError if they do not fit."""
    parameters = named_parameters(model)
    missing = [name for name in shapes if name not in parameters]
    if missing:
        raise BackboneMismatchError(
            f"the model lacks {len(missing)} of the {len(shapes)} masked parameters, first {missing[0]!r}; it has "
            f"{', '.join(list(parameters)[:3])}, …; {OTHER_BASE}"
        )
    for name, shape in shapes.items():
        parameter = parameters[name]
        if why := unusable(parameter):
            raise BackboneMismatchError(f"{name!r} {why}")
        if tuple(parameter.shape) != shape:
            raise BackboneMismatchError(
                f"the mask of {name!r} has shape {shape}, the model's parameter {tuple(parameter.shape)}; {OTHER_BASE}"
            )
    return {name: parameters[name] for name in shapes}


def check_dense(model: nn.Module, parts: Parts, state: Mapping[str, Tensor]) -> None:
    """Raise BackboneMismatchError if a model has no place for an adapter's dense tensors or head."""
    for name, tensor in parts.resolved(state).dense.items():
        if name not in state or state[name].shape != tensor.shape:
            raise BackboneMismatchError(
                f"the model has no {name!r} of shape {tuple(tensor.shape)} as the adapter has; {OTHER_BASE}, or, if "
                f"that is of its head, pass head='keep'"
            )
    module = None if parts.head is None else parts.head.module
    try:
        model.get_submodule(module or "")
    except AttributeError:
        raise BackboneMismatchError(f"the model has no {module!r} for the adapter's head; pass head='keep'") from None


def apply_parts(
    model: nn.Module,
    parts: Parts,
    *,
    mask_id: str = "",
    masks: Iterable[tuple[str, PackedMask]] | None = None,
    restorable: bool = True,
    place: Place = TOP,
    check: Callable[[], object] | None = None,
) -> None:
    """Apply masks one at a time, then dense tensors and head, in place; storage and `requires_grad` stay.

    If anything fails midway, the model is put back before the error goes on. If that is interrupted as well,
    `unload_mask` finishes it, and so does whatever puts a mask on the model next. A head behind an encoder is left out.

    Args:
        masks: name and mask, in the place of those of `parts`, whose names and shapes are checked before the first.
        restorable: keep what `unload_mask` needs. place: where the names of `parts` stand in the model.
        check: called once all is applied; if it raises, the model is put back too.
    """
    check_compiled()
    check_free(model)
    put(model, Applied(mask_id, restorable=restorable, place=place), parts, masks, check)


def put(
    model: nn.Module,
    record: Applied,
    parts: Parts,
    masks: Iterable[tuple[str, PackedMask]] | None = None,
    check: Callable[[], object] | None = None,
) -> None:
    """Apply an adapter to a model that is the base, by a new record; see `apply_parts`."""
    root, model = unwrap(model), view(model, record.place)
    state = tensors_of(model)
    parts = parts.resolved(state)
    shapes, dense, values = parts.masks.shapes, parts.dense, dict(parts.values)
    parameters = check_masks(model, shapes)
    check_dense(model, parts, state)
    names = {*shapes, *dense, *head_tensors(parts.head)}
    record.before = written(state, names)
    try:
        _APPLIED[root] = record
        given = own_parts(parts.masks.items() if masks is None else masks, parameters, values)
        for name, mask, at in located(given, parameters, record.notes or {}):
            assert mask is not None
            _apply(record, name, local(parameters[name]).detach(), mask, at, values.get(name))
        for name, tensor in dense.items():
            _overwrite(record, name, state[name], tensor)
        if parts.head is not None and parts.head.module is not None:
            _apply_head(model, parts.head, record)
        record.after = written(state if record.head is None else tensors_of(model), names)
        if record.notes is not None:
            record.notes.update({name: one for name, one in record.changed if one.at is not None})
        if check is not None:
            check()
        record.complete = True
    except BaseException:
        undo(root, record)
        raise
    if not record.restorable:
        _APPLIED[root] = Applied(record.mask_id, restorable=False, complete=True)


def unload_mask(model: Model, *, force: bool = False) -> Model:
    """Undo `load_mask`: weights, statistics and head get back, to the bit, what they had; return the same model.

    If it is interrupted or fails, the next call finishes it. That also holds for a `load_mask` that was interrupted
    twice, so that it could not undo itself.

    Parameters that something else wrote meanwhile (an optimizer step, `load_state_dict`) are noticed by PyTorch's count
    of in-place writes. Only those that the mask changes are looked at, and no buffers: a forward pass in training mode
    writes the statistics of BatchNorm. `model.to` and `model.half` leave the count as it is, and what is put back is
    moved or cast alike. Not counted, and so not noticed: writes through `.data` or numpy, fused optimizers
    (`fused=True`), and tensors made in inference mode.

    Args:
        force: undo although parameters were written: what the mask changed gets its earlier values, the rest stays as
            it was written.

    Raises:
        StateError: if no mask is loaded, it was loaded with restorable=False, or parameters were written meanwhile.

    Example:
        load_mask(model, "./my-mask")
        unload_mask(model)
    """
    check_not_held(model)
    record = applied(model)
    if record is None:
        raise StateError("this model has no mask to unload; load one with load_mask(model, ref)")
    if record.complete and not record.restorable:
        raise StateError("this model's mask was loaded with restorable=False and cannot be undone; load the base again")
    tensors = tensors_of(view(model, record.place))
    for name, _ in record.changed:
        if name in tensors and unusable(tensors[name]):
            raise StateError(
                f"{name!r} was quantised or offloaded since the mask was loaded, so that it cannot be undone; "
                f"undo that first (accelerate.hooks.remove_hook_from_submodules(model)), or load the base again"
            )
    if record.complete and not force:
        way_out = "unload_mask(model, force=True) puts back what the mask changed and leaves the rest as it was written"
        check_unwritten(record.after, tensors, way_out)
    undo(model, record)
    return model


@contextmanager
def masked(model: nn.Module, parts: Parts, mask_id: str = "") -> Iterator[None]:
    """Apply parts to a model within the context; afterwards it is what it was, to the bit."""
    check_free(model)
    try:
        apply_parts(model, parts, mask_id=mask_id)
        yield
    finally:
        if applied(model) is not None:
            unload_mask(model)


def _apply(
    record: Applied, name: str, weight: Tensor, mask: PackedMask, at: Tensor | None, stored: Tensor | Steps | None
) -> None:
    known = None if record.notes is None else record.notes.get(name)
    values = None if at is None else values_at(stored, weight, at)
    if at is None:
        _overwrite(record, name, weight, rewritten(weight, mask))
    elif known is not None and known.at is at and known.dtype == weight.dtype:
        record.changed.append((name, known))
        for old in known.saved:  # of the whole parameter, if there is any
            write(weight, at, changed_bits(weight, mask, old, values))
    else:
        kept = None if record.notes is None else at.to(torch.int32) if weight.numel() < 2**31 else at
        changed = Changed(weight.dtype, [], mask.but(zeros=None), kept)  # whoever undoes it finds them again
        record.changed.append((name, changed))
        exchange(weight, mask, at.long(), values, changed.saved)


def _overwrite(record: Applied, name: str, target: Tensor, tensor: Tensor) -> None:
    tensor, target = part_of(tensor, target), local(target).detach()
    record.changed.append((name, Changed(target.dtype, [target.clone()])))
    copy_bits(target, tensor.to(target))


def undo(model: nn.Module, record: Applied) -> None:
    """Put back all that a record has, the last first, so that the earliest values win; can be repeated."""
    root, model, record.complete = unwrap(model), view(model, record.place), False
    state = tensors_of(model)
    unwritten = [name for name, left in record.after.items() if name in state and left.same(state[name])]
    try:
        if record.head is not None:
            name, head = record.head
            own = model.get_submodule(name).weight
            assert isinstance(own, Tensor)
            tensors = (tensor for tensor in head.state_dict().values() if tensor.is_floating_point())
            if any((tensor.device, tensor.dtype) != (own.device, own.dtype) for tensor in tensors):
                head.to(own.device, own.dtype)  # as the model was meanwhile
            swap_module(model, name, head)
            state = tensors_of(model)
        changes = [(n, Changed(c.dtype, *own_saved(c.saved, c.mask, state[n]), c.at)) for n, c in record.changed[::-1]]
        found = located(((name, changed.mask) for name, changed in changes), state, dict(changes[::-1]))
        for (name, changed), (_, _, at) in zip(changes, found, strict=True):
            weight = local(state[name]).detach()
            if at is not None:
                put_back(weight, at, changed.saved, changed.dtype)
            else:
                copy_bits(weight, changed.saved[0].to(weight))
        _note_undone(model, record, written(state, record.before), unwritten)
    except BaseException as error:
        error.add_note("maskpack: the model still has a part of the mask; unload_mask (or its bank) removes it")
        raise
    forget(root)


def _note_undone(model: nn.Module, record: Applied, now: Mapping[str, Written], unwritten: Iterable[str]) -> None:
    """Note that tensors have their earlier bits again, at another count of writes.

    That is for the digests of the base, for its bank, and for masked models that share some of its weights.
    """
    has_again(model, {name: (record.before[name].version, now[name].version) for name in unwritten if name in now})
    record.base.update(now)
    mine = {id(was.tensor()): was.version for was in record.before.values()}
    for other in list(_APPLIED.values()):
        for name, left in list(other.after.items()):
            tensor = left.tensor()
            if other is not record and tensor is not None and mine.get(id(tensor)) == left.version:
                other.after.update(written({name: tensor}, [name]))


def _apply_head(model: nn.Module, head: Head, record: Applied) -> None:
    """Copy a head into one of the same shape, so that compiled code stays valid; else put a new module in its place."""
    assert head.module is not None
    old = model.get_submodule(head.module)
    same = isinstance(old, nn.Linear) and old.weight.shape == head.weight.shape
    if same and (old.bias is None) == (head.bias is None):
        state = {f"{head.module}.{name}": p for name, p in old.named_parameters()}
        for name, tensor in head_tensors(head).items():
            _overwrite(record, name, state[name], tensor)
        return
    example = next(old.parameters(), next(model.parameters()))
    classes, features = head.weight.shape
    with torch.inference_mode(False):  # it may be trained later
        new = nn.Linear(features, classes, head.bias is not None, example.device, example.dtype)
    new.weight.detach().copy_(head.weight)
    if head.bias is not None:
        new.bias.detach().copy_(head.bias)
    record.head = (head.module, old)
    swap_module(model, head.module, new.requires_grad_(example.requires_grad).train(old.training))
