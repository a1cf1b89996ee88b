"""Start-up of the command line, beside `hf`: processor seconds and memory of commands that compute next to nothing.

    python -m benchmarks.start_up                                  a minute; replaces the recorded lines
    python -m benchmarks.start_up --write docs/results/speed.md    the table of what is recorded

Every command is a process of its own, in turns, user and system time together, so that other work on the machine
changes little; medians.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from .measured import FOLDER, rewrite, trials
from .report import table, write_between

REPEATED = 5
ADAPTER = "./docs/gallery/resnet20-cartoon"
COMMANDS = (
    *("python -c pass", "python -c 'import torch'"),
    *("hf --help", "hf version", "hf cache ls"),
    *("maskpack --help", "maskpack train --help", "maskpack list", "maskpack list codecs"),
    *(f"maskpack inspect {ADAPTER}", f"maskpack pull {ADAPTER}", f"maskpack verify {ADAPTER}"),
)
MARK = "python -m benchmarks.start_up --write docs/results/speed.md"


def spent(command: str, cache: str) -> tuple[float, int]:
    """Return the processor seconds of a command, and its greatest memory in bytes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HOME": cache, "MASKPACK_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024  # kB on Linux


def measured() -> Iterator[dict[str, Any]]:
    """Yield a line for each command."""
    versions = {name: version(name) for name in ("maskpack", "huggingface-hub", "torch")}
    with tempfile.TemporaryDirectory() as cache:
        (Path(cache) / "hub").mkdir()
        for command in COMMANDS:  # files come into the page cache, modules are compiled
            spent(command, cache)
        rounds = [[spent(command, cache) for command in COMMANDS] for _ in range(REPEATED)]
    for command, runs in zip(COMMANDS, zip(*rounds, strict=True), strict=True):
        seconds, memory = zip(*runs, strict=True)
        yield {"command": command, **versions, "seconds": median(seconds), "all": seconds, "memory": median(memory)}


def tables() -> str:
    """Return the table of what is recorded."""
    found = {one["command"]: one["result"] for one in trials("start-up")}
    rows = [(f"`{name}`", f"{one['seconds']:.2f}", f"{one['memory'] / 1e6:.0f}") for name, one in found.items()]
    return table(("command", "processor seconds", "memory, MB"), rows, 1)


def main() -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="only write the table of what is recorded into this page")
    given = parser.parse_args()
    if given.write is None:
        rewrite(FOLDER / "start-up.jsonl", measured(), "command", "maskpack", "huggingface-hub", "torch")
    else:
        write_between(given.write, MARK, tables())


if __name__ == "__main__":
    main()
