"""Loading, switching, resident memory and training steps, beside checkpoints, PEFT's LoRA and dense copies.

    python -m benchmarks.runtime                               all; half an hour, resumable
    python -m benchmarks.runtime --models ResNet-50 --device cuda
    python -m benchmarks.runtime --write docs/results.md       the tables of what is recorded

Every model is measured in a process of its own, everything of it in one run, by turns; medians of several repetitions.
Needs the extras train and lab.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .measured import trial
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
    """Return the ratios of docs/results.md, smaller is better."""
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
        from .runtime_pages import write_pages

        write_pages(given.write)
        return
    for name in given.models:
        trial("runtime", {"model": name, "device": given.device}, partial(run, name, given.device))


if __name__ == "__main__":
    main()
