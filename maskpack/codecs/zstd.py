"""Packed bits in a zstandard frame."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import zstandard

from ..errors import CorruptAdapterError
from .base import CODECS, Bits, Bytes, Codec, Profile, Side

MAGIC = b"\x28\xb5\x2f\xfd"
WINDOW = 8 << 20  # bytes
BLOCK, BLOCK_CONTENT = 4, 128 << 10  # a block has at least 4 bytes and gives at most 128 KiB
PATIENT = 19
SAMPLED = 4 << 20  # bytes of packed bits (34 million weights) from which level 19 has to prove itself
SAMPLE = 1 << 20


@CODECS.register
@dataclass(frozen=True, slots=True)
class Zstd(Codec):
    """Packed bits in one zstandard frame: general-purpose, quick to decode, good on repeating structure.

    Level 1 beats the middle levels on sparse bits without structure (its literal coder does the work), level 19 finds
    repeats that it misses, at a hundredth of the speed.
    """

    id = "zstd"
    reference = "https://www.rfc-editor.org/rfc/rfc8878"

    level: int = 1

    def encode(self, bits: Bits, side: Side) -> bytes:
        level = self.level
        if level == PATIENT and len(bits) > SAMPLED:
            # minutes are at stake on embeddings of half a billion weights, so a sample from the middle decides
            sample = bits[len(bits) // 2 :][:SAMPLE].tobytes()
            if len(_compress(sample, PATIENT)) > 0.99 * len(_compress(sample, 1)):
                level = 1
        return _compress(bits.tobytes(), level)

    def decode(self, data: Bytes, side: Side) -> Bits:
        frame = bytes(data)
        if frame[:4] != MAGIC:
            raise CorruptAdapterError(f"a zstd payload begins with {frame[:4].hex()}, expected {MAGIC.hex()}")
        try:
            stated = zstandard.get_frame_parameters(frame)
            # the size must be compared first: the library allocates whatever the frame declares
            if stated.content_size != side.size:
                said = "nothing" if stated.content_size == zstandard.CONTENTSIZE_UNKNOWN else stated.content_size
                raise CorruptAdapterError(f"a zstd payload declares {said} as its size, expected {side.size} bytes")
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
            content = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CorruptAdapterError(f"a zstd payload cannot be decoded: {error}") from None
        return side.checked(np.frombuffer(content, dtype=np.uint8))

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls(1)] if profile == "fast" else [cls(1), cls(PATIENT)]


def _compress(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(data)
