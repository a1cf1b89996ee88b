"""Ten tasks in a row on one backbone: forgetting, bytes of each task, and masks combined for an unseen task.

    MASKPACK_DATA=… python -m benchmarks.many_tasks              all; an hour of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.many_tasks masks/0 unseen
    python -m benchmarks.many_tasks --write docs/results/many-tasks.md        tables of what is recorded

EfficientNet-Lite0 at 64 pixels; at most 2,000 training and 1,000 test rows of each data set. Masks: `train_tasks` with
the default recipe. Fine-tuned: one network learns the tasks in the same order, with a head for each.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from maskpack import MaskBank, load_adapter, load_backbone, unload_mask
from maskpack.backbone.classifier import Classifier
from maskpack.backbone.model import swap_module
from maskpack.lab.networks import some
from maskpack.runtime.identify import mixture
from maskpack.training import Task, TrainConfig, load_data, train_tasks
from maskpack.training.data.base import Data, loader, readable
from maskpack.training.evaluate import figures, held_out_accuracy
from maskpack.training.features import disjoint
from maskpack.training.learn import body_parameters
from maskpack.training.multitask import CLAIM
from maskpack.training.trainer import train_dense

from .measured import trial, trials
from .recipe import lite0
from .report import NOTHING, command, percent, table, write_between
from .tasks import DATA, PACS, RUNS, SEEDS, data_of

NAME = "many-tasks"
MARK = "python -m benchmarks.many_tasks --write docs/results/many-tasks.md"
TASKS = (*PACS, "eurosat", "sign_digits", "tf_flowers", "mnist", "chest_xray", "cifar10")
TRAIN, TEST = 2_000, 1_000  # rows at most
CONFIG = TrainConfig(steps=200, batch_size=32)
WHOLE_LR = 0.001  # of fine-tuning; chosen in docs/results/defaults.md
SHOWN = 64  # rows of an unseen task that masks are combined for
SIZES = ("mask_bytes", "file_bytes")
WAYS = {"equal": "equal shares", "entropy": "no labels", "labels": "labels"}


def rows_of(name: str) -> Data:
    """Return some rows of a data set."""
    data = load_data(str(DATA / "data/mnist" if name == "mnist" else data_of(name)))
    assert data.train is not None
    assert data.test is not None
    return replace(data, train=some(data.train, TRAIN), test=some(data.test, TEST))


def masks(seed: int) -> list[dict[str, Any]]:
    """Train a mask for each task in turn; return the accuracy of each after its training and at the end."""
    folder = RUNS / NAME / f"masks-{seed}"
    tasks = {name: Task(rows_of(name)) for name in TASKS}
    config, backbone = replace(CONFIG, seed=seed), load_backbone(**lite0(64))
    found = train_tasks(backbone, tasks, folder, config=config, resume=(folder / CLAIM).exists())
    rows = []
    for row in found["rows"]:
        end = figures(backbone, load_adapter(folder / row["task"]), tasks[row["task"]].data)["accuracy"]
        unload_mask(backbone.model)
        rows.append({**row, "end": end})
    return rows


def fine_tuned(seed: int) -> list[dict[str, Any]]:
    """Let one network learn the tasks in turn; return its accuracy after each and when all are learned."""
    backbone, heads, after = load_backbone(**lite0(64)), dict[str, nn.Module](), dict[str, float]()
    assert backbone.head is not None
    config = replace(CONFIG, seed=seed, lr=WHOLE_LR)

    def accuracy(name: str) -> float:
        assert backbone.head is not None
        swap_module(backbone.model, backbone.head, heads[name])
        found = held_out_accuracy(backbone, rows_of(name))
        assert found is not None
        return found

    for name in TASKS:
        run = train_dense(backbone, replace(rows_of(name), test=None), config, lambda own, _: body_parameters(own))
        assert isinstance(run.objective.module, Classifier)
        heads[name] = deepcopy(run.objective.module.linear)
        after[name] = accuracy(name)
    return [{"task": name, "accuracy": after[name], "end": accuracy(name)} for name in TASKS]


def unseen(domain: str, seed: int) -> dict[str, Any]:
    """Combine the masks of the other domains for one that none of them was made for, by a batch drawn by the seed."""
    backbone, data = load_backbone(**lite0(64)), rows_of(domain)
    train, test = disjoint(data)
    batches = loader(some(train, SHOWN, seed), backbone.preprocess, batch_size=SHOWN)
    inputs, labels = next(readable(batches))

    def accuracy(outputs: Callable[[Any], torch.Tensor]) -> float:
        right = [(outputs(x).argmax(1) == y).double() for x, y in readable(loader(test, backbone.preprocess))]
        return float(torch.cat(right).mean())

    with MaskBank(backbone.model) as bank:
        for name in (one for one in PACS if one != domain):
            bank.add(RUNS / NAME / "masks-0" / name, name)

        def alone(name: str, x: torch.Tensor) -> torch.Tensor:
            return torch.stack(bank(x, [name] * len(x)))

        single = {name: accuracy(partial(alone, name)) for name in bank.names}
        found: dict[str, Any] = {"single": single}
        options: dict[str, dict[str, Any]] = {"equal": {"steps": 0}, "entropy": {}, "labels": {"labels": labels}}
        for way, own in options.items():
            shares, outputs = mixture(bank, inputs, **own)
            found[way] = {"accuracy": accuracy(outputs), "shares": shares}
    return found


def all_unseen() -> None:
    """Combine masks for every domain; the masks of the first seed have to be there."""
    trial(NAME, {"way": "masks", "seed": 0}, partial(masks, 0))
    if not (RUNS / NAME / "masks-0" / PACS[0]).exists():
        masks(0)
    for domain in PACS:
        for seed in SEEDS:
            trial(NAME, {"way": "unseen", "domain": domain, "seed": seed}, partial(unseen, domain, seed))


# --- the page --------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write the tables of what is recorded between the page's markers."""
    write_between(page, f"{MARK}: row", in_a_row() or NOTHING)
    write_between(page, f"{MARK}: unseen", unseen_rows() or NOTHING)


def in_a_row() -> str:
    """Return accuracies of each task after its training and at the end, and bytes."""
    found = {way: [one["result"] for one in trials(NAME, way=way)] for way in ("masks", "fine-tuned")}
    lines, columns = [], ("probe_accuracy", "accuracy", "end")
    if not found["masks"]:
        return ""
    for at, name in enumerate((*TASKS, "mean")):
        own, tuned = ([one if at == len(TASKS) else [one[at]] for one in found[way]] for way in ("masks", "fine-tuned"))
        cells = [percent([mean(row[key] for row in one) for one in own]) for key in columns]
        cells += [f"{mean(mean(row[key] for row in one) for one in own):,.0f}" for key in SIZES]
        for key in columns[1:]:
            cells.append(percent([mean(row[key] for row in one) for one in tuned]) if tuned else "-")
        lines.append([name, *cells])
    heads = ["task", "probe", "mask, after its training", "mask, at the end", "mask bytes", "file bytes"]
    return table([*heads, "fine-tuned, after its training", "fine-tuned, at the end"], lines, 1)


def unseen_rows() -> str:
    """Return accuracies on a domain by one mask of another domain, and by mixtures of three."""
    lines = []
    for domain in PACS:
        found = [one["result"] for one in trials(NAME, way="unseen", domain=domain)]
        if found:
            single = found[0]["single"].values()
            cells = [percent([one[way]["accuracy"] for one in found]) for way in WAYS]
            lines.append([domain, percent([max(single)]), percent([mean(single)]), *cells])
    columns = ["unseen", "best of the others", "mean of the others", *(f"mixture, {words}" for words in WAYS.values())]
    return table(columns, lines, 1) if lines else ""


def main() -> None:
    ways = {"masks": masks, "fine-tuned": fine_tuned}
    jobs: dict[str, Callable[[], object]] = {
        f"{way}/{seed}": partial(trial, NAME, {"way": way, "seed": seed}, partial(measure, seed))
        for way, measure in ways.items()
        for seed in SEEDS
    }
    command(__doc__, {**jobs, "unseen": all_unseen}, write_pages)


if __name__ == "__main__":
    main()
