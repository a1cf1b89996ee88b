"""What another training of the same task would tell of a mask set: bytes of two MiniLM sets, one by the other.

    python -m benchmarks.codecs_left --write docs/results/codecs.md     a minute of one core

Low rank: the coefficients of one set's low-rank terms, their cost in the file, beside what they take given what least
squares make of the other set's (16 bins of the prediction, counted adaptively; the map in 16-bit numbers). Bits:
the whole payload, coded against the other set's mask (the coefficient `reference` of the model).
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskpack.adapter.decode import by_name
from maskpack.adapter.read import read_adapter
from maskpack.codecs import logit
from maskpack.codecs.base import Side, words_of
from maskpack.codecs.lanes import Lanes, tables
from maskpack.mask import packed_bits

from .mask_sets import CORPUS, TASKS
from .measured import trial, trials
from .report import command, table, write_between

NAME, MARK = "codecs-left", "python -m benchmarks.codecs_left --write docs/results/codecs.md"
SETS, BINS = ("banking77-0", "banking77-1"), 16


def coefficients(data: bytes, side: Side) -> tuple[list[NDArray[Any]], float]:
    """Return the left and the right coefficients of a payload, (size, rank) each, and their cost in bits."""
    head = logit.Head.read(data, side, True)
    names, sizes, count = [*head.sizes], [*head.sizes.values()], len(head.lanes)
    kinds = np.repeat([code - 1 & 15 for code in head.codes.values()], sizes)
    parts = np.split(kinds, kinds.size * np.arange(1, count) // count)
    found = np.concatenate(Lanes(head.lanes).coefficients(parts))
    bits = np.log2((1 << 15) / np.diff(tables().first, axis=1)[kinds, found + 7])
    lean = np.repeat([name.startswith(("left", "right")) for name in names], sizes)
    arrays = dict(zip(names, np.split(found, np.cumsum(sizes)[:-1]), strict=True))
    sides = [
        np.column_stack([np.zeros((size, 0)), *(arrays[name] for name in names if name.startswith(word))])
        for word, size in zip(("left", "right"), side.shape, strict=True)
    ]
    return sides, float(bits[lean].sum())


def given(own: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the bits that integers take by adaptive counts, given the bin of their prediction from other columns."""
    made = np.column_stack([other, np.ones(len(other))])
    total = 0.0
    for column in own.T:
        predicted = made @ np.linalg.lstsq(made, column, rcond=None)[0]
        bins = np.searchsorted(np.quantile(predicted, np.arange(1, BINS) / BINS), predicted)
        total += 16 * made.shape[1]
        for one in range(BINS):
            counts = np.bincount(column[bins == one].astype(int) + 7, minlength=15)
            # Krichevsky-Trofimov: what adaptive counting takes, whatever the order
            total -= (math.lgamma(7.5) - math.lgamma(counts.sum() + 7.5)) / math.log(2)
            total -= sum(math.lgamma(c + 0.5) - math.lgamma(0.5) for c in counts.tolist()) / math.log(2)
    return total


def measure() -> dict[str, float]:
    """Return bytes of the second set: all, its low rank, the same given the first set's, all given the first's bits."""
    model = TASKS["banking77"].load().model
    weights = by_name(model)
    sets = [read_adapter(CORPUS / f"{name}.safetensors").parts(base=model).masks for name in SETS]
    found = dict.fromkeys(("payload", "low_rank", "low_rank_given", "payload_given"), 0.0)
    for name in sets[0]:
        first, second = (packed_bits(one[name].bits) for one in sets)
        side = Side(sets[0][name].shape, words_of(weights[name]))
        known, payload = (logit.encode(bits, side, True) for bits in (first, second))
        against = logit.encode(first ^ second, Side(side.shape, side.weights, first), True)
        found["payload"] += len(payload)
        found["payload_given"] += min(len(payload), len(against))
        (others, _), (own, cost) = coefficients(known, side), coefficients(payload, side)
        found["low_rank"] += cost / 8
        found["low_rank_given"] += min(cost, sum(map(given, own, others))) / 8
    return found


def page(path: Path) -> None:
    found = trials(NAME)[0]["result"]
    rows = [
        ("nothing", f"{found['payload']:,.0f}", f"{found['low_rank']:,.0f}"),
        (
            "its low rank",
            f"{found['payload'] - found['low_rank'] + found['low_rank_given']:,.0f}",
            f"{found['low_rank_given']:,.0f}",
        ),
        ("its bits", f"{found['payload_given']:,.0f}", "-"),
    ]
    write_between(
        path, MARK, table((f"known of {SETS[0]}", f"payload bytes of {SETS[1]}", "low-rank coefficients"), rows)
    )


if __name__ == "__main__":
    command(__doc__, {NAME: partial(trial, NAME, {"sets": list(SETS)}, measure)}, page)
