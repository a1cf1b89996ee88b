"""Switching one model between resident adapters: in place, over the base's own bits, by the cheapest way."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from ..backbone.head import Head, swap_module
from ..backbone.parameters import named_buffers, named_parameters, slots
from ..errors import StateError
from ..parts import Parts
from .applied import check_unwritten, written
from .costs import measured
from .heads import head_fits, head_module, head_tensors, new_head
from .patch import Patch, copy_bits, rewritten
from .resident import Resident, change_patches, differing, only_removes, whole_masks
from .weights import check_compiled, check_dense


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
        if parts.head is not None and parts.head.kind == "linear":
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
            head = parts.head if parts.head is not None and parts.head.kind == "linear" else None
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
