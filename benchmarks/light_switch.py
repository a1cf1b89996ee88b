"""The experiments of "Like a Light Switch" (Blum and Law, 2020): gates, a network for each task, one for all.

    MASKPACK_DATA=… python -m benchmarks.light_switch                         all, forty minutes of one core
    MASKPACK_DATA=… python -m benchmarks.light_switch linear noisy            some of them
    python -m benchmarks.light_switch --write docs/results.md                 tables and curves from what is finished

All models of a seed start from the same weights, see the same tasks and rows in the same order, and have the same
optimiser and rate; gates have 4T times that. Results lie in benchmarks/measured/light-switch, a JSON file an
experiment; what is there is not run again.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskpack.lab.plots.masks import users
from maskpack.training import attach_gates
from maskpack.training.config import GATE_START
from maskpack.training.gates import GateHistory, Gates, counts
from maskpack.training.run_folder import read_json, write_json

from .light_switch_tasks import Problem, linear, mnist, sinusoids

MEASURED = Path(__file__).parent / "measured" / "light-switch"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """How the tasks of an experiment are learned.

    Attributes:
        kind: "gated", "separate" or "shared". optimizer: "adam" or "sgd", without momentum.
        factor: gates learn at this times the rate; None: 4T. r1, r2: regularisers.
        start: of the logits of gates.
        variant: which of the experiment's problems.
    """

    kind: str
    variant: str = ""
    optimizer: str = "adam"
    factor: float | None = None
    r1: float = 0.0
    r2: float = 0.0
    start: float = GATE_START


@dataclass(frozen=True)
class Experiment:
    """Problems, rows, and how long they are trained.

    Attributes:
        problems: by variant, made from a seed. every: steps between two points of the curve.
        most: the rate of gates is at most this. histograms: kept of the first seed.
    """

    problems: dict[str, Callable[[int], Problem]]
    rows: dict[str, Row]
    steps: int
    every: int
    lr: float
    lr_sgd: float = 0.1
    most: float | None = None
    histograms: bool = False


def three(variant: str = "", label: str = "", **options: Any) -> dict[str, Row]:
    """Return the three kinds, named with the label behind them."""
    return {f"{kind}{label}": Row(kind, variant, **options) for kind in ("gated", "separate", "shared")}


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the Jensen-Shannon divergence of two histograms in bits: 0 for equal shapes, 1 where no bin is common."""
    p, q = (one.double() / one.sum() for one in (first, second))
    middle = (p + q) / 2
    return float(sum(torch.xlogy(one, one / middle).nansum() for one in (p, q)) / 2 / torch.log(torch.tensor(2.0)))


def lenet(**tasks: tuple[str, ...]) -> dict[str, Callable[[int], Problem]]:
    """Return problems of coloured digits by variant."""
    return {name: partial(mnist, names=names) for name, names in tasks.items()}


NOISY = partial(linear, count=10, outputs=1, noise=0.4)
EXPERIMENTS = {
    "linear": Experiment(
        {"": linear},
        {
            f"{label}, {optimizer}": Row(kind, optimizer=optimizer, factor=factor)
            for optimizer in ("sgd", "adam")
            for label, kind, factor in (
                ("gated, rate x1", "gated", 1.0),
                ("gated, rate x4T", "gated", None),
                ("separate", "separate", None),
                ("shared", "shared", None),
            )
        },
        steps=2000,
        every=50,
        lr=0.01,
    ),
    "noisy": Experiment(
        {**{str(n): partial(NOISY, rows=n) for n in (11, 14, 20, 40)}, "loud": partial(NOISY, rows=14, noise=4.0)},
        {name: row for n in (11, 14, 20, 40) for name, row in three(str(n), f", {n} rows").items()}
        | three("loud", ", 14 rows, noise 4"),
        steps=3000,
        every=100,
        lr=0.01,
    ),
    "sinusoid": Experiment(
        {"": sinusoids},
        {**three(), "gated, R1": Row("gated", r1=1e-4), "gated, R2": Row("gated", r2=1e-4)},
        steps=20_000,
        every=500,
        lr=1e-3,
        most=0.05,
        histograms=True,
    ),
    "mnist": Experiment(
        {
            "1": partial(mnist, names=("black",), channels=1),
            **lenet(one=("black",), two=("black 1", "black 2")),
        },
        {
            "plain, 1 channel": Row("shared", "1"),
            "gated, 1 channel": Row("gated", "1"),
            "plain, 3 channels": Row("shared", "one"),
            "gated, 3 channels": Row("gated", "one"),
            **three("two", ", the same task twice"),
        },
        steps=500,
        every=25,
        lr=1e-3,
    ),
    "colours": Experiment(
        lenet(rgb=("red", "green", "blue"), pair=("black", "red")),
        {
            **three("rgb", ", red, green, blue"),
            "gated from 0.2, red, green, blue": Row("gated", "rgb", start=0.2),
            **three("pair", ", black, red"),
        },
        steps=500,
        every=25,
        lr=1e-3,
    ),
    "white": Experiment(lenet(white=("red", "white")), three("white"), steps=500, every=25, lr=1e-3),
    "inverse": Experiment(lenet(inverse=("black", "inverse")), three("inverse"), steps=500, every=25, lr=1e-3),
}


def train(experiment: Experiment, row: Row, seed: int) -> dict[str, Any]:
    """Train one row; return its curve, what it ends with, and for gates how they ended."""
    started = time.monotonic()
    problem = experiment.problems[row.variant](seed)
    torch.manual_seed(seed)
    first = problem.model()
    models = [deepcopy(first) for _ in problem.tasks] if row.kind == "separate" else [first]
    gates = attach_gates(first, problem.tasks, start=row.start) if row.kind == "gated" else None
    lr = experiment.lr if row.optimizer == "adam" else experiment.lr_sgd
    groups = (
        [{"params": [p for model in models for p in model.parameters()], "lr": lr}]
        if gates is None
        else gates.parameter_groups(lr, row.factor, experiment.most)
    )
    optimizer = torch.optim.Adam(groups) if row.optimizer == "adam" else torch.optim.SGD(groups)
    history = GateHistory(gates) if gates is not None and experiment.histograms and seed == SEEDS[0] else None
    generator, curve = torch.Generator().manual_seed(1000 + seed), []
    for step in range(experiment.steps):
        if history is not None and step % (experiment.steps // 20) == 0:
            history.add(step)
        task = int(torch.randint(len(problem.tasks), (), generator=generator))
        x, y = problem.batch(task, generator)
        model = chosen(models, gates, problem, task)
        loss = problem.loss(model(x), y)
        if gates is not None and (row.r1 or row.r2):
            loss = loss + gates.penalty(row.r1, row.r2)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % experiment.every == 0:
            values = measured(models, gates, problem, last=False)
            curve.append([step + 1, sum(values) / len(values)])
    final = measured(models, gates, problem, last=True)
    result = {"curve": curve, "per_task": final, "final": sum(final) / len(final), "tasks": list(problem.tasks)}
    if gates is not None:
        result |= ended(gates, problem)
        gates.hard = True
        hard = measured(models, gates, problem, last=True)
        result |= {"hardened": sum(hard) / len(hard), "hardened_per_task": hard}
        masks = {task: gates.masks(task) for task in gates.tasks}
        result |= {"density": {task: one.density for task, one in masks.items()}, "users": users(masks)}
    if history is not None:
        history.add(experiment.steps)
        result["history"] = {**history.content, "rows": [together(one) for one in history.content["rows"]]}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def together(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a `GateHistory` with the histograms of all parameters added up."""
    return {
        "step": row["step"],
        **{
            kind: {task: {"all": [sum(one) for one in zip(*own.values(), strict=True)]} for task, own in of.items()}
            for kind, of in row.items()
            if kind != "step"
        },
    }


def chosen(models: Sequence[nn.Module], gates: Gates | None, problem: Problem, task: int) -> nn.Module:
    """Return the model that computes for a task."""
    if gates is not None:
        gates.use(problem.tasks[task])
    return models[task] if len(models) > 1 else models[0]


@torch.no_grad()
def measured(models: Sequence[nn.Module], gates: Gates | None, problem: Problem, last: bool) -> list[float]:
    """Return the error or accuracy of each task on its test rows."""
    found = []
    for task in range(len(problem.tasks)):
        x, y = problem.test(task, last)
        model = chosen(models, gates, problem, task)
        outputs = torch.cat([model(part) for part in torch.split(x, 1000)])
        found.append(problem.measure(outputs, y))
    return found


def ended(gates: Gates, problem: Problem) -> dict[str, Any]:
    """Return how far gates are from 0 and 1, how alike those of tasks are by layer, and how far W is from A."""
    values = {task: gates.values(task) for task in gates.tasks}
    every = torch.cat([value.flatten() for own in values.values() for value in own.values()])
    pairs = list(combinations(gates.tasks, 2))
    shapes = {
        task: {name: torch.tensor(counts(value, 0.0, 1.0)) for name, value in own.items()}
        for task, own in values.items()
    }
    alike = {
        name: sum(divergence(shapes[a][name], shapes[b][name]) for a, b in pairs) / len(pairs)
        for name in gates.members
        if pairs
    }
    result: dict[str, Any] = {"from_ends": float(torch.minimum(every, 1 - every).mean()), "divergence": alike}
    if problem.weights is not None:
        result["from_weights"] = float((gates.weights()["weight"].detach() - problem.weights).abs().max())
    return result


def run(name: str, seeds: Sequence[int] = SEEDS, folder: Path = MEASURED) -> None:
    """Run what is missing of an experiment; a file that was made with other settings is begun anew."""
    experiment, path = EXPERIMENTS[name], folder / f"{name}.json"
    settings: dict[str, Any] = {key: getattr(experiment, key) for key in ("steps", "every", "lr", "lr_sgd", "most")}
    settings["rows"] = {label: asdict(row) for label, row in experiment.rows.items()}
    whole: dict[str, Any] = {"settings": settings, "rows": []}
    if path.exists():
        there = read_json(path, frozenset(whole), "delete it; the experiment runs again then")
        whole = there if there["settings"] == settings else whole
    done = {(row["row"], row["seed"]) for row in whole["rows"]}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for label, row in experiment.rows.items():
            if (label, seed) not in done:
                result = train(experiment, row, seed)
                whole["rows"].append({"row": label, "seed": seed, **result})
                write_json(path, whole)
                print(f"{name}: {label}, seed {seed}: {result['final']:.4g} in {result['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: all, of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--write", type=Path, help="a page with the markers, whose tables are written")
    given = parser.parse_args()
    if given.write is not None:
        from .light_switch_pages import write_pages

        write_pages(MEASURED, given.write)
        return
    unknown = [name for name in given.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; known: {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(1)
    for name in given.names or EXPERIMENTS:
        run(name, given.seeds)


if __name__ == "__main__":
    main()
