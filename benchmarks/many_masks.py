"""Speed of training masks of eight tasks in one step, compared with eight steps in turn, on one core.

    python -m benchmarks.many_masks              two minutes of one core, resumable

In turn: scores on one model for each task, as `attach_scores` makes them. Together: all scores stacked, one pass by
`torch.func.vmap` (products are batched), one optimiser. Times are of the processor, so that other processes do not
count. Results do not depend on values, so weights and inputs are random.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from maskpack_cli.digits_backbone import digits_cnn
from torch import Tensor, nn
from torch.func import functional_call, vmap

from maskpack.backbone.select import select_parameters
from maskpack.mask import masked_weight
from maskpack.training import attach_scores

from .backbones import resnet20
from .measured import trial

NAME, TASKS, REPEATS = "many-masks", 8, 7


class Layer(nn.Module):
    """A layer of a transformer, of MiniLM's kind."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), width // 32
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (one.unflatten(-1, (self.heads, 32)).transpose(-2, -3) for one in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(-2, -3).flatten(-2))
        found: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return found


class Encoder(nn.Module):
    """Layers of a transformer, and the mean over tokens."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.width, self.layers, self.head = (
            width,
            nn.Sequential(*(Layer(width) for _ in range(layers))),
            nn.Linear(width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.layers(x).mean(-2))
        return found


# name: model, and the shape of one example
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits CNN": (digits_cnn, (3, 8, 8)),
    "ResNet-20": (resnet20, (3, 32, 32)),
    "transformer 64 x 2": (partial(Encoder, 64, 2), (8, 64)),
    "transformer 384 x 6": (partial(Encoder, 384, 6), (16, 384)),
}


class Stacked(torch.autograd.Function):
    """Masked weights of all tasks from one frozen weight and stacked scores, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return masked_weight(weight.expand_as(scores), scores > 0, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def in_turn(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a step of each task; they share the model here, since only time is measured."""
    scores = list(attach_scores(model.eval(), head=()).values())
    optimizers = [torch.optim.Adam(scores, lr=1e-3) for _ in range(TASKS)]

    def step() -> None:
        for x, y, optimizer in zip(inputs, labels, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def together(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one step of all tasks."""
    weights = {name: model.get_parameter(name).detach() for name in select_parameters(model.eval())}
    model.requires_grad_(False)
    scores = {name: torch.ones(TASKS, *weight.shape, requires_grad=True) for name, weight in weights.items()}
    optimizer = torch.optim.Adam(scores.values(), lr=1e-3)

    def passed(own: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(model, own, (x,))
        return found

    def step() -> None:
        optimizer.zero_grad()
        effective = {name: Stacked.apply(one, weights[name]) for name, one in scores.items()}
        logits = vmap(passed)(effective, inputs)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def measure(name: str, batch: int) -> dict[str, Any]:
    """Return seconds of a step of all tasks in both ways, in alternation."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    inputs, labels = torch.randn(TASKS, batch, *shape), torch.randint(0, 5, (TASKS, batch))
    steps = {"in turn": in_turn(make(), inputs, labels), "together": together(make(), inputs, labels)}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(REPEATS + 1):
        for way, step in steps.items():
            start = time.process_time()
            step()
            seconds[way].append(time.process_time() - start)
    return {way: median(each[1:]) for way, each in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in MODELS:
        for batch in (1, 4, 16):
            found = trial(
                NAME, {"model": name, "batch": batch, "tasks": TASKS, "threads": 1}, partial(measure, name, batch)
            )
            print(f"{name}, batch {batch}: {found['in turn'] / found['together']:.2f} times as fast", found)
