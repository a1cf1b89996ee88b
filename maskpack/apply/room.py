"""The limits of a bank: what is evicted, and when."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError, StateError
from .resident import Resident
from .switch import Switch


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
