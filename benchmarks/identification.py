"""Identification of a batch's mask among ten: permuted MNIST on one random network, after Wortsman et al. (2020).

    MASKPACK_DATA=… python -m benchmarks.identification       a quarter of an hour of one core

The result is a table of `benchmarks.runtime --write`.
"""

import statistics
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from maskpack import MaskBank, identify
from maskpack.runtime.identify import HOWS, profiles
from maskpack.training import attach_scores, extract_masks

from .light_switch_tasks import digits
from .measured import trial
from .tasks import SEEDS

TASKS, STEPS, BATCH, HIDDEN = 10, 300, 128, 512
SIZES, BATCHES = (1, 16, 128), 20
UNSEEN = "an eleventh permutation"
PROFILE = 200  # training images of each task


def network(seed: int) -> nn.Module:
    """Return a random network whose weights have one size and random signs."""
    torch.manual_seed(seed)
    sizes = (784, HIDDEN, HIDDEN, 10)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
        weight = layers[-2].weight
        assert isinstance(weight, Tensor)
        weight.data = torch.randn(weight.shape).sign() * (2 / before) ** 0.5
    return nn.Sequential(*layers[:-1]).eval()


def seen(split: str) -> tuple[Tensor, Tensor]:
    """Return images as rows of 784 grey values, and labels."""
    x, y = digits(split)
    return x[:, :, 2:-2, 2:-2].flatten(1), y


def measured(seed: int) -> dict[str, Any]:
    """Train ten masks, then identify batches of each task; return accuracies and passes."""
    x, y = seen("train")
    x_test, y_test = seen("test")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(784, generator=generator) for _ in range(TASKS)]
    model = network(seed)
    accuracies: list[float] = []
    with MaskBank(network(seed)) as bank:
        for task, order in enumerate(orders):
            scores = attach_scores(model, "topk")
            optimizer = torch.optim.Adam(scores.values(), lr=0.003)
            for _ in range(STEPS):
                rows = torch.randint(len(x), (BATCH,), generator=generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows][:, order]), y[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            bank.add(extract_masks(model), f"permutation {task}")
            with bank.using(f"permutation {task}"), torch.no_grad():
                accuracies.append(float((bank.model(x_test[:, order]).argmax(1) == y_test).double().mean()))
        known = profiles(bank, {f"permutation {t}": x[:PROFILE][:, order] for t, order in enumerate(orders)})
        found: dict[str, Any] = {}
        for how in (*HOWS, known):
            name = how if isinstance(how, str) else "profiles"
            for size in SIZES:
                right, total, none, passes = 0, 0, 0, 0
                for task, order in enumerate(orders):
                    for _ in range(BATCHES):
                        rows = torch.randint(len(x_test), (size,), generator=generator)
                        one = identify(bank, x_test[rows][:, order], how)
                        right += one.likeliest == f"permutation {task}"
                        none, total, passes = none + (one.name is None), total + 1, one.passes
                found[f"{name}, {size}"] = {"accuracy": right / total, "none": none / total, "passes": passes}
        unseen = torch.randperm(784, generator=generator)
        for how in ("one-shot", known):
            name = how if isinstance(how, str) else "profiles"
            batches = [torch.randint(len(x_test), (SIZES[-1],), generator=generator) for _ in range(BATCHES)]
            unknown = [identify(bank, x_test[one][:, unseen], how).name is None for one in batches]
            found[f"{name}, {UNSEEN}"] = {"none": sum(unknown) / len(unknown)}
    return {"accuracy": statistics.mean(accuracies), "rows": found}


def main() -> None:
    torch.set_num_threads(1)
    for seed in SEEDS:
        trial("identification", {"seed": seed}, partial(measured, seed))


if __name__ == "__main__":
    main()
