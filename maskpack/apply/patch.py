"""What a mask changes in one weight tensor, by the places of its zero bits."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from bitarray import bitarray
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backbone.parameters import same_size_int
from ..mask import PackedMask, masked_weight, packed_bits, unpack
from ..threads import in_order

FEW = 0.1  # share of places up to which it is faster to leave out the bytes without any
WORTH = 1 << 22  # bytes of places
FEW_PLACES = 1 << 14  # that are read, then written: the weights around them are still in the core's cache


def places(bits: bitarray, device: torch.device) -> Tensor:
    """Return where zero bits are, as flat row-major positions in order, int64.

    Places are what everything else works on: reading and writing a few weights by place takes a tenth of the time that
    going through all of them with a tensor of bool takes.
    """
    packed = ~packed_bits(bits)
    if device.type == "cpu":
        zeros = bits.count(0)  # the padding of the last byte comes behind them
        if zeros > FEW * len(bits):
            return torch.from_numpy(np.flatnonzero(np.unpackbits(packed, bitorder="little").view(np.bool_))[:zeros])
        some = np.flatnonzero(packed != 0)
        inner = np.flatnonzero(np.unpackbits(packed[some], bitorder="little").view(np.bool_))[:zeros]
        return torch.from_numpy((some[inner >> 3] << 3) + (inner & 7))
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    zeros_there = (torch.from_numpy(packed).to(device).unsqueeze(1) >> shifts & 1).flatten()[: len(bits)]
    return zeros_there.nonzero()[:, 0]


def at_places(mask: PackedMask) -> bool:
    """Whether a mask changes only the weights at its zero bits: neither scale nor signs change the others."""
    return mask.alpha is None and mask.signs is None


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Weights at some places, before and after; the tensor may have any strides.

    Attributes:
        at: flat row-major positions, int32 where that is enough. old, new: bits there, as integers; a `new` of None
            stands for zeros.
    """

    at: Tensor
    old: Tensor
    new: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory that the patch takes."""
        return self.at.nbytes + self.old.nbytes + (0 if self.new is None else self.new.nbytes)

    def put(self, weight: Tensor) -> None:
        """Write the new bits into a weight that has the old ones."""
        write(weight, self.at, self.new)

    def undo(self, weight: Tensor) -> None:
        """Write the old bits."""
        write(weight, self.at, self.old)


def read(weight: Tensor, at: Tensor) -> Tensor:
    """Return the bits at flat positions (int64) of a weight."""
    whole = same_size_int(weight.detach())
    if whole.is_cpu and whole.is_contiguous():  # one thread of numpy does it as fast as all of torch's
        # a mask has the weight's shape, so that numpy need not look for positions outside
        return torch.from_numpy(whole.view(-1).numpy().take(at.numpy(), mode="clip"))
    return whole.take(at)


# No mode of autograd is switched around these: a Ctrl-C on the way into or out of `torch.no_grad` can leave it on.
def write(weight: Tensor, at: Tensor, bits: Tensor | None) -> None:
    """Write bits, or zeros, at flat positions of a weight."""
    whole, at = same_size_int(weight.detach()), at.long()
    if whole.is_cpu and whole.is_contiguous():
        whole.view(-1).numpy()[at.numpy()] = 0 if bits is None else bits.numpy()
        if not whole.is_inference():  # those have no version
            increment_version(whole)  # numpy does not, and a backward pass is to see that a weight is another one
    elif whole.is_inference():
        with torch.inference_mode():
            whole.put_(at, whole.new_zeros(()).expand(len(at)) if bits is None else bits)
    elif whole.is_contiguous():  # takes half to two thirds of the time of put_
        whole.view(-1).scatter_(0, at, 0 if bits is None else bits)
    else:
        whole.put_(at, whole.new_zeros(()).expand(len(at)) if bits is None else bits)


def copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy bits, whatever they stand for."""
    if target.is_inference():
        with torch.inference_mode():
            same_size_int(target).copy_(same_size_int(source))
    else:
        same_size_int(target.detach()).copy_(same_size_int(source))


def exchange(weight: Tensor, mask: PackedMask, at: Tensor, values: Tensor | None, before: list[Tensor]) -> None:
    """Apply a mask at its places; `values` as of `patch_of`.

    The bits there are added to `before` piece by piece, each piece before it is overwritten. So `put_back` leads back
    from wherever this was interrupted.
    """
    few = FEW_PLACES if weight.is_cpu else max(len(at), 1)
    for start in range(0, len(at), few):
        part = slice(start, start + few)
        old, new = changes(weight, mask, at[part], None if values is None else values[part])
        before.append(old)
        write(weight, at[part], new)
    if len(before) > 1:  # one piece is written back faster; the others are dropped in the same step
        before[:] = [torch.cat(before)]


def put_back(weight: Tensor, at: Tensor, before: list[Tensor], dtype: torch.dtype) -> None:
    """Undo `exchange`, or a part of it, on a weight that had this dtype then; can be repeated."""
    start = 0
    for old in before:
        if old.device != weight.device or dtype != weight.dtype:  # moved or cast meanwhile
            old = same_size_int(old.view(dtype).to(weight))
        write(weight, at[start : start + len(old)], old)
        start += len(old)


def inverted(bits: Tensor) -> Tensor:
    """Invert the sign bit of floats that are given as integers: negation would change the payload of some NaNs."""
    return bits ^ (torch.iinfo(bits.dtype).min or 0x80)


def patch_of(weight: Tensor, mask: PackedMask, values: Tensor | None) -> Patch:
    """Return the patch of a mask for a weight that has its base's bits; the mask must be one with `at_places`.

    Args:
        values: what op "replace" puts at the zeros of the mask, flat.
    """
    at = places(mask.bits, weight.device)
    old, new = changes(weight, mask, at, values)
    return Patch(at.to(torch.int32) if len(mask.bits) < 2**31 else at, old, new)


def changes(weight: Tensor, mask: PackedMask, at: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the bits at the places of a mask, before and after, as `Patch` has them."""
    old = read(weight, at)
    if mask.op == "flip":
        return old, inverted(old)
    if mask.op == "replace":
        assert values is not None
        return old, same_size_int(values.to(weight))
    return old, None


def located(
    masks: Iterable[tuple[str, PackedMask]], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, PackedMask, Tensor | None]]:
    """Yield names and masks with the places of those that have `at_places`, which threads look for ahead."""

    def find(item: tuple[str, PackedMask]) -> tuple[str, PackedMask, Tensor | None]:
        (name, mask), device = item, weights[item[0]].device
        kept = replace(mask, zeros=None)  # by whoever undoes it
        if not at_places(mask):
            return name, kept, None
        at = places(mask.bits, device) if mask.zeros is None else torch.from_numpy(mask.zeros).to(device).long()
        return name, kept, at

    def worth(item: tuple[str, PackedMask]) -> int:
        return 8 * item[1].bits.count(0) if item[1].zeros is None and at_places(item[1]) else 0

    return in_order(find, masks, worth, WORTH)


def rewritten(weight: Tensor, mask: PackedMask) -> Tensor:
    """Return a weight with a mask on it that has a scale or signs, which change every weight that is kept."""
    device = weight.device
    if mask.signs is not None:
        weight = weight.clone()
        at = places(mask.signs, device)
        write(weight, at, inverted(read(weight, at)))
    alpha = None if mask.alpha is None else torch.tensor(mask.alpha, dtype=torch.float32, device=device)
    return masked_weight(weight, unpack(mask.bits).to(device).reshape(mask.shape), alpha)
