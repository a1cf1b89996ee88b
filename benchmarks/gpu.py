"""All measurements that need a GPU, in less than eight minutes: bits equal to a CPU's, rates, loading and switching.

    python -m benchmarks.gpu --output runs/gpu                        where there is one
    TRITON_INTERPRET=1 python -m benchmarks.gpu --output runs/gpu     whether it runs, in Triton's interpreter
    python -m benchmarks.gpu --write docs/results/codecs.md           the table of what is recorded

It runs tests/test_cuda.py, then what is below, then the models of `benchmarks.runtime` as long as there is time. Lines
go to the folder; from there those of a GPU belong into benchmarks/measured, in the place of earlier ones.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from maskpack.adapter.read import read_adapter
from maskpack.backbone.model import same_size_int
from maskpack.codecs import ulps
from maskpack.codecs.base import Side, words_of
from maskpack.codecs.logit import Logit, LogitBase

from . import measured, runtime
from .report import table, write_between
from .runtime_measures import Clock
from .runtime_models import SUBJECTS

MINUTES = 7.0  # after which no other model is begun
MARK = "python -m benchmarks.gpu --write docs/results/codecs.md"
NOTHING = "Not measured: no GPU was available.\n"


class Work(NamedTuple):
    """An operation that CPU and GPU both do: its size and unit, both functions, and the comparison of their results."""

    what: str
    size: int
    unit: str
    here: Callable[[], Any]
    there: Callable[[], Any]
    agree: Callable[[Any, Any], bool]


def decoding(what: str, codec: Logit, payloads: list[tuple[bytes, Tensor]]) -> Work:
    """Return the decoding of payloads, for weights on a device, to packed bits and positions."""
    sides = [Side(tuple(w.shape), words_of(w) if codec.needs_base else None) for _, w in payloads]
    jobs = [(data, tuple(weight.shape), weight, None) for data, weight in payloads]

    def agree(here: Any, there: Any) -> bool:
        return all(np.array_equal(bits, one[0].cpu().numpy()) for bits, one in zip(here, there, strict=True))

    def here() -> list[Any]:
        return [codec.decode(data, side) for (data, _), side in zip(payloads, sides, strict=True)]

    size = sum(weight.numel() for _, weight in payloads)
    return Work(what, size, "weights", here, lambda: codec.decode_on(jobs), agree)


def works(device: str, tiny: bool) -> Iterator[Work]:
    """Yield the operations to measure; `tiny` ones are for Triton's interpreter."""
    from maskpack.backbone.digest_gpu import digest_of
    from maskpack.codecs.native import steps_gpu

    generator = torch.Generator().manual_seed(0)
    adapter = read_adapter(Path(__file__).with_name("corpus") / "banking77-0.safetensors")
    trained = [one for one in adapter.header.sets["default"].payloads if not tiny]
    if trained:
        payloads = [(bytes(adapter.piece(one)), torch.empty(one.shape, device=device)) for one in trained]
        yield decoding("a trained mask of MiniLM, `logit`", Logit(), payloads)
    count, side = (1, 24) if tiny else (8, 4096)
    for what, codec, times in (
        ("drawn, density 0.95, `logit`", Logit(), 1),
        ("by the base, `logit-base`", LogitBase(), 4),
    ):
        payloads = []
        for _ in range(max(1, count // times)):
            weight, pull = (torch.randn(side, side // times, generator=generator) for _ in range(2))
            kept = weight * pull.mean(1, keepdim=True) < 0.1 if codec.needs_base else pull < 1.645
            bits = np.packbits(kept.flatten().numpy(), bitorder="little")
            own = Side(tuple(weight.shape), words_of(weight) if codec.needs_base else None)
            payloads.append((codec.encode(bits, own) or b"", weight.to(device)))
        yield decoding(what, codec, payloads)
    base = (torch.randn(40 if tiny else 1 << 23, generator=generator) * 0.02).bfloat16()
    values = same_size_int(base) + torch.randint(-1, 2, base.shape, generator=generator, dtype=torch.int16)
    here, there = same_size_int(base).numpy().view(np.uint16), same_size_int(base).to(device)
    data = ulps.encode("BF16", here, values.numpy().view(np.uint16))
    yield Work("stored values of a patch", len(base), "values", lambda: ulps.decode(data, here),
               lambda: steps_gpu.decode(data, there),
               lambda one, other: np.array_equal(one.view(np.int16), other.cpu().numpy()))  # fmt: skip
    weights = torch.arange(64 if tiny else 1 << 28, dtype=torch.int32).view(torch.uint8)
    moved = weights.to(device)
    yield Work("BLAKE3", len(weights), "bytes", lambda: blake3(weights.numpy().data).digest(),
               lambda: digest_of(moved), lambda one, other: bool(one == other))  # fmt: skip
    yield Work("bandwidth of memory, a copy", 2 * len(weights), "bytes", weights.clone, moved.clone,
               lambda one, other: torch.equal(one, other.cpu()))  # fmt: skip


def rates(device: str, tiny: bool) -> dict[str, Any]:
    """Return seconds of CPU and GPU; anything that does not agree is an error."""
    rows, here, there = list[dict[str, Any]](), Clock("cpu"), Clock(device)
    for one in works(device, tiny):
        if not one.agree(one.here(), one.there()):
            raise AssertionError(f"{one.what}: a GPU gives something else than the CPU")
        repeats = 1 if tiny else 3
        times = {"cpu": here.median(one.here, repeats), "gpu": there.median(one.there, repeats)}
        rows.append({"what": one.what, "size": one.size, "unit": one.unit, **times})
        print(rows[-1], flush=True)
    return {"rows": rows, "torch": torch.__version__}


def text() -> str:
    """Return the table of what is recorded."""
    found = [
        (one["device"], row["what"], f"{row['size']:,} {row['unit']}", f"{1e3 * row['cpu']:,.1f}",
         f"{1e3 * row['gpu']:,.1f}", f"{row['size'] / row['gpu'] / 1e9:,.1f} G {row['unit']}")
        for one in measured.trials("gpu") for row in one["result"]["rows"]
    ]  # fmt: skip
    head = ("GPU", "what", "size", "CPU, one core, ms", "GPU, ms", "GPU, a second")
    return table(head, found, 2) if found else NOTHING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the lines")
    parser.add_argument("--write", type=Path, help="only write the table into this page")
    given = parser.parse_args()
    if given.write is not None:
        write_between(given.write, MARK, text())
        return
    started, measured.FOLDER = time.monotonic(), given.output.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    torch.set_num_threads(1)
    if device == "cuda":
        chosen = ["tests/test_cuda.py", "-q", "-n", "0", "-k", "not command_line and not kept_from"]
        subprocess.run([sys.executable, "-m", "pytest", *chosen], check=False)
    measured.trial("gpu", {"device": name}, partial(rates, device, device == "cpu"))
    for model in SUBJECTS if device == "cuda" else ():
        if time.monotonic() - started > 60 * MINUTES:
            print(f"no time is left for {model}: call it again with another folder, or benchmarks.runtime", flush=True)
            continue
        measured.trial("runtime", {"model": model, "device": device}, partial(runtime.run, model, device))


if __name__ == "__main__":
    main()
