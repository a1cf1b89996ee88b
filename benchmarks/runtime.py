"""Loading, switching, resident memory and training steps, beside checkpoints, PEFT's LoRA and dense copies.

    python -m benchmarks.runtime                               all; half an hour, resumable
    python -m benchmarks.runtime --models ResNet-50 --device cuda
    python -m benchmarks.runtime --write docs/results/speed.md       the tables of what is recorded

Every model is measured in a process of its own, everything of it in one run, by turns; medians of several repetitions.
Needs the extras train and lab.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from maskpack.runtime.identify import HOWS

from .identification import SIZES, UNSEEN
from .measured import trial, trials
from .report import NOTHING, write_between
from .runtime_measures import measure, step
from .runtime_models import SUBJECTS

MEGABITS = 100e6  # a second
EXAMPLES = {"cpu": ("8",), "cuda": ("8", "64")}  # of a training step


def child(*words: str) -> Any:
    """Run this module in a fresh process, and return what it prints."""
    # PEFT asks the Hub for models that are not there, and the time of an answer is not what is compared
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.runtime", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, device: str) -> dict[str, Any]:
    """Measure one model."""
    whole: dict[str, Any] = child("--one", name, "--device", device)
    if SUBJECTS[name].train:
        whole["training"] = {
            examples: {
                kind: child("--step", kind, examples, "--one", name, "--device", device) for kind in ("full", "mask")
            }
            for examples in EXAMPLES[device]
        }
    print(f"{name}: {json.dumps(ratios(whole))}", flush=True)
    return whole


def ratios(one: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratios of docs/results/speed.md, smaller is better."""
    load, switch = one["loading"], one["switching"]
    size, peft = load["bytes"], load["PEFT load and merge"]
    found = {
        "load, verify off / PEFT": load["load_mask, verify off"] / peft,
        "switch / load": switch["switch"] / min(load.get("load_mask", peft), peft),
        "forward / plain": switch["forward with a mask"] / switch["plain forward"],
    }
    if "load_mask" in load:
        ready = size["mask"] * 8 / MEGABITS + load["load_mask"]
        found["ready / full"] = ready / (size["full"] * 8 / MEGABITS + load["full checkpoint"])
        found["load / PEFT load and merge"] = load["load_mask"] / peft
        found["load, base known / PEFT"] = load["load_mask, base known"] / peft
    for examples, both in one.get("training", {}).items():
        for what, key in (("step", "seconds"), ("memory", "memory")):
            found[f"{what} / full, {examples}"] = both["mask"][key] / both["full"][key]
    return found


# --- the page --------------------------------------------------------------------------------------------------------

MARK = "python -m benchmarks.runtime --write docs/results/speed.md"
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
    """Return the time and memory of a training step, or nothing if it was not measured."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--write", type=Path, help="only write the tables into this page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        subject = SUBJECTS[given.one]
        if given.step:
            print(json.dumps(step(subject, given.step[0], int(given.step[1]), given.device)))
        else:
            print(json.dumps(measure(given.one, given.device)))
        return
    if given.write is not None:
        write_pages(given.write)
        return
    for name in given.models:
        trial("runtime", {"model": name, "device": given.device}, partial(run, name, given.device))


if __name__ == "__main__":
    main()
