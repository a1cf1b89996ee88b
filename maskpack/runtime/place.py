"""Where an adapter's names stand in a model: at its top, in a part of it, or it is a part of what they name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapter.content import Parts
from ..backbone.fingerprint import compared_dtype, same_digest, tensor_digest
from ..backbone.model import Fingerprint, body, inside, named_parameters, unwrap
from ..errors import BackboneMismatchError
from ..mask import MaskSet, Shape


class Place(NamedTuple):
    """A name of the adapter's without `strip` in front is the model's with `add` in front; both are dotted or empty."""

    strip: str = ""
    add: str = ""

    def __str__(self) -> str:
        said = f"under {self.add!r}" if self.add else "at the top"
        return f"{said}, without their {self.strip!r}" if self.strip else said

    def moved(self, name: str) -> str:
        """Return the model's name for one of the adapter's."""
        rest = name[len(self.strip) + 1 :] if self.strip and inside(name, [self.strip]) else name
        return f"{self.add}.{rest}" if self.add else rest

    def back(self, name: str) -> str | None:
        """Return the adapter's name for one of the model's, or None if the adapter's names do not reach there."""
        if self.add and not inside(name, [self.add]):
            return None
        rest = name[len(self.add) + 1 :] if self.add else name
        return f"{self.strip}.{rest}" if self.strip else rest

    def parts(self, parts: Parts) -> Parts:
        """Return an adapter's parts under the model's names."""
        if self == TOP:
            return parts
        head = parts.head
        if head is not None and head.module is not None:
            head = replace(head, embedding=replace(head.embedding, module=self.moved(head.module)))

        def all_moved(named: Mapping[str, Any]) -> dict[str, Any]:
            return {self.moved(name): one for name, one in named.items()}

        dense = (all_moved(one) for one in (parts.statistics, parts.parameters, parts.values, parts.norms))
        return Parts(MaskSet(all_moved(parts.masks)), head, *dense)


TOP = Place()


def view(model: nn.Module, place: Place) -> nn.Module:
    """Return the model, or the part of it, as a module in which the adapter's names stand."""
    found = unwrap(model).get_submodule(place.add)
    for part in reversed(place.strip.split(".")) if place.strip else ():
        outer = nn.Module()
        outer._modules[part] = found
        found = outer
    return found


def module_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a module whose parameters have these dotted names, and the memory of these tensors."""
    found = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        inner = found
        for part in path:
            if part not in inner._modules:
                inner._modules[part] = nn.Module()
            inner = inner.get_submodule(part)
        inner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    return found


def find_place(model: nn.Module, base: Fingerprint, shapes: Mapping[str, Shape]) -> Place:
    """Return where the parameters stand that an adapter's masks, of these shapes, are for; by default at the top.

    Names and shapes decide; where several places have them, the digests of the base.

    Raises:
        BackboneMismatchError: if several places fit that are not the same tensors.
    """
    parameters = named_parameters(model)
    own = {name: tuple(one.shape) for name, one in parameters.items()}
    if not shapes or _fits(TOP, shapes, own):
        return TOP
    places = [place for place in _candidates(next(iter(shapes)), own) if _fits(place, shapes, own)]
    distinct = {tuple(id(parameters[place.moved(name)]) for name in shapes): place for place in reversed(places)}
    if len(distinct) > 1:
        right = [place for place in distinct.values() if _is_base(view(model, place), base, shapes)]
        if len(right) != 1:
            raise BackboneMismatchError(
                f"the adapter's names stand at {len(distinct)} places of the model, "
                f"{' and '.join(str(place) for place in sorted(distinct.values())[:3])}, and the weights of "
                f"{len(right)} of them are those of its base; load it onto the part that you mean, as "
                f"load_mask(model.get_submodule({sorted(distinct.values())[0].add!r}), ref)"
            )
        return right[0]
    return next(iter(distinct.values()), TOP)


def _candidates(name: str, own: Mapping[str, Shape]) -> list[Place]:
    """Return every place at which a name could be one of the model's, by what the two have in common at their ends."""
    found, parts = set(), name.split(".")
    for other in own:
        others = other.split(".")
        common = 0
        while common < min(len(parts), len(others)) and parts[-1 - common] == others[-1 - common]:
            common += 1
        if common > 1 or common == len(parts):  # almost all names end in "weight"
            found.add(Place(".".join(parts[:-common]), ".".join(others[:-common])))
    return sorted(found)


def _fits(place: Place, shapes: Mapping[str, Shape], own: Mapping[str, Shape]) -> bool:
    within = f"{place.strip}." if place.strip else ""
    return all(name.startswith(within) and own.get(place.moved(name)) == shape for name, shape in shapes.items())


@torch.no_grad()
def _is_base(found: nn.Module, base: Fingerprint, shapes: Mapping[str, Shape]) -> bool:
    dtype, parameters = compared_dtype(body(found, base.head).values()), named_parameters(found)
    if any(parameters[name].is_meta for name in shapes):
        return False
    return all(same_digest(tensor_digest(parameters[name], dtype), base, name, dtype) for name in shapes)
