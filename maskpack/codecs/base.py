"""The codec contract: packed bits <-> fewer bytes.

A codec is a frozen dataclass in a file of this folder (or in another distribution, under the entry point group
`maskpack.codecs`), registered with `@CODECS.register`. `raw.py` is the example to copy. No other file changes.

**Bits** go in and come out as packed bits: a uint8 array of ceil(count / 8) bytes, eight mask bits a byte, the first in
the least significant bit, row-major, the last byte padded with zero bits. `count` is the product of `Side.shape`.

**Side** is all that a codec may use beside the payload: plain arrays, equal when packing and unpacking.
- `shape`: of the parameter.
- `classes`: only for a codec with `needs_base`: one uint8 per weight of the base, row-major: in the lower seven bits
  its place among the parameter's magnitudes, from 0 (smallest) to 127, equally populated; the top bit is its sign.
- `reference`: packed bits of the same parameter in another mask set of the file, where the payload is coded against
  it; else None. The bits that the codec gets, and gives back, are then the mask XOR the reference already, whatever
  the codec; it may use the reference as context beside that.
- `table`: the bytes that `table` returned when the set was written; else None.

**Decoding** gives exactly `count` bits or raises CorruptAdapterError (`Side.checked` does the last step). The payload
comes from a stranger: never allocate more than a small multiple of `count` bits because of what it says, and refuse
bytes that are left over. What is too short for its number of weights (`plausible`) is neither stored nor decoded. The
same payload and side give the same bits on every machine: integers, or floats whose sums are exact.

**Configuration.** The fields of an instance are its settings. `config` returns those that decoding needs, as JSON
values under names other than codec, op, reference, table; `type(codec)(**codec.config())` must decode what `codec`
encoded, and raise ConfigError or TypeError on settings that make no sense. Several threads use one instance. Two
classes may share an id never; what an id decodes today it decodes for ever.

**Events.** A codec that finds positions rather than bits when it decodes gives them in `events`, and its `decode` makes
bits of them: applying a mask wants positions.

**Declining.** `encode` returns None for a mask that a codec is not made for (`nm` where groups are not alike). It does
not compete then; asked for by name, it is an error.

**Profiles.** `candidates` says which instances compete in a profile: `fast`, `default` (without the base, decoding at
100 million weights a second or more) or `max` (may use the base). The smallest payload wins, whole parameter by
whole parameter. A codec that is not in a profile returns [].

**Shared tables.** A codec that codes better with statistics over all parameters of a set returns them from `table`;
they are stored once, and are given up again where they cost more than they gain.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from ..registry import Registry

Bits = NDArray[np.uint8]
Bytes = bytes | bytearray | memoryview
Profile = Literal["fast", "default", "max"]
FREE, EACH = 1 << 28, 1 << 21  # weights that a payload may stand for at all, and for each of its bytes
PROFILES: tuple[Profile, ...] = ("fast", "default", "max")


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """What a codec may use beside the payload; the module's text says what each is."""

    shape: tuple[int, ...]
    classes: Bits | None = None
    reference: Bits | None = None
    table: bytes | None = None

    @property
    def count(self) -> int:
        """Number of mask bits."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of bytes of the packed bits."""
        return (self.count + 7) // 8

    def checked(self, bits: Bits) -> Bits:
        """Return decoded packed bits if they have the right length and zero padding.

        Raises:
            CorruptAdapterError: if they do not.
        """
        if bits.dtype != np.uint8 or bits.shape != (self.size,):
            raise CorruptAdapterError(
                f"the payload decodes to {bits.dtype} of shape {bits.shape}, expected uint8 of shape ({self.size},) "
                f"for {self.count} bits"
            )
        if self.count % 8 and int(bits[-1]) >> (self.count % 8):
            raise CorruptAdapterError(f"the payload decodes to more than {self.count} bits: its padding is not zero")
        return bits


def plausible(payload: Bytes, count: int) -> bool:
    """Tell whether a payload is long enough for a mask of so many bits: a few bytes must not fill the memory."""
    return count <= FREE + EACH * len(payload)


class Codec(ABC):
    """One way to code packed bits; see the module's text.

    Attributes:
        id: the name that files carry. reference: paper or specification, or "".
        needs_base: whether it wants `Side.classes`.
    """

    id: ClassVar[str]
    reference: ClassVar[str] = ""
    needs_base: bool = False

    @abstractmethod
    def encode(self, bits: Bits, side: Side) -> bytes | None:
        """Return the payload of packed bits, or None if the codec is not made for such a mask."""

    @abstractmethod
    def decode(self, data: Bytes, side: Side) -> Bits:
        """Return the packed bits of a payload.

        Raises:
            CorruptAdapterError: if the payload does not give exactly `side.count` bits.
        """

    def events(self, data: Bytes, side: Side) -> tuple[int, NDArray[Any]] | None:
        """Return (symbol, distinct positions that have it, in any order; all others have the other symbol).

        None if decoding does not come by them.

        Raises:
            CorruptAdapterError: as `decode`.
        """
        return None

    @classmethod
    @abstractmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        """Return the instances that compete in a profile; [] if none does."""

    def config(self) -> Mapping[str, Any]:
        """Return the settings that decoding needs, as JSON values."""
        return {}

    def table(self, masks: Iterable[tuple[Bits, Side]]) -> bytes | None:
        """Return a table shared by these masks, or None. `masks` may be walked several times, one mask in memory."""
        return None


CODECS: Registry[Codec] = Registry("codec", "maskpack.codecs")
