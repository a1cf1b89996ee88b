"""Measurements of `benchmarks.runtime` of one model in one process: loading, switching, memory, a training step."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskpack import MaskBank, fingerprint, load_adapter, load_mask, unload_mask
from maskpack.backbone.classifier import example_count, taken
from maskpack.backbone.fingerprint import compared_dtype, tensor_digests
from maskpack.backbone.model import body

from .runtime_models import SUBJECTS, Subject, adapter_at, forward

ROUNDS, REPEATS, TURNS, SWITCHES, MANY = 7, 5, 11, 20, 100
RANK = 8
ADAPTERS = ("one", "other")


class Clock:
    """A clock for operations on a device, which waits for them to end."""

    def __init__(self, device: str):
        self.device = device

    def once(self, act: Callable[[], object]) -> float:
        """Return the seconds that an operation takes."""
        self._wait()
        started = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - started

    def median(self, act: Callable[[], object], repeats: int = REPEATS) -> float:
        """Return the median of seconds, after one time that is not counted."""
        act()
        return statistics.median(self.once(act) for _ in range(repeats))

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def peft_of(subject: Subject, model: nn.Module) -> Any:
    """Return the model with LoRA on the layers that masks are for."""
    import peft

    pattern = rf".*\.({subject.targets.replace('.', chr(92) + '.')})"
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=pattern))


def merge(model: nn.Module, folder: Path) -> None:
    """Load LoRA matrices and add them to the weights."""
    import peft

    peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


def loading(subject: Subject, model: nn.Module, folder: Path, clock: Clock) -> dict[str, Any]:
    """Time the load of an adapter by stages, PEFT's load and merge, and a full checkpoint's: medians, by turns."""
    from safetensors.torch import load_file, save_file

    path, lora, full = folder / ADAPTERS[0], folder / f"lora-{ADAPTERS[0]}", folder / "full.safetensors"
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in model.state_dict().items()}, full)
    with_lora = peft_of(subject, copy.deepcopy(model))
    for name in ADAPTERS:
        with_lora.save_pretrained(folder / f"lora-{name}")
    del with_lora
    adapter = load_adapter(path)
    sizes = {"mask": adapter.size, "full": full.stat().st_size}
    sizes["lora"] = (lora / "adapter_model.safetensors").stat().st_size
    tensors = body(model, [subject.head])
    turns: dict[str, Callable[[], object]] = {
        "read and verify the file": lambda: load_adapter(path),
        "hash the base": lambda: tensor_digests(tensors, compared_dtype(tensors.values())),
        "decode": lambda: sum(1 for _ in adapter.iter_masks(base=model, zeros=True)),
        # writes every weight, so that the next load hashes all of them
        "full checkpoint": lambda: model.load_state_dict(load_file(full, device=clock.device)),
        "load_mask": lambda: load_mask(model, path),
        "unload_mask": lambda: unload_mask(model),
        "load_mask, base known": lambda: load_mask(model, path),
        "unload_mask, second": lambda: unload_mask(model),
        "load_mask, verify off": lambda: load_mask(model, path, verify="off"),
        "unload_mask, third": lambda: unload_mask(model),
    }
    times: dict[str, list[float]] = {name: [] for name in (*turns, "PEFT load and merge")}
    for _ in range(ROUNDS + 1):
        for name, act in turns.items():
            times[name].append(clock.once(act))
        fresh = copy.deepcopy(model)
        times["PEFT load and merge"].append(clock.once(partial(merge, fresh, lora)))
        del fresh
    full.unlink()
    return {"bytes": sizes, **{name: statistics.median(every[1:]) for name, every in times.items()}}


def switching(subject: Subject, model: nn.Module, folder: Path, clock: Clock, inputs: Any) -> dict[str, Any]:
    """Time switches of a bank, of PEFT and of dense copies, forward passes, and mixed batches."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    found: dict[str, Any] = {}
    with MaskBank(model) as bank:
        for name in ADAPTERS:
            bank.add(folder / name)
        found["first switch"] = clock.once(lambda: bank.use(ADAPTERS[0]))
        bank.use(ADAPTERS[1])
        times, calls = [], []
        for step in range(SWITCHES):
            times.append(clock.once(partial(bank.use, ADAPTERS[step % 2])))
            calls.append(clock.once(lambda: forward(model, inputs)))
        found["switch"] = statistics.median(times)
        found["switch, p95"] = sorted(times)[int(0.95 * len(times))]
        found["call after a switch"] = statistics.median(calls)
        turns: dict[str | None, list[float]] = {None: [], ADAPTERS[0]: []}
        for _ in range(TURNS):  # a passing load on memory lasts longer than one turn
            for which, own in turns.items():
                with bank.disabled() if which is None else bank.using(which):
                    own.append(clock.once(lambda: forward(model, inputs)))
        found["plain forward"], found["forward with a mask"] = map(statistics.median, turns.values())
        found["switches"] = dict(bank.status().switches)
        count = example_count(inputs)
        if count > 1:
            names = [ADAPTERS[at % 2] for at in range(count)]

            def one_by_one() -> None:
                for at, name in enumerate(names):
                    with bank.using(name):
                        forward(model, taken(inputs, torch.tensor([at])))

            found["mixed batch"] = clock.median(lambda: bank(inputs, masks=names), 3)
            found["one by one"] = clock.median(one_by_one, 3)
    dense = {k: t.clone() for k, t in model.state_dict().items()}
    found["dense copy"] = clock.median(lambda: model.load_state_dict(dense))
    dense.clear()
    lora = peft.PeftModel.from_pretrained(model, folder / f"lora-{ADAPTERS[0]}", adapter_name=ADAPTERS[0])
    found["PEFT load second"] = clock.once(lambda: lora.load_adapter(folder / f"lora-{ADAPTERS[1]}", ADAPTERS[1]))
    lora.eval()
    found["PEFT set_adapter"] = clock.median(lambda: (lora.set_adapter(ADAPTERS[1]), lora.set_adapter(ADAPTERS[0]))) / 2
    found["PEFT hotswap"] = clock.median(
        lambda: hotswap_adapter(lora, str(folder / f"lora-{ADAPTERS[1]}"), adapter_name=ADAPTERS[0])
    )
    found["PEFT forward, not merged"] = clock.median(lambda: forward(lora, inputs))
    lora.unload()
    return found


def residents(model: nn.Module, folder: Path) -> dict[str, int]:
    """Return the bytes that a bank takes for 1, 10 and 100 adapters, of which two were used."""
    found = {}
    first, second = (load_adapter(folder / name).parts().masks for name in ADAPTERS)
    with MaskBank(model) as bank:
        for index in range(MANY):
            bank.add((first, second)[index % 2], str(index))
            if index + 1 in (1, 10, MANY):
                for name in ("0", str(min(index, 1))):
                    bank.use(name)
                status = bank.status()
                found[str(index + 1)] = status.host_bytes + status.device_bytes
    return found


def step(subject: Subject, kind: str, examples: int, device: str) -> dict[str, float]:
    """Measure a step of Adam on masks or on the same weights: seconds and peak memory, in this process."""
    from maskpack.training import attach_scores

    torch.manual_seed(0)
    with torch.device(device):
        model = subject.make().train()
    model.requires_grad_(False)
    names = set(subject.names(model))
    if kind == "mask":
        learned: list[nn.Parameter] = list(attach_scores(model, "threshold", sorted(names)).values())
    else:
        learned = [p for name, p in model.named_parameters() if name in names]
        for parameter in learned:
            parameter.requires_grad_()
    optimizer = torch.optim.Adam(learned, lr=1e-4)
    inputs = subject.inputs_on(device, examples)
    clock = Clock(device)

    def one() -> None:
        output = forward(model, inputs)
        loss = getattr(output, "logits", output).float().logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seconds = clock.median(one, 4)
    if device == "cuda":
        return {"seconds": seconds, "memory": float(torch.cuda.max_memory_allocated())}
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "memory": float(peak)}


def measure(name: str, device: str) -> dict[str, Any]:
    """Measure one model in this process."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = subject.make().eval()
    inputs = subject.inputs_on(device, subject.batch)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        base = fingerprint(model, id="benchmark", head=[subject.head])
        for seed, own in enumerate(ADAPTERS):
            adapter_at(folder / own, subject, model, seed, base)
        found: dict[str, Any] = {"loading": loading(subject, model, folder, clock)}
        found["switching"] = switching(subject, model, folder, clock, inputs)
        found["resident bytes"] = residents(model, folder)
    found["model bytes"] = sum(p.nbytes for p in model.parameters())
    weights = sum(p.numel() for n, p in model.named_parameters() if n in set(subject.names(model)))
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {**found, "weights": weights, "density": subject.density, "device": on}
