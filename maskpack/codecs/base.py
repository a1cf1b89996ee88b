"""The codec contract: packed bits <-> fewer bytes.

A codec is a frozen dataclass in a file of this folder (or in another distribution, under the entry point group
`maskpack.codecs`), registered with `@CODECS.register`. `raw.py` is the example to copy. No other file changes.

**Bits** are packed: a uint8 array of ceil(count / 8) bytes, eight mask bits a byte, the first in the least significant
bit, row-major, the last byte padded with zero bits. `count` is the product of `Side.shape`.

**Decoding** gives exactly `count` bits or raises CorruptAdapterError (`Side.checked` does the last step). Payloads are
not trusted: allocate at most a small multiple of `count` bits, and refuse bytes that are left over. A payload that is
too short for its number of weights (`plausible`) is neither stored nor decoded. The same payload and side give the same
bits on every machine: use integers, or floats whose sums are exact. Several threads use one instance.

**Settings** are the fields of an instance. `config` returns those that decoding needs, as JSON values under names other
than codec, op, reference; `type(codec)(**codec.config())` must decode what `codec` encoded, and raise
ConfigError or TypeError on impossible settings. Ids are unique and permanent: what an id decodes today it always does.

**Profiles.** The codecs that `candidates` names for a profile compete, and the smallest payload of each parameter wins:
`fast`, `default` (without the base) or `max` (may use the base); all decode at 100 million weights a second or more.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from ctypes import c_int64
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import zstandard
from bitarray import bitarray
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from ..registry import Registry
from . import native

if TYPE_CHECKING:
    from torch import Tensor

Bits = NDArray[np.uint8]
Bytes = bytes | bytearray | memoryview
Words = NDArray[np.uint16] | NDArray[np.uint32]  # of bfloat16 or float32
Profile = Literal["fast", "default", "max"]
FREE, EACH = 1 << 28, 1 << 21  # weights that a payload may stand for at all, and for each of its bytes
PROFILES: tuple[Profile, ...] = ("fast", "default", "max")


@dataclass(frozen=True, eq=False)
class Side:
    """Side information of a codec, equal when packing and unpacking: shape, base weights, reference mask.

    Attributes:
        shape: of the parameter.
        weights: for a codec with `needs_base`: the weights of the base as patterns of bits, row-major, flat. What a
            codec makes of them must be the same for float32 and for the same rounded to bfloat16
            (`classes.weight_classes`).
        reference: packed bits of the same parameter in the mask set that the payload is coded against, or None. The
            bits that the codec gets and gives back are then mask XOR reference already.
        lean: whether an encoder may look for a low rank in the signs of the weights, which takes time.
    """

    shape: tuple[int, ...]
    weights: Words | None = None
    reference: Bits | None = None
    lean: bool = True

    @property
    def base(self) -> Words:
        """The weights, for a codec that needs them."""
        if self.weights is None:
            raise ValueError("the codec needs the weights of the base")
        return self.weights

    @cached_property
    def ranks(self) -> Bits | None:
        """The magnitude class (0 to 15) of each weight, for compiled loops; None without them."""
        from .classes import ranks

        return ranks(self.base, 16)

    @property
    def count(self) -> int:
        """Number of mask bits."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Number of bytes of the packed bits."""
        return (self.count + 7) // 8

    def checked(self, bits: Bits) -> Bits:
        """Return decoded packed bits, or raise CorruptAdapterError if their length or padding is wrong."""
        if bits.dtype != np.uint8 or bits.shape != (self.size,):
            raise CorruptAdapterError(
                f"the payload decodes to {bits.dtype} of shape {bits.shape}, expected uint8 of shape ({self.size},) "
                f"for {self.count} bits"
            )
        if self.count % 8 and int(bits[-1]) >> (self.count % 8):
            raise CorruptAdapterError(f"the payload decodes to more than {self.count} bits: its padding is not zero")
        return bits


def plausible(payload: Bytes, count: int) -> bool:
    """Return True if a payload is long enough for a mask of so many bits: a few bytes must not fill the memory."""
    return count <= FREE + EACH * len(payload)


# a payload, its shape, the parameter if there is one, packed bits of the mask that it is coded against, if it is, there
There = tuple[Bytes, tuple[int, ...], "Tensor | None", "Tensor | None"]


class Codec(ABC):
    """One way to code packed bits; see the module's text.

    Attributes:
        id: the name that files carry. reference: paper or specification, or "".
        needs_base: whether it needs `Side.weights`.
        supersedes: id of a codec that need not compete where this one does, or "".
        local: whether the bytes for some pieces of a mask tell about how many it takes for all.
    """

    id: ClassVar[str]
    reference: ClassVar[str] = ""
    needs_base: bool = False
    supersedes: ClassVar[str] = ""
    local: ClassVar[bool] = False

    @abstractmethod
    def encode(self, bits: Bits, side: Side) -> bytes | None:
        """Return the payload of packed bits, or None if the codec is not made for such a mask."""

    def at_least(self, bits: Bits, side: Side) -> float:
        """Return a number of bytes that a payload hardly takes fewer than, if that is quickly known; else 0."""
        return 0

    @abstractmethod
    def decode(self, data: Bytes, side: Side) -> Bits:
        """Return the packed bits of a payload, or raise CorruptAdapterError."""

    def decodes_on(self, device: str) -> bool:
        """Return True if `decode_on` is quicker for parameters on such a device ("cpu", "cuda", …)."""
        return False

    def decode_on(self, payloads: Sequence[There]) -> Sequence[Any]:
        """Decode payloads together on the one device where their parameters lie; on the CPU they refer to no others.

        Returns:
            Of each the mask's packed bits and None; or, on another device, tensors of them and of the positions of the
            false ones, rising, there. None stands for what has to be decoded, or refused, by `decode`.
        """
        return [None] * len(payloads)

    @classmethod
    @abstractmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        """Return the instances that compete in a profile; [] if none does."""

    def config(self) -> Mapping[str, Any]:
        """Return the settings that decoding needs, as JSON values."""
        return {}


CODECS: Registry[Codec] = Registry("codec", "maskpack.codecs")


MAGIC = b"\x28\xb5\x2f\xfd"
WINDOW = 8 << 20  # bytes
BLOCK, BLOCK_CONTENT = 4, 128 << 10  # a block has at least 4 bytes and gives at most 128 KiB


def to_frame(data: bytes, level: int, dictionary: bytes = b"") -> bytes:
    """Return a zstandard frame with its content's size, without checksum; `dictionary` is what comes before it."""
    words = zstandard.ZstdCompressionDict(dictionary, zstandard.DICT_TYPE_RAWCONTENT) if dictionary else None
    return zstandard.ZstdCompressor(level, words, write_checksum=False, write_content_size=True).compress(data)


def from_frame(data: Bytes | Bits, least: int, most: int | None = None, dictionary: bytes = b"") -> bytes:
    """Return the content of a frame, which must have `least` to `most` bytes (default: exactly `least`).

    Raises:
        CorruptAdapterError: if it states another size, or anything else is wrong with the frame.
    """
    frame, most = bytes(data), least if most is None else most
    if frame[:4] != MAGIC:
        raise CorruptAdapterError(f"a zstd payload begins with {frame[:4].hex()}, expected {MAGIC.hex()}")
    try:
        stated = zstandard.get_frame_parameters(frame)
        # the size must be compared first: the library allocates whatever the frame declares
        if stated.content_size == zstandard.CONTENTSIZE_UNKNOWN or not least <= stated.content_size <= most:
            said = "nothing" if stated.content_size == zstandard.CONTENTSIZE_UNKNOWN else stated.content_size
            expected = least if least == most else f"{least} to {most}"
            raise CorruptAdapterError(f"a zstd payload declares {said} as its size, expected {expected} bytes")
        if stated.content_size > len(frame) // BLOCK * BLOCK_CONTENT:
            raise CorruptAdapterError(
                f"a zstd payload of {len(frame)} bytes declares {stated.content_size} bytes as its size; no frame "
                f"that short holds as many"
            )
        if stated.window_size > WINDOW or stated.dict_id or stated.has_checksum:
            raise CorruptAdapterError(
                f"a zstd payload has a window of {stated.window_size} bytes, dictionary {stated.dict_id}, checksum "
                f"{stated.has_checksum}; expected a window of at most {WINDOW}, no dictionary and no checksum"
            )
        words = zstandard.ZstdCompressionDict(dictionary, zstandard.DICT_TYPE_RAWCONTENT) if dictionary else None
        return zstandard.ZstdDecompressor(words, max_window_size=WINDOW).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptAdapterError(f"a zstd payload cannot be decoded: {error}") from None


Numbers = NDArray[Any]  # integers: of four bytes where all fit, as most masks' positions do
FOUR_BYTES = 1 << 30
CHUNK = 1 << 20  # numbers, or bytes of packed bits, that are worked on at once where copies would add up
MAX_VARINT = 9  # bytes, 63 bits
NO_EVENTS = 0x80  # in the first byte, and with the symbol all of the payload


def varint(value: int) -> bytes:
    """Return an integer >= 0 in groups of seven bits, lowest first; the top bit of a byte says that another follows."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


class Reader:
    """Takes a payload apart from the front; every piece is checked against what is there.

    Raises:
        CorruptAdapterError: from each method, if the payload ends too early.
    """

    def __init__(self, data: Bytes):
        self.data = memoryview(data)
        self.at = 0

    def take(self, size: int) -> Bits:
        """Return the next `size` bytes."""
        if not 0 <= size <= len(self.data) - self.at:
            raise CorruptAdapterError(
                f"a piece of {size} bytes is stated at byte {self.at} of a payload of {len(self.data)}"
            )
        self.at += size
        return np.frombuffer(self.data[self.at - size : self.at], dtype=np.uint8)

    def byte(self) -> int:
        """Return the next byte."""
        return int(self.take(1)[0])

    def varint(self) -> int:
        """Return the next varint."""
        value = 0
        for shift in range(0, 7 * MAX_VARINT, 7):
            group = self.byte()
            value |= (group & 0x7F) << shift
            if group < 0x80:
                return value
        raise CorruptAdapterError(f"a number has more than {MAX_VARINT} bytes in the payload")

    def rest(self) -> Bits:
        """Return all bytes that are left."""
        return self.take(len(self.data) - self.at)


def distances(positions: Numbers) -> Numbers:
    """Return how many places lie between each of rising positions and the one before, or the start."""
    found = positions.copy()
    found[1:] -= positions[:-1]
    found[1:] -= 1
    return found


def words_of(weight: "Tensor") -> Words:
    """Return weights as patterns of bits, row-major, flat; in their own memory where that is the host's."""
    import torch

    flat = weight.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one number that was expanded counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    words: Words = flat.view(torch.uint8).numpy().view(f"u{weight.element_size()}")
    return words


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that codecs see a parameter as: output units and what feeds them."""
    count = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else min(count, 1)
    return rows, count // rows if rows else 0


def count_ones(bits: Bits) -> int:
    """Return the number of true bits."""
    return bitarray(buffer=np.ascontiguousarray(bits).data, endian="little").count()


def where_ones(bits: Bits) -> Numbers:
    """Return the positions of true bits, in increasing order."""
    found: Numbers = np.empty(count_ones(bits), dtype=np.int32 if 8 * len(bits) < FOUR_BYTES else np.int64)
    if (library := native.library()) is not None and found.itemsize == 4:
        whole = np.ascontiguousarray(bits)
        library.maskpack_where(native.pointer(whole), c_int64(whole.size), native.pointer(found))
        return found
    at = 0
    for start in range(0, len(bits), CHUNK):
        own = np.flatnonzero(np.unpackbits(bits[start : start + CHUNK], bitorder="little").view(np.bool_))
        np.add(own, 8 * start, out=found[at : at + own.size], casting="unsafe")
        at += own.size
    return found


def rarer(bits: Bits, count: int) -> tuple[int, Numbers]:
    """Return the rarer of the two symbols (1 if they are even) and where it is, in increasing order."""
    symbol = int(2 * count_ones(bits) <= count)
    return symbol, where_ones(bits if symbol else flipped(bits, count))


def flipped(bits: Bits, count: int) -> Bits:
    """Return packed bits with each of the `count` bits inverted."""
    bits = ~bits
    if count % 8:
        bits[-1] &= (1 << count % 8) - 1
    return bits


def place(symbol: int, where: Numbers, count: int) -> Bits:
    """Return packed bits that are `symbol` at distinct positions and the other symbol elsewhere."""
    bits = np.zeros((count + 7) // 8, dtype=np.uint8)
    for start in range(0, where.size, CHUNK):
        own = where[start : start + CHUNK]
        np.add.at(bits, own >> 3, np.left_shift(1, own & 7).astype(np.uint8))
    return bits if symbol else flipped(bits, count)
