"""Stored values on a GPU, as `ulps` decodes them, from the base's weights there. TRITON_INTERPRET=1 runs it on a CPU.

One program has all lanes, since they take their words from one stream.
"""

# mypy: ignore-errors

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ulps
from ..base import Bytes


@triton.jit(do_not_specialize=["size", "count", "lanes", "top", "contexts"])
def _buckets(
    words, table, base, buckets, fits, size, count, lanes, top, contexts, mantissa, magnitude, LANES: tl.constexpr
):
    """Decode the bucket of each value, and whether the words come out even."""
    lane = tl.arange(0, LANES)
    there = lane < lanes
    low = tl.load(words + 2 * lane, mask=there, other=0).to(tl.int64) & 0xFFFF
    high = tl.load(words + 2 * lane + 1, mask=there, other=1).to(tl.int64) & 0xFFFF
    state, at = high << 16 | low, 2 * lanes
    for start in range(0, count, lanes):
        inside = there & (start + lane < count)
        exponent = (tl.load(base + start + lane, mask=inside, other=0).to(tl.int32) & magnitude) >> mantissa
        context = tl.minimum(tl.maximum(top - exponent, 0), contexts - 1)
        slot = state & 4095
        entry = tl.load(table + context * 4096 + slot, mask=inside, other=0).to(tl.int64)
        tl.store(buckets + start + lane, (entry & 63).to(tl.uint8), mask=inside)
        state = tl.where(inside, (entry >> 18) * (state >> 12) + slot - ((entry >> 6) & 4095), state)
        empty = (state < 65536) & inside
        wanted = empty.to(tl.int32)
        place = at + tl.cumsum(wanted, 0) - wanted
        word = tl.load(words + place, mask=empty & (place < size), other=0).to(tl.int64) & 0xFFFF
        state = tl.where(empty, state << 16 | word, state)
        at += tl.sum(wanted)
    even = tl.min(tl.where(there, state == 65536, True).to(tl.int32))
    tl.store(fits, even * (at == size).to(tl.int32))


def decode(data: Bytes, base: Tensor) -> Tensor:
    """Return the values of a payload as integers, from those of the base's weights, where they lie.

    Raises:
        CorruptAdapterError: if the payload is not one of as many values.
    """
    parsed = ulps.Parsed.of(data, len(base))
    if parsed is None:
        return base.clone()
    kind, top, entries, bits, words = parsed
    sent = words.view(np.int16), entries[entries > 0].view(np.int32), bits
    stream, slots, rest = (torch.from_numpy(np.array(one)).to(base.device) for one in sent)
    buckets, fits = (base.new_empty(size, dtype=dtype) for size, dtype in ((len(base), torch.uint8), (1, torch.int32)))
    table = slots.repeat_interleave(slots >> 18, output_size=len(entries) * ulps.SLOTS)
    numbers = words.size, len(base), ulps.lane_count(len(base)), top, len(entries), kind.mantissa, kind.sign - 1
    with torch.cuda.device_of(base):
        _buckets[(1,)](stream, table, base, buckets, fits, *numbers, LANES=ulps.MOST_LANES, num_warps=1)
    if not int(fits):
        raise ulps.unlike()
    return ulps.valued(kind, base, buckets.long(), rest)
