"""Thousands of damaged adapter files, read, described, verified and decoded: outcomes, times and memory.

    python -m benchmarks.hostile                           # prints the tables and writes runs/hostile.jsonl
    python -m benchmarks.hostile --write docs/reliability.md
    python -m benchmarks.hostile --files 200 --no-large

Files are spoiled in four ways (tests/fuzz): bytes; the text of the header, with its length and digest made good;
members, tensors and payloads, bombs among them, with every digest made good; text that acts on terminals. A child
process with limited address space works on them, so that what takes it down is noticed. Then files of very many sets,
parameters, tensors and classes are read. The exit status is 1 if anything but an error of ours came out, or if a file
with a wrong digest was read.
"""

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bitarray import bitarray

from benchmarks.measured import rewrite
from benchmarks.report import write_between
from maskpack.adapter.card import render_card
from maskpack.adapter.describe import config_text, inspect_adapter
from maskpack.adapter.read import Adapter, read_adapter
from maskpack.errors import MaskpackError
from maskpack.mask import bits_digest, rows_id
from maskpack.training.trainer import process_memory
from tests.fuzz.damage import File, damaged, edited_header
from tests.fuzz.fuzz_cli import with_text
from tests.fuzz.fuzz_reader import WEIGHTS, TooSlow, address_space, too_slow, valid_files
from tests.fuzz.mutations import forged
from tests.helpers_adapter import many

LIMIT = 60  # seconds for a file
ROOM = 1 << 30  # bytes of address space beyond those of the start
WAYS: dict[str, Callable[[list[bytes], random.Random], bytes]] = {
    "bytes": lambda seeds, rng: damaged(rng.choice(seeds), rng, seeds),
    "header, its digest made good": lambda seeds, rng: edited_header(rng.choice(seeds), rng, seeds),
    "members, tensors, payloads, all digests made good": lambda seeds, rng: forged(rng.choice(seeds), rng),
    "text that acts, all digests made good": lambda seeds, rng: with_text(rng.choice(seeds), rng),
}
STAGES: dict[str, Callable[[Adapter], object]] = {
    "inspect": lambda adapter: (config_text(inspect_adapter(adapter), "x"), render_card(inspect_adapter(adapter))),
    "verify": lambda adapter: adapter.verify(),
    "decode": lambda adapter: [one for name in adapter.sets for one in decoded(adapter, name)],
}
BOMBS = 20
LARGE = {"sets": 16_000, "parameters": 100_000, "tensors": 50_000, "classes": 100_000}


def decoded(adapter: Adapter, name: str) -> Iterator[str]:
    """Decode everything in a set, one mask in memory at a time."""
    adapter.parts(name, WEIGHTS, stream=True)
    for parameter, _ in adapter.iter_masks(name, WEIGHTS):
        yield parameter


def measured(path: Path) -> dict[str, Any]:
    """Read, describe, verify and decode a file; return outcome, seconds of each stage and growth of memory."""
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds, outcome = process_memory()[0], dict[str, float](), "read"
    signal.alarm(LIMIT)
    stage = "read"
    try:
        began = time.perf_counter()
        adapter = read_adapter(path)
        seconds[stage] = time.perf_counter() - began
        for stage, action in STAGES.items():
            began = time.perf_counter()
            action(adapter)
            seconds[stage] = time.perf_counter() - began
    except MaskpackError as error:
        outcome = type(error).__name__
        seconds[stage] = time.perf_counter() - began
    except (Exception, TooSlow) as error:
        outcome = f"WRONG: {error!r:.200}"
        seconds[stage] = time.perf_counter() - began
    finally:
        signal.alarm(0)
    grown = max(0, process_memory()[1] - before)
    return {"outcome": outcome, "stage": stage, "bytes": path.stat().st_size, "seconds": seconds, "memory": grown}


def work(way: str, start: int, stop: int, seed: int) -> None:
    """Work on the files with these numbers and print a line of JSON for each; run in a process of its own."""
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        seeds = valid_files(Path(folder))
        path.write_bytes(seeds[0])
        measured(path)  # what is imported late is imported now
        limit = address_space() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(start, stop):
            data = WAYS[way](seeds, random.Random(f"{seed}/{way}/{number}"))
            path.write_bytes(data)
            row = {"way": way, "number": number, **measured(path)}
            if way == "bytes" and row["outcome"] == "read" and data not in seeds:
                row["outcome"] = "WRONG: read with bytes that were changed"
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


def rows_of(way: str, files: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one way to spoil files; a process that dies is a row too, and another goes on."""
    start = 0
    while start < files:
        words = [sys.executable, "-m", "benchmarks.hostile", "--work", way, str(start), str(files), str(seed)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        yield from found
        start += len(found)
        if done.returncode:
            what = f"WRONG: the process ended with {done.returncode}: {done.stderr[-200:]}"
            yield {"way": way, "number": start, "outcome": what, "stage": "-", "bytes": 0, "seconds": {}, "memory": 0}
            start += 1


def large(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each file of very many members."""
    for what, count in LARGE.items():
        path = folder / "large.safetensors"
        path.write_bytes(many(**{what: count}))
        yield {"way": f"{count:,} {what}", **measured(path)}
    path.write_bytes(bombs())
    yield {"way": f"{BOMBS} payloads of a byte, each for 2²⁸ weights", **measured(path)}


def bombs() -> bytes:
    """Return a file whose payloads of one byte stand for as many weights as a payload may."""
    file, weights = File.of(many(sets=BOMBS)), 1 << 28
    one = {"shapes": [[weights]], "kept": [weights], "codings": [{"codec": "logit", "op": "zero"}]}
    digest = bits_digest(bitarray("1", endian="little") * weights)
    for name, members in file.inner["sets"].items():
        members.update(one)
        file.data[f"{name}/payloads"] = b"\x80"
    names = ((name, members["names"], "zero", (weights,), digest) for name, members in file.inner["sets"].items())
    file.inner["mask_id"] = rows_id(names)  # type: ignore[arg-type]
    return file.joined()


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each way, outcome and stage: how many files, the longest time, and the file of most memory."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for one in rows:
        groups.setdefault((one["way"], one["outcome"], one["stage"]), []).append(one)
    found = []
    for (way, outcome, stage), own in groups.items():
        longest = max(sum(one["seconds"].values()) for one in own)
        most = max(own, key=lambda one: one["memory"])
        numbers = {"files": len(own), "longest": longest, "memory": most["memory"], "bytes": most["bytes"]}
        found.append({"way": way, "outcome": outcome, "stage": stage, **numbers})
    return found


def markdown(groups: list[dict[str, Any]], larger: list[dict[str, Any]]) -> str:
    """Return the tables."""
    wrong = sum(one["files"] for one in groups if one["outcome"].startswith("WRONG"))
    lines = [f"{sum(one['files'] for one in groups):,} spoiled files; wrong: {wrong}.", ""]
    lines += ["| what is spoiled | files | refused by reading | refused later | used whole | with which error |"
              " longest, seconds | most memory, MB | the same over the file's size |"]  # fmt: skip
    lines += ["| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"]
    for way in dict.fromkeys(one["way"] for one in groups):
        own = [one for one in groups if one["way"] == way]
        errors = Counter[str]()
        for one in own:
            errors[one["outcome"]] += one["files"]
        whole = errors.pop("read", 0)
        early = sum(one["files"] for one in own if one["outcome"] != "read" and one["stage"] == "read")
        kinds = ", ".join(f"{kind} {count}" for kind, count in errors.most_common())
        most = max(own, key=lambda one: one["memory"])
        lines.append(
            f"| {way} | {errors.total() + whole:,} | {early:,} | {errors.total() - early:,} | {whole:,} | {kinds} | "
            f"{max(one['longest'] for one in own):.2f} | {most['memory'] / 1e6:.0f} | "
            f"{most['memory'] / max(most['bytes'], 1):,.0f} |"
        )
    if larger:
        lines += ["", "| file with | MB | read, seconds | inspect | verify | decode | memory, MB |"]
        lines += ["| --- |" + " ---: |" * 6]
    for one in larger:
        times = " | ".join(f"{one['seconds'].get(stage, float('nan')):.2f}" for stage in ("read", *STAGES))
        lines.append(f"| {one['way']} | {one['bytes'] / 1e6:.1f} | {times} | {one['memory'] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="for each way to spoil them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-large", action="store_true", help="leave out the files of very many members")
    parser.add_argument("--write", type=Path, help="Markdown file that gets the tables between its markers")
    parser.add_argument("--json", type=Path, default=Path("runs/hostile.jsonl"))
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        way, *numbers = options.work
        work(way, *map(int, numbers))
        return
    rows = [row for way in WAYS for row in rows_of(way, options.files, options.seed)]
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as folder:
        larger = [] if options.no_large else list(large(Path(folder)))
    groups = grouped(rows)
    text = markdown(groups, larger)
    print(text)
    rewrite(options.json, [*groups, *larger], "way", "outcome", "stage")
    if options.write:
        write_between(options.write, "make bench-hostile", text)
    wrong = [one for one in [*rows, *larger] if one["outcome"].startswith("WRONG")]
    print(*wrong[:20], sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
