"""Chunks as the Xet protocol packs them: an 8-byte header, then bytes as they are, LZ4, or LZ4 of grouped bytes."""

from .messages import HttpError

HEADER = 8
PLAIN, LZ4, GROUPED_LZ4 = 0, 1, 2
FRAME = b"\x04\x22\x4d\x18"


def pack_chunk(data: bytes) -> bytes:
    """Return a chunk that holds the data as they are."""
    size = len(data).to_bytes(3, "little")
    return b"\0" + size + bytes([PLAIN]) + size + data


def split_chunks(xorb: bytes) -> list[tuple[int, bytes]]:
    """Return where each chunk of a xorb ends, and what it holds; a footer behind them is left out.

    Raises:
        HttpError: if a chunk is damaged.
    """
    found, at = [], 0
    while at + HEADER <= len(xorb) and xorb[at] == 0:
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        try:
            data = _unpack(xorb[at + 4], xorb[at + HEADER : at + HEADER + packed])
        except (IndexError, ValueError) as error:
            raise HttpError(400, f"a chunk cannot be unpacked: {error}") from error
        at += HEADER + packed
        if at > len(xorb) or len(data) != size:
            raise HttpError(400, "a chunk has not the size that it declares")
        found.append((at, data))
    if not found:
        raise HttpError(400, "not a xorb")
    return found


def _unpack(scheme: int, data: bytes) -> bytes:
    if scheme == PLAIN:
        return data
    if scheme not in (LZ4, GROUPED_LZ4):
        raise ValueError(f"no compression scheme {scheme}")
    plain = read_frame(data)
    if scheme == LZ4:
        return plain
    # every fourth byte together: the first groups are one longer where the size is no multiple of four
    grouped, at = bytearray(len(plain)), 0
    for first in range(4):
        count = len(range(first, len(plain), 4))
        grouped[first::4] = plain[at : at + count]
        at += count
    return bytes(grouped)


def read_frame(data: bytes) -> bytes:
    """Return what an LZ4 frame holds; its checksums are not looked at."""
    if data[:4] != FRAME:
        raise ValueError("not an LZ4 frame")
    flags = data[4]
    at = 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
    plain = bytearray()
    while size := int.from_bytes(data[at : at + 4], "little"):
        block = data[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:
            plain += block
        else:
            _read_block(block, plain)
        at += 4 + len(block) + (4 if flags & 16 else 0)
    return bytes(plain)


def _read_block(data: bytes, plain: bytearray) -> None:
    at = 0

    def extended(count: int) -> int:
        nonlocal at
        if count == 15:
            more = 255
            while more == 255:
                more = data[at]
                count, at = count + more, at + 1
        return count

    while at < len(data):
        token = data[at]
        at += 1
        count = extended(token >> 4)
        plain += data[at : at + count]
        at += count
        if at >= len(data):  # the last sequence has literals only
            return
        distance = data[at] | data[at + 1] << 8
        at += 2
        count = extended(token & 15) + 4
        if not 0 < distance <= len(plain):
            raise ValueError("a match lies before the beginning")
        piece = bytes(plain[-distance:][:count])
        plain += (piece * (count // len(piece) + 1))[:count]  # a match may overlap what it makes
