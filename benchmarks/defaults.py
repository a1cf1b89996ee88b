"""`maskpack train` without options beside the probe, norms, LoRA and full fine-tuning: docs/results/defaults.md.

    MASKPACK_DATA=… python -m benchmarks.defaults                       every pair; hours of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.defaults resnet20-cartoon-200  one pair of backbone and data, 200 steps
    python -m benchmarks.defaults --write docs/results/defaults.md      the tables of what is recorded

Baselines choose their rate, and frozen or adapted BatchNorm statistics, on a fifth of the training rows. The mask has
the default settings, or those that `--auto` chooses on such rows in 500 steps, or in 1,000 for a training of as many.
Every row is measured once on the test split, with three seeds.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from maskpack.training.config import TrainConfig

from .comparisons import TEXT_RATES, compared, mask_rate, rows_of
from .recipe import lite0
from .report import NOTHING, command, percent, table, write_between
from .tasks import data_of, minilm, resnet

NAME = "defaults"
MARK = "python -m benchmarks.defaults --write docs/results/defaults.md"
BATCH = 32
PAIRS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    **{f"resnet20-{name}": (partial(resnet, 20), name) for name in ("cartoon", "eurosat")},
    **{f"lite0-{name}": (partial(lite0, 96), name) for name in ("eurosat", "sign_digits", "tf_flowers")},
    "minilm-trec6": (minilm, "trec6"),
    "minilm-sst2": (minilm, "sst2"),
}
STEPS = dict.fromkeys(PAIRS, (200, 100)) | dict.fromkeys(("resnet20-cartoon", "resnet20-eurosat"), (200, 100, 1000))
COLUMNS = ("probe", "norms", "LoRA r=8", "full", "mask, defaults", "mask, --auto")


def baselines(steps: int) -> dict[str, str]:
    """Return the baselines of a comparison, and the columns they are in."""
    names = ("probe", "norms", "lora:8", "full", "mask", f"auto:{max(500, min(steps, 1000))}")
    return dict(zip(names, COLUMNS, strict=True))


def run(pair: str, steps: int) -> None:
    """Run the comparison of a pair that is not recorded."""
    make, data = PAIRS[pair]
    text = make is minilm
    config = TrainConfig(steps=steps, batch_size=BATCH, precision="bf16" if text else "no")
    rates = {**(TEXT_RATES if text else {}), "mask": (mask_rate(pair, config),)}
    compared(NAME, f"{pair}-{steps}", make(), data_of(data), baselines(steps), rates, config)


def write_pages(page: Path) -> None:
    """Write the tables of the trials between the page's markers."""
    found = {(pair, steps): by_method(pair, steps) for pair, several in STEPS.items() for steps in several}
    found = {about: rows for about, rows in found.items() if rows}
    write_between(page, MARK, accuracies(found) if found else NOTHING)


def by_method(pair: str, steps: int) -> dict[str, dict[str, Any]]:
    """Return the rows of a comparison by their methods, controls among them."""
    return {row["method"]: row for row in rows_of(NAME, f"{pair}-{steps}", baselines(steps))}


def accuracies(found: dict[tuple[str, int], dict[str, dict[str, Any]]]) -> str:
    """Return test accuracies by pair and number of steps, and the means over the pairs where all are there."""
    lines, whole = [], dict[int, list[list[float]]]()
    for (pair, steps), rows in found.items():
        own = [rows.get(name) for name in baselines(steps)]
        lines.append([pair, steps, *("-" if row is None else percent(row["accuracies"]) for row in own)])
        if None not in own:
            whole.setdefault(steps, []).append([row["accuracy"] for row in own if row is not None])
    for steps, several in ((steps, several) for steps, several in whole.items() if len(several) > 1):
        lines.append(
            [f"mean of {len(several)}", steps, *(percent([mean(column)]) for column in zip(*several, strict=True))]
        )
    return table(("pair", "steps", *COLUMNS), lines, 2)


def main() -> None:
    jobs = {f"{pair}-{steps}": partial(run, pair, steps) for pair, several in STEPS.items() for steps in several}
    command(__doc__, jobs, write_pages)


if __name__ == "__main__":
    main()
