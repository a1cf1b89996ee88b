"""Trainings killed at random moments and resumed until they are done, compared with uninterrupted ones.

    python -m benchmarks.training_kills             # prints the table and writes runs/training-kills.jsonl
    python -m benchmarks.training_kills --write docs/reliability.md
    python -m benchmarks.training_kills --kills 6 --seed 1

`maskpack train` runs in processes of its own, forked behind the imports, which take longer than a small training. Each
gets SIGKILL, SIGTERM or SIGINT after a random time, and the next one goes on with `--resume` where there is a
checkpoint. A run that is done in spite of that must have written the adapter of an uninterrupted run, byte for byte,
and lines of the log that are there once. The exit status is 1 if anything else comes out.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskpack_cli import digits_backbone
from maskpack_cli.main import main as command_line

from benchmarks.measured import rewrite
from benchmarks.report import write_between
from maskpack.errors import StateError
from maskpack.lab.trial import IMPORTED
from maskpack.training.run_folder import FILE, load_checkpoint

Row = dict[str, Any]
NAME = "make bench-kills"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED = {  # SIGTERM before the first step and after the last one ends the process as it does any other
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGINT: (128 + signal.SIGINT,),
}
COMMON = [
    "train",
    "--backbone",
    f"{digits_backbone.__file__}:digits_cnn",
    "--random-weights",
    "0",
    "--data",
    "digits:5-9",
]
COMMON += ["--labels-fraction", "0.5", "--epochs", "3", "--batch-size", "8", "--lr", "0.1", "--quiet"]
QUEUE = [f"--objective-option={option}" for option in ("prototypes=8", "queue=32", "queue_start=0", "small_crops=0")]
RUNS: dict[str, list[str]] = {
    "adam": ["--checkpoint-every", "1steps"],
    "sgd, accumulated": ["--optimizer", "sgd", "--lr", "10", "--accumulate", "3", "--checkpoint-every", "5steps"],
    "budget": ["--bytes-budget", "8kB", "--checkpoint-every", "0.2s"],
    "drawn masks": ["--method", "gumbel", "--checkpoint-every", "3steps"],
    "self-supervised": ["--objective", "self-supervised", *QUEUE, "--epochs", "2", "--checkpoint-every", "4steps"],
    "every epoch": ["--workers", "1"],
}


class Training:
    """A process that runs `maskpack train`."""

    def __init__(self, arguments: Sequence[str], printed: Path):
        self.printed, self.started = printed, time.monotonic()
        self.id = os.fork()
        if self.id == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background ignore it
            file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.argv = ["maskpack", *arguments]
            status = 1
            try:
                command_line()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0
            finally:
                os._exit(status)

    def wait(self, seconds: float = 300.0) -> int | None:
        """Return the exit status, negative for a signal; None if it runs on after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.id, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                return None
            time.sleep(0.005)


def run(kills: int, seed: int, folder: Path) -> list[Row]:
    """Return a row for every kill, and for every run that was done, with what was wrong."""
    drawn, row, killed, done = random.Random(seed), 0, list[Row](), list[Row]()
    whole = {name: uninterrupted(name, folder) for name in RUNS}
    while len(killed) < kills:
        name = list(RUNS)[row % len(RUNS)]
        output, row = folder / f"{row}", row + 1
        before = len(killed)
        while found := attempt(name, output, whole[name][1], drawn, SIGNALS[len(killed) % 3], len(killed) < kills):
            killed.append({"seed": seed, "run": name, "kill": len(killed), **found})
        ended = {"kills": len(killed) - before, "wrong": differing(output, whole[name][0])}
        done.append({"seed": seed, "run": name, **ended})
    return [*killed, *done]


def uninterrupted(name: str, folder: Path) -> tuple[Path, float]:
    """Return the folder of a run that nobody kills, and its seconds."""
    output = folder / f"whole-{list(RUNS).index(name)}"
    training = Training([*COMMON, *RUNS[name], "--output", str(output)], folder / "printed")
    if training.wait() != 0:
        raise SystemExit((folder / "printed").read_text())
    return output, time.monotonic() - training.started


def attempt(
    name: str, output: Path, seconds: float, drawn: random.Random, number: signal.Signals, kill: bool
) -> dict[str, Any] | None:
    """Begin a run or go on with it, and kill it in the first half of its time; None if it is done before."""
    checkpoint, printed = output / "training" / FILE, output.with_suffix(".txt")
    resume = ["--resume"] if checkpoint.exists() else []
    training = Training([*COMMON, *RUNS[name], "--output", str(output), *resume], printed)
    status = training.wait(drawn.uniform(0, seconds / 2) if kill else 300.0)
    if status is None:
        with suppress(ProcessLookupError):
            os.kill(training.id, number)
        status = training.wait()
        wrong = (
            "" if status in (0, *EXPECTED[number]) and "Traceback" not in printed.read_text() else "status or traceback"
        )
    else:
        wrong = "" if status == 0 else printed.read_text()
    if status == 0:
        return None
    step, middle = 0, False
    try:
        if checkpoint.exists():
            facts = load_checkpoint(checkpoint)[1]
            step, middle = facts["step"], bool(facts["batches"])
    except StateError as error:
        wrong = str(error)
    return {"signal": number.name, "status": status, "step": step, "middle": middle, "wrong": wrong}


def differing(output: Path, whole: Path) -> str:
    """Return what a run that is done has other than an uninterrupted one: the adapter, or lines of the log."""
    name = "maskpack_model.safetensors"
    if (output / name).read_bytes() != (whole / name).read_bytes():
        return "adapter"
    return "" if logged(output) == logged(whole) else "log"


def logged(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_left"} for line in lines]


def markdown(found: Sequence[Row]) -> str:
    """Return the table of the runs, and their outcomes."""
    lines = ["| signal | processes | left a checkpoint | of these in the middle of an epoch | something wrong |"]
    lines.append("| --- |" + " ---: |" * 4)
    for number in SIGNALS:
        rows = [one for one in found if one.get("signal") == number.name]
        kept = [one for one in rows if one["step"]]
        middle, wrong = sum(one["middle"] for one in kept), sum(bool(one["wrong"]) for one in rows)
        lines.append(f"| {number.name} | {len(rows)} | {len(kept)} | {middle} | {wrong} |")
    runs = [one for one in found if "signal" not in one]
    same, most = sum(not one["wrong"] for one in runs), max((one["kills"] for one in runs), default=0)
    told = (
        f"{len(runs)} runs of {len(RUNS)} kinds, each ended up to {most} times, were resumed until they were done; "
        f"{same} of them have the adapter, byte for byte, and the log of an uninterrupted run."
    )
    return "\n".join([*lines, "", told]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page to write the table into")
    parser.add_argument("--json", type=Path, default=Path("runs/training-kills.jsonl"))
    options = parser.parse_args()
    for name in (*IMPORTED, "maskpack.training.trainer", "maskpack.training.data.base", "maskpack.adapter.write"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="maskpack-") as place:
        found = run(options.kills, options.seed, Path(place))
    rewrite(options.json, found, "seed", "run", "kill", "signal")
    text = markdown(found)
    print(text)
    if options.write is not None:
        write_between(options.write, NAME, text)
    return int(any(one["wrong"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
