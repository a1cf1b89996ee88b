"""Loads, undos and switches fail at every point, and are interrupted at random ones: no model is damaged.

    python -m benchmarks.interruptions                     # prints the tables and writes runs/interruptions.json
    python -m benchmarks.interruptions --write docs/reliability.md
    python -m benchmarks.interruptions --quick --storm 500

Every case of `interruption_cases.py` is run once to count, then once for each place where it can fail: each line of
maskpack/apply that is executed, and each call of PyTorch, numpy, reading, writing and decoding, before and after it had
its effect. MemoryError, KeyboardInterrupt and an error of maskpack's take turns. A second round interrupts the way
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
from unittest.mock import patch

from benchmarks.interruption_cases import CASES
from benchmarks.interruption_faults import every, storm, twice
from benchmarks.interruption_world import Setting, World, settings
from benchmarks.pages import write_between
from maskpack.apply import patch as places


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting instead of the cross product")
    parser.add_argument("--storm", type=int, default=5000, help="how many real signals")
    parser.add_argument("--write", type=Path, help="Markdown file that gets the table between its markers")
    parser.add_argument("--json", type=Path, default=Path("runs/interruptions.json"))
    options = parser.parse_args()
    began, draw = time.monotonic(), random.Random(0)
    sys.unraisablehook = lambda _: None  # what is raised while a generator is collected
    found: dict[str, Counter[str]] = {case.name: Counter() for case in CASES}
    wrong: list[str] = []
    for setting in [Setting()] if options.quick else settings():
        with tempfile.TemporaryDirectory() as folder, patch.object(places, "FEW_PLACES", setting.few):
            world = World(setting, Path(folder))
            for case in CASES:
                counts, bad = every(world, case)
                both, worse = twice(world, case, 30, draw)
                found[case.name] += counts + Counter(twice=both)
                wrong += bad + worse
                print(setting, case.name, dict(counts), both, len(bad + worse), flush=True)
    signals, bad = storm(options.storm, draw)
    text = table(found, signals, len(wrong), len(bad))
    seconds = round(time.monotonic() - began)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"seconds": seconds, "failures": found, "signals": signals, "wrong": wrong + bad})
    )
    print(text, f"{seconds} s", *wrong, *bad, sep="\n")
    if options.write:
        write_between(options.write, "make bench-interruptions", text)
    sys.exit(bool(wrong + bad))


def table(found: dict[str, Counter[str]], signals: Counter[str], wrong: int, met: int) -> str:
    """Return the Markdown of what was injected."""
    lines = [
        "| operation | failures at lines | failures of calls | and the way back interrupted |",
        "| --- | --- | --- | --- |",
    ]
    for name, counts in found.items():
        lines.append(f"| {name} | {counts['at_lines']:,} | {counts['at_calls']:,} | {counts['twice']:,} |")
    total = sum(sum(counts.values()) for counts in found.values())
    lines.append(f"\n{total:,} failures, {wrong} damaged models.\n")
    lines += ["| real SIGINTs during | met it | came after its end |", "| --- | --- | --- |"]
    for name in sorted({key.split(":")[0] for key in signals}):
        lines.append(f"| {name} | {signals[f'{name}: met']:,} | {signals[f'{name}: after the end']:,} |")
    return "\n".join([*lines, f"\n{sum(signals.values()):,} signals, {met} damaged models.\n"])


if __name__ == "__main__":
    main()
