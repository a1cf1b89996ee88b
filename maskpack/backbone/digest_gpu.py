"""BLAKE3 of a tensor, computed on its GPU by Triton. TRITON_INTERPRET=1 runs it on a CPU.

A thread hashes a chunk of 1,024 bytes. A program joins the chaining values of its chunks, its nodes, in pairs, level
after level, and one program those of all others.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # bytes
BLOCK = 128  # chunks of a program, a power of two


@triton.jit
def _mixed(a, b, c, d, x, y):
    """Mix two words of a message into four of the state."""
    a = tl.add(tl.add(a, b, sanitize_overflow=False), x, sanitize_overflow=False)
    d ^= a
    d = d >> 16 | d << 16
    c = tl.add(c, d, sanitize_overflow=False)
    b ^= c
    b = b >> 12 | b << 20
    a = tl.add(tl.add(a, b, sanitize_overflow=False), y, sanitize_overflow=False)
    d ^= a
    d = d >> 8 | d << 24
    c = tl.add(c, d, sanitize_overflow=False)
    b ^= c
    b = b >> 7 | b << 25
    return a, b, c, d


@triton.jit
def _initial(zero):
    """Return the chaining value that chunks and pairs begin with."""
    a0, a1, a2, a3 = zero + 0x6A09E667, zero + 0xBB67AE85, zero + 0x3C6EF372, zero + 0xA54FF53A
    b0, b1, b2, b3 = zero + 0x510E527F, zero + 0x9B05688C, zero + 0x1F83D9AB, zero + 0x5BE0CD19
    return a0, a1, a2, a3, b0, b1, b2, b3


@triton.jit
def _four(words, at, count):
    """Return four words of a message, 0 where it has no more."""
    m0 = tl.load(words + at, mask=at < count, other=0).to(tl.uint32, bitcast=True)
    m1 = tl.load(words + at + 1, mask=at + 1 < count, other=0).to(tl.uint32, bitcast=True)
    m2 = tl.load(words + at + 2, mask=at + 2 < count, other=0).to(tl.uint32, bitcast=True)
    m3 = tl.load(words + at + 3, mask=at + 3 < count, other=0).to(tl.uint32, bitcast=True)
    return m0, m1, m2, m3


@triton.jit
def _compressed(a0, a1, a2, a3, b0, b1, b2, b3, first, second, count, chunk, length, flags):
    """Return the next chaining value, from this one and a message of two times eight words, `count` in all."""
    c0, c1, c2, c3, _, _, _, _ = _initial(chunk * 0)
    d0, d1, d2, d3 = chunk, chunk * 0, length, flags
    m0, m1, m2, m3 = _four(first, 0, count)
    m4, m5, m6, m7 = _four(first, 4, count)
    m8, m9, m10, m11 = _four(second, 0, count - 8)
    m12, m13, m14, m15 = _four(second, 4, count - 8)
    for _ in range(7):
        a0, b0, c0, d0 = _mixed(a0, b0, c0, d0, m0, m1)
        a1, b1, c1, d1 = _mixed(a1, b1, c1, d1, m2, m3)
        a2, b2, c2, d2 = _mixed(a2, b2, c2, d2, m4, m5)
        a3, b3, c3, d3 = _mixed(a3, b3, c3, d3, m6, m7)
        a0, b1, c2, d3 = _mixed(a0, b1, c2, d3, m8, m9)
        a1, b2, c3, d0 = _mixed(a1, b2, c3, d0, m10, m11)
        a2, b3, c0, d1 = _mixed(a2, b3, c0, d1, m12, m13)
        a3, b0, c1, d2 = _mixed(a3, b0, c1, d2, m14, m15)
        m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15 = (
            m2, m6, m3, m10, m7, m0, m4, m13, m1, m11, m12, m5, m9, m14, m15, m8
        )  # fmt: skip
    return a0 ^ c0, a1 ^ c1, a2 ^ c2, a3 ^ c3, b0 ^ d0, b1 ^ d1, b2 ^ d2, b3 ^ d3


@triton.jit
def _store(node, inside, a0, a1, a2, a3, b0, b1, b2, b3):
    """Write chaining values."""
    tl.store(node, a0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 1, a1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 2, a2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 3, a3.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 4, b0.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 5, b1.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 6, b2.to(tl.int32, bitcast=True), mask=inside)
    tl.store(node + 7, b3.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _join(nodes, count, step, whole, BLOCK: tl.constexpr):
    """Join nodes that lie `step` words apart in pairs until one is left, the first; it is the root if `whole`."""
    index = tl.arange(0, BLOCK)
    while count > 1:
        pairs = count // 2
        for start in range(0, pairs, BLOCK):
            pair = start + index
            words = tl.where(pair < pairs, 16, 0)
            left = nodes + pair * 2 * step
            zero = (pair * 0).to(tl.uint32)
            a0, a1, a2, a3, b0, b1, b2, b3 = _initial(zero)
            flags = zero + tl.where(whole & (count == 2), 12, 4)
            a0, a1, a2, a3, b0, b1, b2, b3 = _compressed(
                a0, a1, a2, a3, b0, b1, b2, b3, left, left + step, words, zero, zero + 64, flags
            )
            tl.debug_barrier()  # all are read
            _store(nodes + pair * step, pair < pairs, a0, a1, a2, a3, b0, b1, b2, b3)
            tl.debug_barrier()
        if count % 2 == 1:  # goes up as it is
            word = tl.arange(0, 8)
            tl.store(nodes + pairs * step + word, tl.load(nodes + (count - 1) * step + word))
            tl.debug_barrier()
        count -= pairs


@triton.jit(do_not_specialize=["size"])
def _chunks(words, nodes, size, BLOCK: tl.constexpr):
    """Hash BLOCK chunks of `size` bytes and join their nodes into the first of them."""
    group = tl.program_id(0)
    chunks = tl.maximum((size + 1023) // 1024, 1)
    chunk = group.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.minimum(tl.maximum(size - chunk * 1024, 0), 1024).to(tl.int32)
    blocks = tl.maximum((own + 63) // 64, 1)
    number = chunk.to(tl.uint32)
    a0, a1, a2, a3, b0, b1, b2, b3 = _initial(number * 0)
    for block in range(tl.max(blocks)):
        length = tl.minimum(tl.maximum(own - block * 64, 0), 64)
        last = block == blocks - 1
        flags = tl.where(last, tl.where(chunks == 1, 10, 2), 0) + tl.where(block == 0, 1, 0)
        first = words + chunk * 256 + block * 16
        a0, a1, a2, a3, b0, b1, b2, b3 = _compressed(
            a0, a1, a2, a3, b0, b1, b2, b3, first, first + 8, (length + 3) // 4, number, length.to(tl.uint32),
            flags.to(tl.uint32),
        )  # fmt: skip
        _store(nodes + chunk * 8, last & (chunk < chunks), a0, a1, a2, a3, b0, b1, b2, b3)
    tl.debug_barrier()
    begin = group.to(tl.int64) * BLOCK
    _join(nodes + begin * 8, tl.minimum(chunks - begin, BLOCK), 8, chunks <= BLOCK, BLOCK)


@triton.jit(do_not_specialize=["count"])
def _groups(nodes, count, BLOCK: tl.constexpr):
    """Join the nodes of the programs of `_chunks`."""
    _join(nodes, count, BLOCK * 8, True, BLOCK)


def digest_of(data: Tensor) -> bytes:
    """Return the BLAKE3 of a flat uint8 tensor, computed where it lies."""
    size = len(data)
    if size % 4 or data.storage_offset() % 4:  # words, of which the last is filled with zeros
        data, given = data.new_zeros(-(-size // 4) * 4), data
        data[:size] = given
    chunks = max(1, triton.cdiv(size, CHUNK))
    groups = triton.cdiv(chunks, BLOCK)
    nodes = torch.empty(8 * chunks, dtype=torch.int32, device=data.device)
    with torch.cuda.device_of(data):
        _chunks[(groups,)](data.view(torch.int32), nodes, size, BLOCK=BLOCK)
        if groups > 1:
            _groups[(1,)](nodes, groups, BLOCK=BLOCK)
    return nodes[:8].cpu().numpy().astype("<i4").tobytes()
