"""MaskBank: many adapters resident on one model, switched in place."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Unpack

from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..backbone.parameters import unwrap
from ..errors import ConfigError, UnknownNameError
from ..hub.download import PullOptions
from ..mask import MaskSet
from ..parts import Parts
from .admit import Gate, name_of
from .applied import Applied, forget
from .load import Reference, Verify, load_adapter
from .mixed import mixed_batch
from .resident import Resident
from .room import BankStatus, Room
from .switch import Switch
from .weights import hold


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
