"""The codec logit on a GPU: the bits that the other ways of decoding give, from weights that lie there.

A program decodes a lane: it evaluates the model for BLOCK weights at once, adds up their hazards, and takes the events
one after another. With TRITON_INTERPRET=1 the same code runs on a CPU, for tests.
"""

# mypy: ignore-errors

import logging
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import CorruptAdapterError
from ..base import NO_EVENTS, Bits, Bytes, Side
from ..lanes import tables
from ..logit import Head, unlike
from ..logit_model import CLASSES, STEPS

BLOCK = 256  # weights that a program works on at once
ARRAYS = ("row", "input", "position", "before", "magnitude", "reference")


@triton.jit
def _filled(state, words, at, end):
    """Return the state with the next word, if it wants one and there is one, and where the word behind that is."""
    want = (state < 65536) & (at < end)
    word = tl.load(words + at, mask=want, other=0).to(tl.int64) & 0xFFFF
    return tl.where(want, state << 16 | word, state), at + want.to(tl.int64)


@triton.jit
def _coefficients(words, ends, first, kinds, count, lanes, values, states, places):
    """Decode a lane's part of the coefficients, and leave its state for what follows."""
    lane = tl.program_id(0).to(tl.int64)
    at = tl.load(ends + lane)
    end = tl.load(ends + lane + 1)
    state, at = _filled(at * 0, words, at, end)
    state, at = _filled(state, words, at, end)
    edge = tl.arange(0, 16)
    for c in range(count * lane // lanes, count * (lane + 1) // lanes):
        edges = tl.load(first + tl.load(kinds + c).to(tl.int64) * 16 + edge).to(tl.int64)
        slot = state & 32767
        below = edges <= slot
        start = tl.max(tl.where(below, edges, 0))
        size = tl.min(tl.where(below, 1 << 20, edges)) - start
        tl.store(values + c, tl.sum(below.to(tl.int32)) - 8)
        state, at = _filled(size * (state >> 15) + slot - start, words, at, end)
    tl.store(states + lane, state)
    tl.store(places + lane, at)


@triton.jit
def _negative(word):
    return (word < 0) & (word <= -8388608)  # as the pattern of a float32; a NaN has no sign


@triton.jit
def _events(
    words, ends, bounds, hazards, survival, reaches, states, places, events, seen, weights, references,
    row, input, position, before, magnitude, reference, left, right, inputs, positions, level,
    WIDTH: tl.constexpr, ROW: tl.constexpr, INPUT: tl.constexpr, POSITION: tl.constexpr, BEFORE: tl.constexpr,
    MAGNITUDE: tl.constexpr, REFERENCE: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode the events of a lane, a byte for each weight, and leave its state and the place behind its last word."""
    lane = tl.program_id(0)
    begin, stop = tl.load(bounds + lane), tl.load(bounds + lane + 1)
    at, end, state = tl.load(places + lane), tl.load(ends + lane + 1), tl.load(states + lane)
    spent = (state * 0).to(tl.int32)
    index = tl.arange(0, BLOCK)
    for p in range(positions):
        for start in range(begin, stop, BLOCK):
            unit = start + index
            inside = unit < stop
            weight = unit.to(tl.int64) * positions + p
            own = tl.zeros((BLOCK,), dtype=tl.int32) + level
            minus = tl.zeros((BLOCK,), dtype=tl.int32)
            if WIDTH == 4:
                word = tl.load(weights + weight, mask=inside, other=0)
                minus = _negative(word).to(tl.int32)
            elif WIDTH == 2:
                word = tl.load(weights + weight, mask=inside, other=0).to(tl.int32) << 16
                minus = _negative(word).to(tl.int32)
            if ROW:
                own += tl.load(row + unit // inputs, mask=inside, other=0)
            if INPUT:
                own += tl.load(input + unit % inputs, mask=inside, other=0)
            if POSITION:
                own += tl.load(position + p)
            if MAGNITUDE:
                absolute = word & 0x7FFFFFFF
                rounded = (absolute + 0x7FFF + (absolute >> 16 & 1)) >> 16
                own += tl.load(magnitude + tl.where(absolute > 0x7F800000, 0x7F81, rounded), mask=inside, other=0)
            if REFERENCE:
                byte = tl.load(references + (weight >> 3), mask=inside, other=0).to(tl.int32)
                own += (byte >> (weight & 7).to(tl.int32) & 1) * tl.load(reference)
            if BEFORE:
                counts = tl.load(seen + unit, mask=inside, other=0).to(tl.int32)
                positive, negative = counts >> 4, counts & 15
                same, other = tl.where(minus == 1, negative, positive), tl.where(minus == 1, positive, negative)
                context = tl.minimum(same, 4) + 5 * tl.minimum(other, 2)
                own += tl.load(before + context, mask=inside, other=0)
            if RANK > 0:
                lean = tl.zeros((BLOCK,), dtype=tl.int32)
                for k in tl.static_range(RANK):
                    one = tl.load(left + unit // inputs * RANK + k, mask=inside, other=0)
                    lean += one * tl.load(right + unit % inputs * RANK + k, mask=inside, other=0)
                own += tl.where(minus == 1, -lean, lean) >> 4
            own = tl.minimum(tl.maximum(own, 0), 1023)
            hazard = tl.where(inside, tl.load(hazards + own), 0)
            sums = tl.cumsum(hazard, 0)
            total = tl.sum(hazard)
            hits = tl.zeros((BLOCK,), dtype=tl.int32)
            opened = -spent
            slot = (state & 32767).to(tl.int32)
            reach = tl.load(reaches + slot)
            target = opened + tl.minimum(reach, 8192)
            while target <= total:
                now = tl.min(tl.where(sums >= target, sums, 1 << 30))
                hit = (sums == now) & inside
                low = tl.load(survival + (now - opened))
                high = tl.load(survival + (now - opened - tl.sum(tl.where(hit, hazard, 0))))
                event = now - opened >= reach
                hits = tl.where(hit & event, 1, hits)
                first, size = tl.where(event, low, 0).to(tl.int64), tl.where(event, high - low, low).to(tl.int64)
                state, at = _filled(size * (state >> 15) + slot - first, words, at, end)
                opened = now
                slot = (state & 32767).to(tl.int32)
                reach = tl.load(reaches + slot)
                target = opened + tl.minimum(reach, 8192)
            spent = total - opened
            tl.store(events + weight, hits.to(tl.uint8), mask=inside)
            if BEFORE:
                positive = tl.minimum(positive + hits * (1 - minus), 5)
                negative = tl.minimum(negative + hits * minus, 5)
                tl.store(seen + unit, (positive << 4 | negative).to(tl.uint8), mask=inside)
                tl.debug_barrier()
    tl.store(states + lane, state)
    tl.store(places + lane, at)


@cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Return hazards, survival, reaches and the first slots of coefficients, on a device."""
    fixed = tables()
    arrays = (fixed.hazard, fixed.survival, fixed.reach, fixed.first)
    return tuple(torch.from_numpy(one.astype(np.int32)).to(device) for one in arrays)


def decode_on(data: Bytes, shape: tuple[int, ...], weight: Tensor, base: bool) -> tuple[Bits, Tensor] | None:
    """Decode a payload on the device of the parameter; see `Codec.decode_on`.

    The payload goes there, and packed bits come back.
    """
    try:
        symbol, events = decode_events(data, shape, weight if base else None, None, weight.device)
    except (CorruptAdapterError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Triton compiles when it is first used, and may find no compiler
        logging.getLogger("maskpack").warning(
            "decoding on %s does not work, so the CPU does it: %s", weight.device, error
        )
        return None
    kept = events if symbol else 1 - events
    eights = torch.nn.functional.pad(kept, (0, -len(kept) % 8)).view(-1, 8)
    packed = (eights << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(1, dtype=torch.uint8)
    return packed.cpu().numpy(), (kept == 0).nonzero()[:, 0]


def decode_events(
    data: Bytes, shape: tuple[int, ...], weights: Tensor | None, reference: Tensor | None, device: torch.device
) -> tuple[int, Tensor]:
    """Return the symbol of a payload's events, and 1 for each weight that is one, flat, uint8, on a device.

    Args:
        weights: of the base, float32 or bfloat16, on the device, if the payload goes by them. reference: packed bits of
            the mask that it is coded against, on the device.

    Raises:
        CorruptAdapterError: as the other ways of decoding do.
    """
    known = np.zeros(0, dtype=np.uint8) if reference is not None else None
    side, base = Side(shape, None, known), weights is not None
    events = torch.zeros(side.count, dtype=torch.uint8, device=device)
    if len(data) == 1 and data[0] & ~1 == NO_EVENTS:
        return data[0] & 1, events
    head = Head.read(data, side, base)
    grid, sizes, lanes = head.grid, head.sizes, len(head.lanes)
    edges = np.cumsum([0, *(len(own) for own in head.lanes)])
    count = sum(sizes.values())
    sent = [np.concatenate(head.lanes).view(np.int16), edges, grid.lanes(lanes)]
    words, ends, bounds = (torch.from_numpy(np.ascontiguousarray(one)).to(device) for one in sent)
    kinds = np.repeat(np.array([(code & 15) - 1 for code in head.codes.values()], dtype=np.uint8), [*sizes.values()])
    states, places = (torch.zeros(lanes, dtype=torch.int64, device=device) for _ in range(2))
    values = torch.zeros(max(count, 1), dtype=torch.int32, device=device)
    hazards, survival, reaches, first = _tables(device)
    _coefficients[(lanes,)](
        words, ends, first, torch.from_numpy(kinds).to(device), count, lanes, values, states, places
    )
    arrays = _arrays(head, values[:count], weights)
    ranks = [n for n in range(len(sizes)) if f"left {n}" in arrays]
    left, right = (
        torch.stack([arrays[f"{side} {n}"] for n in ranks], 1).contiguous() if ranks else values
        for side in ("left", "right")
    )
    width, own = (weights.element_size(), _patterns(weights)) if weights is not None else (0, values)
    seen = torch.zeros(grid.units if "before" in arrays else 1, dtype=torch.uint8, device=device)
    named = [arrays.get(name, values) for name in ARRAYS]
    _events[(lanes,)](
        words, ends, bounds, hazards, survival, reaches, states, places, events, seen, own,
        events if reference is None else reference, *named, left, right, grid.inputs, grid.positions, 512 + head.offset,
        width, *(name in arrays for name in ARRAYS), len(ranks), BLOCK,
    )  # fmt: skip
    if bool(states.any()) or not torch.equal(places, ends[1:]):
        raise unlike()
    return head.symbol, events


def _patterns(weights: Tensor) -> Tensor:
    return weights.detach().contiguous().view(torch.int32 if weights.element_size() == 4 else torch.int16).reshape(-1)


def _arrays(head: Head, values: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """Return the arrays of coefficients, multiplied out; that of magnitudes has an entry for each that there may be."""
    arrays = {}
    for (name, code), own in zip(
        head.codes.items(), values.split([*head.sizes.values()]) if head.sizes else (), strict=True
    ):
        whole = own.cumsum(0, dtype=torch.int32) if name == "magnitude" else own
        arrays[name] = (whole * STEPS[code >> 4]).contiguous()
    if "magnitude" in arrays and weights is not None:
        words = _patterns(weights).int() << (0 if weights.element_size() == 4 else 16)
        size = words & 0x7FFFFFFF
        rounded = torch.where(size > 0x7F800000, 0x7F81, size + 0x7FFF + (size >> 16 & 1) >> 16)
        have = torch.bincount(rounded, minlength=0x7F82)
        ranks = CLASSES * (2 * (have.cumsum(0) - have) + have) // (2 * words.numel())
        arrays["magnitude"] = arrays["magnitude"][ranks.clamp(max=CLASSES - 1)].contiguous()
    return arrays
