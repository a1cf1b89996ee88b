"""The experiments of "Like a Light Switch" (Blum and Law, 2020): gates, a network for each task, one for all.

    MASKPACK_DATA=… python -m benchmarks.light_switch                         all; forty minutes of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.light_switch linear noisy            some of them
    python -m benchmarks.light_switch --write docs/results/light-switch.md        tables and curves of what is recorded

All models of a seed start from the same weights, see the same tasks and rows in the same order, and have the same
optimiser and rate; gates have 4T times that.
"""

import math
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
from .report import command, table, write_between
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
        spread: deviation of the logits about their start, drawn from a normal distribution.
    """

    kind: str
    variant: str = ""
    optimizer: str = "adam"
    factor: float | None = None
    r1: float = 0.0
    r2: float = 0.0
    start: float = GATE_START
    spread: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings in a trial's line."""
        return {name: value for name, value in asdict(self).items() if name != "spread" or value}


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
    """Return a learner of each of the three kinds, by its kind with the label behind it."""
    return {f"{kind}{label}": Learner(kind, variant, **options) for kind in ("gated", "separate", "shared")}


def divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the Jensen-Shannon divergence of two histograms in bits: 0 for equal shapes, 1 where no bin is common."""
    p, q = (one.double() / one.sum() for one in (first, second))
    middle = (p + q) / 2
    return float(sum(torch.xlogy(one, one / middle).nansum() for one in (p, q)) / 2 / torch.log(torch.tensor(2.0)))


def lenet(**tasks: tuple[str, ...]) -> dict[str, Callable[[int], Problem]]:
    """Return problems of coloured digits by variant."""
    return {name: partial(mnist, names=names) for name, names in tasks.items()}


RANDOM: dict[str, Any] = {"start": 0.0, "spread": 1.0}  # of gates: the source says that they start at random
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
        }
        | {"gated, random start, adam": Learner("gated", **RANDOM)},
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
        {
            **three(),
            "gated, R1": Learner("gated", r1=1e-4),
            "gated, R2": Learner("gated", r2=1e-4),
            "gated, random start": Learner("gated", **RANDOM),
        },
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
            "gated, random start, 3 channels": Learner("gated", "one", **RANDOM),
            **three("two", ", the same task twice"),
        },
        steps=500,
        every=10,
        lr=1e-3,
        accuracy=True,
    ),
    "colours": Experiment(
        "7.5 MNIST on coloured backgrounds",
        lenet(rgb=("red", "green", "blue"), pair=("black", "red")),
        {
            **three("rgb", ", red, green, blue"),
            "gated from 0.2, red, green, blue": Learner("gated", "rgb", start=0.2),
            "gated, random start, red, green, blue": Learner("gated", "rgb", **RANDOM),
            **three("pair", ", black, red"),
        },
        steps=500,
        every=10,
        lr=1e-3,
        accuracy=True,
        features="gated from 0.2, red, green, blue",
    ),
    "white": Experiment(
        "7.6 One task is all white",
        lenet(white=("red", "white")),
        three("white"),
        steps=500,
        every=10,
        lr=1e-3,
        accuracy=True,
    ),
    "inverse": Experiment(
        "7.7 One task is inverse",
        lenet(inverse=("black", "inverse")),
        three("inverse"),
        steps=500,
        every=10,
        lr=1e-3,
        accuracy=True,
    ),
}


def train(experiment: Experiment, learner: Learner, seed: int) -> dict[str, Any]:
    """Train one learner; return its curve, its final figures, and those of its gates if it has any.

    Points of the curve are the step, the test measure, and the mean over the batches since the point before.
    """
    started = time.monotonic()
    problem = experiment.problems[learner.variant](seed)
    torch.manual_seed(seed)
    first = problem.model()
    models = [deepcopy(first) for _ in problem.tasks] if learner.kind == "separate" else [first]
    gates = attach_gates(first, problem.tasks, start=learner.start) if learner.kind == "gated" else None
    if gates is not None and learner.spread:
        for logits in (one for task in gates.tasks for one in gates.logits(task).values()):
            nn.init.normal_(logits, learner.start, learner.spread)
    lr = experiment.lr if learner.optimizer == "adam" else experiment.lr_sgd
    groups = (
        [{"params": [p for model in models for p in model.parameters()], "lr": lr}]
        if gates is None
        else gates.parameter_groups(lr, learner.factor, experiment.most)
    )
    optimizer = torch.optim.Adam(groups) if learner.optimizer == "adam" else torch.optim.SGD(groups)
    history = GateHistory(gates) if gates is not None and experiment.histograms and seed == SEEDS[0] else None
    generator, curve, seen = torch.Generator().manual_seed(1000 + seed), [], list[float]()
    for step in range(experiment.steps):
        if history is not None and step % (experiment.steps // 20) == 0:
            history.add(step)
        task = int(torch.randint(len(problem.tasks), (), generator=generator))
        x, y = problem.batch(task, generator)
        model = chosen(models, gates, problem, task)
        outputs = model(x)
        seen.append(problem.measure(outputs.detach(), y))
        loss = problem.loss(outputs, y)
        if gates is not None and (learner.r1 or learner.r2):
            loss = loss + gates.penalty(learner.r1, learner.r2)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % experiment.every == 0:
            values = measured(models, gates, problem, last=False)
            curve.append([step + 1, sum(values) / len(values), mean(seen)])
            seen = []
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
    """Return the model to use for a task."""
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
    """Return figures of gates: distance from 0 and 1, divergence between tasks by layer, distance of W from A."""
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
            about = {"experiment": name, "learner": words, "seed": seed, **settings, **learner.settings}
            trial(NAME, about, partial(train, experiment, learner, seed))


# --- the page --------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write tables and pictures of what is recorded between the page's markers."""
    texts = []
    for name, experiment in EXPERIMENTS.items():
        found: dict[str, list[Mapping[str, Any]]] = {}
        for learner in experiment.learners:
            now = trials(NAME, experiment=name, learner=learner, every=experiment.every)
            if own := now or trials(NAME, experiment=name, learner=learner):  # else of earlier settings
                found[learner] = [one["result"] for one in own]
        if found:
            texts.append(f"**{experiment.title}**\n\n{described(name, experiment, found, page.parent)}")
    save_figure(regularisers(), page.parent / "light-switch-regularisers.svg")
    text = "![Regularisers and their gradients over the logit](light-switch-regularisers.svg)\n"
    write_between(page, MARK, "\n".join([*texts, text]))


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
    histories = {n: one["history"] for n, results in found.items() for one in results if "history" in one}
    if histories:
        first = next(iter(histories.values()))
        save_figure(gate_figure(first), folder / "light-switch-gates.svg")
        text += "\n![Gates and effective weights of each task over steps](light-switch-gates.svg)\n"
        save_figure(spikes_figure(histories), folder / "light-switch-spikes.svg")
        text += f"\n{spikes(histories)}\n![Effective weights at some steps](light-switch-spikes.svg)\n"
    return text


def effective(history: Mapping[str, Any]) -> list[tuple[int, list[float]]]:
    """Return the steps of a history, and the shares of effective weights by bin, of all tasks together."""
    found = []
    for row in history["rows"]:
        parts = (one for task in row["weights"].values() for one in task.values())
        whole = [float(sum(own)) for own in zip(*parts, strict=True)]
        found.append((row["step"], [one / sum(whole) for one in whole]))
    return found


def spikes(histories: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how concentrated effective weights are over the steps, as in figure 2 of the source.

    Entropy in bits: 0 if all lie in one bin, 5.3 if they are spread evenly over the 40. Kurtosis, whatever the spread:
    3 of a normal distribution, the more the sharper the peak.
    """
    lines = []
    for name, history in histories.items():
        found = effective(history)
        for step, shares in (found[0], found[len(found) // 4], found[len(found) // 2], found[-1]):
            entropy = -sum(one * math.log2(one) for one in shares if one)
            lines.append([name, step, f"{entropy:.2f}", f"{max(shares):.3f}", f"{kurtosis(shares):.1f}"])
    return table(["effective weights", "step", "entropy, bits", "share of the fullest bin", "kurtosis"], lines, 1)


def kurtosis(shares: Sequence[float]) -> float:
    """Return the kurtosis of a histogram whose middle is 0."""
    places = [at - (len(shares) - 1) / 2 for at in range(len(shares))]
    second, fourth = (sum(one * x**power for one, x in zip(shares, places, strict=True)) for power in (2, 4))
    return float(fourth / second**2)


def spikes_figure(histories: Mapping[str, Mapping[str, Any]]) -> Any:
    """Draw histograms of effective weights at some steps, a panel for each learner."""
    figure = new_figure(7.5, 2.4)
    for axes, (name, history) in zip(
        figure.subplots(1, len(histories), squeeze=False)[0], histories.items(), strict=True
    ):
        found, end = effective(history), history["weight_end"]
        edges = torch.linspace(-end, end, history["bins"] + 1).tolist()
        for at, (step, shares) in enumerate((found[0], found[len(found) // 2], found[-1])):
            axes.stairs(shares, edges, color=look(at)["color"], label=f"step {step}")
        axes.set_title(label(name), size=8)
        axes.set_yscale("log")
        axes.set_xlabel("effective weight", size=8)
        plain_axes(axes)
    axes.legend(frameon=False, fontsize="x-small")
    return figure


def regularisers() -> Any:
    """Draw the two regularisers and their gradients over the logit, as `Gates.penalty` computes them."""
    model = nn.Linear(601, 1, bias=False)
    gates = attach_gates(model, ["task"])
    (logits,) = gates.logits("task").values()
    with torch.no_grad():
        logits.copy_(torch.linspace(-6, 6, logits.numel()).view_as(logits))
    figure = new_figure(7.5, 2.6)
    for axes, (name, which) in zip(figure.subplots(1, 2), {"R1": {"r1": 1.0}, "R2": {"r2": 1.0}}.items(), strict=True):
        (gradient,) = torch.autograd.grad(gates.penalty(**which), logits)
        x = logits.detach().flatten()
        value = (-x.abs()).exp() if name == "R1" else (-x.square()).exp()
        axes.plot(x.tolist(), value.tolist(), color=look(0)["color"], label=f"{name} of one logit")
        axes.plot(x.tolist(), gradient.flatten().tolist(), color=look(1)["color"], label="gradient")
        axes.set_xlabel("logit")
        plain_axes(axes, grid="both")
        axes.legend(frameon=False, fontsize="small")
    return figure


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
    """Draw the means over seeds of the learners with these words in their name, with the range of the seeds.

    Dotted: the same of the training batches.
    """
    figure = new_figure(7.5, 3.6)
    axes = figure.add_subplot()
    for index, (name, results) in enumerate((n, f) for n, f in found.items() if words in n):
        steps = [point[0] for point in results[0]["curve"]]
        values = list(zip(*([point[1] for point in one["curve"]] for one in results), strict=True))
        colour = look(index)["color"]
        axes.plot(steps, [mean(one) for one in values], color=colour, label=label(name))
        if len(results[0]["curve"][0]) > 2:  # of the training batches as well
            train = zip(*([point[2] for point in one["curve"]] for one in results), strict=True)
            axes.plot(steps, [mean(one) for one in train], color=colour, linestyle=":", linewidth=1)
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
