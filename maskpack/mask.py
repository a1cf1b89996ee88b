"""MaskSet: parameter name -> packed mask, the value that passes between stages.

torch is imported where tensors are made, so that masks are decoded and hashed without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from bitarray import bitarray
from blake3 import blake3
from numpy.typing import NDArray

from .errors import ConfigError, UnknownNameError, check_argument

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Op = Literal["zero", "flip", "replace"]
OPS: tuple[Op, ...] = ("flip", "replace", "zero")


def packed_bits(bits: bitarray) -> NDArray[np.uint8]:
    """Return bits in little bit order as ceil(len / 8) bytes with zero padding, read-only; not copied if possible."""
    packed = np.frombuffer(memoryview(bits), dtype=np.uint8)
    if bits.padbits and packed[-1] >> (8 - bits.padbits):  # bitarray leaves these as they were
        packed = np.frombuffer(bits.tobytes(), dtype=np.uint8)
    packed.flags.writeable = False
    return packed


def bits_digest(bits: bitarray) -> str:
    """Return the hex BLAKE3 of packed bits."""
    return blake3(packed_bits(bits).data).hexdigest()


def masked_weight(weight: Tensor, mask: Tensor, scale: Tensor | None) -> Tensor:
    """Return the weight with the mask applied, in its own dtype: cast(float32(w) / scale), +0 where the mask is False.

    The same formula is used in training and at load, so that both give the same bits.
    """
    import torch

    if scale is not None:
        weight = (weight.to(torch.float32) / scale).to(weight.dtype)
    return torch.where(mask, weight, 0.0)


class DeviceBits(NamedTuple):
    """The packed bits of a mask, and of its signs, as uint8 tensors where the weights lie; `kept` bits are true."""

    kept: int
    bits: Tensor
    signs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + (0 if self.signs is None else self.signs.nbytes)


def fetched(packed: Tensor) -> NDArray[np.uint8]:
    """Return packed bits, which come over the bus when somebody asks for them."""
    found: NDArray[np.uint8] = packed.cpu().numpy()
    return found


@dataclass(frozen=True, slots=True, eq=True)
class PackedMask:
    """One parameter's mask as packed bits.

    Attributes:
        bits: little bit order, row-major, one bit a weight; True = weight kept.
        shape: the parameter's shape. op: what a zero bit does to its weight.
        alpha: divisor of the kept weights, float32(sqrt(kept / total)), or None if the scale is off.
        signs: second payload of a ternary mask (op "zero" only): False = the weight's sign is inverted.
        zeros: rising flat positions of the zero bits, a tensor where the weights lie, of a mask that was decoded there;
            who keeps a mask leaves them out.
        there: of a mask that was decoded on a device: its packed bits, of which `bits` and `signs` are made when they
            are asked for.
    """

    bits: bitarray
    shape: Shape
    op: Op = "zero"
    alpha: float | None = None
    signs: bitarray | None = None
    zeros: Any = field(default=None, compare=False, repr=False)
    there: DeviceBits | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ConfigError(f"unknown op {self.op!r}; known: {', '.join(OPS)}")
        if self.bits.endian != "little" or len(self.bits) != math.prod(self.shape):
            raise ConfigError(
                f"a mask of shape {self.shape} needs {math.prod(self.shape)} bits in little bit order, "
                f"got {len(self.bits)} in {self.bits.endian} order"
            )
        if self.signs is not None and (self.op != "zero" or len(self.signs) != len(self.bits)):
            raise ConfigError("only a mask with op 'zero' can have signs, as many as it has bits")

    def __repr__(self) -> str:
        more = "" if self.alpha is None else f", alpha {self.alpha:.4f}"
        signs = "" if self.signs is None else ", with signs"
        return f"PackedMask({'x'.join(map(str, self.shape))}, {self.op}, density {self.density:.4f}{more}{signs})"

    @classmethod
    def from_tensor(cls, mask: Tensor, op: Op = "zero", scale: bool = False) -> PackedMask:
        """Pack a tensor of bool, or of uint8 zeros and ones; `scale` sets alpha."""
        import torch

        check_argument("the mask", mask, torch.Tensor, "a tensor of bool", "make one: torch.as_tensor(mask) != 0")
        raw = mask.detach().view(torch.uint8) if mask.dtype in (torch.bool, torch.uint8) else None
        if raw is None or (raw.numel() and int(raw.max()) > 1):  # a file may hold any byte as a bool
            held = "" if raw is None else f" with the byte {int(raw.max())}"
            raise ConfigError(f"a mask must be bool, or uint8 of zeros and ones; got {mask.dtype}{held}")
        flat = raw.reshape(-1).cpu().numpy()
        packed = cls.from_bytes(np.packbits(flat, bitorder="little"), tuple(mask.shape), op)
        return packed.scaled() if scale else packed

    @classmethod
    def from_bytes(cls, packed: np.ndarray, shape: Shape, op: Op = "zero") -> PackedMask:
        """Copy packed bits (uint8, at least ceil(weights / 8) bytes; what is beyond the weights is dropped)."""
        bits = bitarray(endian="little")
        count = math.prod(shape)
        bits.frombytes(np.ascontiguousarray(packed[: (count + 7) // 8]).data)  # type: ignore[arg-type]  # any buffer
        del bits[count:]
        return cls(bits, shape, op)

    @classmethod
    def on_device(cls, there: DeviceBits, shape: Shape, op: Op, alpha: float | None, zeros: Any = None) -> PackedMask:
        """Return a mask whose bits are where the weights lie, and come from there when they are asked for."""
        found = object.__new__(cls)
        own = {"shape": shape, "op": op, "alpha": alpha, "zeros": zeros, "there": there}
        for name, value in (own if there.signs is not None else {**own, "signs": None}).items():
            object.__setattr__(found, name, value)
        return found

    def __getattr__(self, name: str) -> Any:  # of what is not set
        if name not in ("bits", "signs"):
            raise AttributeError(name)
        bits = PackedMask.from_bytes(fetched(getattr(self.there, name)), self.shape).bits
        object.__setattr__(self, name, bits)
        return bits

    def but(self, **changes: Any) -> PackedMask:
        """Return a copy with other fields; unlike `replace` it leaves on a device what is there."""
        found = object.__new__(PackedMask)
        for name in self.__slots__:
            with suppress(AttributeError):
                value = changes[name] if name in changes else object.__getattribute__(self, name)
                object.__setattr__(found, name, value)
        return found

    def on(self, device: Any, of: Literal["bits", "signs"] = "bits") -> Tensor:
        """Return the bits, or the signs, as a flat bool tensor on a device."""
        if self.there is None:
            return unpack(getattr(self, of)).to(device)
        return unpacked(getattr(self.there, of).to(device), self.total)

    def part(self, cut: Callable[[Tensor], Tensor]) -> PackedMask:
        """Return the mask of a part of its weight, which `cut` takes from tensors of the weight's shape."""
        bits, signs = (
            None if one is None else PackedMask.from_tensor(cut(unpack(one).reshape(self.shape)).contiguous())
            for one in (self.bits, self.signs)
        )
        assert bits is not None
        return replace(bits, op=self.op, alpha=self.alpha, signs=None if signs is None else signs.bits)

    def values_of_part(self, values: Tensor, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the values of a part of the weight, of those at this mask's zeros; flat, the part as in `part`."""
        kept = self.tensor().to(values.device)
        spread = values.new_zeros(self.shape).masked_scatter_(~kept, values)
        return cut(spread)[~cut(kept)]

    def scaled(self) -> PackedMask:
        """Return the mask with alpha = float32(sqrt(kept / total)); an empty mask counts as one kept weight."""
        return replace(self, alpha=float(np.float32(math.sqrt(max(self.kept, 1) / max(len(self.bits), 1)))))

    def payloads(self) -> list[tuple[Op, bitarray]]:
        """Return the (op, bits) pairs that are stored, sorted by op: two for a ternary mask, else one."""
        own: list[tuple[Op, bitarray]] = [(self.op, self.bits)]
        return own if self.signs is None else [("flip", self.signs), *own]

    @property
    def kept(self) -> int:
        """Number of true bits."""
        return self.bits.count() if self.there is None else self.there.kept

    @property
    def total(self) -> int:
        """Number of bits."""
        return math.prod(self.shape)

    @property
    def has_signs(self) -> bool:
        """Whether it is a ternary mask."""
        return (self.signs if self.there is None else self.there.signs) is not None

    @property
    def nbytes(self) -> int:
        """Memory of the packed bits on the host."""
        return 0 if self.there is not None else sum((len(bits) + 7) // 8 for _, bits in self.payloads())

    @property
    def density(self) -> float:
        """Share of weights kept; 1.0 for a parameter without weights."""
        return self.kept / self.total if self.total else 1.0

    def tensor(self) -> Tensor:
        """Return the mask as a bool tensor of the parameter's shape."""
        return unpack(self.bits).reshape(self.shape)


def packed(flat: Tensor) -> Tensor:
    """Return flat zeros and ones, uint8, as packed bits on their device."""
    import torch

    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpacked(packed: Tensor, count: int) -> Tensor:
    """Return packed bits as a flat bool tensor on their device."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & 1).flatten()[:count].bool()


def unpack(bits: bitarray) -> Tensor:
    """Return bits in little bit order as a flat bool tensor."""
    import torch

    return torch.from_numpy(np.unpackbits(packed_bits(bits), count=len(bits), bitorder="little").view(np.bool_))


@dataclass(frozen=True, slots=True, eq=False)
class MaskSet(Mapping[str, PackedMask]):
    """Masks by dotted parameter name, sorted by name. Immutable.

    Attributes:
        masks: by name; of a streamed set the shapes that are known, or None. make: see `streamed`.

    Example:
        masks = MaskSet.from_tensors({"conv1.weight": model.conv1.weight.abs() > 0.01})
        print(masks)  # MaskSet(1 parameter, 216 weights, density …)
        print(masks["conv1.weight"].tensor().shape)
    """

    masks: Mapping[str, Any]
    make: Callable[[str], PackedMask] | None = None

    def __post_init__(self) -> None:
        check_argument("masks", self.masks, Mapping, "a dictionary by parameter name", "see MaskSet.from_tensors")
        for name, one in self.masks.items() if self.make is None else ():
            check_argument(f"mask {name!r}", one, PackedMask, "a PackedMask", "MaskSet.from_tensors packs tensors")
        object.__setattr__(self, "masks", {name: self.masks[name] for name in sorted(self.masks)})

    def __repr__(self) -> str:
        count = f"{len(self)} parameter{'s' * (len(self) != 1)}"
        if self.make is not None:  # masks, and perhaps their shapes, would have to be made
            return f"MaskSet({count}, streamed)"
        return f"MaskSet({count}, {self.total:,} weights, density {self.density:.4f})"

    @classmethod
    def streamed(
        cls, names: Iterable[str], make: Callable[[str], PackedMask], shapes: Mapping[str, Shape] | None = None
    ) -> MaskSet:
        """Make a set whose masks are made when they are asked for and not kept, so that it may exceed memory.

        Args:
            make: name -> mask; called in one thread whenever a mask is asked for, and gives the same mask each time.
            shapes: of the masks by name, if known: then `shapes` and `total` need no mask, and a mask that is made
                with another shape is a ConfigError.
        """
        return cls({name: (shapes or {}).get(name) for name in names}, make)

    @classmethod
    def from_tensors(cls, masks: Mapping[str, Tensor], *, op: Op = "zero", scale: bool = False) -> MaskSet:
        """Make a set from tensors of bool, or of uint8 zeros and ones (True = weight kept).

        Raises:
            ConfigError: if a tensor has another dtype or other values; the message names it.
        """
        check_argument("masks", masks, Mapping, "a dictionary of tensors by parameter name", "give each its name")
        packed = {}
        for name, mask in masks.items():
            try:
                packed[name] = PackedMask.from_tensor(mask, op, scale)
            except ConfigError as error:
                raise ConfigError(f"mask {name!r}: {error}") from None
        return cls(packed)

    def __getitem__(self, name: str) -> PackedMask:
        if name not in self.masks:
            raise UnknownNameError(f"no mask for {name!r}; the set has {len(self.masks)} parameters")
        mask: PackedMask = self.masks[name] if self.make is None else self.make(name)
        if self.make is not None and self.masks[name] not in (None, mask.shape):
            raise ConfigError(f"the mask made for {name!r} has shape {mask.shape}, expected {self.masks[name]}")
        return mask

    def get(self, name: str, default: PackedMask | None = None) -> PackedMask | None:  # type: ignore[override]
        """Return the mask of a parameter, or `default` if the set has none."""
        return self[name] if name in self.masks else default

    def __contains__(self, name: object) -> bool:
        return name in self.masks

    def __iter__(self) -> Iterator[str]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def is_streamed(self) -> bool:
        """Whether masks are made when they are asked for."""
        return self.make is not None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by name; a mask is made for those only that a streamed set was not told."""
        known = {} if self.make is None else self.masks
        return {name: self[name].shape if known.get(name) is None else known[name] for name in self.masks}

    @property
    def total(self) -> int:
        """Number of masked weights."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(mask.kept for mask in self.values())

    @property
    def density(self) -> float:
        """Share of weights kept, over all parameters."""
        sizes = [(mask.kept, mask.total) for mask in self.values()]
        total = sum(size for _, size in sizes)
        return sum(kept for kept, _ in sizes) / total if total else 1.0


Row = tuple[str, str, Op, Shape, str]  # set, parameter, op, shape, hex BLAKE3 of the packed bits


def mask_id(sets: Mapping[str, MaskSet]) -> str:
    """Return the digest of decoded masks, which does not depend on the codec (docs/format.md section 5)."""
    return rows_id(
        (name, parameter, op, mask.shape, bits_digest(bits))
        for name in sorted(sets)
        for parameter, mask in sets[name].items()
        for op, bits in mask.payloads()
    )


def rows_id(rows: Iterable[Row]) -> str:
    """Return the `mask_id` of masks that were hashed one by one, in file order."""
    return blake3(json.dumps(list(rows), separators=(",", ":")).encode()).hexdigest()
