"""MaskBank: many adapters resident on one model, switched in place."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..adapter.read import MODEL_FILE, Adapter
from ..backbone.classifier import Inputs, classifier_from, example_count, taken
from ..backbone.model import unwrap
from ..errors import ConfigError, DataError, StateError, UnknownNameError
from ..hub.pull import PullOptions
from ..mask import MaskSet, mask_id
from .apply import Applied, check_masks, forget, hold
from .load import VERIFY, Reference, Verify, check_base, check_one_set, load_adapter
from .switch import Resident, Switch


@dataclass(frozen=True, slots=True)
class ResidentStatus:
    """An adapter in a bank.

    Attributes:
        state: "active", "ready" (places and values are noted), "packed" (a bit a weight) or "evicted" (read again when
            it is used).
        density: share of weights kept, None if evicted. host_bytes, device_bytes: of packed bits and dense tensors; of
            places and values.
    """

    name: str
    state: str
    pinned: bool
    mask_id: str
    density: float | None
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class BankStatus:
    """What a bank holds.

    Attributes:
        active: name of the adapter that the model computes with; None: the base.
        residents: by name. host_bytes, device_bytes: of all, with what else switching keeps.
        switches: how many there were, by how: "bits", "places" or "changes".
    """

    active: str | None
    residents: Mapping[str, ResidentStatus]
    host_bytes: int
    device_bytes: int
    switches: Mapping[str, int]


class Room:
    """Keeps a bank's adapters within limits of memory.

    Attributes:
        host: limit for packed bits and dense tensors, None: no limit. device: limit for places and values, beside those
            of the active adapter.
    """

    def __init__(self, residents: Mapping[str, Resident], switch: Switch, host: int | None, device: int | None):
        for name, limit in (("max_host_bytes", host), ("max_device_bytes", device)):
            if limit is not None and limit < 0:
                raise ConfigError(f"{name} must be 0 or more, or None, got {limit}")
        self.residents, self.switch, self.host = residents, switch, host
        tensors: list[Tensor] = list(switch.tensors.values())
        self.device = sum(tensor.nbytes for tensor in tensors) if device is None else device

    @property
    def host_bytes(self) -> int:
        """Memory of packed bits and dense tensors."""
        return sum(one.host_bytes for one in self.residents.values())

    @property
    def device_bytes(self) -> int:
        """Memory of places and values, of the base's tensors that are kept, and of changes between adapters."""
        return self._notes() + sum(tensor.nbytes for tensor in self.switch.kept.values())

    def status(self) -> BankStatus:
        """Return what the bank holds, and how it switched so far."""
        active = self.switch.active
        return BankStatus(
            active.name if active else None,
            {name: self._status(one) for name, one in self.residents.items()},
            self.host_bytes,
            self.device_bytes,
            dict(self.switch.counts),
        )

    def _status(self, one: Resident) -> ResidentStatus:
        state = "active" if self.switch.active is one else "ready" if one.patches else "packed"
        density = None if one.parts is None else one.parts.masks.density
        state = "evicted" if one.parts is None else state
        return ResidentStatus(one.name, state, one.pinned, one.mask_id, density, one.host_bytes, one.device_bytes)

    def make(self, one: Resident) -> None:
        """Evict others until an adapter fits that was read.

        Raises:
            StateError: if there are not enough that may be evicted; the adapter has no parts then.
        """
        if self.host is None:
            return
        others = sorted(self._evictable(one), key=lambda other: other.used)
        while self.host_bytes > self.host:
            if not others:
                needed, limit = one.host_bytes, self.host
                one.parts = None
                kept = ", ".join(repr(o.name) for o in self.residents.values() if o.parts is not None) or "no other"
                raise StateError(
                    f"{one.name!r} takes {needed} bytes, and there is no room for it within max_host_bytes={limit}: "
                    f"{kept} cannot be evicted, being active or pinned; raise the limit, or remove some"
                )
            gone = others.pop(0)
            self.switch.forget(gone)
            gone.parts = None

    def trim(self) -> None:
        """Drop places and changes that were used longest ago, until the limit of the device is kept."""
        idle = [one for one in self.residents.values() if one is not self.switch.active and one.patches]
        idle.sort(key=lambda one: one.used)
        active = self.switch.active
        spare = self.device + (0 if active is None else active.device_bytes)
        while idle and self._notes() > spare:
            self.switch.forget(idle.pop(0))

    def _notes(self) -> int:
        """Memory of places and values, and of changes between adapters."""
        changes = sum(patch.nbytes for patches in self.switch.changes.values() for patch in patches.values())
        return changes + sum(one.device_bytes for one in self.residents.values())

    def _evictable(self, one: Resident) -> list[Resident]:
        return [
            other
            for other in self.residents.values()
            if other is not one
            and other is not self.switch.active
            and other.parts is not None
            and other.read is not None
            and not other.pinned
        ]


class Gate:
    """Checks adapters against one model.

    Args:
        verify: as of `load_mask`.
    """

    def __init__(self, model: nn.Module, verify: Verify):
        if verify not in VERIFY:
            raise ConfigError(f"verify must be strict, warn or off, got {verify!r}")
        self.model, self.verify = model, verify

    def admit(self, name: str, source: Adapter | MaskSet, options: PullOptions) -> Resident:
        """Check and decode an adapter, or masks alone, while the model has its base's bits.

        Raises:
            As `MaskBank.add`.
        """
        if isinstance(source, MaskSet):
            check_masks(self.model, source.shapes)
            masks = MaskSet(dict(source))
            return Resident(name, Parts(masks), mask_id({"default": masks}))
        check_one_set(source)
        check_masks(self.model, source.shapes())
        check_base(self.model, source, self.verify, stacklevel=4)
        parts, pinned = source.parts(base=unwrap(self.model)), source.pinned
        # what a branch or tag meant is pinned by the commit
        later: Any = {key: value for key, value in options.items() if key not in ("revision", "require_revision")}
        return Resident(
            name,
            parts,
            source.mask_id,
            lambda: load_adapter(pinned, **later),
            source.digest,
        )


def name_of(source: Adapter | MaskSet) -> str:
    """Return the last part of an adapter's reference, without commit and suffix; of a folder's file, the folder's.

    Raises:
        ConfigError: if masks are no adapter's.
    """
    if isinstance(source, MaskSet):
        raise ConfigError("masks that are no adapter have no name of their own; give one: bank.add(masks, 'name')")
    path = PurePath(source.pinned)
    name = path.parent.name if path.name == MODEL_FILE else path.name
    return name.split("@")[0].removesuffix(".safetensors")


def mixed_batch(bank: "MaskBank", inputs: Tensor | Mapping[str, Tensor], masks: Sequence[str | None]) -> list[Tensor]:
    """Compute examples in groups of the same adapter, the active one first; see `MaskBank.__call__`."""
    batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
    count = example_count(batch)
    if len(masks) != count:
        raise ConfigError(f"every example needs the name of a mask, or None; got {len(masks)} for {count} examples")
    rows: dict[str | None, list[int]] = {}
    for index, name in enumerate(masks):
        rows.setdefault(name, []).append(index)
    found: list[Tensor | None] = [None] * count
    for name in sorted(rows, key=lambda name: name != bank.active):
        group = taken(batch, torch.tensor(rows[name]))
        with bank.disabled() if name is None else bank.using(name):
            for index, output in zip(rows[name], _forward(bank, name, group), strict=True):
                found[index] = output
    return [output for output in found if output is not None]


def _forward(bank: "MaskBank", name: str | None, inputs: Inputs) -> Tensor:
    """Return the outputs of the model for one group, by the adapter's head where that lies behind the model."""
    head = None if name is None else bank.parts(name).head
    if head is not None and head.module is None:
        classifier = classifier_from(bank.model, head).train(bank.model.training)
        output: object = classifier(inputs)
    else:
        output = bank.model(**inputs) if isinstance(inputs, dict) else bank.model(inputs)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise DataError(
            f"the model gives a {type(output).__name__} without logits, which cannot be taken apart by examples; call "
            f"the model inside `with bank.using({name!r})`"
        )
    return output


class MaskBank:
    """Adapters that stay resident on one model as packed bits; the model computes with one of them, or as the base.

    Weights, statistics and heads are written in place: class, names, storage and `requires_grad` of the model's tensors
    stay, so compiled code and CUDA graphs stay valid (but for heads of another shape than the model's). Between any two
    masks the way leads over the base's own bits, and `close` gives them back.

    **Threads.** All calls may come from any thread. `using`, `disabled` and a call of the bank have the model for
    themselves until they are left; others wait. A forward pass outside of them computes with whatever is active then.

    **Failures.** A call that fails or is interrupted leaves the base or one whole adapter; `active` says which. If the
    way back to the base is interrupted as well, the next call finishes it, also that of `active`.

    The model belongs to the bank until `close`: `load_mask` refuses it, and it must not be moved, cast or trained. The
    next switch notices that.

    Args:
        model: the base, without a mask.
        max_host_bytes: limit for packed bits and dense tensors. Adapters that are neither active nor pinned are
            evicted, the least recently used first, and read again when they are used. None: no limit.
        max_device_bytes: limit for places and values that switching keeps, beside those of the active adapter; None:
            as many bytes as the model's parameters take.
        verify: as of `load_mask`, for every adapter.

    Raises:
        StateError: if the model has a mask, or belongs to a bank.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_host_bytes: int | None = None,
        max_device_bytes: int | None = None,
        verify: Verify = "strict",
    ):
        self.model, self._gate = model, Gate(model, verify)
        self._lock = threading.RLock()
        self._residents: dict[str, Resident] = {}
        self._switch = Switch(unwrap(model))
        self._room = Room(self._residents, self._switch, max_host_bytes, max_device_bytes)
        self._closed, self._hold = False, Applied("", held=True)
        hold(model, self._hold)

    def __enter__(self) -> "MaskBank":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._residents

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were added."""
        return tuple(self._residents)

    @property
    def active(self) -> str | None:
        """Name of the adapter that the model computes with now; None: the base."""
        if self._switch.between is not None:
            with self._lock:
                self._switch.settle()
        return self._switch.active.name if self._switch.active else None

    def add(
        self,
        ref: Reference | Adapter | MaskSet,
        name: str | None = None,
        *,
        pin: bool = False,
        **options: Unpack[PullOptions],
    ) -> str:
        """Read, verify and decode an adapter; the model computes with what it did before. Returns the name.

        Args:
            ref: as of `load_mask`; masks without an adapter are taken as they are, and are never evicted.
            name: to use it by; default: the last part of the reference, without revision and suffix.
            pin: never evict it. Others: as of `pull`.

        Raises:
            ConfigError: if the name is taken, or masks are given without one.
            BackboneMismatchError: if the adapter was made for another base. StateError: if it has no room.
            AdapterError, HubError: as `load_adapter`.
        """
        source = ref if isinstance(ref, MaskSet | Adapter) else load_adapter(ref, **options)
        name = name or name_of(source)
        with self._lock:
            if name in self._residents:
                raise ConfigError(
                    f"this bank has an adapter called {name!r} already; give another name, or remove it: "
                    f"bank.remove({name!r})"
                )
            with self.disabled():
                one = self._gate.admit(name, source, options)
            self._switch.check(one.decoded())
            one.pinned = pin
            try:
                self._residents[name] = one
                self._room.make(one)
            except BaseException:
                self._residents.pop(name, None)
                raise
        return name

    def use(self, name: str) -> nn.Module:
        """Compute with an adapter from now on; return the model. If that fails, it computes as the base.

        Raises:
            UnknownNameError: if the bank has none of that name. StateError: as `add`, of one that was evicted.
        """
        return self._to(name)

    def disable(self) -> nn.Module:
        """Compute as the base from now on, to the bit; return the model."""
        return self._to(None)

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """Compute with an adapter as long as this lasts, and have the model for oneself; then as before."""
        with self._during(name):
            yield self.model

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Compute as the base as long as this lasts, and have the model for oneself; then as before."""
        with self._during(None):
            yield self.model

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is active, the model computes as the base.

        Raises:
            UnknownNameError: if the bank has none of that name.
        """
        with self._lock:
            one = self._find(name)
            if self.active == name:
                self._switch.to(None)
            self._switch.forget(one)
            del self._residents[name]

    def status(self) -> BankStatus:
        """Return what the bank holds, and how it switched so far."""
        with self._lock:
            self._switch.settle()
            return self._room.status()

    def close(self, *, force: bool = False) -> None:
        """Give the model back as the base, to the bit, and forget all adapters; a closed bank cannot be used.

        If it is interrupted, the next call finishes it. Weights that something else wrote are a StateError; `force`
        puts back what the active adapter changed in spite of that.
        """
        with self._lock:
            if not self._closed:
                self._switch.to(None, force)
                for name in list(self._residents):
                    self.remove(name)
                forget(self.model, self._hold)
                self._closed = True

    def __call__(self, inputs: Tensor | Mapping[str, Tensor], masks: Sequence[str | None]) -> list[Tensor]:
        """Compute a batch in which every example has an adapter of its own.

        Examples are grouped, and each group is one forward pass with its adapter and that adapter's head.

        Args:
            inputs: preprocessed: (B, …), or a tokenizer's tensors by name.
            masks: a name for each example, or None for the base.

        Returns:
            The output for each example, in order; shapes may differ.

        Raises:
            UnknownNameError: if a name is none of the bank's. ConfigError: if there is not a name for each example.
        """
        with self._lock:
            for name in masks:
                if name is not None:
                    self._find(name)
            return mixed_batch(self, inputs, masks)

    def parts(self, name: str) -> Parts:
        """Return the masks of an adapter with its head and dense tensors, read again if they were evicted."""
        with self._lock:
            one = self._find(name)
            with self._during(self.active):
                self._load(one)
                return one.decoded()

    def _to(self, name: str | None) -> nn.Module:
        with self._lock:
            one = None if name is None else self._find(name)
            if one is not None:
                self._load(one)
            self._switch.to(one)
            self._room.trim()
            return self.model

    @contextmanager
    def _during(self, name: str | None) -> Iterator[None]:
        with self._lock:
            before = self.active
            self._to(name)
            try:
                yield
            finally:
                self._to(before if before in self._residents else None)

    def _find(self, name: str) -> Resident:
        if name not in self._residents:
            raise UnknownNameError(f"this bank has no adapter {name!r}; it has: {', '.join(self._residents) or 'none'}")
        return self._residents[name]

    def _load(self, one: Resident) -> None:
        """Read an adapter again that was evicted; that takes the base, which the model is then."""
        if one.parts is None:
            self._switch.to(None)
            one.reread(unwrap(self.model))
            self._room.make(one)
