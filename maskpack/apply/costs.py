"""How long writing weights takes on a device, measured: what switching chooses its way by."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from bitarray import bitarray

from .patch import places, write

WEIGHTS = 1 << 20  # of the tensor that is measured on
EVERY = 16  # weights for each one written
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: `write` for each weight that is written by place, `scan` for each whose bit is looked at."""

    write: float
    scan: float


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Costs:
    """Measure a device, once; this takes some hundredths of a second."""
    weight = torch.zeros(WEIGHTS, dtype=dtype, device=device)
    bits = bitarray(WEIGHTS, endian="little")
    bits.setall(1)
    bits[::EVERY] = 0
    at = places(bits, device)
    small, values = at.to(torch.int32), torch.zeros_like(at, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32)

    def seconds(act: Callable[[], object]) -> float:
        taken = []
        for _ in range(REPEATS):
            _wait(device)
            started = time.perf_counter()
            act()
            _wait(device)
            taken.append(time.perf_counter() - started)
        return median(taken)

    return Costs(
        seconds(lambda: write(weight, small, values)) / len(at), seconds(lambda: places(bits, device)) / WEIGHTS
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
