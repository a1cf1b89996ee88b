"""Record of what is on a model, kept beside it, and of who wrote its weights last."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbone.parameters import unwrap
from ..errors import StateError
from ..mask import PackedMask


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
