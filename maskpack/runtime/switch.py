"""How long writing weights takes on a device, measured: what switching chooses its way by."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from bitarray import bitarray
from bitarray.util import count_xor
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter.content import Parts
from ..adapter.read import Adapter
from ..backbone.classifier import Inputs, classifier_from
from ..backbone.model import Head, named_buffers, named_parameters, slots, swap_module, unwrap
from ..errors import ConfigError, StateError
from ..mask import PackedMask
from .apply import (
    Patch,
    at_places,
    check_compiled,
    check_dense,
    check_unwritten,
    copy_bits,
    head_fits,
    head_module,
    head_tensors,
    new_head,
    patch_of,
    places,
    rewritten,
    write,
    written,
)

WEIGHTS = 1 << 20  # of the tensor that is measured on
EVERY = 16  # weights for each one written
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: `write` for each weight that is written by place, `scan` for each whose bit is looked at."""

    write: float
    scan: float


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Costs:
    """Measure a device, once; this takes some hundredths of a second."""
    weight = torch.zeros(WEIGHTS, dtype=dtype, device=device)
    bits = bitarray(WEIGHTS, endian="little")
    bits.setall(1)
    bits[::EVERY] = 0
    at = places(bits, device)
    small, values = at.to(torch.int32), torch.zeros_like(at, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32)

    def seconds(act: Callable[[], object]) -> float:
        taken = []
        for _ in range(REPEATS):
            _wait(device)
            started = time.perf_counter()
            act()
            _wait(device)
            taken.append(time.perf_counter() - started)
        return median(taken)

    return Costs(
        seconds(lambda: write(weight, small, values)) / len(at), seconds(lambda: places(bits, device)) / WEIGHTS
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(eq=False)
class Resident:
    """An adapter in a bank.

    Attributes:
        parts: its decoded masks, a bit a weight, and dense tensors; None after they were evicted from memory.
        read: reads the adapter again, or None for masks that did not come from one. digest: of its file.
        pinned: is never evicted.
        patches: what its masks change, for those that change only some places; empty until the adapter is used.
        used: when it was last used, by the bank's clock.
    """

    name: str
    parts: Parts | None
    mask_id: str
    read: Callable[[], Adapter] | None = None
    digest: str | None = None
    pinned: bool = False
    patches: dict[str, Patch] = field(default_factory=dict)
    used: int = 0

    @property
    def host_bytes(self) -> int:
        """Memory of packed bits and dense tensors."""
        return 0 if self.parts is None else self.parts.nbytes

    @property
    def device_bytes(self) -> int:
        """Memory of patches."""
        return sum(patch.nbytes for patch in self.patches.values())

    def decoded(self) -> Parts:
        """Return the parts; those that were evicted must have been read again."""
        assert self.parts is not None
        return self.parts

    def reread(self, base: nn.Module) -> None:
        """Read the adapter again after its parts were evicted; the model must have its base's bits.

        Raises:
            StateError: if the file is another one now.
        """
        assert self.read is not None
        adapter = self.read()
        if adapter.digest != self.digest:
            raise StateError(
                f"{self.name!r} was evicted from the bank, and {adapter.path}, which it was read from, has other bytes "
                f"now; remove it and add it again, or pin what must stay"
            )
        self.parts = adapter.parts(base=base)

    def make_patches(self, parameters: Mapping[str, Tensor]) -> None:
        """Note what the masks change in parameters that have their base's bits."""
        parts = self.decoded()
        if not self.patches:
            self.patches = {  # in one step: places of some parameters alone would be taken for those of all
                name: patch_of(parameters[name], mask, parts.values.get(name))
                for name, mask in parts.masks.items()
                if at_places(mask)
            }


def whole_masks(parts: Parts) -> dict[str, PackedMask]:
    """Return the masks with a scale or signs, which change every weight."""
    return {name: mask for name, mask in parts.masks.items() if not at_places(mask)}


def only_removes(parts: Parts) -> bool:
    """Whether masks only remove weights, so that two of the sort differ in the places where their bits do."""
    return all(mask.op == "zero" and at_places(mask) for mask in parts.masks.values())


def differing(one: Parts, other: Parts) -> int:
    """Return in how many places two sets of removing masks differ; a parameter without a mask is kept whole."""
    count = 0
    for name in {*one.masks, *other.masks}:
        a, b = one.masks.get(name), other.masks.get(name)
        count += count_xor(a.bits, b.bits) if a and b else sum(mask.bits.count(0) for mask in (a, b) if mask)
    return count


def change_patches(one: Resident, other: Resident) -> dict[str, Patch]:
    """Return patches from a set of removing masks to another one: `put` leads there, `undo` back."""
    found = {}
    masks_a, masks_b = one.decoded().masks, other.decoded().masks
    for name in sorted({*masks_a, *masks_b}):
        a, b = one.patches.get(name), other.patches.get(name)
        if a is None or b is None:
            only = a or b
            assert only is not None
            zeros = torch.zeros_like(only.old)
            found[name] = Patch(only.at, zeros, only.old) if b is None else Patch(only.at, only.old, zeros)
            continue
        bits_a, bits_b = masks_a[name].bits, masks_b[name].bits
        back = places(bits_a | ~bits_b, a.at.device)
        gone = places(~bits_a | bits_b, a.at.device)
        was, now = base_bits(b, gone), base_bits(a, back)
        at = torch.cat([back, gone]).to(a.at.dtype)
        found[name] = Patch(at, torch.cat([torch.zeros_like(now), was]), torch.cat([now, torch.zeros_like(was)]))
    return found


def base_bits(patch: Patch, at: Tensor) -> Tensor:
    """Return the old bits of a patch at some of its places."""
    return patch.old[torch.searchsorted(patch.at.long(), at)]


@dataclass(frozen=True, slots=True, eq=False)
class Superposition:
    """The networks theta(a) = sum of a_i theta_i, after "Supermasks in Superposition" (Wortsman et al., 2020).

    theta_i are all tensors as adapter i leaves them: masked weights, statistics, parameters, head. Nothing is written
    into the model, which has its base's bits.

    Attributes:
        module: what computes: the model, or an encoder with a head behind it.
        base: the tensors of `module` that some adapter changes, by name.
        changes: for each adapter, by the same names, a mask or what stands in the place of the tensor.
        values: for each adapter, what masks with op "replace" put in.
    """

    module: nn.Module
    base: Mapping[str, Tensor]
    changes: Sequence[Mapping[str, PackedMask | Tensor]]
    values: Sequence[Mapping[str, Tensor]]

    def theta(self, index: int, name: str) -> Tensor:
        """Return a tensor as one adapter leaves it: a new one, in the base's dtype."""
        base, change = self.base[name], self.changes[index].get(name)
        if isinstance(change, Tensor):
            return change.to(base)
        if change is None:
            return base.detach().clone()
        if not at_places(change):
            return rewritten(base.detach(), change)
        result = base.detach().clone()
        patch_of(result, change, self.values[index].get(name)).put(result)
        return result

    def added(self, weights: Tensor) -> dict[str, Tensor]:
        """Return theta(a) by name, for a of shape (k,); added up in float32, one tensor at a time."""
        found = {}
        for name, base in self.base.items():
            parts = [self.theta(i, name).float() * weight for i, weight in enumerate(weights.tolist()) if weight]
            found[name] = torch.stack(parts).sum(0).to(base.dtype)
        return found

    def slopes(self, inputs: Inputs, weights: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """Return the loss of the logits at a, and its gradient for a, (k,): sum of dL/dtheta * theta_i.

        One forward and one backward pass, whatever k is. Statistics are added up as all else is, and count as
        constants: PyTorch's BatchNorm has no gradient for them.
        """
        point = self.added(weights)
        learned = [name for name in point if isinstance(self.base[name], nn.Parameter)]
        with torch.enable_grad():
            inner = [point[name].requires_grad_() for name in learned]
            value = loss(self.logits(inputs, point))
            slopes = torch.autograd.grad(value, inner, allow_unused=True)
        found = torch.zeros(len(self.changes))
        for name, slope in zip(learned, slopes, strict=True):
            if slope is not None:
                products = [(slope.float() * self.theta(i, name).float()).sum() for i in range(len(found))]
                found += torch.stack(products).cpu()
        return float(value.detach()), found

    def logits(self, inputs: Inputs, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs with these tensors, (B, classes)."""
        named = isinstance(inputs, dict) and not hasattr(self.module, "pooling")
        arguments: tuple[Any, ...] = () if named else (inputs,)
        output = functional_call(self.module, dict(tensors), arguments, dict(inputs) if named else None)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def superposition(model: nn.Module, parts: Mapping[str, Parts]) -> Superposition:
    """Return the superposition of some adapters on a model that has its base's bits.

    Raises:
        ConfigError: if their heads have not one shape, so that they cannot be added up.
    """
    heads = [one.head for one in parts.values()]
    if len({_shape(head) for head in heads}) != 1:
        raise ConfigError(
            f"masks are added up with their heads, and those of {', '.join(map(repr, parts))} have not one shape; "
            f"choose others, or how='each', which asks one mask after the other"
        )
    first = heads[0]
    behind = first is not None and first.module is None
    module: nn.Module = unwrap(model)
    if behind:
        assert first is not None
        module = classifier_from(module, first).eval()
    prefix = "model." if behind else ""
    changes = []
    for one in parts.values():
        body: dict[str, PackedMask | Tensor] = {**one.masks, **one.statistics, **one.parameters}
        changes.append({**{prefix + name: change for name, change in body.items()}, **_head(one.head)})
    state = {**named_buffers(module), **named_parameters(module)}
    base = {name: state[name] for name in sorted({name for own in changes for name in own})}
    values = [{prefix + name: tensor for name, tensor in one.values.items()} for one in parts.values()]
    return Superposition(module, base, changes, values)


def _shape(head: Head | None) -> tuple[object, ...]:
    return () if head is None else (head.module, tuple(head.weight.shape), head.bias is not None)


def _head(head: Head | None) -> dict[str, Tensor]:
    """Return the tensors of a head by their names in what computes."""
    if head is None:
        return {}
    if head.module is not None:
        return dict(head_tensors(head))
    named = {"linear.weight": head.weight, "linear.bias": head.bias}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of each row, in nats, (B,)."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


class Switch:
    """What the model computes with, and how it comes to something else.

    There are three ways from one adapter to another one. By **bits**: the places that masks change are found from their
    bits; the first time, and whenever they were not kept. By **places**: they are known, what the one changed is put
    back, and what the other changes is written. By **changes**: only what differs between two adapters is written; that
    is for adapters that remove weights only. What differs is noted for a pair as soon as the time that it would have
    saved so far is more than the time that it takes, by measured costs.

    What adapters change never changes, since the base does not. So a switch that was interrupted is undone by writing
    the base's bits of both adapters, and that may be interrupted and repeated: see `settle`.

    Attributes:
        active: what the model computes with; None: the base. counts: switches by how.
        between: adapters that a switch is between; the model may have a part of each. None: the last switch is done.
        changes: patches of pairs of adapters by name of the pair. kept: the base's bits of tensors that are written as
            a whole: statistics, parameters, heads, and weights under a mask with a scale or signs.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: Resident | None = None
        self.between: tuple[Resident | None, Resident | None] | None = None
        self.counts: Counter[str] = Counter()
        self.changes: dict[tuple[str, str], dict[str, Patch]] = {}
        self.kept: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {**named_buffers(model), **named_parameters(model)}
        self.kinds = {name: (tensor.dtype, tensor.device) for name, tensor in self.tensors.items()}
        self._slots = dict(slots(model))
        self._written_last = written(self.tensors, self.tensors)  # by the bank
        # of pairs that were switched between by places: see `_worth_of`, and how often
        self._worth: dict[tuple[str, str], tuple[float, float]] = {}
        self._repeated: Counter[tuple[str, str]] = Counter()
        self._written: set[str] = set()  # statistics, parameters and heads that are not the base's now
        self._head: tuple[str, nn.Module] | None = None  # the model's own, while another one is in its place
        self._clock = 0

    def check(self, parts: Parts) -> None:
        """Raise BackboneMismatchError if the model has no place for what comes with masks."""
        check_dense({**parts.statistics, **parts.parameters}, self.tensors)
        if parts.head is not None and parts.head.module is not None:
            head_module(self.model, parts.head)

    def to(self, one: Resident | None, force: bool = False) -> None:
        """Let the model compute with an adapter, or as the base; if that fails, as the base.

        Args:
            force: also where something else wrote weights that these adapters change.

        Raises:
            StateError: if the model was moved or cast, is compiled with frozen weights, or something else wrote
                weights; then nothing changed.
        """
        self.settle()
        self._clock += 1
        if one is not None:
            one.used = self._clock
        before = self.active
        if one is before:
            return
        check_compiled()
        names = self._names(before, one)
        self._check(names, force)
        try:
            self.between = before, one
            self._weights(before, one)
            self._dense(one)
            self._written_last |= written(self.tensors, names)
            self.active = one
            self.between = None
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Make the model the base again if a switch was interrupted; this can be interrupted itself, and repeated."""
        if self.between is None:
            return
        for one in self.between:
            for name, patch in one.patches.items() if one is not None else ():
                patch.undo(self.tensors[name])
        for name, tensor in self.kept.items():
            copy_bits(self.tensors[name], tensor)
        if self._head is not None:
            swap_module(self.model, *self._head)
            self._head = None
        self._written.clear()
        self._written_last |= written(self.tensors, self._names(*self.between) | self.kept.keys())
        self.active = None
        self.between = None

    def forget(self, one: Resident) -> None:
        """Drop what is noted of an adapter that is not active."""
        self.settle()
        one.patches = {}
        self.changes = {pair: patches for pair, patches in self.changes.items() if one.name not in pair}
        self._worth = {pair: worth for pair, worth in self._worth.items() if one.name not in pair}
        self._repeated = Counter({pair: count for pair, count in self._repeated.items() if one.name not in pair})

    def _weights(self, before: Resident | None, one: Resident | None) -> None:
        pair = self._pair(before, one)
        if pair is not None and before is not None and one is not None:
            self.counts["changes"] += 1
            forward = pair[0] == before.name
            for name, patch in self.changes[pair].items():
                (patch.put if forward else patch.undo)(self.tensors[name])
            return
        if before is not None:
            self._undo(before, {} if one is None else whole_masks(one.decoded()))
        if one is not None:
            self.counts["places" if one.patches else "bits"] += 1
            one.make_patches(self.tensors)
            for name, patch in one.patches.items():
                patch.put(self.tensors[name])
            for name, mask in whole_masks(one.decoded()).items():
                base = self._keep(name)
                copy_bits(self.tensors[name], rewritten(base, mask))

    def _undo(self, one: Resident, but: Iterable[str] = ()) -> None:
        """Put the base's bits back where an adapter changed weights, but for some that are to be written as a whole."""
        for name, patch in one.patches.items():
            patch.undo(self.tensors[name])
        for name in whole_masks(one.decoded()).keys() - set(but):
            copy_bits(self.tensors[name], self.kept[name])

    def _pair(self, before: Resident | None, one: Resident | None) -> tuple[str, str] | None:
        """Return the pair whose changes lead from one adapter to the other, if they are worth it."""
        if before is None or one is None or not before.patches or not one.patches:
            return None
        for pair in ((before.name, one.name), (one.name, before.name)):
            if pair in self.changes:
                return pair
        if not (only_removes(before.decoded()) and only_removes(one.decoded())):
            return None
        first, second = sorted((before, one), key=lambda resident: resident.name)
        pair = (first.name, second.name)
        if pair not in self._worth:
            self._worth[pair] = self._worth_of(first, second)
        saved, price = self._worth[pair]
        self._repeated[pair] += 1
        if self._repeated[pair] * saved <= price:
            return None
        self.changes[pair] = change_patches(first, second)
        return pair

    def _worth_of(self, one: Resident, other: Resident) -> tuple[float, float]:
        """Return the seconds that changes save in a switch between two, and those that it takes to find them."""
        weights = sum(len(mask.bits) for mask in one.decoded().masks.values())
        written = sum(len(patch.at) for resident in (one, other) for patch in resident.patches.values())
        example = self.tensors[next(iter(one.patches))]
        costs = measured(example.device, example.dtype)
        return costs.write * (written - differing(one.decoded(), other.decoded())), costs.scan * 2 * weights

    def _dense(self, one: Resident | None) -> None:
        """Switch statistics, parameters and heads."""
        wanted: dict[str, Tensor] = {}
        head: Head | None = None
        if one is not None:
            parts = one.decoded()
            wanted = {**parts.statistics, **parts.parameters}
            head = parts.head if parts.head is not None and parts.head.module is not None else None
        own = self._own_head(head)
        if self._head is not None and (head is None or own or head.module != self._head[0]):
            swap_module(self.model, *self._head)
            self._head = None
        if head is not None and own:
            wanted |= head_tensors(head)
        for name in self._written - wanted.keys():
            copy_bits(self.tensors[name], self.kept[name])
        self._written = set(wanted)
        for name, tensor in wanted.items():
            self._keep(name)
            copy_bits(self.tensors[name], tensor.to(self.tensors[name]))
        if head is not None and not own:
            self._swap(head)

    def _own_head(self, head: Head | None) -> bool:
        """Whether a head fits into the module that the model itself has."""
        if head is None or head.module is None:
            return False
        module = self._head[1] if self._head is not None else self.model.get_submodule(head.module)
        return head_fits(module, head)

    def _swap(self, head: Head) -> None:
        """Put a head of another shape in the place of the model's."""
        assert head.module is not None
        there = self.model.get_submodule(head.module)
        if self._head is not None and head_fits(there, head):
            module = there
            for name, tensor in head_tensors(head).items():
                target = module.get_parameter(name.rpartition(".")[2])
                copy_bits(target, tensor.to(target))
            return
        module = new_head(self.model, there, head)
        self._head = self._head or (head.module, there)
        swap_module(self.model, head.module, module)

    def _keep(self, name: str) -> Tensor:
        """Return the base's bits of a tensor, which are noted when it is first written as a whole."""
        if name not in self.kept:
            self.kept[name] = self.tensors[name].detach().clone()
        return self.kept[name]

    def _names(self, *residents: Resident | None) -> set[str]:
        """Return the names of the model's own parameters that some adapters change."""
        names: set[str] = set()
        for one in residents:
            if one is not None:
                parts = one.decoded()
                names |= parts.masks.shapes.keys() | parts.parameters.keys()
                names |= head_tensors(parts.head).keys() if parts.head is not None else set()
        return names & self._slots.keys()

    def _check(self, names: Iterable[str], force: bool) -> None:
        """Raise StateError if parameters were moved or cast, or, without `force`, written by something else."""
        now = {name: owner[leaf] for name in sorted(names) for owner, leaf in [self._slots[name]] if leaf in owner}
        for name, tensor in now.items():
            dtype, device = self.kinds[name]
            if tensor.dtype != dtype or tensor.device != device:
                raise StateError(
                    f"{name!r} is {tensor.dtype} on {tensor.device} now, and was {dtype} on {device} when the bank "
                    f"was made; move or cast the model before that, or close the bank and make another one"
                )
        if not force:
            noted = {name: self._written_last[name] for name in names if name in self._written_last}
            check_unwritten(
                noted, now, "a bank's model must not be trained; bank.close(force=True) puts back what adapters changed"
            )
