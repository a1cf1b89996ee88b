"""Fuzz the adapter reader: `python -m tests.fuzz.fuzz_reader --seconds 120`.

Spoils valid adapter files (mutations.py) and reads everything in them. Only AdapterError may come out, no case may
take longer than SLOW seconds, and the address space may not grow by more than ROOM bytes. Each case depends on the
seed and its number alone: `--seed S --case N` repeats one.
"""

import argparse
import contextlib
import math
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskpack.adapter.card import render_card, update_card
from maskpack.adapter.content import Parts
from maskpack.adapter.describe import config_text, inspect_adapter
from maskpack.adapter.read import read_adapter
from maskpack.adapter.steps import Norm, rounded_rows, row_steps
from maskpack.adapter.write import save_adapter
from maskpack.backbone.model import Embedding, Head
from maskpack.codecs.base import CODECS
from maskpack.errors import AdapterError, BackboneMismatchError, ConfigError
from maskpack.mask import MaskSet, PackedMask

from ..helpers_adapter import base_of, random_masks
from ..helpers_cascade import cascade_parts
from .mutations import mutated

SHAPES = {"a.weight": (40, 4), "b.weight": (17,)}
WEIGHTS = {name: torch.linspace(-1, 1, math.prod(shape)).reshape(shape) for name, shape in SHAPES.items()}
BASE = {"n.weight": torch.ones(3), "n.bias": torch.ones(3), "rms.weight": torch.ones(2)}
ROOM = 512 << 20
SLOW = 10
DIFFERENT = 20  # failures that are not alike, after which there is no use in going on


def valid_files(folder: Path) -> list[bytes]:
    """Return adapter files of every kind and codec."""
    masks = random_masks(SHAPES)
    torch.manual_seed(0)
    head = Head(Embedding("fc"), torch.rand(2, 2), torch.rand(2))
    pooled = Head(Embedding(None, "mean", True), torch.rand(2, 2))
    full = Parts(masks, head, {"bn.running_mean": torch.rand(3)}, {"bn.weight": torch.rand(3)})
    stepped = replace(pooled, weight=rounded_rows(pooled.weight), steps=row_steps(pooled.weight))
    norms = {"n": Norm(np.arange(-1, 2, dtype=np.int32), np.arange(299, 302, dtype=np.int32))}
    norms["rms"] = Norm(np.arange(2, dtype=np.int32))
    replaced = random_masks(SHAPES, op="replace")
    values = {name: torch.rand(len(mask.bits) - mask.kept) for name, mask in replaced.items()}
    signs = random_masks(SHAPES, 0.5, seed=1)
    ternary = MaskSet({n: PackedMask(m.bits, m.shape, "zero", m.alpha, signs[n].bits) for n, m in masks.items()})
    about: dict[str, Any] = {"class_names": ["x", "y"], "task": "t", "preprocess": {"kind": "image"}}
    about["training"] = {"data": "x", "metrics": {"accuracy": 0.5}}
    sets: list[dict[str, MaskSet | Parts]] = [
        {"default": full},
        {"default": Parts(random_masks(SHAPES, scale=True), pooled), "other": random_masks(SHAPES, seed=2)},
        {"default": Parts(replaced, values=values)},
        {"default": ternary},
        {"default": Parts(masks, stepped, norms=norms)},
        {"default": MaskSet({"a.weight": PackedMask.from_tensor(torch.rand(40, 4).argsort(1) < 2)})},
    ]
    made = []
    for codec in (cls.id for cls in CODECS.all()):
        for one in sets:
            path = folder / "valid.safetensors"
            with contextlib.suppress(ConfigError):  # a codec may decline masks
                save_adapter(path, one, base_of(SHAPES, weights=WEIGHTS), codec=codec, weights=WEIGHTS, **about)
                made.append(path.read_bytes())
    named = {name: random_masks(SHAPES, seed=3) for name in ("dispatcher", "expert-0", "expert-1")}
    for cascade in (cascade_parts(classes=2), cascade_parts(reduced=4, classes=2, combine="unconditional")):
        save_adapter(path, named, base_of(SHAPES), cascade=cascade, **about)
        made.append(path.read_bytes())
    return made


def use(path: Path) -> None:
    """Read a file and everything in it, and describe it as the command line does."""
    adapter = read_adapter(path)
    description = inspect_adapter(adapter)
    card = render_card(description, "user/name")
    update_card(card, card)
    config_text(description, path.name)
    adapter.verify()
    if adapter.cascade is not None:
        adapter.cascade.router.route(torch.zeros(2, len(adapter.cascade.router.whitening.mean)))
    for name in adapter.sets:
        adapter.parts(name, WEIGHTS).resolved(BASE)


def read_all(data: bytes, path: Path, rng: random.Random) -> None:
    """Write a file and read everything in it; errors of ours are what spoiled files are for."""
    path.write_bytes(data)
    with contextlib.suppress(AdapterError, BackboneMismatchError):
        use(path)


class TooSlow(BaseException):
    """Raised in a case that takes over SLOW seconds; no boundary of errors takes it for one of its own."""


def too_slow(*_: object) -> None:
    raise TooSlow(f"a case took over {SLOW} seconds")


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fuzz(
    doc: str | None,
    seeds: list[bytes],
    spoil: Callable[[list[bytes], random.Random], bytes],
    run: Callable[[bytes, Path, random.Random], None],
) -> int:
    """Run cases for some time, as the command line says, and return the exit status; what `run` raises is a failure."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, help="only this case; its file is kept")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, too_slow)
    failures: dict[str, str] = {}
    cases = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.safetensors"
        for data in seeds:
            run(data, path, random.Random(0))
        limit = address_space() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        start, case = time.monotonic(), options.case or 0
        while time.monotonic() - start < options.seconds and len(failures) < DIFFERENT:
            rng = random.Random(f"{options.seed}/{case}")
            data = spoil(seeds, rng)
            signal.alarm(SLOW)
            try:
                run(data, path, rng)
            except (Exception, TooSlow):
                found = traceback.format_exc()
                if (kind := alike(found)) not in failures:
                    failures[kind] = found
                    kept = Path(tempfile.gettempdir()) / f"fuzz-{options.seed}-{case}.safetensors"
                    kept.write_bytes(data)
                    sys.stdout.write(f"--seed {options.seed} --case {case} ({kept}):\n{found}\n")
            finally:
                signal.alarm(0)
            cases += 1
            if options.case is not None:
                break
            case += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(
        f"{cases} executions, seed {options.seed}, {len(failures)} different failures, peak memory {peak} MiB\n"
    )
    return 1 if failures else 0


def alike(found: str) -> str:
    """Return what failures of one cause share: the kind of the error and the last line of code."""
    lines = found.rstrip().splitlines()
    place = next(line for line in reversed(lines) if line.lstrip().startswith("File "))
    return f"{lines[-1].partition(':')[0]} {place}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        seeds = valid_files(Path(folder))
    return fuzz(__doc__, seeds, mutated, read_all)


if __name__ == "__main__":
    sys.exit(main())
