"""Zstandard frames inside payloads: one frame, nothing behind it, never more bytes than expected."""

import zstandard

from ..errors import CorruptAdapterError
from .base import Bits, Bytes

MAGIC = b"\x28\xb5\x2f\xfd"
WINDOW = 8 << 20  # bytes
BLOCK, BLOCK_CONTENT = 4, 128 << 10  # a block has at least 4 bytes and gives at most 128 KiB


def to_frame(data: bytes, level: int) -> bytes:
    """Return a zstandard frame with its content's size, without checksum or dictionary."""
    return zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(data)


def from_frame(data: Bytes | Bits, least: int, most: int | None = None) -> bytes:
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
        return zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptAdapterError(f"a zstd payload cannot be decoded: {error}") from None
