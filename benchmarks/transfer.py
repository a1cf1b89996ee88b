"""Domain transfer between the four domains of PACS: what a source keeps and a target learns, by mask and start.

    MASKPACK_DATA=… python -m benchmarks.transfer                all 12 pairs; some hours, resumable
    MASKPACK_DATA=… python -m benchmarks.transfer photo sketch   these sources only, as for one of two processes
    python -m benchmarks.transfer --write docs/results/transfer.md        tables of what is recorded

A ResNet-20 that knows CIFAR-10 learns a source at 32x32 pixels. A source network serves all masks of it, a mask serves
all targets and starts.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from maskpack import MaskSet, Parts, load_backbone
from maskpack.backbone.load import Backbone, export_state
from maskpack.backbone.select import select_parameters
from maskpack.lab import density_figure, save_figure
from maskpack.safetensors_io import read_tensors, write_tensors
from maskpack.training import TrainConfig, load_data
from maskpack.training.data.base import Data
from maskpack.training.evaluate import applied_parts, held_out_accuracy
from maskpack.training.transfer import (
    SOURCE_FILE,
    STARTS,
    current_values,
    find_reuse,
    start_values,
    train_reused,
    train_source,
)

from .measured import trial, trials
from .report import NOTHING, command, table, write_between
from .tasks import PACS, RUNS, SEEDS, data_of, resnet

NAME = "transfer"
MARK = "python -m benchmarks.transfer --write docs/results/transfer.md"
WEIGHTS = TrainConfig(optimizer="sgd", lr=0.05, head_lr=0.05, batch_size=32, clip=1.0, augment="flip", bn="freeze")
SOURCE = replace(WEIGHTS, steps=240)
TARGET = replace(WEIGHTS, steps=150, head_kind="own")
# edit comes after gumbel: it reuses as large a share of the weights
MASKS = {
    "naive": replace(WEIGHTS, method="naive"),
    "gumbel": replace(
        WEIGHTS, method="gumbel", method_options={"strength": 1e-3}, optimizer="adam", lr=0.05, steps=160
    ),
    "edit": replace(WEIGHTS, method="edit", optimizer="adam", lr=0.003, steps=160),
}
PICTURE = "density-transfer.svg"


class Source:
    """A source network with one seed, its masks, and what it is carried to."""

    def __init__(self, domain: str, seed: int):
        self.domain, self.seed, self.folder = domain, seed, RUNS / NAME / f"{domain}-{seed}"
        self.data = {name: load_data(str(data_of(name))) for name in PACS}
        self.before = values_of(load_backbone(**resnet(20)))
        self.backbone = self.network()
        self.after = values_of(self.backbone)

    def rows(self, domain: str) -> Data:
        """Return the data of training: test rows are read by finished networks only."""
        return replace(self.data[domain], test=None)

    def network(self) -> Backbone:
        path = self.folder / SOURCE_FILE
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            made = train_source(load_backbone(**resnet(20)), self.rows(self.domain), replace(SOURCE, seed=self.seed))
            export_state(path, made.model)
        return load_backbone(resnet(20)["reference"], weights=path)

    def masks(self, method: str) -> MaskSet:
        """Return a mask that was learned now or earlier."""
        path = self.folder / f"{method}.safetensors"
        if not path.exists():
            config = replace(MASKS[method], seed=self.seed)
            if method == "edit":
                config = replace(config, method_options={"share": 1 - self.masks("gumbel").density})
            found = find_reuse(self.backbone, self.rows(self.domain), config)
            write_tensors(path, {name: mask.tensor() for name, mask in found.items()}, {"format": "pt"})
        return MaskSet.from_tensors(read_tensors(path), op="replace")

    def on(self, domain: str) -> float:
        found = held_out_accuracy(self.backbone, self.data[domain])
        assert found is not None
        return found

    def of_mask(self, masks: MaskSet) -> dict[str, Any]:
        """Return what a mask leaves of the source, and its densities."""
        found = {"source": self.on(self.domain), "density": masks.density}
        with applied_parts(self.backbone.model, Parts(masks), "source"):
            found["through_mask"] = self.on(self.domain)
        return {**found, "layers": {name: mask.density for name, mask in masks.items()}}

    def carried(self, target: str, masks: MaskSet, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the accuracies of a transferred network."""
        parts = train_reused(self.backbone, masks, values, self.rows(target), replace(TARGET, seed=self.seed)).parts
        with applied_parts(self.backbone.model, parts, "target"):
            return {"source": self.on(self.domain), "target": self.on(target)}

    def measure(self) -> None:
        """Run all trials that are not recorded."""
        about = {"source": self.domain, "seed": self.seed}
        zeros = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in self.after.items()}
        nothing = MaskSet.from_tensors(zeros, op="replace")
        for target in targets(self.domain):
            trial(NAME, {**about, "target": target}, partial(self.carried, target, nothing, self.after))
        for method in MASKS:
            masks = self.masks(method)
            trial(NAME, {**about, "mask": method}, partial(self.of_mask, masks))
            for target, start in product(targets(self.domain), STARTS):
                values = start_values(start, self.before, self.after, self.seed)
                carried = partial(self.carried, target, masks, values)
                trial(NAME, {**about, "target": target, "mask": method, "start": start}, carried)


def values_of(backbone: Backbone) -> dict[str, Tensor]:
    return current_values(backbone, select_parameters(backbone.model, head=backbone.outside))


def targets(domain: str) -> list[str]:
    return [name for name in PACS if name != domain]


def run(domain: str) -> None:
    for seed in SEEDS:
        if seed not in finished(domain):
            Source(domain, seed).measure()


# --- the page --------------------------------------------------------------------------------------------------------


def finished(domain: str) -> list[int]:
    """Return the seeds of a source of which all trials are recorded."""
    seeds = [one["seed"] for one in trials(NAME, source=domain)]
    count = len(MASKS) + len(targets(domain)) * (1 + len(MASKS) * len(STARTS))
    return [seed for seed in sorted(set(seeds)) if seeds.count(seed) == count]


def write_pages(page: Path) -> None:
    write_between(page, MARK, tables(page.parent))


def tables(folder: Path) -> str:
    """Return the tables of the sources that have a finished seed; a picture is drawn into the folder."""
    seeds = {name: own for name in PACS if (own := finished(name))}
    if not seeds:
        return NOTHING
    # by source, target, mask and start; the results of all seeds, in the order of seeds
    found: dict[tuple[str | None, ...], list[dict[str, Any]]] = {}
    for one in sorted(trials(NAME), key=lambda one: int(one["seed"])):
        if one["seed"] in seeds.get(one["source"], ()):
            which = (one["source"], one.get("target"), one.get("mask"), one.get("start"))
            found.setdefault(which, []).append(one["result"])

    def over_plain(domain: str, mask: str, start: str, key: str) -> float:
        """Return the mean over targets and seeds of accuracy less that of plain fine-tuning."""
        return mean(
            float(one[key] - plain[key])
            for to in targets(domain)
            for one, plain in zip(found[domain, to, mask, start], found[domain, to, None, None], strict=True)
        )

    columns = list(product(seeds, ("source", "target")))
    lines = [
        [mask, start, *(f"{over_plain(domain, mask, start, key):+.3f}" for domain, key in columns)]
        for mask, start in product(MASKS, STARTS)
    ]
    text = table(["mask", "start", *(f"{domain} {key[0].upper()}" for domain, key in columns)], lines, 2)
    rows = {"source network on S": ("naive", "source")}
    rows |= {f"S through the mask, {mask}": (mask, "through_mask") for mask in MASKS}
    rows |= {f"density, {mask}": (mask, "density") for mask in MASKS}
    lines = [
        [title, *(f"{mean(one[key] for one in found[domain, None, mask, None]):.3f}" for domain in seeds)]
        for title, (mask, key) in rows.items()
    ]
    for key in ("source", "target"):
        values = [[one[key] for to in targets(name) for one in found[name, to, None, None]] for name in seeds]
        lines.append([f"plain fine-tuning on {key[0].upper()}", *(f"{mean(own):.3f}" for own in values)])
    text += "\n" + table(["accuracy or density", *seeds], lines, 1)
    layers = {name: [one["layers"] for one in found[name, None, "gumbel", None]] for name in seeds}
    save_figure(density_figure(layers), folder / PICTURE)
    counts = ", ".join(f"{name} {len(own)}" for name, own in seeds.items())
    note = f"Means over targets and seeds; of these there are: {counts}."
    return f"{text}\n{note}\n\n![Density by layer of the gumbel masks, by source]({PICTURE})\n"


def main() -> None:
    command(__doc__, {domain: partial(run, domain) for domain in PACS}, write_pages)


if __name__ == "__main__":
    main()
