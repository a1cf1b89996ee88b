"""Real pairs of checkpoints: SmolLM2-135M in bfloat16 with float32 masters, by SFT and by GRPO on GSM8K.

    MASKPACK_DATA=… python -m benchmarks.patch_pairs runs/smollm2 runs/pairs     an hour of one core, resumable

The network computes with weights rounded to bfloat16; AdamW steps on float32 copies. What is saved is what a trainer
publishes: the rounded weights, as safetensors. SFT: an example of 48 tokens a step. GRPO: two questions a step,
four answers of 16 tokens each, a reward for a number at the end of few words, advantages within each group.
"""

import argparse
import csv
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

RUNS: dict[str, tuple[str, float, tuple[int, ...]]] = {  # kind, rate, steps after which weights are saved
    "grpo-1e-6": ("grpo", 1e-6, (1, 10, 199, 200)),
    "sft-1e-6": ("sft", 1e-6, (1, 9, 10)),
    "sft-1e-5": ("sft", 1e-5, (1, 10, 199, 200)),
    "sft-1e-4": ("sft", 1e-4, (1, 10, 199, 200)),
}
PAIRS = {  # name: run, step before, step after
    f"{run}, {'steps' if before == 0 else 'step'} {after}": (run, before, after)
    for run, (_, _, saved) in RUNS.items()
    for before, after in [(0, 1), (0, 10), *([(0, 200)] if 200 in saved else []), (saved[-2], saved[-1])]
}
BATCH, LENGTH, GROUP, QUESTIONS, ANSWER = 1, 48, 4, 2, 16


def weights_path(folder: Path, base: Path, run: str, step: int) -> Path:
    """Return the checkpoint of a run after a step; step 0 is the base."""
    return folder / run / f"{step}.safetensors" if step else base / "model.safetensors"


def rows() -> list[dict[str, str]]:
    with (Path(os.environ["MASKPACK_DATA"]) / "data" / "gsm8k" / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sft(model: Any, tokenizer: Any, data: list[dict[str, str]]) -> Iterator[Tensor]:
    """Yield the loss of each step of fine-tuning on answers (SFT)."""
    for step in count():
        own = [data[(step * BATCH + k) % len(data)] for k in range(BATCH)]
        texts = [f"{one['question']}\n{one['answer']}" for one in own]
        ids = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)["input_ids"]
        yield model(input_ids=ids, labels=ids).loss


def reward(text: str) -> float:
    """Return 1 for an answer that ends in a number and says little else."""
    words = text.split()
    return float(bool(words) and words[-1].strip(".$").isdigit()) - 0.02 * len(words)


def grpo(model: Any, tokenizer: Any, data: list[dict[str, str]]) -> Iterator[Tensor]:
    """Yield the loss of each step of GRPO: advantages of sampled answers times their log-probabilities."""
    for step in count():
        losses = []
        for k in range(QUESTIONS):
            asked = [{"role": "user", "content": data[(step * QUESTIONS + k) % len(data)]["question"][:200]}]
            ids = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"].repeat(GROUP, 1)
            with torch.no_grad():
                full = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=True, temperature=1.0
                )
            texts = tokenizer.batch_decode(full[:, ids.shape[1] :], skip_special_tokens=True)
            got = torch.tensor([reward(text) for text in texts])
            advantage = (got - got.mean()) / (got.std() + 1e-4)
            logits = model(full).logits[:, ids.shape[1] - 1 : -1]
            chosen = -cross_entropy(logits.transpose(1, 2), full[:, ids.shape[1] :], reduction="none")
            losses.append(-(advantage[:, None] * chosen).mean())
        yield torch.stack(losses).mean()


def train(base: Path, folder: Path, run: str) -> None:
    """Train a run and save its checkpoints, unless they are there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, rate, saved = RUNS[run]
    if all(weights_path(folder, base, run, step).exists() for step in saved):
        return
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    own = list(model.parameters())
    masters = [nn.Parameter(p.detach().clone()) for p in own]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    make: Callable[..., Iterator[Tensor]] = {"sft": sft, "grpo": grpo}[kind]
    losses = make(model, tokenizer, rows())
    for step in range(1, saved[-1] + 1):
        loss = next(losses)
        loss.backward()  # type: ignore[no-untyped-call]
        for master, parameter in zip(masters, own, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, own, strict=True):
                parameter.copy_(master.bfloat16())
        print(run, step, f"{loss.item():.3f}", flush=True)
        if step in saved:
            tensors = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
            path = weights_path(folder, base, run, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="SmolLM2-135M as a transformers folder in bfloat16")
    parser.add_argument("folder", type=Path, help="where checkpoints go")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for one in RUNS:
        train(given.base, given.folder, one)
