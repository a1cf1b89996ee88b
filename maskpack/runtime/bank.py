"""MaskBank: many adapters resident on one model, switched in place."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..adapter.read import MODEL_FILE, Adapter
from ..backbone.classifier import Inputs, classifier_from, example_count, taken
from ..backbone.model import inside, unwrap
from ..errors import ConfigError, DataError, StateError, UnknownNameError
from ..hub.pull import PullOptions
from ..mask import MaskSet, mask_id
from .apply import (
    Applied,
    Changed,
    Written,
    applied,
    check_compiled,
    check_dense,
    check_masks,
    check_unwritten,
    head_tensors,
    held_by,
    hold,
    put,
    release,
    tensors_of,
    undo,
    written,
)
from .load import Reference, Verify, check_base, check_choices, check_one_set, load_adapter


@dataclass(frozen=True, slots=True)
class ResidentStatus:
    """An adapter in a bank.

    Attributes:
        state: "active", "ready" (places and base weights are noted), "packed" (a bit a weight) or "evicted" (read again
            when it is used).
        density: share of weights kept, None if evicted. host_bytes: of packed bits and dense tensors. device_bytes: of
            places and base weights.
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
        residents: by name. host_bytes, device_bytes: of all.
        switches: how many there were to adapters, by how their places were found: "bits" (searched) or "places"
            (noted).
    """

    active: str | None
    residents: Mapping[str, ResidentStatus]
    host_bytes: int
    device_bytes: int
    switches: Mapping[str, int]


@dataclass(eq=False)
class Resident:
    """An adapter in a bank.

    Attributes:
        parts: its decoded masks, a bit a weight, and dense tensors; None after they were evicted from memory.
        read: reads the adapter again, or None for masks that did not come from one. digest: of its file.
        notes: what its masks change, for those that change only some places; empty until it is used.
        used: when it was last used, by the bank's clock.
    """

    name: str
    parts: Parts | None
    mask_id: str
    read: Callable[[], Adapter] | None = None
    digest: str | None = None
    pinned: bool = False
    notes: dict[str, Changed] = field(default_factory=dict)
    used: int = 0

    @property
    def host_bytes(self) -> int:
        """Memory of packed bits and dense tensors."""
        return 0 if self.parts is None else self.parts.nbytes

    @property
    def device_bytes(self) -> int:
        """Memory of notes."""
        return sum(changed.nbytes for changed in self.notes.values())


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
        max_device_bytes: limit for places and base weights that switching keeps, beside those of the active adapter;
            None: as many bytes as the model's tensors take.
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
        check_choices(verify)
        for name, limit in (("max_host_bytes", max_host_bytes), ("max_device_bytes", max_device_bytes)):
            if limit is not None and limit < 0:
                raise ConfigError(f"{name} must be 0 or more, or None, got {limit}")
        tensors = tensors_of(model)
        self.model, self._verify, self._host = model, verify, max_host_bytes
        self._device = sum(t.nbytes for t in tensors.values()) if max_device_bytes is None else max_device_bytes
        self._base = written(tensors, tensors)  # as the bank last left the base's tensors
        self._lock, self._clock = threading.RLock(), 0
        self._residents: dict[str, Resident] = {}
        self._switches: Counter[str] = Counter()
        hold(model, self._lock)  # not the bank itself, which would keep the model

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
        record = self._applied()
        if record is not None and not record.complete:  # interrupted, or another thread is switching
            with self._lock:
                record = self._settled()
        return None if record is None else record.mask_id

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
            BackboneMismatchError: if the adapter was made for another base.
            StateError: if it has no room, or the bank is closed.
            AdapterError, HubError: as `load_adapter`.
        """
        source = ref if isinstance(ref, MaskSet | Adapter) else load_adapter(ref, **options)
        name = name or _name_of(source)
        with self._lock:
            if not held_by(self.model, self._lock):
                raise StateError("this bank is closed; make another one: MaskBank(model)")
            if name in self._residents:
                raise ConfigError(
                    f"this bank has an adapter called {name!r} already; give another name, or remove it: "
                    f"bank.remove({name!r})"
                )
            with self.disabled():
                new = self._admit(name, source, options)
            new.pinned = pin
            try:
                self._residents[name] = new
                self._make_room(new)
            except BaseException:
                self._residents.pop(name, None)
                raise
        return name

    def use(self, name: str) -> nn.Module:
        """Compute with an adapter from now on; return the model. If that fails, it computes as the base.

        Raises:
            UnknownNameError: if the bank has none of that name.
            StateError: as `add`, of one that was evicted; or if the model was moved, cast, or written by something
                else, and then nothing changed.
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
            self._find(name)
            if self.active == name:
                self._to(None)
            del self._residents[name]

    def status(self) -> BankStatus:
        """Return what the bank holds, and how it switched so far."""
        with self._lock:
            active, found = self.active, dict[str, ResidentStatus]()
            for name, one in self._residents.items():
                state, density = "evicted", None
                if one.parts is not None:
                    state = "active" if name == active else "ready" if one.notes else "packed"
                    density = one.parts.masks.density
                found[name] = ResidentStatus(
                    name, state, one.pinned, one.mask_id, density, one.host_bytes, one.device_bytes
                )
            host = sum(one.host_bytes for one in found.values())
            return BankStatus(
                active, found, host, sum(one.device_bytes for one in found.values()), dict(self._switches)
            )

    def close(self, *, force: bool = False) -> None:
        """Give the model back as the base, to the bit, and forget all adapters; a closed bank cannot be used.

        If it is interrupted, the next call finishes it. Weights that something else wrote are a StateError; `force`
        puts back what the active adapter changed in spite of that.
        """
        with self._lock:
            if held_by(self.model, self._lock):
                self._to(None, force)
                self._residents.clear()
                release(self.model)

    def __call__(self, inputs: Tensor | Mapping[str, Tensor], masks: Sequence[str | None]) -> list[Tensor]:
        """Compute a batch in which every example has an adapter of its own.

        Examples are grouped, and each group is one forward pass with its adapter and that adapter's head, the group of
        the active one first.

        Args:
            inputs: preprocessed: (B, …), or a tokenizer's tensors by name.
            masks: a name for each example, or None for the base.

        Returns:
            The output for each example, in order; shapes may differ.

        Raises:
            UnknownNameError: if a name is none of the bank's. ConfigError: if there is not a name for each example.
        """
        batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
        with self._lock:
            rows: dict[str | None, list[int]] = {}
            for index, name in enumerate(masks):
                if name is not None:
                    self._find(name)
                rows.setdefault(name, []).append(index)
            if len(masks) != example_count(batch):
                raise ConfigError(
                    f"every example needs the name of a mask, or None; got {len(masks)} for {example_count(batch)} "
                    f"examples"
                )
            outputs: dict[int, Tensor] = {}
            for name in sorted(rows, key=lambda name: name != self.active):
                with self._during(name):
                    group = self._outputs(name, taken(batch, torch.tensor(rows[name])))
                    outputs |= zip(rows[name], group, strict=True)
            return [outputs[index] for index in range(len(masks))]

    def parts(self, name: str) -> Parts:
        """Return the masks of an adapter with its head and dense tensors, read again if they were evicted."""
        with self._lock:
            resident = self._find(name)
            with self._during(self.active):
                return self._loaded(resident)

    def _outputs(self, name: str | None, inputs: Inputs) -> Tensor:
        """Return the outputs for one group, by the adapter's head where that lies behind the model."""
        head = None if name is None else self.parts(name).head
        if head is not None and head.module is None:
            classifier = classifier_from(self.model, head).train(self.model.training)
            output: object = classifier(inputs)
        else:
            output = self.model(**inputs) if isinstance(inputs, dict) else self.model(inputs)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor):
            raise DataError(
                f"the model gives a {type(output).__name__} without logits, which cannot be taken apart by examples; "
                f"call the model inside `with bank.using({name!r})`"
            )
        return output

    def _find(self, name: str) -> Resident:
        if name not in self._residents:
            raise UnknownNameError(f"this bank has no adapter {name!r}; it has: {', '.join(self._residents) or 'none'}")
        return self._residents[name]

    # Switching

    def _applied(self) -> Applied | None:
        return applied(self.model) if held_by(self.model, self._lock) else None

    def _settled(self) -> Applied | None:
        """Return what is applied, after a switch that was interrupted is undone."""
        record = self._applied()
        if record is not None and not record.complete:
            undo(self.model, record)
            return None
        return record

    def _to(self, name: str | None, force: bool = False) -> nn.Module:
        """Compute with an adapter, or as the base; `force`: also where something else wrote what the active changes."""
        with self._lock:
            record, noted = self._settled(), dict[str, Written]()
            if name is not None:
                resident = self._find(name)
                self._clock += 1
                resident.used = self._clock
            if name == (None if record is None else record.mask_id):
                return self.model
            check_compiled()
            if name is not None:
                parts = self._loaded(resident)
                record, names = self._applied(), {*parts.masks, *parts.parameters, *head_tensors(parts.head)}
                swapped = () if record is None or record.head is None else (record.head[0],)
                noted = {n: self._base[n] for n in names & self._base.keys() if not inside(n, swapped)}
            if record is not None:
                noted |= record.after
            self._check(noted, force)
            if record is not None:
                try:
                    undo(self.model, record)
                except BaseException:
                    undo(self.model, record)  # once more, so that one interruption leaves the base
                    raise
            if name is not None:
                self._switches["places" if resident.notes else "bits"] += 1
                put(self.model, Applied(name, base=self._base, notes=resident.notes), parts)
            self._trim()
            return self.model

    def _check(self, noted: Mapping[str, Written], force: bool) -> None:
        """Raise StateError if parameters were moved or cast, or, without `force`, written by something else."""
        now = tensors_of(self.model)
        for name, was in sorted(noted.items()):
            tensor = now.get(name)
            if isinstance(tensor, nn.Parameter) and (tensor.dtype, tensor.device) != (was.dtype, was.device):
                raise StateError(
                    f"{name!r} is {tensor.dtype} on {tensor.device} now, and was {was.dtype} on {was.device} when the "
                    f"bank was made; move or cast the model before that, or close the bank and make another one"
                )
        if not force:
            way_out = "a bank's model must not be trained; bank.close(force=True) puts back what adapters changed"
            check_unwritten(noted, now, way_out)

    @contextmanager
    def _during(self, name: str | None) -> Iterator[None]:
        with self._lock:
            before = self.active
            self._to(name)
            try:
                yield
            finally:
                self._to(before if before in self._residents else None)

    # Reading adapters, and room for them

    def _admit(self, name: str, source: Adapter | MaskSet, options: PullOptions) -> Resident:
        """Check and decode an adapter, or masks alone, while the model is the base."""
        if isinstance(source, MaskSet):
            check_masks(self.model, source.shapes)
            masks = MaskSet(dict(source))
            return Resident(name, Parts(masks), mask_id({"default": masks}))
        check_one_set(source)
        check_masks(self.model, source.shapes())
        check_base(self.model, source, self._verify, stacklevel=5)
        base, pinned = unwrap(self.model), source.pinned
        parts = source.parts(base=base)
        check_dense(base, parts, tensors_of(base))
        # what a branch or tag meant is pinned by the commit
        later: Any = {key: value for key, value in options.items() if key not in ("revision", "require_revision")}
        return Resident(name, parts, source.mask_id, lambda: load_adapter(pinned, **later), source.digest)

    def _loaded(self, resident: Resident) -> Parts:
        """Return an adapter's parts; if they were evicted, they are read again, from the base, which the model is then.

        Raises:
            StateError: if the file is another one now, or there is no room.
        """
        if resident.parts is None:
            assert resident.read is not None
            self._to(None)
            adapter = resident.read()
            if adapter.digest != resident.digest:
                raise StateError(
                    f"{resident.name!r} was evicted from the bank, and {adapter.path}, which it was read from, has "
                    f"other bytes now; remove it and add it again, or pin what must stay"
                )
            resident.parts = adapter.parts(base=unwrap(self.model))
            self._make_room(resident)
        assert resident.parts is not None
        return resident.parts

    def _make_room(self, new: Resident) -> None:
        """Evict others, used longest ago first, until an adapter that was read fits; if none can be, evict that one."""
        active, residents = self.active, sorted(self._residents.values(), key=lambda resident: resident.used)
        kept = [one for one in residents if one is new or one.name == active or one.read is None or one.pinned]
        idle = [one for one in residents if one not in kept and one.parts is not None]
        needed = sum(one.host_bytes for one in residents)
        while self._host is not None and needed > self._host:
            if not idle:
                size, new.parts = new.host_bytes, None
                names = ", ".join(repr(one.name) for one in self._residents.values() if one.parts) or "no other"
                raise StateError(
                    f"{new.name!r} takes {size} bytes, and there is no room for it within max_host_bytes={self._host}: "
                    f"{names} cannot be evicted, being active or pinned; raise the limit, or remove some"
                )
            gone = idle.pop(0)
            needed -= gone.host_bytes
            gone.notes, gone.parts = {}, None

    def _trim(self) -> None:
        """Drop notes of adapters that are not active, used longest ago first, until the device's limit is kept."""
        active = self.active
        idle = [resident for resident in self._residents.values() if resident.notes and resident.name != active]
        total = sum(resident.device_bytes for resident in idle)
        for resident in sorted(idle, key=lambda resident: resident.used):
            if total <= self._device:
                break
            total -= resident.device_bytes
            resident.notes = {}


def _name_of(source: Adapter | MaskSet) -> str:
    """Return the last part of an adapter's reference, without commit and suffix; of a folder's file, the folder's."""
    if isinstance(source, MaskSet):
        raise ConfigError("masks that are no adapter have no name of their own; give one: bank.add(masks, 'name')")
    path = PurePath(source.pinned)
    name = path.parent.name if path.name == MODEL_FILE else path.name
    return name.split("@")[0].removesuffix(".safetensors")
