"""The experiments of "Like a Light Switch" (Blum and Law, 2020): gates, a network for each task, one for all.

    MASKPACK_DATA=… python -m benchmarks.light_switch                         all; forty minutes of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.light_switch linear noisy            some of them
    python -m benchmarks.light_switch --write docs/results/light-switch.md        tables and curves of what is recorded

All models of a seed start from the same weights, see the same tasks and rows in the same order, and have the same
optimiser and rate; gates have 4T times that.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from maskpack.lab import feature_figure, gate_figure, save_figure
from maskpack.lab.figure import label, look, new_figure, plain_axes
from maskpack.lab.pictures import users
from maskpack.training import attach_gates
from maskpack.training.config import GATE_START
from maskpack.training.gates import GateHistory, Gates, counts

from .light_switch_tasks import Problem, linear, mnist, sinusoids
from .measured import trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import SEEDS

NAME = "light-switch"
MARK = "python -m benchmarks.light_switch --write docs/results/light-switch.md"


@dataclass(frozen=True)
class Learner:
    """How the tasks of an experiment are learned.

    Attributes:
        kind: "gated", "separate" or "shared". variant: which of the experiment's problems.
        optimizer: "adam" or "sgd", without momentum. r1, r2: regularisers.
        factor: gates learn at this times the rate; None: 4T. start: of the logits of gates.
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
    """Problems, learners, and how long they are trained.

    Attributes:
        title: of the table. problems: by variant, made from a seed. every: steps between two points of the curve.
        most: the rate of gates is at most this. histograms: kept of the first seed.
        accuracy: what is measured; else the mean squared error.
        curves: learners with these words in their name are drawn. features: whose masks are drawn as sets of features.
    """

    title: str
    problems: dict[str, Callable[[int], Problem]]
    learners: dict[str, Learner]
    steps: int
    every: int
    lr: float
    lr_sgd: float = 0.1
    most: float | None = None
    histograms: bool = False
    accuracy: bool = False
    curves: str = ""
    features: str = ""


def three(variant: str = "", label: str = "", **options: Any) -> dict[str, Learner]:
    """Return the three kinds, named with the label behind them."""
    return {f"{kind}{label}": Learner(kind, variant, **options) for kind in ("gated", "separate", "shared")}


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
        "7.1 Linear: 5 tasks, 200 rows each, no noise",
        {"": linear},
        {
            f"{label}, {optimizer}": Learner(kind, optimizer=optimizer, factor=factor)
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
        curves="adam",
    ),
    "noisy": Experiment(
        "7.2 Noisy linear: 10 tasks, few rows",
        {**{str(n): partial(NOISY, rows=n) for n in (11, 14, 20, 40)}, "loud": partial(NOISY, rows=14, noise=4.0)},
        {name: row for n in (11, 14, 20, 40) for name, row in three(str(n), f", {n} rows").items()}
        | three("loud", ", 14 rows, noise 4"),
        steps=3000,
        every=100,
        lr=0.01,
        curves="14 rows",
    ),
    "sinusoid": Experiment(
        "7.3 Sinusoids: 8 tasks, three layers",
        {"": sinusoids},
        {**three(), "gated, R1": Learner("gated", r1=1e-4), "gated, R2": Learner("gated", r2=1e-4)},
        steps=20_000,
        every=500,
        lr=1e-3,
        most=0.05,
        histograms=True,
        features="gated",
    ),
    "mnist": Experiment(
        "7.4 MNIST, LeNet-5",
        {
            "1": partial(mnist, names=("black",), channels=1),
            **lenet(one=("black",), two=("black 1", "black 2")),
        },
        {
            "plain, 1 channel": Learner("shared", "1"),
            "gated, 1 channel": Learner("gated", "1"),
            "plain, 3 channels": Learner("shared", "one"),
            "gated, 3 channels": Learner("gated", "one"),
            **three("two", ", the same task twice"),
        },
        steps=500,
        every=25,
        lr=1e-3,
        accuracy=True,
    ),
    "colours": Experiment(
        "7.5 MNIST on coloured backgrounds",
        lenet(rgb=("red", "green", "blue"), pair=("black", "red")),
        {
            **three("rgb", ", red, green, blue"),
            "gated from 0.2, red, green, blue": Learner("gated", "rgb", start=0.2),
            **three("pair", ", black, red"),
        },
        steps=500,
        every=25,
        lr=1e-3,
        accuracy=True,
        features="gated from 0.2, red, green, blue",
    ),
    "white": Experiment(
        "7.6 One task is all white",
        lenet(white=("red", "white")),
        three("white"),
        steps=500,
        every=25,
        lr=1e-3,
        accuracy=True,
    ),
    "inverse": Experiment(
        "7.7 One task is inverse",
        lenet(inverse=("black", "inverse")),
        three("inverse"),
        steps=500,
        every=25,
        lr=1e-3,
        accuracy=True,
    ),
}


def train(experiment: Experiment, learner: Learner, seed: int) -> dict[str, Any]:
    """Train one learner; return its curve, what it ends with, and for gates how they ended."""
    started = time.monotonic()
    problem = experiment.problems[learner.variant](seed)
    torch.manual_seed(seed)
    first = problem.model()
    models = [deepcopy(first) for _ in problem.tasks] if learner.kind == "separate" else [first]
    gates = attach_gates(first, problem.tasks, start=learner.start) if learner.kind == "gated" else None
    lr = experiment.lr if learner.optimizer == "adam" else experiment.lr_sgd
    groups = (
        [{"params": [p for model in models for p in model.parameters()], "lr": lr}]
        if gates is None
        else gates.parameter_groups(lr, learner.factor, experiment.most)
    )
    optimizer = torch.optim.Adam(groups) if learner.optimizer == "adam" else torch.optim.SGD(groups)
    history = GateHistory(gates) if gates is not None and experiment.histograms and seed == SEEDS[0] else None
    generator, curve = torch.Generator().manual_seed(1000 + seed), []
    for step in range(experiment.steps):
        if history is not None and step % (experiment.steps // 20) == 0:
            history.add(step)
        task = int(torch.randint(len(problem.tasks), (), generator=generator))
        x, y = problem.batch(task, generator)
        model = chosen(models, gates, problem, task)
        loss = problem.loss(model(x), y)
        if gates is not None and (learner.r1 or learner.r2):
            loss = loss + gates.penalty(learner.r1, learner.r2)
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


def run(name: str) -> None:
    """Run the trials of an experiment that are not recorded with its present settings."""
    experiment = EXPERIMENTS[name]
    settings = {key: getattr(experiment, key) for key in ("every", "lr", "lr_sgd", "most", "steps")}
    for seed in SEEDS:
        for words, learner in experiment.learners.items():
            about = {"experiment": name, "learner": words, "seed": seed, **settings, **asdict(learner)}
            trial(NAME, about, partial(train, experiment, learner, seed))


# --- the page --------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write tables and pictures of what is recorded between the page's markers."""
    texts = []
    for name, experiment in EXPERIMENTS.items():
        found: dict[str, list[Mapping[str, Any]]] = {}
        for learner in experiment.learners:
            if own := trials(NAME, experiment=name, learner=learner):
                found[learner] = [one["result"] for one in own]
        if found:
            texts.append(f"**{experiment.title}**\n\n{described(name, experiment, found, page.parent)}")
    write_between(page, MARK, "\n".join(texts) or NOTHING)


def described(name: str, experiment: Experiment, found: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> str:
    """Return the table of an experiment, and draw its curves."""
    accuracy = experiment.accuracy
    tasks = next(iter(found.values()))[0]["tasks"]
    each = ["each task"] if len(tasks) > 1 and accuracy else []
    what = "accuracy" if accuracy else "test error"
    lines = []
    for one, results in found.items():
        cells = [one, over(results, "final", accuracy), over(results, "hardened", accuracy)]
        if each:
            means = [mean(values) for values in zip(*(one["per_task"] for one in results), strict=True)]
            named = zip(results[0]["tasks"], means, strict=True)
            cells.append(", ".join(f"{task} {number(value, True)}" for task, value in named))
        if "density" in results[0]:
            cells.append(f"{mean(mean(one['density'].values()) for one in results):.3f}")
            cells.append(f"{mean(one['from_ends'] for one in results):.3f}")
        lines.append(cells if len(cells) == len(each) + 5 else [*cells, "-", "-"])
    text = table(["row", what, "hardened", *each, "density", "gates from 0 or 1"], lines, 1)
    seeds = max(len(results) for results in found.values())
    text += f"\n{f'{seeds} seeds, mean ± sample deviation' if seeds > 1 else 'One seed'}.\n{divergences(found)}"
    save_figure(curves(found, experiment.curves, accuracy), folder / f"light-switch-{name}.svg")
    text += f"\n![{what.capitalize()} over steps](light-switch-{name}.svg)\n"
    if experiment.features in found:
        picture = feature_figure(found[experiment.features][0]["users"])
        save_figure(picture, folder / f"light-switch-{name}-features.svg")
        text += f"\n![How many tasks use each weight, layer by layer](light-switch-{name}-features.svg)\n"
    history = next((one["history"] for results in found.values() for one in results if "history" in one), None)
    if history is not None:
        save_figure(gate_figure(history), folder / "light-switch-gates.svg")
        text += "\n![Gates and effective weights of each task over steps](light-switch-gates.svg)\n"
    return text


def number(value: float, accuracy: bool) -> str:
    return f"{100 * value:.1f}" if accuracy else f"{value:.3g}"


def over(results: Sequence[Mapping[str, Any]], key: str, accuracy: bool) -> str:
    """Return mean and deviation over seeds."""
    values = [one[key] for one in results if key in one]
    if not values:
        return "-"
    spread = f" ± {number(stdev(values), accuracy)}" if len(values) > 1 else ""
    return number(mean(values), accuracy) + spread


def divergences(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return in words how alike the gates of tasks are, by layer, where there are several layers of them."""
    lines = []
    for name, results in found.items():
        layers = [layer for layer in results[0].get("divergence", {}) if layer.endswith("weight")]
        if len(layers) > 1:
            means = {layer: mean(one["divergence"][layer] for one in results) for layer in layers}
            lines.append(f"{name}: " + ", ".join(f"{layer} {value:.3f}" for layer, value in means.items()))
    head = "\nJensen-Shannon divergence of two tasks' histograms of gates (bits), mean over pairs: "
    return head + "; ".join(lines) + ".\n" if lines else ""


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]], words: str, accuracy: bool) -> Any:
    """Draw the means over seeds of the learners with these words in their name, with the range of the seeds."""
    figure = new_figure(7.5, 3.6)
    axes = figure.add_subplot()
    for index, (name, results) in enumerate((n, f) for n, f in found.items() if words in n):
        steps = [point[0] for point in results[0]["curve"]]
        values = list(zip(*([point[1] for point in one["curve"]] for one in results), strict=True))
        colour = look(index)["color"]
        axes.plot(steps, [mean(one) for one in values], color=colour, label=label(name))
        low, high = [min(one) for one in values], [max(one) for one in values]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if not accuracy:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy" if accuracy else "test error")
    plain_axes(axes, grid="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def main() -> None:
    command(__doc__, {name: partial(run, name) for name in EXPERIMENTS}, write_pages)


if __name__ == "__main__":
    main()
