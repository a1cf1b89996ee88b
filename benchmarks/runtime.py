"""Loading, switching, resident memory and training steps, beside checkpoints, PEFT's LoRA and dense copies.

    python -m benchmarks.runtime                               all; what is measured is read back; half an hour
    python -m benchmarks.runtime --models ResNet-50 --device cuda
    python -m benchmarks.runtime --write docs/results.md       the tables from what is measured

Every model is measured in a process of its own, everything of it in one run, by turns; medians of several repetitions.
Results lie in benchmarks/measured/runtime. Needs the extras train and compare.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskpack import MaskBank, fingerprint, load_adapter, load_mask, unload_mask
from maskpack.backbone.fingerprint import check_fingerprint
from maskpack.evaluate.trial import write_json

from .runtime_models import SUBJECTS, Subject, adapter_at, drawn, forward

MEASURED = Path(__file__).parent / "measured" / "runtime"
REPEATS, SWITCHES, MANY = 5, 20, 100
RANK = 8
MEGABITS = 100e6  # a second
ADAPTERS = ("one", "other")


class Clock:
    """Times what is done on a device."""

    def __init__(self, device: str):
        self.device = device

    def once(self, act: Callable[[], object]) -> float:
        """Return seconds."""
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
    """Verify, decode, apply; PEFT's load and merge; a full checkpoint."""
    from safetensors.torch import load_file, save_file

    found: dict[str, Any] = {}
    state = {name: tensor.cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "full.safetensors")
    del state
    path = folder / ADAPTERS[0]
    adapter = load_adapter(path)
    found["bytes"] = {"mask": adapter.size, "full": (folder / "full.safetensors").stat().st_size}
    found["read and verify the file"] = clock.median(lambda: load_adapter(path))
    found["hash the base"] = clock.median(lambda: check_fingerprint(model, adapter.base))
    found["decode"] = clock.median(lambda: sum(1 for _ in adapter.iter_masks()))
    loads, unloads = [], []
    for _ in range(REPEATS + 1):
        loads.append(clock.once(lambda: load_mask(model, path)))
        unloads.append(clock.once(lambda: unload_mask(model)))
    found["load_mask"], found["unload_mask"] = statistics.median(loads[1:]), statistics.median(unloads[1:])
    found["load_mask, verify off"] = clock.median(lambda: load_mask(model, path, verify="off"))
    unload_mask(model)

    def full() -> None:
        model.load_state_dict(load_file(folder / "full.safetensors"))

    found["full checkpoint"] = clock.median(full)
    (folder / "full.safetensors").unlink()
    lora = peft_of(subject, copy.deepcopy(model))
    for name in ADAPTERS:
        lora.save_pretrained(folder / f"lora-{name}")
    del lora
    found["bytes"]["lora"] = (folder / f"lora-{ADAPTERS[0]}/adapter_model.safetensors").stat().st_size
    merged = []
    for _ in range(3):
        fresh = copy.deepcopy(model)
        merged.append(clock.once(partial(merge, fresh, folder / f"lora-{ADAPTERS[0]}")))
        del fresh
    found["PEFT load and merge"] = statistics.median(merged)
    return found


def switching(subject: Subject, model: nn.Module, folder: Path, clock: Clock, inputs: Any) -> dict[str, Any]:
    """Switches of a bank, of PEFT, of dense copies; forward passes; mixed batches."""
    import peft
    from peft.utils.hotswap import hotswap_adapter

    found: dict[str, Any] = {"plain forward": clock.median(lambda: forward(model, inputs))}
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
        found["forward with a mask"] = clock.median(lambda: forward(model, inputs))
        found["switches"] = dict(bank.status().switches)
        count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        if count > 1:
            names = [ADAPTERS[at % 2] for at in range(count)]

            def one_by_one() -> None:
                for at, name in enumerate(names):
                    single = (
                        {k: t[at : at + 1] for k, t in inputs.items()}
                        if isinstance(inputs, dict)
                        else inputs[at : at + 1]
                    )
                    with bank.using(name):
                        forward(model, single)

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


def residents(subject: Subject, model: nn.Module) -> dict[str, int]:
    """Bytes that a bank takes for 1, 10 and 100 adapters, of which two were used."""
    found = {}
    first, second = drawn(subject, model, 0), drawn(subject, model, 1)
    with MaskBank(model) as bank:
        for index in range(MANY):
            bank.add((first, second)[index % 2], str(index))
            if index + 1 in (1, 10, MANY):
                for name in ("0", str(min(index, 1))):
                    bank.use(name)
                status = bank.status()
                found[str(index + 1)] = status.host_bytes + status.device_bytes
    return found


def step(subject: Subject, kind: str, device: str) -> dict[str, float]:
    """A training step of the masks or of the same weights, by Adam: seconds and peak memory, in this process."""
    from maskpack import attach_scores

    torch.manual_seed(0)
    model = subject.make().to(device).train()
    model.requires_grad_(False)
    names = set(subject.names(model))
    if kind == "mask":
        learned: list[nn.Parameter] = list(attach_scores(model, "threshold", sorted(names)).values())
    else:
        learned = [p for name, p in model.named_parameters() if name in names]
        for parameter in learned:
            parameter.requires_grad_()
    optimizer = torch.optim.Adam(learned, lr=1e-4)
    inputs = subject.inputs(subject.train)
    inputs = {k: t.to(device) for k, t in inputs.items()} if isinstance(inputs, dict) else inputs.to(device)
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
    model = subject.make().to(device).eval()
    inputs = subject.inputs(subject.batch)
    inputs = (
        {k: t.to(device) for k, t in inputs.items()} if isinstance(inputs, dict) else inputs.to(device, subject.dtype)
    )
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        base = fingerprint(model, id="benchmark", head=[subject.head])
        for seed, own in enumerate(ADAPTERS):
            adapter_at(folder / own, subject, model, seed, base)
        found: dict[str, Any] = {"loading": loading(subject, model, folder, clock)}
        found["switching"] = switching(subject, model, folder, clock, inputs)
        found["resident bytes"] = residents(subject, model)
    found["model bytes"] = sum(p.nbytes for p in model.parameters())
    weights = sum(p.numel() for n, p in model.named_parameters() if n in set(subject.names(model)))
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {**found, "weights": weights, "density": subject.density, "device": on}


def child(*words: str) -> Any:
    """Run this module in a fresh process, and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.runtime", *words], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, device: str, folder: Path = MEASURED) -> None:
    """Measure what is not measured of one model."""
    path = folder / f"{name.partition(',')[0].replace('/', '-')}-{device}.json"
    if path.exists():
        return
    whole = child("--one", name, "--device", device)
    if SUBJECTS[name].train:
        whole["training"] = {
            kind: child("--step", kind, "--one", name, "--device", device) for kind in ("full", "mask")
        }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"model": name, **whole})
    print(f"{path.name}: {json.dumps(ratios(whole))}", flush=True)


def ratios(one: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratios of docs/results.md, smaller is better."""
    load, switch = one["loading"], one["switching"]
    size = load["bytes"]
    ready = size["mask"] * 8 / MEGABITS + load["load_mask"]
    found = {
        "ready / full": ready / (size["full"] * 8 / MEGABITS + load["full checkpoint"]),
        "load / PEFT load and merge": load["load_mask"] / load["PEFT load and merge"],
        "switch / load": switch["switch"] / min(load["load_mask"], load["PEFT load and merge"]),
        "forward / plain": switch["forward with a mask"] / switch["plain forward"],
    }
    if "training" in one:
        full, mask = one["training"]["full"], one["training"]["mask"]
        found |= {"step / full": mask["seconds"] / full["seconds"], "memory / full": mask["memory"] / full["memory"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--write", type=Path, help="only write the tables into this page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=["full", "mask"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        subject = SUBJECTS[given.one]
        print(json.dumps(step(subject, given.step, given.device) if given.step else measure(given.one, given.device)))
        return
    if given.write is not None:
        from .runtime_pages import write_pages

        write_pages(MEASURED, given.write)
        return
    for name in given.models:
        run(name, given.device)


if __name__ == "__main__":
    main()
