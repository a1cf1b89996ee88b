"""Decoder of the codec `logit` on a GPU, in Triton: many payloads in one launch, the same bits as on a CPU.

A program (one warp) decodes a lane: it evaluates the model for BLOCK weights at once, adds up their hazards, and takes
the events one after another. With TRITON_INTERPRET=1 the same code runs on a CPU, for tests.
"""

# mypy: ignore-errors

import logging
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import CorruptAdapterError
from ...mask import packed, unpacked
from ..base import NO_EVENTS, Bytes, Side, There
from ..lanes import tables
from ..logit import Head
from ..logit_model import CLASSES, STEPS

BLOCK = 256  # weights that a program works on at once
MAGNITUDES = 0x7F82
LANE = 7  # numbers of a lane: where its words, coefficients and units begin and end; which payload it is of
# of a payload: shape, model and buffers; -1: there is none
FIELDS = (
    "rows inputs positions level rank row input position before magnitude reference lean weights width references "
    "events seen"
).split()
Job = tuple[Bytes, tuple[int, ...], Tensor | None, Tensor | None]


@triton.jit
def _filled(state, words, at, end):
    """Return the state with the next word, if it wants one and there is one, and where the word behind that is."""
    want = (state < 65536) & (at < end)
    word = tl.load(words + at, mask=want, other=0).to(tl.int64) & 0xFFFF
    return tl.where(want, state << 16 | word, state), at + want.to(tl.int64)


@triton.jit
def _coefficients(words, lanes, first, kinds, values, states, places, LANE: tl.constexpr):
    """Decode a lane's part of the coefficients, and leave its state for what follows."""
    lane = tl.program_id(0)
    own = lanes + lane * LANE
    at, end = tl.load(own).to(tl.int64), tl.load(own + 1).to(tl.int64)
    state, at = _filled(at * 0, words, at, end)
    state, at = _filled(state, words, at, end)
    edge = tl.arange(0, 16)
    for c in range(tl.load(own + 2), tl.load(own + 3)):
        edges = tl.load(first + tl.load(kinds + c).to(tl.int32) * 16 + edge).to(tl.int64)
        slot = state & 32767
        below = edges <= slot
        start = tl.max(tl.where(below, edges, 0))
        size = tl.min(tl.where(below, 1 << 20, edges)) - start
        tl.store(values + c, tl.load(values + c) * (tl.sum(below.to(tl.int32)) - 8))
        state, at = _filled(size * (state >> 15) + slot - start, words, at, end)
    tl.store(states + lane, state)
    tl.store(places + lane, at)


@triton.jit
def _events(
    words, lanes, fields, hazards, survival, reaches, states, places, values, magnitudes, events, seen,
    LANE: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode the events of a lane, a byte for each weight, and leave its state and the place behind its last word."""
    lane = tl.program_id(0)
    own = lanes + lane * LANE
    end, begin, stop = tl.load(own + 1).to(tl.int64), tl.load(own + 4), tl.load(own + 5)
    own = fields + tl.load(own + 6) * FIELDS
    rows, inputs = tl.load(own).to(tl.int32), tl.load(own + 1).to(tl.int32)
    positions, level, rank = tl.load(own + 2).to(tl.int32), tl.load(own + 3).to(tl.int32), tl.load(own + 4)
    row, input, position = tl.load(own + 5), tl.load(own + 6), tl.load(own + 7)
    before, magnitude, reference, lean = tl.load(own + 8), tl.load(own + 9), tl.load(own + 10), tl.load(own + 11)
    weights, width, references = tl.load(own + 12), tl.load(own + 13), tl.load(own + 14)
    events += tl.load(own + 15)
    seen += tl.load(own + 16)
    at, state = tl.load(places + lane), tl.load(states + lane)
    spent = begin * 0
    index = tl.arange(0, BLOCK)
    for p in range(positions):
        for start in range(begin, stop, BLOCK):
            unit = start + index
            inside = unit < stop
            of_row, of_input = unit // inputs, unit % inputs
            weight = unit.to(tl.int64) * positions + p
            at_level = tl.zeros((BLOCK,), dtype=tl.int32) + level
            word = tl.zeros((BLOCK,), dtype=tl.int32)
            if width == 4:
                word = tl.load(weights.to(tl.pointer_type(tl.int32)) + weight, mask=inside, other=0)
            if width == 2:
                half = tl.load(weights.to(tl.pointer_type(tl.int16)) + weight, mask=inside, other=0)
                word = half.to(tl.int32) << 16
            minus = ((word < 0) & (word <= -8388608)).to(tl.int32)  # a NaN has no sign
            if row >= 0:
                at_level += tl.load(values + row + of_row, mask=inside, other=0)
            if input >= 0:
                at_level += tl.load(values + input + of_input, mask=inside, other=0)
            if position >= 0:
                at_level += tl.load(values + position + p)
            if magnitude >= 0:
                absolute = word & 0x7FFFFFFF
                rounded = (absolute + 0x7FFF + (absolute >> 16 & 1)) >> 16
                rounded = tl.where(absolute > 0x7F800000, 0x7F81, rounded)
                at_level += tl.load(magnitudes + magnitude + rounded, mask=inside, other=0)
            if reference >= 0:
                byte = tl.load(references.to(tl.pointer_type(tl.uint8)) + (weight >> 3), mask=inside, other=0)
                at_level += (byte.to(tl.int32) >> (weight & 7).to(tl.int32) & 1) * tl.load(values + reference)
            counts = tl.zeros((BLOCK,), dtype=tl.int32)
            if before >= 0:
                counts = tl.load(seen + unit, mask=inside, other=0).to(tl.int32)
                positive, negative = counts >> 4, counts & 15
                same, other = tl.where(minus == 1, negative, positive), tl.where(minus == 1, positive, negative)
                context = tl.minimum(same, 4) + 5 * tl.minimum(other, 2)
                at_level += tl.load(values + before + context, mask=inside, other=0)
            if rank > 0:
                sum = tl.zeros((BLOCK,), dtype=tl.int32)
                for k in range(rank):
                    left = values + lean + k * (rows + inputs)
                    one = tl.load(left + of_row, mask=inside, other=0)
                    sum += one * tl.load(left + rows + of_input, mask=inside, other=0)
                at_level += tl.where(minus == 1, -sum, sum) >> 4
            at_level = tl.minimum(tl.maximum(at_level, 0), 1023)
            hazard = tl.where(inside, tl.load(hazards + at_level), 0)
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
            if before >= 0:
                positive = tl.minimum((counts >> 4) + hits * (1 - minus), 5)
                negative = tl.minimum((counts & 15) + hits * minus, 5)
                tl.store(seen + unit, (positive << 4 | negative).to(tl.uint8), mask=inside)
                tl.debug_barrier()
    tl.store(states + lane, state)
    tl.store(places + lane, at)


@cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Return hazards, survival, reaches, the first slots of coefficients, and their steps, on a device."""
    fixed = tables()
    arrays = (fixed.hazard, fixed.survival, fixed.reach, fixed.first, np.array(STEPS))
    return tuple(torch.from_numpy(one.astype(np.int32)).to(device) for one in arrays)


def decode_events(jobs: Sequence[Job], device: torch.device) -> list[tuple[int, Tensor] | None]:
    """Return, for each payload, the symbol of its events, and 1 for each weight that is one, flat, uint8, on a device.

    None stands for a payload that is refused, or too large.

    Args:
        jobs: payloads with their shapes; the weights of the base, float32 or bfloat16, on the device, if the payload
            goes by them; packed bits of the mask that it is coded against, on the device.
    """
    heads: list[Head | None] = []
    for data, shape, weights, reference in jobs:
        try:
            side = Side(shape, None, None if reference is None else np.zeros(0, dtype=np.uint8))
            plain = len(data) == 1 and data[0] & ~1 == NO_EVENTS
            heads.append(None if plain else Head.read(data, side, weights is not None))
        except CorruptAdapterError:
            heads.append(None)
    table, words, shared, codes, sizes = list[np.ndarray](), list[np.ndarray](), [], bytearray(), list[int]()
    spans, held, magnitudes = list[tuple[int, int] | None](), list[Tensor](), list[tuple[int, Tensor]]()
    lane = word = coefficient = weight = unit = 0
    for (_, shape, weights, reference), head in zip(jobs, heads, strict=True):
        if head is None or head.grid.units >= 1 << 31:
            spans.append(None)
            continue
        lanes, names = len(head.lanes), [*head.sizes]
        count = sum(head.sizes.values())
        offsets = dict(zip(names, coefficient + np.cumsum([0, *head.sizes.values()]), strict=False))
        ends, bounds = word + np.cumsum([0, *map(len, head.lanes)]), head.grid.lanes(lanes)
        parts = coefficient + count * np.arange(lanes + 1) // lanes
        fields = dict.fromkeys(FIELDS, -1) | head.grid._asdict()
        fields |= {name: offsets[name] for name in offsets if name in FIELDS}
        fields |= {"level": 512 + head.offset, "rank": sum(name.startswith("left") for name in names)}
        fields |= {"lean": offsets.get("left 0", -1), "width": 0, "events": weight, "seen": unit}
        if weights is not None:
            held.append(own := _patterns(weights))
            fields |= {"weights": own.data_ptr(), "width": own.element_size()}
            if "magnitude" in offsets:
                fields["magnitude"] = len(magnitudes) * MAGNITUDES
                magnitudes.append((offsets["magnitude"], own))
        if reference is not None:
            fields["references"] = reference.data_ptr()
        spans.append((lane, lane + lanes))
        columns = ends[:-1], ends[1:], parts[:-1], parts[1:], bounds[:-1], bounds[1:], np.full(lanes, len(shared))
        table.append(np.stack(columns, axis=1))
        shared.append([*fields.values()])
        words += head.lanes
        codes += bytes(head.codes.values())
        sizes += head.sizes.values()
        lane, word, coefficient = lane + lanes, int(ends[-1]), coefficient + count
        weight, unit = weight + int(np.prod(shape)), unit + head.grid.units
    found = torch.zeros(weight, dtype=torch.uint8, device=device)
    if table:
        numbers = (
            (np.concatenate(table), np.int32),
            (shared, np.int64),
            ([*codes, 1], np.uint8),
            ([*sizes, 1], np.int32),
        )
        sent = np.concatenate(words).view(np.int16), *(np.asarray(one, kind) for one, kind in numbers)
        stream, lines, lists, coded, counts = (torch.from_numpy(one).to(device) for one in sent)
        coded = coded.repeat_interleave(counts, output_size=coefficient + 1).int()
        states, places = (torch.zeros(lane, dtype=torch.int64, device=device) for _ in range(2))
        hazards, survival, reaches, first, steps = _tables(device)
        kinds, values = (coded & 15) - 1, steps[coded >> 4]
        grid, own = (lane,), {"LANE": LANE, "num_warps": 1}
        _coefficients[grid](stream, lines, first, kinds, values, states, places, **own)
        added = [_by_magnitude(values[start : start + CLASSES], weights) for start, weights in magnitudes]
        seen = torch.zeros(max(unit, 1), dtype=torch.uint8, device=device)
        own |= {"FIELDS": len(FIELDS), "BLOCK": BLOCK}
        buffers = hazards, survival, reaches, states, places, values, torch.cat(added) if added else values, found, seen
        _events[grid](stream, lines, lists, *buffers, **own)
        good = ((states == 0) & (places == lines[:, 1])).cpu()
    made, start = list[tuple[int, Tensor] | None](), 0
    for (data, shape, _, _), span in zip(jobs, spans, strict=True):
        if span is None:
            empty = len(data) == 1 and data[0] & ~1 == NO_EVENTS
            made.append(
                (data[0] & 1, torch.zeros(int(np.prod(shape)), dtype=torch.uint8, device=device)) if empty else None
            )
            continue
        count = int(np.prod(shape))
        made.append((data[0] & 1, found[start : start + count]) if bool(good[slice(*span)].all()) else None)
        start += count
    return made


def _patterns(weights: Tensor) -> Tensor:
    return weights.detach().contiguous().view(torch.int32 if weights.element_size() == 4 else torch.int16).reshape(-1)


def _by_magnitude(coefficients: Tensor, words: Tensor) -> Tensor:
    """Return what each magnitude of the base's weights adds to a level; coefficients are differences."""
    absolute = (words.int() << (0 if words.element_size() == 4 else 16)) & 0x7FFFFFFF
    rounded = torch.where(absolute > 0x7F800000, 0x7F81, absolute + 0x7FFF + (absolute >> 16 & 1) >> 16)
    have = torch.bincount(rounded, minlength=MAGNITUDES)
    ranks = CLASSES * (2 * (have.cumsum(0) - have) + have) // (2 * words.numel())
    return coefficients.cumsum(0, dtype=torch.int32)[ranks.clamp(max=CLASSES - 1)]


def decode_on(payloads: Sequence[There], base: bool) -> list[tuple[Tensor, Tensor] | None]:
    """Decode payloads on the device of their parameters; see `Codec.decode_on`."""
    device = payloads[0][2].device
    jobs: list[Job] = [(data, shape, weight if base else None, known) for data, shape, weight, known in payloads]
    try:
        with torch.cuda.device_of(payloads[0][2]):
            events = decode_events(jobs, device)
    except Exception as error:  # Triton compiles when it is first used, and may find no compiler, or too little memory
        logging.getLogger("maskpack").warning("masks are not decoded on %s, but on the CPU: %s", device, error)
        return [None] * len(payloads)
    return [None if one is None else _bits_and_zeros(*one, job[3]) for one, job in zip(events, jobs, strict=True)]


def _bits_and_zeros(symbol: int, events: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    kept = events if symbol else 1 - events
    if reference is not None:
        kept = kept ^ unpacked(reference, len(kept)).byte()
    zeros = (kept == 0).nonzero()[:, 0]
    return packed(kept), zeros.to(torch.int32) if len(kept) < 2**31 else zeros
