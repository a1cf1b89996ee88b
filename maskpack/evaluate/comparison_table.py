"""The table of a comparison: means over seeds, as values and as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from ..text import escape

COLUMNS = ("row", "labels", "accuracy", "trained", "bytes", "head", "rate", "steps", "seconds", "memory", "forward")
NOTE = (
    "Accuracy: test split, in per cent, mean ± sample deviation over {seeds}. Trained: numbers that training changed. "
    "Bytes: all to store beside the backbone; head: of which the head's. Memory: growth of the process over the loaded "
    "backbone. Forward: time of a batch relative to the bare backbone's.\n"
)


def summaries(
    name: str, share: float, rate: float | None, seeds: Sequence[int], trials: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the means of a row's trials, one for each seed, under the keys that pictures read; controls follow."""
    rows = [_summary(name, share, rate, seeds, trials)]
    for control in trials[0]["controls"]:
        own = [trial["controls"][control] for trial in trials]
        rows.append(_summary(f"{name}: {control}", share, rate, seeds, own))
    return rows


def _summary(
    name: str, share: float, rate: float | None, seeds: Sequence[int], trials: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    values = {key: [trial[key] for trial in trials] for key in trials[0] if key not in ("sizes", "controls")}
    sizes = {what: mean(trial["sizes"][what] for trial in trials) for what in trials[0]["sizes"]}
    return {
        "method": name,
        "labels_fraction": share,
        "rate": rate,
        "seeds": list(seeds),
        "accuracies": values["accuracy"],
        "deviation": stdev(values["accuracy"]) if len(trials) > 1 else None,
        "sizes": sizes,
        **{key: mean(one) for key, one in values.items()},
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of a comparison as a Markdown table with a note."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += [f"| {escape(row['method'], 'markdown')} | {' | '.join(cells(row)[1:])} |" for row in rows]
    count = max(len(row["seeds"]) for row in rows)
    seeds = f"{count} seeds" if count > 1 else "one seed (no deviation)"
    return "\n".join(lines) + "\n\n" + NOTE.format(seeds=seeds)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row's cells as text, one for each of `COLUMNS`."""
    accuracy = f"{100 * row['accuracy']:.2f}"
    if row["deviation"] is not None:
        accuracy += f" ± {100 * row['deviation']:.2f}"
    return [
        str(row["method"]),
        f"{100 * row['labels_fraction']:g} %",
        accuracy,
        f"{row['trained']:,.0f}",
        f"{row['bytes']:,.0f}",
        f"{row['sizes'].get('head', 0):,.0f}",
        "-" if row["rate"] is None else f"{row['rate']:g}",
        f"{row['steps']:,.0f}",
        f"{row['seconds']:.1f}" if "seconds" in row else "-",
        f"{row['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in row else "-",
        f"{row['overhead']:.2f}x" if "overhead" in row else "-",
    ]
