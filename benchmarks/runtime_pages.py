"""What `benchmarks.runtime` and `benchmarks.identification` measured, as tables of a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from maskpack.runtime.identify import HOWS

from .identification import SIZES, UNSEEN
from .measured import trials
from .report import NOTHING, write_between
from .runtime import EXAMPLES, MEGABITS, ratios

MARK = "python -m benchmarks.runtime --write docs/results.md"
LIMITS = {
    "ready / full": ("time to ready at 100 Mbit/s / full checkpoint", "≤ 0.2", "≤ 0.1"),
    "load / PEFT load and merge": ("load_mask from a warm disk / PEFT LoRA r=8, load and merge", "≤ 1", "≤ 0.5"),
    "load, base known / PEFT": ("the same with a base that was checked before and has not changed", "-", "-"),
    "load, verify off / PEFT": ("the same with verify='off'", "-", "-"),
    "switch / load": ("switch / loading either", "≤ 0.5", "≤ 0.2"),
    "forward / plain": ("forward with a mask / plain", "1.00", "1.00"),
    "step / full, 8": ("training step of 8 examples / the same weights in full, Adam", "≤ 1.3", "≤ 1.10"),
    "step / full, 64": ("the same of 64 examples", "≤ 1.3", "≤ 1.10"),
    "memory / full, 8": ("peak memory of a training process of 8 examples / the same", "≤ 1.4", "≤ 1.05"),
    "memory / full, 64": ("the same of 64 examples", "≤ 1.4", "≤ 1.05"),
}
STEPS = [(examples, kind) for examples in EXAMPLES["cuda"] for kind in ("full", "mask")]
LOADING = (
    "read and verify the file", "hash the base", "decode", "load_mask", "load_mask, base known",
    "load_mask, verify off", "unload_mask", "full checkpoint", "PEFT load and merge",
)  # fmt: skip
SWITCHING = (
    "first switch", "switch", "switch, p95", "dense copy", "PEFT set_adapter", "PEFT hotswap", "PEFT load second",
    "plain forward", "forward with a mask", "call after a switch", "PEFT forward, not merged", "mixed batch",
    "one by one",
)  # fmt: skip


def write_pages(page: Path) -> None:
    """Write the tables of what is recorded between the page's markers."""
    recorded = sorted(trials("runtime"), key=lambda one: (one["model"], one["device"]))
    every = [{**one["result"], "model": one["model"]} for one in recorded]
    texts = [tables(every)] if every else []
    if runs := [one["result"] for one in trials("identification")]:
        texts.append(identification(runs))
    write_between(page, MARK, "\n".join(texts) or NOTHING)


def tables(every: Sequence[Mapping[str, Any]]) -> str:
    """Return ratios, milliseconds and bytes of all models, a column each."""
    heads = [f"{one['model']} ({one['device']})" for one in every]
    lines = [f"| ratio | {' | '.join(heads)} | must | goal |", "| --- |" + " ---: |" * (len(heads) + 2)]
    own = [ratios(one) for one in every]
    for key, (words, must, goal) in LIMITS.items():
        cells = [f"{found[key]:.2f}" if key in found else "-" for found in own]
        lines.append(f"| {words} | {' | '.join(cells)} | {must} | {goal} |")
    lines += ["", f"| milliseconds, medians | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for part, rows in (("loading", LOADING), ("switching", SWITCHING)):
        for row in rows:
            lines.append(f"| {row} | {' | '.join(milliseconds(one[part].get(row)) for one in every)} |")
    for examples, kind in STEPS:
        cells = [milliseconds(trained(one, examples, kind).get("seconds")) for one in every]
        lines.append(f"| training step of {examples}, {kind} | {' | '.join(cells)} |")
    lines += ["", f"| megabytes | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    sizes: dict[str, list[float | None]] = {
        "weights masked, millions": [one["weights"] for one in every],
        "the model": [one["model bytes"] for one in every],
    }
    for what, key in (("adapter, default", "mask"), ("LoRA r=8, as PEFT saves it", "lora"), ("checkpoint", "full")):
        sizes[what] = [one["loading"]["bytes"][key] for one in every]
    for count in ("1", "10", "100"):
        sizes[f"resident: {count} masks"] = [one["resident bytes"][count] for one in every]
    for examples, kind in STEPS:
        key = f"training process, {examples} examples, {kind}"
        sizes[key] = [trained(one, examples, kind).get("memory") for one in every]
    for what, values in sizes.items():
        cells = ["-" if found is None else f"{found / 1e6:,.1f}" for found in values]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    ready = [
        f"{one['loading']['bytes']['mask'] * 8 / MEGABITS + one['loading']['load_mask']:.2f}"
        if "load_mask" in one["loading"]
        else "-"
        for one in every
    ]
    lines.append(f"| seconds to ready at 100 Mbit/s | {' | '.join(ready)} |")
    return "\n".join(lines) + "\n"


def trained(one: Mapping[str, Any], examples: str, kind: str) -> Mapping[str, float]:
    """Return what a training step took, or nothing if it was not measured."""
    found: Mapping[str, float] = one.get("training", {}).get(examples, {}).get(kind, {})
    return found


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f}"


def identification(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of identified batches, means over seeds."""
    lines = [
        "| which of ten permutations; how | images in a batch | right | none of these | passes |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows = [(how, size) for how in (*HOWS, "profiles") for size in (*map(str, SIZES), UNSEEN)]
    for how, size in rows:
        key = f"{how}, {size}"
        if key not in runs[0]["rows"]:
            continue
        found = [run["rows"][key] for run in runs]
        right = f"{mean(one['accuracy'] for one in found):.3f}" if "accuracy" in found[0] else "-"
        passes = found[0].get("passes", "-")
        lines.append(f"| {how} | {size} | {right} | {mean(one['none'] for one in found):.3f} | {passes} |")
    accuracy = mean(run["accuracy"] for run in runs)
    return (
        "\n".join(lines)
        + f"\n\nThe masks themselves are right on {accuracy:.3f} of the test images. {len(runs)} seeds.\n"
    )
