"""Failures on purpose: at every line and every call of an operation, and real signals at random moments."""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

import maskpack.runtime
from benchmarks.interruption_cases import Case, bank_of, check_bank
from benchmarks.interruption_world import Setting, World
from maskpack import load_mask, unload_mask
from maskpack.adapter.read import Adapter
from maskpack.errors import CorruptAdapterError, MaskpackError
from maskpack.runtime import apply as places
from maskpack.runtime.apply import applied

ERRORS = (KeyboardInterrupt, MemoryError, CorruptAdapterError)
FOLDER = str(Path(maskpack.runtime.__file__).parent)
NAMES = ("flatnonzero", "unpackbits")
SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    time.sleep(float(line))
    os.kill(os.getppid(), signal.SIGINT)
"""


class Fault:
    """A counter of places where something can fail, which raises at one of them.

    Attributes:
        at: number of the place, from 1; 0: only count. seen: places so far. raised: whether it was reached.
    """

    def __init__(self, at: int = 0, error: type[BaseException] = MemoryError, then: "Fault | None" = None):
        self.at, self.error, self.then = at, error, then
        self.seen, self.raised = 0, False

    def step(self) -> None:
        """Count a place, and raise the error if it is the one to fail at."""
        if self.raised:
            if self.then is not None:
                self.then.step()
            return
        self.seen += 1
        if self.seen == self.at:
            self.raised = True
            raise self.error(f"injected at {self.at}")


@contextmanager
def at_lines(fault: Fault) -> Iterator[None]:
    """Let every line of maskpack/runtime that is executed be a place."""

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(FOLDER) else None

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            fault.step()
        return line

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def at_calls(fault: Fault) -> Iterator[None]:
    """Let every call of PyTorch, numpy, reading, writing and decoding be two places: before and after its effect."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "grad_enabled" in getattr(func, "__name__", ""):  # of PyTorch's own contexts
                return func(*args, **(kwargs or {}))
            fault.step()
            result = func(*args, **(kwargs or {}))
            fault.step()
            return result

    def both(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **named: Any) -> Any:
            fault.step()
            result = call(*args, **named)
            fault.step()
            return result

        return inner

    def decoded(self: Adapter, *args: Any, **named: Any) -> Iterator[Any]:
        for item in iter_masks(self, *args, **named):
            fault.step()
            yield item

    iter_masks = Adapter.iter_masks
    with ExitStack() as stack:
        for name in ("read", "write", "changed_bits", "places", "increment_version"):
            stack.enter_context(patch.object(places, name, both(getattr(places, name))))
        for name in NAMES:
            stack.enter_context(patch.object(np, name, both(getattr(np, name))))
        stack.enter_context(patch.object(Adapter, "iter_masks", decoded))
        stack.enter_context(Mode())
        yield


WAYS = (at_lines, at_calls)


def once(world: World, case: Case, *ways: Any) -> str | None:
    """Run a case under faults; return what is wrong afterwards, or None."""
    case.before(world)
    try:
        with ExitStack() as stack:
            for way, fault in ways:
                stack.enter_context(way(fault))
            case.act(world)
    except (KeyboardInterrupt, MemoryError, MaskpackError):  # what is injected, or what became of it
        pass
    try:
        assert torch.is_grad_enabled(), "gradients are off"
        case.check(world)
    except Exception as error:
        torch.set_grad_enabled(True)
        return f"{case.name}, {world.setting}, {[(way.__name__, fault.at) for way, fault in ways]}: {error!r}"
    return None


def every(world: World, case: Case, step: int = 1, first: int = 1) -> tuple[Counter[str], list[str]]:
    """Let a case fail at every place, or at every `step`-th from the `first` on; kinds of error take turns.

    Returns:
        How many failures were injected, by kind of place, and what was wrong afterwards.
    """
    counts: Counter[str] = Counter()
    wrong: list[str | None] = []
    for way in WAYS:
        wrong.append(once(world, case, (way, count := Fault())))
        for at in range(first, count.seen + 1, step):
            wrong.append(once(world, case, (way, fault := Fault(at, ERRORS[at % 3]))))
            counts[way.__name__] += fault.raised
    return counts, [one for one in wrong if one]


def twice(world: World, case: Case, tries: int, draw: random.Random) -> tuple[int, list[str]]:
    """Fail at a random place of a case and again in its undo; return how often both happened, and the errors."""
    once(world, case, (at_calls, count := Fault()))
    wrong, both, world.twice = [], 0, True
    for _ in range(tries):
        first = Fault(draw.randint(1, count.seen), ERRORS[0], Fault(draw.randint(1, 200), ERRORS[0]))
        wrong.append(once(world, case, (at_calls, first)))
        both += first.then is not None and first.then.raised
    world.twice = False
    return both, [one for one in wrong if one]


def storm(count: int, draw: random.Random) -> tuple[Counter[str], list[str]]:
    """Interrupt loads, undos and switches of real size at random moments; return the number of hits of each."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    sender = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, text=True)
    assert sender.stdin is not None
    came = False

    def handler(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def met(name: str, act: Callable[[], object], world: World) -> None:
        """Send a signal at a random moment of an operation, wait for it, and check the model."""
        nonlocal came
        assert sender.stdin is not None
        came = done = False
        began = time.perf_counter()
        try:
            sender.stdin.write(f"{draw.uniform(0, lasts[name])}\n")
            sender.stdin.flush()
            act()
            done = True
            lasts[name] = 0.9 * lasts[name] + 0.1 * (time.perf_counter() - began)
            while not came:
                time.sleep(1e-3)
        except KeyboardInterrupt:
            pass
        counts[f"{name}: {'after the end' if done else 'met'}"] += 1
        try:
            world.check_said()
        except Exception as error:
            wrong.append(f"storm, {name}, {world.setting}: {error!r}")

    def rounds(world: World, adapter: Adapter) -> None:
        """Interrupt each operation `count` / 6 times."""
        world.renew()
        for _ in range(count // 6):
            met("load_mask", lambda: load_mask(world.model, adapter), world)
            if applied(world.model) is None:
                load_mask(world.model, adapter)
            met("unload_mask", lambda: unload_mask(world.model), world)
            if applied(world.model) is not None:
                unload_mask(world.model)
            world.check()
        bank_of(world)
        for number in range(count // 6):
            met("bank.use", partial(world.bank.use, "abc"[number % 3]), world)
        check_bank(world)

    earlier = signal.signal(signal.SIGINT, handler)
    lasts = {"load_mask": 0.05, "unload_mask": 0.03, "bank.use": 0.05}
    try:
        for op in ("zero", "flip"):
            with tempfile.TemporaryDirectory() as folder:
                world = World(Setting(op, side=1024, few=places.FEW_PLACES, layers=4), Path(folder))
                rounds(world, world.adapters["a"])
    finally:
        signal.signal(signal.SIGINT, earlier)
        sender.stdin.close()
        sender.wait()
    return counts, wrong
