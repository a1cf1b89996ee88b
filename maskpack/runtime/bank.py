"""MaskBank: many adapters resident on one model, switched in place."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from types import TracebackType
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..adapter.read import MODEL_FILE, Adapter
from ..backbone.classifier import Inputs, batch_of, classifier_from, example_count, taken
from ..backbone.model import inside, unwrap
from ..errors import ConfigError, DataError, StateError, UnknownNameError, brief
from ..hub.pull import PullOptions
from ..mask import MaskSet, PackedMask, mask_id
from . import apply
from .load import Reference, Verify, check_base, check_choices, check_one_set, decoded_parts, load_adapter
from .mixed import FEW, Correction, corrections, mixing
from .place import TOP, Place, find_place, view


@dataclass(frozen=True, slots=True)
class ResidentStatus:
    """An adapter in a bank: memory of its masks and dense tensors (host), of noted places and base weights (device).

    Masks that were decoded on a GPU are there, and count as the device's.

    `state` is "active", "ready" (places and base weights are noted), "packed" (a bit a weight) or "evicted" (read again
    when it is used; its density is None).
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
    """What a bank holds, and the adapter that the model computes with, or None.

    `switches` to adapters are counted by how their places were found: "bits" (searched) or "places" (noted).
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
        parts: its decoded masks, a bit a weight, and dense tensors, under the model's names; None after they were
            evicted from memory. place: where the adapter's own names stand in the model.
        mask_id: None until it is asked for.
        read: reads the adapter again, or None for masks that did not come from one. digest: of its file.
        notes: what its masks change, for those that change only some places; empty until it is used.
        correction: for passes of several adapters, None inside if it cannot be in one; None until that is asked.
    """

    name: str
    parts: Parts | None
    mask_id: str | None = None
    read: Callable[[], Adapter] | None = None
    digest: str | None = None
    pinned: bool = False
    notes: dict[str, apply.Changed] = field(default_factory=dict)
    correction: tuple[Mapping[str, Correction] | None] | None = None
    used: int = 0
    place: Place = TOP

    @property
    def masks(self) -> Mapping[str, PackedMask]:
        return {} if self.parts is None else self.parts.masks

    @property
    def device_bytes(self) -> int:
        noted = sum(changed.nbytes for changed in self.notes.values())
        noted += 0 if self.parts is None else self.parts.device_bytes
        return noted + sum(one.nbytes for found in self.correction or () for one in (found or {}).values())

    def drop(self) -> None:
        """Keep nothing on the device: masks that are there come to the host."""
        self.notes, self.correction = {}, None
        if self.parts is not None and any(mask.there is not None for mask in self.masks.values()):
            here = {name: replace(mask, there=None) for name, mask in self.masks.items()}
            self.parts = replace(self.parts, masks=MaskSet(here))

    def status(self, active: str | None) -> ResidentStatus:
        state = "active" if self.name == active else "ready" if self.notes else "packed"
        host, density = (0, None) if self.parts is None else (self.parts.nbytes, self.parts.masks.density)
        state = "evicted" if self.parts is None else state
        if self.mask_id is None:
            assert self.parts is not None
            self.mask_id = mask_id({"default": self.parts.masks})
        return ResidentStatus(self.name, state, self.pinned, self.mask_id, density, host, self.device_bytes)


class MaskBank(AbstractContextManager["MaskBank"]):
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
        max_host_bytes: limit for packed bits and dense tensors. Adapters that are neither active nor pinned are
            evicted, the least recently used first, and read again when they are used. None: no limit.
        max_device_bytes: limit for places and base weights that switching keeps, beside those of the active adapter,
            and for masks that were decoded on a GPU, which then come to the host; None: as many bytes as the model's
            tensors take.
        verify: as of `load_mask`, for every adapter.

    Example:
        bank = MaskBank(model)
        bank.add("./my-mask", "first")
        with bank.using("first"):
            outputs = model(images)
        bank.close()  # the base, to the bit
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
        tensors = apply.tensors_of(model)
        self.model, self._verify, self._host = model, verify, max_host_bytes
        self._device = sum(t.nbytes for t in tensors.values()) if max_device_bytes is None else max_device_bytes
        self._base = apply.written(tensors, tensors)  # as the bank last left the base's tensors
        self._lock, self._clock = threading.RLock(), 0
        self._residents: dict[str, Resident] = {}
        self._switches: Counter[str] = Counter()
        apply.hold(model, self._lock)  # not the bank itself, which would keep the model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MaskBank({type(unwrap(self.model)).__name__}, adapters={brief(self.names)}, active={self.active!r})"

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
        ref: Reference | Adapter | Parts | MaskSet,
        name: str | None = None,
        *,
        pin: bool = False,
        **options: Unpack[PullOptions],
    ) -> str:
        """Read, verify and decode an adapter, and return its name; the model computes with what it did before.

        Args:
            ref: as of `load_mask`; masks or parts without an adapter are taken as they are, and are never evicted.
            name: to use it by; default: the last part of the reference, without revision and suffix.
            pin: never evict it. Others: as of `pull`.
        """
        ref = Parts(ref) if isinstance(ref, MaskSet) else ref
        source = ref if isinstance(ref, Parts | Adapter) else load_adapter(ref, **options)
        name = name or _name_of(source)
        with self._lock:
            if not apply.held_by(self.model, self._lock):
                raise StateError("this bank is closed; make another one: MaskBank(model)")
            if name in self._residents:
                raise ConfigError(f"this bank has an adapter called {name!r} already; give another name, or remove it")
            if isinstance(source, Parts):
                apply.check_masks(self.model, source.masks.shapes)
                new = Resident(name, replace(source, masks=MaskSet(dict(source.masks))))
            else:
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

        A StateError says that the model was moved, cast, or written by something else, and then nothing changed.
        """
        return self._to(name)

    def disable(self) -> nn.Module:
        """Compute as the base from now on, to the bit; return the model."""
        return self._to(None)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Lock the model and compute with an adapter, or as the base, within the context."""
        with self._lock:
            before = self.active
            self._to(name)
            try:
                yield self.model
            finally:
                self._to(before if before in self._residents else None)

    def disabled(self) -> AbstractContextManager[nn.Module]:
        """Lock the model and compute as the base, to the bit, within the context; afterwards as before."""
        return self.using(None)

    def remove(self, name: str) -> None:
        """Forget an adapter; if it is active, the model computes as the base."""
        with self._lock:
            self._find(name)
            if self.active == name:
                self._to(None)
            del self._residents[name]

    def status(self) -> BankStatus:
        """Return what the bank holds, and how it switched so far."""
        with self._lock:
            active = self.active
            found = {name: one.status(active) for name, one in self._residents.items()}
            host, device = (sum(getattr(one, key) for one in found.values()) for key in ("host_bytes", "device_bytes"))
            return BankStatus(active, found, host, device, dict(self._switches))

    def close(self, *, force: bool = False) -> None:
        """Give the model back as the base, to the bit, and forget all adapters; a closed bank cannot be used.

        If it is interrupted, the next call finishes it. `force`: put back what the active adapter changed although
        something else wrote these weights.
        """
        with self._lock:
            if apply.held_by(self.model, self._lock):
                self._to(None, force)
                self._residents.clear()
                apply.release(self.model)

    def __call__(self, inputs: Tensor | Mapping[str, Tensor], masks: Sequence[str | None]) -> list[Tensor]:
        """Compute a batch in which every example has an adapter, or None for the base; return each example's output.

        Examples are grouped, and each group is one forward pass with its adapter and that adapter's head, the group of
        the active one first. Outputs may differ in shape. Inputs are preprocessed: (B, …), or a tokenizer's tensors.
        """
        return self._grouped(inputs, masks, self._outputs)

    def generate(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        masks: Sequence[str | None],
        *,
        mixed: bool | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Let a language model go on with a batch in which every example has an adapter, or None for the base.

        Return each example's tokens, or rows of tokens if it has several sequences.

        Args:
            inputs: token numbers (B, …), or a tokenizer's tensors.
            mixed: one pass for all adapters, in which the outputs of linear layers are corrected by what the weights
                change; they agree but for rounding. False: examples are grouped by adapter, to the bit. Default: one
                pass where every adapter changes linear layers alone, and at most 2 % of their weights.
            options: as of the model's own `generate`.
        """
        with self._lock:
            names = [name for name in dict.fromkeys(masks) if name is not None]
            own = {} if mixed is False else {name: self._correction(name) for name in names}
            if mixed and (others := [name for name in names if own[name] is None]):
                raise ConfigError(
                    f"{others[0]!r} cannot be one of several adapters in a pass: it changes other layers than "
                    f"linear ones, or over {FEW:.0%} of their weights; leave mixed out, or group with mixed=False"
                )
            if mixed is False or None in own.values() or len({*masks}) < 2:
                return self._grouped(inputs, masks, lambda name, group: self._generated(group, options))
            batch = batch_of(inputs)
            self._check_count(batch, masks)
            found = [own.get(name) if name is not None else None for name in masks]
            with self.disabled(), mixing(unwrap(self.model), found):
                tokens = self._generated(batch, options)
            return list(tokens)

    def _generated(self, inputs: Inputs, options: Mapping[str, Any]) -> Tensor:
        """Return the tokens of each example, (B, tokens) or (B, sequences, tokens)."""
        model: Any = unwrap(self.model)
        if not hasattr(model, "generate"):
            raise ConfigError(f"a {type(model).__name__} does not generate; call the bank for its outputs")
        found = model.generate(**inputs, **options) if isinstance(inputs, dict) else model.generate(inputs, **options)
        tokens: Tensor = getattr(found, "sequences", found)
        count = example_count(inputs)
        return tokens if len(tokens) == count else tokens.reshape(count, -1, tokens.shape[-1])

    def _correction(self, name: str) -> Mapping[str, Correction] | None:
        resident = self._find(name)
        if resident.correction is None:
            with self.disabled():
                resident.correction = (corrections(unwrap(self.model), self._loaded(resident)),)
        return resident.correction[0]

    def _check_count(self, batch: Inputs, masks: Sequence[str | None]) -> None:
        if len(masks) != example_count(batch):
            raise ConfigError(f"got {len(masks)} names for {example_count(batch)} examples; each needs one, or None")

    def _grouped(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        masks: Sequence[str | None],
        work: Callable[[str | None, Inputs], Tensor],
    ) -> list[Tensor]:
        """Work on the examples of each adapter together, while it is active; return what belongs to each example."""
        batch, rows = batch_of(inputs), dict[str | None, list[int]]()
        with self._lock:
            for index, name in enumerate(masks):
                if name is not None:
                    self._find(name)
                rows.setdefault(name, []).append(index)
            self._check_count(batch, masks)
            outputs: dict[int, Tensor] = {}
            for name in sorted(rows, key=lambda name: name != self.active):
                with self.using(name):
                    group = work(name, taken(batch, torch.tensor(rows[name])))
                    outputs |= zip(rows[name], group, strict=True)
            return [outputs[index] for index in range(len(masks))]

    def parts(self, name: str) -> Parts:
        """Return the parts of an adapter; they are read again if they were evicted."""
        with self._lock:
            resident = self._find(name)
            with self.using(self.active):
                return self._loaded(resident)

    def _outputs(self, name: str | None, inputs: Inputs) -> Tensor:
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
                f"call it inside `with bank.using({name!r})`"
            )
        return output

    def _find(self, name: str) -> Resident:
        if name not in self._residents:
            raise UnknownNameError(f"this bank has no adapter {name!r}; it has: {', '.join(self._residents) or 'none'}")
        return self._residents[name]

    # Switching

    def _applied(self) -> apply.Applied | None:
        return apply.applied(self.model) if apply.held_by(self.model, self._lock) else None

    def _settled(self) -> apply.Applied | None:
        """Return what is applied, after a switch that was interrupted is undone."""
        record = self._applied()
        if record is not None and not record.complete:
            apply.undo(self.model, record)
            return None
        return record

    def _to(self, name: str | None, force: bool = False) -> nn.Module:
        """Compute with an adapter, or as the base; `force`: also where something else wrote what the active changes."""
        with self._lock:
            record, noted = self._settled(), dict[str, apply.Written]()
            if name is not None:
                resident = self._find(name)
                self._clock += 1
                resident.used = self._clock
            if name == (None if record is None else record.mask_id):
                return self.model
            apply.check_compiled()
            if name is not None:
                parts = self._loaded(resident)
                parameters = {*parts.parameters, *(f"{n}.{leaf}" for n in parts.norms for leaf in ("weight", "bias"))}
                record, names = self._applied(), {*parts.masks, *parameters, *apply.head_tensors(parts.head)}
                swapped = () if record is None or record.head is None else (record.head[0],)
                noted = {n: self._base[n] for n in names & self._base.keys() if not inside(n, swapped)}
            if record is not None:
                noted |= record.after
            self._check(noted, force)
            if record is not None:
                try:
                    apply.undo(self.model, record)
                except BaseException:
                    apply.undo(self.model, record)  # once more, so that one interruption leaves the base
                    raise
            if name is not None:
                self._switches["places" if resident.notes else "bits"] += 1
                apply.put(self.model, apply.Applied(name, base=self._base, notes=resident.notes), parts)
            self._trim()
            return self.model

    def _check(self, noted: Mapping[str, apply.Written], force: bool) -> None:
        """Raise StateError if parameters were moved or cast, or, without `force`, written by something else."""
        now = apply.tensors_of(self.model)
        for name, was in sorted(noted.items()):
            tensor = now.get(name)
            if isinstance(tensor, nn.Parameter) and (kind := apply.kind_of(tensor)) != was.kind:
                (dtype, device, _), (old, there, _) = kind, was.kind
                raise StateError(
                    f"{name!r} is {dtype} on {device} now, and was {old} on {there} when the bank was made, or it was "
                    f"sharded since; move or cast the model back, or close the bank and make another one"
                )
        if not force:
            way_out = "a bank's model must not be trained; bank.close(force=True) puts back what adapters changed"
            apply.check_unwritten(noted, now, way_out)

    # Reading adapters, and room for them

    def _admit(self, name: str, source: Adapter, options: PullOptions) -> Resident:
        """Check and decode an adapter while the model is the base."""
        check_one_set(source)
        place, pinned = find_place(self.model, source.base, source.shapes()), source.pinned
        base = view(self.model, place)
        apply.check_masks(base, source.shapes())
        check_base(base, source.base, self._verify, stacklevel=5)
        parts = place.parts(decoded_parts(source, base))
        apply.check_dense(unwrap(self.model), parts, apply.tensors_of(self.model))
        # what a branch or tag meant is pinned by the commit
        later: Any = {key: value for key, value in options.items() if key not in ("revision", "require_revision")}
        again = lambda: load_adapter(pinned, **later)  # noqa: E731
        return Resident(name, parts, source.mask_id, again, source.digest, place=place)

    def _loaded(self, resident: Resident) -> Parts:
        """Return an adapter's parts; if they were evicted, they are read again, and the model is the base then."""
        if resident.parts is None:
            assert resident.read is not None
            self._to(None)
            adapter = resident.read()
            if adapter.digest != resident.digest:
                raise StateError(
                    f"{resident.name!r} was evicted, and {adapter.path} has other bytes now; remove it and add it "
                    "again, or pin it"
                )
            resident.parts = resident.place.parts(decoded_parts(adapter, view(self.model, resident.place)))
            self._make_room(resident)
        assert resident.parts is not None
        return resident.parts

    def _make_room(self, new: Resident) -> None:
        """Evict others, used longest ago first, until an adapter that was read fits; if none can be, evict that one."""
        active, residents = self.active, sorted(self._residents.values(), key=lambda one: one.used)
        sizes = {one.name: one.parts.nbytes for one in residents if one.parts is not None}
        idle = [one for one in residents if one.name in sizes and one.read is not None and not one.pinned]
        idle = [one for one in idle if one.name not in (new.name, active)]
        while self._host is not None and sum(sizes.values()) > self._host:
            if not idle:
                new.parts = None
                names = ", ".join(repr(name) for name in self._residents if name in sizes and name != new.name)
                raise StateError(
                    f"{new.name!r} takes {sizes[new.name]} bytes, too many for max_host_bytes={self._host}: "
                    f"{names or 'no other'} cannot be evicted, being active or pinned; raise the limit, or remove some"
                )
            gone = idle.pop(0)
            gone.parts = None
            gone.drop()
            del sizes[gone.name]

    def _trim(self) -> None:
        """Drop notes of adapters that are not active, used longest ago first, until the device's limit is kept."""
        active = self.active
        sizes = {one.name: one.device_bytes for one in self._residents.values() if one.name != active}
        idle = sorted((name for name, size in sizes.items() if size), key=lambda name: self._residents[name].used)
        while sum(sizes.values()) > self._device:
            self._residents[idle[0]].drop()
            del sizes[idle.pop(0)]


def _name_of(source: Adapter | Parts) -> str:
    """Return the last part of an adapter's reference, without commit and suffix; of a folder's file, the folder's."""
    if isinstance(source, Parts):
        raise ConfigError("masks that are no adapter have no name of their own; give one: bank.add(masks, 'name')")
    path = PurePath(source.pinned)
    name = path.parent.name if path.name == MODEL_FILE else path.name
    return name.split("@")[0].removesuffix(".safetensors")
