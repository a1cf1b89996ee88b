"""Failures of loads, undos and switches at every point, and interruptions at random ones: no model is damaged.

    python -m benchmarks.interruptions                     # prints the tables and writes runs/interruptions.jsonl
    python -m benchmarks.interruptions --write docs/reliability.md
    python -m benchmarks.interruptions --step 6 --storm 500

Every case of `interruption_cases.py` is run once to count, then once for each place where it can fail: each line of
maskpack/runtime that is executed, and each call of PyTorch, numpy, reading, writing and decoding, before and after it
had its effect. MemoryError, KeyboardInterrupt and an error of maskpack's take turns. A second round interrupts the way
back as well. Then real SIGINTs, sent by another process, meet models of real size. The exit status is 1 if anything
does not hold.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.interruption_cases import CASES
from benchmarks.interruption_faults import every, storm, twice
from benchmarks.interruption_world import World, settings
from benchmarks.measured import rewrite
from benchmarks.report import write_between
from maskpack.runtime import apply as places


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("failures", "storm"), help="one of the two; the other as it was")
    parser.add_argument("--step", type=int, default=1, help="every how many places, from another one in each setting")
    parser.add_argument("--storm", type=int, default=5004, help="how many real signals, a multiple of 6")
    parser.add_argument("--write", type=Path, help="Markdown file that gets the table between its markers")
    parser.add_argument("--json", type=Path, default=Path("runs/interruptions.jsonl"))
    options = parser.parse_args()
    began, draw = time.monotonic(), random.Random(0)
    sys.unraisablehook = lambda _: None  # what is raised while a generator is collected
    facts: dict[str, Any] = {}
    if options.part and options.json.exists():
        facts = {one["part"]: one["result"] for one in map(json.loads, options.json.read_text().splitlines())}
    if options.part != "storm":
        facts["failures"] = {"step": options.step, **failures(options.step, draw)}
    if options.part != "failures":
        signals, wrong = storm(options.storm, draw)
        facts["signals"] = {"counts": signals, "wrong": wrong}
    rewrite(options.json, [{"part": part, **found} for part, found in facts.items()], "part")
    wrong = [line for part in facts.values() for line in part["wrong"]]
    print(f"{time.monotonic() - began:.0f} s; {len(wrong)} things that must not be", *wrong, sep="\n")
    if len(facts) == 2:
        text = table(facts)
        print(text)
        if options.write:
            write_between(options.write, "make bench-interruptions", text)
    sys.exit(bool(wrong))


def failures(step: int, draw: random.Random) -> dict[str, Any]:
    """Let every case fail in every setting; return how often, by case and kind of place, and what was wrong."""
    found: dict[str, Counter[str]] = {case.name: Counter() for case in CASES}
    wrong: list[str] = []
    for number, setting in enumerate(settings()):
        with tempfile.TemporaryDirectory() as folder, patch.object(places, "FEW_PLACES", setting.few):
            world = World(setting, Path(folder))
            for case in CASES:
                counts, bad = every(world, case, step, 1 + number % step)
                both, worse = twice(world, case, 20, draw)
                found[case.name] += counts + Counter(twice=both)
                wrong += bad + worse
        print(number, setting, sum(sum(counts.values()) for counts in found.values()), len(wrong), flush=True)
    return {"counts": found, "wrong": wrong}


def table(facts: dict[str, Any]) -> str:
    """Return the Markdown of what was injected."""
    found, signals = facts["failures"]["counts"], facts["signals"]["counts"]
    lines = ["| operation | failures at lines | of calls | with the way back interrupted |", "|---|---|---|---|"]
    for name, counts in found.items():
        numbers = (f"{counts.get(kind, 0):,}" for kind in ("at_lines", "at_calls", "twice"))
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    total, step = sum(sum(counts.values()) for counts in found.values()), facts["failures"]["step"]
    which = "every place" if step == 1 else f"one of {step} places, others in each setting"
    lines.append(f"\n{total:,} failures ({which}), {len(facts['failures']['wrong'])} damaged models.\n")
    lines += ["| real SIGINTs during | met it | came after its end |", "|---|---|---|"]
    for name in sorted({key.split(":")[0] for key in signals}):
        lines.append(f"| {name} | {signals.get(f'{name}: met', 0):,} | {signals.get(f'{name}: after the end', 0):,} |")
    return "\n".join(
        [*lines, f"\n{sum(signals.values()):,} signals, {len(facts['signals']['wrong'])} damaged models.\n"]
    )


if __name__ == "__main__":
    main()
