"""Bytes that one mask saves in coding another on the same base: its bits as context, its coefficients as predictions.

    MASKPACK_DATA=… python -m benchmarks.across        some minutes of one core, resumable
    python -m benchmarks.across --write docs/results/codecs.md

The first is what the codec does where a mask is coded against another set's. The second is tried here alone: rows,
inputs and low rank of a mask are coded as differences from those of the other, fitted to them by least squares, and
cost what the encoder itself counts: bits of the coefficients, and of the events by their rounding.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskpack import MaskSet, load_backbone, save_adapter
from maskpack.adapter.decode import base_weight, by_name
from maskpack.adapter.read import read_adapter
from maskpack.codecs import logit_fit
from maskpack.codecs.base import Bits, Side, count_ones, flipped, words_of
from maskpack.codecs.logit import encode
from maskpack.codecs.logit_fit import Rounded
from maskpack.codecs.logit_model import Grid, Known
from maskpack.mask import packed_bits
from maskpack.training import TrainConfig, load_data, train_mask

from .mask_sets import CORPUS, cases
from .measured import trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import RUNS, data_of, minilm

NAME, MARK = "codecs-across", "python -m benchmarks.across --write docs/results/codecs.md"
OTHER_TASK = "trec6-for-codecs"
# a mask, and the one that is known: another seed, another task, another optimiser, another method
PAIRS = (
    ("banking77-1", "banking77-0"),
    ("banking77-0", "banking77-1"),
    ("banking77-0", OTHER_TASK),
    ("sketch-1", "sketch-0"),
    ("eurosat-adam-0", "eurosat-sgd-0"),
    ("cartoon-largest-0", "cartoon-flip-0"),
)
Floats = NDArray[np.float64]
Rounding = tuple[Floats, Floats, tuple[int, ...], bool, Rounded]  # arguments of `rounded`, and what it gave


def roundings(bits: Bits, side: Side) -> dict[str, list[Rounding]]:
    """Return the roundings of a mask's coefficients by array: "row", "input", "left" and "right"."""
    seen, names = list[Rounding](), list[str]()
    rounded, assembled = logit_fit.rounded, logit_fit.assembled
    events = bits if 2 * count_ones(bits) <= side.count else flipped(bits, side.count)
    if not events.any():
        return {}
    grid = Grid.of(side.shape)

    def seen_rounded(values: Floats, curvature: Floats, steps: tuple[int, ...], differences: bool) -> Rounded:
        found = rounded(values, curvature, steps, differences)
        seen.append((values.copy(), curvature.copy(), steps, differences, found))
        return found

    def seen_assembled(fit: logit_fit.Fit, chosen: dict[str, Rounded]) -> logit_fit.Fitted:
        names.extend(chosen)  # in the order of rounding
        return assembled(fit, chosen)

    logit_fit.rounded, logit_fit.assembled = seen_rounded, seen_assembled
    try:
        logit_fit.fitted(grid, Known.of(side, True), events)
    finally:
        logit_fit.rounded, logit_fit.assembled = rounded, assembled
    found = dict[str, list[Rounding]]()
    for name, one in zip(names, seen, strict=True):
        if (array := name.split()[0]) in ("left", "right", "row", "input"):
            found.setdefault(array, []).append(one)
    return found


def saved(mine: dict[str, list[Rounding]], known: dict[str, list[Rounding]]) -> float:
    """Return the bits saved when a mask's coefficients are predicted by other masks' and the rest is coded."""
    total = 0.0
    for name, own in mine.items():
        if name not in known:
            continue
        others = np.stack([one[-1].nats() for one in known[name]], axis=1)
        for values, curvature, steps, differences, chosen in own:
            root = np.sqrt(curvature)
            factors = np.linalg.lstsq(others * root[:, None], values * root, rcond=None)[0]
            rest = logit_fit.rounded(values - others @ factors, curvature, steps, differences)
            total += max(0.0, chosen.cost - rest.cost - 8 * len(factors))  # a byte for each factor
    return total


def trained() -> MaskSet:
    """Return masks of all weights of MiniLM for TREC's questions, trained in 80 steps once and kept in runs/."""
    file = RUNS / f"{OTHER_TASK}.safetensors"
    if not file.exists():
        settings: dict[str, Any] = {"top": 1.0, "train": (), "lr": 0.05, "head_lr": 0.01, "steps": 80, "batch_size": 16}
        data, config = load_data(str(data_of("trec6"))), TrainConfig(seed=0, **settings)
        made = train_mask(load_backbone(**minilm()), data, config)
        RUNS.mkdir(parents=True, exist_ok=True)
        save_adapter(file, made.parts.masks, made.base)
    return read_adapter(file).parts().masks


def measure(name: str, known: str) -> dict[str, Any]:
    """Return the bytes of a mask coded alone and with another as context, and what predictions save of both."""
    made = dict(cases(CORPUS))
    case, other = made[name](), trained() if known == OTHER_TASK else made[known]().masks
    assert case.weights is not None
    weights, found = by_name(case.weights), Counter[str]()
    for key, mask in case.masks.items():
        words = words_of(base_weight(weights, key, mask.shape))
        mine, theirs = packed_bits(mask.bits), packed_bits(other[key].bits)
        side, beside = Side(mask.shape, words), Side(mask.shape, words, theirs)
        alone, context = len(encode(mine, side, True)), len(encode(mine ^ theirs, beside, True))
        known_too = roundings(theirs, side)
        predicted = alone - saved(roundings(mine, side), known_too) / 8
        both = context - saved(roundings(mine ^ theirs, beside), known_too) / 8
        found["alone"] += alone
        found["context"] += min(alone, context)
        found["predicted"] += round(predicted)
        found["both"] += round(min(predicted, both))
    return dict(found)


def page(path: Path) -> None:
    rows = []
    for one in trials(NAME):
        found = one["result"]
        shares = (f"{1 - found[way] / found['alone']:.1%}" for way in ("context", "predicted", "both"))
        rows.append((one["set"], one["known"], f"{found['alone']:,}", *shares))
    columns = ("mask", "known", "bytes alone", "saved by its bits as context", "by its coefficients", "by both")
    write_between(path, MARK, table(columns, rows, 2) if rows else NOTHING)


if __name__ == "__main__":
    jobs: dict[str, Callable[[], object]] = {
        f"{name}/{known}": partial(trial, NAME, {"set": name, "known": known}, partial(measure, name, known))
        for name, known in PAIRS
    }
    command(__doc__, jobs, page)
