"""What a bank keeps of an adapter: packed bits, and, while it is used, the places and values that it changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from bitarray.util import count_xor
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..backbone.parameters import same_size_int
from ..errors import StateError
from ..mask import PackedMask
from ..parts import Parts
from .patch import Patch, at_places, patch_of, places


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
        self.parts = parts_of(adapter, base)

    def make_patches(self, parameters: Mapping[str, Tensor]) -> None:
        """Note what the masks change in parameters that have their base's bits."""
        parts = self.decoded()
        for name, mask in parts.masks.items():
            if at_places(mask) and name not in self.patches:
                self.patches[name] = patch_of(parameters[name], mask, parts.values.get(name))


def parts_of(adapter: Adapter, base: nn.Module) -> Parts:
    """Decode the one set of an adapter, with everything beside its masks."""
    masks = adapter.masks(base=base)
    return Parts(masks, adapter.head(), adapter.statistics(), adapter.parameters(), adapter.values())


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


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy bits, whatever they stand for."""
    same_size_int(target).copy_(same_size_int(source))
