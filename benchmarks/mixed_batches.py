"""Batches in which every example has its own adapter: one pass with corrections, switching, and PEFT's LoRA.

    MASKPACK_SMOLLM2=… python -m benchmarks.mixed_batches           ten minutes of one core, resumable
    python -m benchmarks.mixed_batches --write docs/serving.md      the table of what is recorded

SmolLM2-135M in float32 generates 8 tokens for 8 prompts; the examples share 1 to 8 adapters. benchmarks/smollm2.py
makes the folder of the model. Needs the extras train and lab.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskpack import MaskBank, MaskSet

from .measured import trial, trials
from .report import NOTHING, command, table, write_between

NAME = "mixed-batches"
MARK = "python -m benchmarks.mixed_batches --write docs/serving.md"
EXAMPLES, PROMPT, TOKENS, TIMES = 8, 16, 8, 3
SHARES = (0.001, 0.005, 0.015)  # of the weights of linear layers that an adapter changes
COUNTS = (1, 4, 8)  # adapters in the batch


def network() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(os.environ["MASKPACK_SMOLLM2"], dtype=torch.float32).eval()


def few(model: Any, share: float, seed: int) -> MaskSet:
    """Return masks that remove some weights of all layers."""
    generator = torch.Generator().manual_seed(seed)
    names = {name: one.shape for name, one in model.named_parameters() if "_proj" in name}
    return MaskSet.from_tensors({n: torch.rand(shape, generator=generator) >= share for n, shape in names.items()})


def seconds(work: Callable[[], object]) -> float:
    """Return the least processor time of several runs in one thread, which depends least on the machine's load."""
    found = []
    for _ in range(TIMES):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def prompts() -> dict[str, Tensor]:
    ids = torch.randint(100, 40000, (EXAMPLES, PROMPT), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


SAME: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}


def masks(share: float) -> dict[str, Any]:
    """Return seconds of each way by number of adapters, and how many tokens of the two ways agree."""
    model, inputs, found = network(), prompts(), dict[str, Any]()
    with MaskBank(model) as bank:
        for seed in range(max(COUNTS)):
            bank.add(few(model, share, seed), str(seed))
        for count in COUNTS:
            names = [str(i % count) for i in range(EXAMPLES)]
            ways = {"switched": partial(bank.generate, inputs, names, mixed=False, **SAME)}
            if count > 1:
                ways["one pass"] = partial(bank.generate, inputs, names, mixed=True, **SAME)
            texts = {way: torch.stack(work())[:, PROMPT:] for way, work in ways.items()}
            found[str(count)] = {way: seconds(work) for way, work in ways.items()}
            if count > 1:
                found[str(count)]["same tokens"] = float((texts["switched"] == texts["one pass"]).float().mean())
        found["correction bytes"] = bank.status().residents["0"].device_bytes
    return found


def lora(rank: int) -> dict[str, Any]:
    """Return seconds of PEFT's mixed batches by number of adapters."""
    from peft import LoraConfig, get_peft_model

    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, target_modules=layers, init_lora_weights=False)
    model, inputs = get_peft_model(network(), config, adapter_name="0").eval(), prompts()
    for seed in range(1, max(COUNTS)):
        model.add_adapter(str(seed), config)
    found = {}
    for count in COUNTS:
        names = [str(i % count) for i in range(EXAMPLES)]
        work = partial(model.generate, **inputs, adapter_names=names, **SAME)
        found[str(count)] = {"one pass": seconds(work)}
    return found


def base() -> dict[str, Any]:
    model, inputs = network(), prompts()
    return {"seconds": seconds(lambda: model.generate(**inputs, **SAME))}


def write(page: Path) -> None:
    """Write the table of what is recorded."""
    results = {(one["what"], one.get("share") or one.get("rank")): one["result"] for one in trials(NAME)}
    rows: list[list[object]] = []
    alone = results.get(("base", None))
    if alone is not None:
        rows.append(["the base, no adapters", *[f"{alone['seconds']:.2f}"] * len(COUNTS), "-"])
    for (what, size), one in results.items():
        for way in {"base": [], "lora": ["one pass"], "masks": ["one pass", "switched"]}[what]:
            said = (
                f"LoRA r = {size}, PEFT" if what == "lora" else f"{100 * float(size or 0):g} % of the weights changed"
            )
            cells = [f"{one[str(count)][way]:.2f}" if way in one[str(count)] else "-" for count in COUNTS]
            agree = [one[str(count)].get("same tokens", 1) for count in COUNTS] if what == "masks" else []
            same = f"{100 * min(agree):.0f} %" if way == "one pass" and agree else "-"
            rows.append([f"{said}, {way}", *cells, same])
    heads = ["processor seconds for 8 prompts", *(f"adapters: {count}" for count in COUNTS), "same tokens"]
    text = table(heads, rows, 1) if rows else NOTHING
    most = [one[str(COUNTS[-1])] for (what, _), one in results.items() if what == "masks"]
    loras = [one[str(COUNTS[-1])]["one pass"] for (what, _), one in results.items() if what == "lora"]
    if most and loras:
        others = {"switching": [one["switched"] for one in most], "LoRA's": loras * len(most)}
        shares = {name: [one["one pass"] / o for one, o in zip(most, all, strict=True)] for name, all in others.items()}
        said = " and ".join(f"{min(each):.2f} to {max(each):.2f} of {name}" for name, each in shares.items())
        text += f"\nWith {COUNTS[-1]} adapters one pass takes {said}.\n"
    write_between(page, MARK, text)


def job(work: Callable[..., Any], **settings: Any) -> Callable[[], object]:
    given = list(settings.values())
    return lambda: trial(NAME, {"what": work.__name__, **settings}, partial(work, *given))


JOBS = {"base": job(base), "lora": job(lora, rank=8)} | {f"masks-{x}": job(masks, share=x) for x in SHARES}


if __name__ == "__main__":
    command(__doc__, JOBS, write)
