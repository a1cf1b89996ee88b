"""Densities of rows and columns learned on the way, an arithmetic coder's precision: the smallest without the base."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptAdapterError
from .base import (
    CODECS,
    NO_EVENTS,
    Bits,
    Bytes,
    Codec,
    Numbers,
    Profile,
    Reader,
    Side,
    matrix_shape,
    place,
    rarer,
    varint,
)
from .rates import CENTERS, CONTEXTS, MOST_PER_BYTE, ONE, Floats, GapDecoder, GapEncoder, Known, Rates, Settings

MAX_PRIOR = 15
MAX_SIZE = 1 << 20  # rows, and columns: each takes memory
MAX_KERNELS = 1 << 24
T = TypeVar("T", bound=np.generic)


@CODECS.register
@dataclass(frozen=True, slots=True)
class Adaptive(Codec):
    """Row and column densities, learned on the way; small and slow."""

    id = "adaptive"
    reference = "https://arxiv.org/abs/1311.2540"

    def encode(self, bits: Bits, side: Side) -> bytes | None:
        return encode(bits, side, known(side, None), (0,))

    def decode(self, data: Bytes, side: Side) -> Bits:
        return decode(data, side, known(side, None), 0)

    @classmethod
    def candidates(cls, profile: Profile) -> list[Self]:
        return [cls()] if profile == "max" else []


def kernels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a parameter's output channels, input channels and positions of its kernels; (rows, columns, 1) without."""
    rows, cols = matrix_shape(shape)
    inputs = shape[1] if len(shape) > 2 and cols else cols
    return (rows, inputs, cols // inputs) if cols and rows * inputs <= MAX_KERNELS else (rows, cols, 1)


def magnitudes(classes: Bits) -> Bits:
    """Return the 16 magnitude classes that are contexts."""
    return np.asarray(classes >> 3 & 15, dtype=np.uint8)


def known(side: Side, classes: Bits | None, curve: Floats | None = None) -> Known:
    """Return what both sides know: the base's classes and signs, and the bits of the reference."""
    traits: Bits | None = None
    rows, inputs, positions = kernels(side.shape)
    shape = (rows, inputs * positions)
    if classes is not None:
        traits = np.bitwise_or(magnitudes(classes), classes & 128, dtype=np.uint8).reshape(shape)
    if side.reference is not None:
        bits = np.left_shift(np.unpackbits(side.reference, count=side.count, bitorder="little").reshape(shape), 4)
        traits = np.bitwise_or(bits, 0 if traits is None else traits, dtype=np.uint8)
    if traits is not None:
        traits = _by_position(traits, inputs, positions)
    return Known(
        traits, np.ones(CONTEXTS) if curve is None else curve, inputs if positions > 1 else 0, classes is not None
    )


def _by_position(matrix: NDArray[T], inputs: int, positions: int) -> NDArray[T]:
    """Sort columns by position in the kernel, so that later positions can learn from earlier ones."""
    if positions == 1:
        return matrix
    return matrix.reshape(-1, inputs, positions).transpose(0, 2, 1).reshape(len(matrix), -1)


def encode(bits: Bits, side: Side, known: Known, channels: tuple[int, ...]) -> bytes | None:
    """Code packed bits with the number of sign channels that is estimated best."""
    shape = matrix_shape(side.shape)
    if max(shape) > MAX_SIZE:
        return None
    symbol, where = rarer(bits, side.count)
    if not where.size:
        return bytes([symbol | NO_EVENTS])
    events = np.zeros(side.count, dtype=np.bool_)
    events[where] = True
    _, inputs, positions = kernels(side.shape)
    matrix = _by_position(events.reshape(shape), inputs, positions)
    row_prior, col_prior = _prior(matrix.sum(1)), _prior(matrix.sum(0))
    tried = (_predict(matrix, where.size, Settings(row_prior, col_prior, number), known) for number in channels)
    settings, blocks, _ = min(tried, key=lambda one: one.bits)
    encoder = GapEncoder()
    for levels, part in blocks:
        encoder.put(levels, part)
    head = bytes([symbol | settings.channels << 1, settings.row_prior << 4 | settings.col_prior])
    return head + varint(where.size) + encoder.finish()


def decode(data: Bytes, side: Side, known: Known, channels: int) -> Bits:
    """Return the packed bits of a payload with at most `channels` sign channels."""
    reader = Reader(data)
    first = reader.byte()
    symbol, stated = first & 1, first >> 1
    if first & ~1 == NO_EVENTS and len(data) == 1:
        return place(symbol, np.zeros(0, dtype=np.int64), side.count)
    if stated > channels:
        raise CorruptAdapterError(f"an adaptive payload states {stated} sign channels, expected at most {channels}")
    priors, count = reader.byte(), reader.varint()
    if not 0 < count <= side.count:
        raise CorruptAdapterError(f"an adaptive payload states {count} events among {side.count} weights")
    coded = reader.rest()
    shape = matrix_shape(side.shape)
    _, inputs, positions = kernels(side.shape)
    if side.count > MOST_PER_BYTE * len(coded) or max(shape) > MAX_SIZE:
        raise CorruptAdapterError(
            f"{len(coded)} bytes of coded gaps for {shape[0]} rows and {shape[1]} columns; expected at most {MAX_SIZE} "
            f"of either, and a byte for every {MOST_PER_BYTE} weights"
        )
    rates = Rates(shape, count, Settings(priors >> 4, priors & 15, stated), known)
    decoder = GapDecoder(coded)
    found: list[Numbers] = []
    for block in rates.blocks():
        levels = rates.levels(block)
        events = decoder.get(levels)
        rates.learn(block, levels, events)
        row, col = np.nonzero(events)
        position, channel = np.divmod(col + block.cols.start, inputs)
        found.append((row + block.rows.start) * shape[1] + channel * positions + position)
    decoder.end()
    return place(symbol, np.concatenate(found), side.count)


def _prior(events: Numbers) -> int:
    """Return the logarithm of the likeliest prior of rows (or columns) with so many events: a negative binomial."""
    values, counts = np.unique(events, return_counts=True)
    mean = float(events.mean())

    def likelihood(prior: int) -> float:
        k = float(1 << prior)
        alike = k * math.log(k / (k + mean)) - math.lgamma(k)
        return float(np.dot(counts, [math.lgamma(v + k) - v * math.log(k + mean) + alike for v in values.tolist()]))

    return max(range(MAX_PRIOR + 1), key=likelihood)


class _Predicted(NamedTuple):
    """Levels and events of each block with some settings, and about how many bits the events take."""

    settings: Settings
    blocks: list[tuple[NDArray[np.uint8], NDArray[np.bool_]]]
    bits: float


def _predict(matrix: NDArray[np.bool_], count: int, settings: Settings, known: Known) -> _Predicted:
    rates, blocks, bits = Rates(matrix.shape, count, settings, known), [], 0.0
    likely, unlikely = np.log2(CENTERS / ONE), np.log2(1 - CENTERS / ONE)
    for block in rates.blocks():
        levels, part = rates.levels(block), matrix[block.rows, block.cols]
        bits -= float(np.where(part, likely[levels], unlikely[levels]).sum())
        rates.learn(block, levels, part)
        blocks.append((levels, part))
    return _Predicted(settings, blocks, bits)
