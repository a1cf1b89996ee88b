"""Domain transfer between the four domains of PACS: what a source keeps, what a target learns, by mask and start.

    MASKPACK_DATA=… python -m benchmarks.transfer                all 12 pairs, some hours; what is finished is read back
    MASKPACK_DATA=… python -m benchmarks.transfer photo sketch   these sources only, as for one of two processes
    python -m benchmarks.transfer --write docs/results.md        tables from what is finished

A ResNet-20 that knows CIFAR-10 learns a source at 32x32 pixels. A source network serves all masks of it, a mask serves
all targets and starts. In benchmarks/measured/transfer is a folder for each source and seed, with a JSON file a trial.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from maskpack import MaskSet, load_backbone
from maskpack.adapter.content import Parts
from maskpack.backbone.load import Backbone, export_state
from maskpack.backbone.select import select_parameters
from maskpack.safetensors_io import read_tensors, write_tensors
from maskpack.training import TrainConfig, load_data
from maskpack.training.data.base import Data
from maskpack.training.evaluate import applied_parts, held_out_accuracy
from maskpack.training.run_folder import write_json
from maskpack.training.transfer import (
    SOURCE_FILE,
    STARTS,
    current_values,
    find_reuse,
    start_values,
    train_reused,
    train_source,
)

from .comparison_pages import PACS
from .comparisons import DATA, ROOT, SEEDS, resnet
from .pages import write_between

MARK = "python -m benchmarks.transfer --write docs/results.md"
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
PLAIN = "plain"
PICTURE = "density-transfer.svg"


class Source:
    """A source network with one seed, its masks, and what it is carried to."""

    def __init__(self, domain: str, seed: int, output: Path):
        self.domain, self.seed, self.folder = domain, seed, output / f"{domain}-{seed}"
        self.data = {name: load_data(str(DATA / "data/pacs" / name)) for name in PACS}
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

    def trial(self, name: str, measure: Callable[..., Mapping[str, Any]], *arguments: Any) -> None:
        """Measure what was not measured earlier."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            found = measure(*arguments)
            write_json(path, found)
            print(self.folder.name, name, {key: value for key, value in found.items() if key != "layers"}, flush=True)

    def measure(self) -> None:
        """Do all that is not done."""
        zeros = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in self.after.items()}
        nothing = MaskSet.from_tensors(zeros, op="replace")
        for target in targets(self.domain):
            self.trial(f"{target}-{PLAIN}", self.carried, target, nothing, self.after)
        for method in MASKS:
            masks = self.masks(method)
            self.trial(method, self.of_mask, masks)
            for target, start in product(targets(self.domain), STARTS):
                values = start_values(start, self.before, self.after, self.seed)
                self.trial(f"{target}-{method}-{start}", self.carried, target, masks, values)


def values_of(backbone: Backbone) -> dict[str, Tensor]:
    return current_values(backbone, select_parameters(backbone.model, head=backbone.outside))


def targets(domain: str) -> list[str]:
    return [name for name in PACS if name != domain]


# --- the page --------------------------------------------------------------------------------------------------------


def finished(output: Path, domain: str) -> list[Path]:
    """Return the folders of a source in which there are all trials, one for each seed."""
    return [folder for folder in sorted(output.glob(f"{domain}-*")) if complete(folder, domain)]


def complete(folder: Path, domain: str) -> bool:
    """Tell whether all trials of a source and seed are there."""
    count = len(MASKS) + len(targets(domain)) * (1 + len(MASKS) * len(STARTS))
    return len(list(folder.glob("*.json"))) == count


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def difference(output: Path, domain: str, name: str, key: str) -> float:
    """Return how far transferred networks are above plain fine-tuning, the mean over targets and seeds."""
    pairs = product(finished(output, domain), targets(domain))
    return float(mean(read(one, f"{to}-{name}")[key] - read(one, f"{to}-{PLAIN}")[key] for one, to in pairs))


def tables(output: Path, folder: Path) -> str:
    """Return the tables of the sources that have a finished seed; a picture is drawn into the folder."""
    from maskpack.lab import density_figure, save_figure

    domains = [name for name in PACS if finished(output, name)]
    if not domains:
        return "Nothing is finished yet.\n"
    lines = [
        "| mask | start | " + " | ".join(f"{name} S | {name} T" for name in domains) + " |",
        "| --- | --- |" + " ---: |" * (2 * len(domains)),
    ]
    for method, start in product(MASKS, STARTS):
        columns = product(domains, ("source", "target"))
        cells = [f"{difference(output, name, f'{method}-{start}', key):+.3f}" for name, key in columns]
        lines.append(f"| {method} | {start} | {' | '.join(cells)} |")
    lines += ["", "| | " + " | ".join(domains) + " |", "| --- |" + " ---: |" * len(domains)]
    rows = {"source network on S": ("naive", "source")}
    rows |= {f"S through the mask, {method}": (method, "through_mask") for method in MASKS}
    rows |= {f"density, {method}": (method, "density") for method in MASKS}
    for title, (name, key) in rows.items():
        cells = [f"{mean(read(one, name)[key] for one in finished(output, domain)):.3f}" for domain in domains]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for key in ("source", "target"):
        values = {
            domain: [read(one, f"{to}-{PLAIN}")[key] for one, to in product(finished(output, domain), targets(domain))]
            for domain in domains
        }
        cells = [f"{mean(values[domain]):.3f}" for domain in domains]
        lines.append(f"| plain fine-tuning on {key[0].upper()} | {' | '.join(cells)} |")
    layers = {name: [read(one, "gumbel")["layers"] for one in finished(output, name)] for name in domains}
    save_figure(density_figure(layers), folder / PICTURE)
    seeds = ", ".join(f"{name} {len(finished(output, name))}" for name in domains)
    note = f"Means over targets and seeds; of these there are: {seeds}."
    return "\n".join([*lines, "", note, "", f"![Density by layer of the gumbel masks, by source]({PICTURE})"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help=f"of {', '.join(PACS)}; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=ROOT / "measured/transfer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="only write the tables into this page")
    arguments = parser.parse_args()
    if arguments.write is not None:
        write_between(arguments.write, MARK, tables(arguments.output, arguments.write.parent))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    for seed, domain in product(arguments.seeds, arguments.sources or PACS):
        if not complete(arguments.output / f"{domain}-{seed}", domain):
            Source(domain, seed, arguments.output).measure()


if __name__ == "__main__":
    main()
