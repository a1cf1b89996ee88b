"""Domain transfer between the four domains of PACS: accuracy on source and target, by mask and start.

    MASKPACK_DATA=… python -m benchmarks.transfer                    all 12 pairs; some hours, resumable
    MASKPACK_DATA=… python -m benchmarks.transfer photo sketch       these sources only, as for one of two processes
    MASKPACK_DATA=… python -m benchmarks.transfer adapted/0 more/0   further experiments with one seed
    python -m benchmarks.transfer --write docs/results/transfer.md        tables of what is recorded

A ResNet-20 that knows CIFAR-10 learns a source at 32x32 pixels. A source network serves all masks of it, a mask serves
all targets and starts. Further: BatchNorm statistics that adapt to the target ("adapted"), more masks ("more": the
objective `distribution`, edits of low rank), other thresholds ("thresholds"), chest X-rays as target ("xray").
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from maskpack import MaskSet, Parts, load_backbone
from maskpack.backbone.load import Backbone, export_state
from maskpack.backbone.select import select_parameters
from maskpack.lab import density_figure, save_figure
from maskpack.lab.comparison import STATISTICS
from maskpack.lab.figure import draw_curves, look
from maskpack.safetensors_io import read_tensors, write_tensors
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.config import Start, Statistics
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
# as strong a pressure as that of gumbel, whose strength is divided by the batch
DISTRIBUTION: dict[str, Any] = {
    "objective": "distribution",
    "objective_options": {"strength": 8.0},
    "top": 1.0,
    "train": (),
}
MORE = {
    "distribution": replace(MASKS["gumbel"], method_options={"strength": 0.0}, **DISTRIBUTION),
    "edit, rank 4": MASKS["edit"],
    "edit, rank 16": MASKS["edit"],
}
WIDTHS, EDITED = (0.5, 1.5, 2.0), (0.2, 0.6, 0.8)  # in standard deviations; share of the weights
THRESHOLDS = {
    **{f"naive, width {width:g}": replace(MASKS["naive"], method_options={"width": width}) for width in WIDTHS},
    **{f"edit, share {share:g}": replace(MASKS["edit"], method_options={"share": share}) for share in EDITED},
}
NEXT = dict(zip(PACS, (*PACS[1:], PACS[0]), strict=True))  # the one target on which thresholds are tried
XRAY, XRAY_SOURCES = "chest_xray", ("photo", "sketch")
PICTURE = "density-transfer.svg"


class Source:
    """A source network with one seed, its masks, and what it is carried to."""

    def __init__(self, domain: str, seed: int):
        self.domain, self.seed, self.folder = domain, seed, RUNS / NAME / f"{domain}-{seed}"
        self.data = {name: load_data(str(data_of(name))) for name in (*PACS, XRAY)}
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
        path = self.folder / f"{method.replace(', ', '-').replace(' ', '-')}.safetensors"
        if not path.exists():
            config = replace({**MASKS, **MORE, **THRESHOLDS}[method], seed=self.seed)
            if config.method == "edit" and method not in THRESHOLDS:
                rank = {"rank": int(method.rpartition(" ")[2])} if method in MORE else {}
                config = replace(config, method_options={"share": 1 - self.masks("gumbel").density, **rank})
            if config.objective == "supervised":
                found = find_reuse(self.backbone, self.rows(self.domain), config)
            else:  # with the outputs of the network as it is, and not with a head that learns
                found = train_mask(self.backbone, self.rows(self.domain), config, longer=False).parts.masks
            write_tensors(path, {name: mask.tensor() for name, mask in found.items()}, {"format": "pt"})
        return MaskSet.from_tensors(read_tensors(path), op="replace")

    def on(self, domain: str) -> float:
        found = held_out_accuracy(self.backbone, self.data[domain])
        assert found is not None
        return found

    def of_mask(self, masks: MaskSet) -> dict[str, Any]:
        """Return the accuracy on the source with a mask on it, and the mask's densities."""
        found = {"source": self.on(self.domain), "density": masks.density}
        with applied_parts(self.backbone.model, Parts(masks), "source"):
            found["through_mask"] = self.on(self.domain)
        return {**found, "layers": {name: mask.density for name, mask in masks.items()}}

    def carried(
        self, target: str, masks: MaskSet, values: Mapping[str, Tensor], statistics: Statistics = "freeze"
    ) -> dict[str, float]:
        """Return the accuracies of a transferred network; a target with other classes has a head of its own."""
        same = self.data[target].class_names == self.data[self.domain].class_names
        config = replace(TARGET, seed=self.seed, bn=statistics, head_kind="own" if same else "linear")
        parts = train_reused(self.backbone, masks, values, self.rows(target), config).parts
        with applied_parts(self.backbone.model, parts, "target"):
            source = self.on(self.domain)
        with applied_parts(self.backbone.model, parts, "target", parts.head):
            return {"source": source, "target": self.on(target)}

    def measure(self) -> None:
        """Run all trials that are not recorded."""
        self.plain(targets(self.domain))
        for method in MASKS:
            self.masked(method, targets(self.domain))

    def plain(self, names: Iterable[str], **about: Any) -> None:
        """Fine-tune all weights on the targets."""
        zeros = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in self.after.items()}
        nothing = MaskSet.from_tensors(zeros, op="replace")
        own = {"source": self.domain, "seed": self.seed, **about}
        for target in names:
            run = partial(self.carried, target, nothing, self.after, about.get("statistics", "freeze"))
            trial(NAME, {**own, "target": target}, run)

    def masked(self, method: str, names: Iterable[str], starts: Iterable[Start] = STARTS, **about: Any) -> None:
        """Carry the network to the targets with one of its masks."""
        masks, own = self.masks(method), {"source": self.domain, "seed": self.seed}
        trial(NAME, {**own, "mask": method}, partial(self.of_mask, masks))
        for target, start in product(names, starts):
            values = start_values(start, self.before, self.after, self.seed)
            run = partial(self.carried, target, masks, values, about.get("statistics", "freeze"))
            trial(NAME, {**own, **about, "target": target, "mask": method, "start": start}, run)


def values_of(backbone: Backbone) -> dict[str, Tensor]:
    return current_values(backbone, select_parameters(backbone.model, head=backbone.outside))


def targets(domain: str) -> list[str]:
    return [name for name in PACS if name != domain]


def run(domain: str) -> None:
    for seed in SEEDS:
        if seed not in finished(domain):
            Source(domain, seed).measure()


def adapted(seed: int) -> None:
    """Carry networks between all pairs once more, with statistics that adapt to the target."""
    for domain in PACS:
        source = Source(domain, seed)
        source.plain(targets(domain), statistics="adapt")
        for method in MASKS:
            source.masked(method, targets(domain), statistics="adapt")


def more(seed: int) -> None:
    """Carry networks between all pairs with more masks."""
    for domain in PACS:
        source = Source(domain, seed)
        for method in MORE:
            source.masked(method, targets(domain), STARTS[:2])


def thresholds(seed: int) -> None:
    """Carry networks with masks of other thresholds, one target for each source."""
    for domain in PACS:
        source = Source(domain, seed)
        for method in THRESHOLDS:
            source.masked(method, [NEXT[domain]], STARTS[:1])


def xray(seed: int) -> None:
    """Carry networks to chest X-rays, a target of other classes that is like none of the sources."""
    for domain, statistics in product(XRAY_SOURCES, ("freeze", "adapt")):
        source = Source(domain, seed)
        about: dict[str, Any] = {"statistics": "adapt"} if statistics == "adapt" else {}
        source.plain([XRAY], **about)
        for method in MASKS:
            source.masked(method, [XRAY], **about)


# --- the page --------------------------------------------------------------------------------------------------------


Results = dict[str, Any]
# results by source, target, mask and start, in the order of the seeds
Found = Mapping[tuple[str | None, ...], list[Results]]


def finished(domain: str, statistics: str | None = None) -> list[int]:
    """Return the seeds of a source of which all trials are recorded."""
    goals = targets(domain)
    own = [one for one in trials(NAME, source=domain, statistics=statistics) if one.get("target", goals[0]) in goals]
    seeds = [one["seed"] for one in own if one.get("mask") in (None, *MASKS)]
    count = len(goals) * (1 + len(MASKS) * len(STARTS)) + (0 if statistics else len(MASKS))
    return [seed for seed in sorted(set(seeds)) if seeds.count(seed) == count]


def gathered(seeds: Mapping[str, Sequence[int]], statistics: str | None = None) -> Found:
    """Return the results of these sources and seeds."""
    found: dict[tuple[str | None, ...], list[Results]] = {}
    for one in sorted(trials(NAME, statistics=statistics), key=lambda one: int(one["seed"])):
        if one["seed"] in seeds.get(one["source"], ()):
            which = (one["source"], one.get("target"), one.get("mask"), one.get("start"))
            found.setdefault(which, []).append(one["result"])
    return found


def write_pages(page: Path) -> None:
    """Write tables and pictures of what is recorded between the page's markers."""
    for name, text in {
        "frozen": tables(page.parent),
        "adapted": adapted_rows(),
        "claims": claims(),
        "more": more_rows(),
        "thresholds": threshold_rows(page.parent),
        "xray": xray_rows(),
    }.items():
        write_between(page, f"{MARK}: {name}", text or NOTHING)


def over_plain(found: Found, domain: str, mask: str, start: str, key: str, goals: Sequence[str] = ()) -> list[float]:
    """Return accuracies less those of plain fine-tuning, means over the targets, for each seed."""
    pairs = [
        [float(one[key] - plain[key]) for one, plain in zip(found[domain, to, mask, start], plains, strict=False)]
        for to in goals or targets(domain)
        if (plains := found[domain, to, None, None])
    ]
    return [mean(own) for own in zip(*pairs, strict=True)]


def signed(values: Sequence[float]) -> str:
    """Return mean and sample deviation of differences."""
    return f"{mean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def gains(found: Found, domains: Sequence[str]) -> str:
    """Return the gains of masks over plain fine-tuning, on source and target."""
    columns = list(product(domains, ("source", "target")))
    lines = [
        [mask, start, *(signed(over_plain(found, domain, mask, start, key)) for domain, key in columns)]
        for mask, start in product(MASKS, STARTS)
    ]
    return table(["mask", "start", *(f"{domain} {key[0].upper()}" for domain, key in columns)], lines, 2)


def tables(folder: Path) -> str:
    """Return the tables of the sources that have a finished seed; a picture is drawn into the folder."""
    seeds = {name: own for name in PACS if (own := finished(name))}
    if not seeds:
        return ""
    found = gathered(seeds)
    text = gains(found, list(seeds))
    rows = {"source network on S": ("naive", "source")}
    rows |= {f"S through the mask, {mask}": (mask, "through_mask") for mask in MASKS}
    rows |= {f"density, {mask}": (mask, "density") for mask in MASKS}
    lines = [
        [title, *(shares([one[key] for one in found[domain, None, mask, None]]) for domain in seeds)]
        for title, (mask, key) in rows.items()
    ]
    for key in ("source", "target"):
        each = [
            zip(*([one[key] for one in found[name, to, None, None]] for to in targets(name)), strict=True)
            for name in seeds
        ]
        cells = [shares([mean(own) for own in values]) for values in each]
        lines.append([f"plain fine-tuning on {key[0].upper()}", *cells])
    text += "\n" + table(["accuracy or density", *seeds], lines, 1)
    layers = {name: [one["layers"] for one in found[name, None, "gumbel", None]] for name in seeds}
    save_figure(density_figure(layers), folder / PICTURE)
    counts = ", ".join(f"{name} {len(own)}" for name, own in seeds.items())
    note = f"Means over targets ± sample deviation of the seeds; of these there are: {counts}."
    return f"{text}\n{note}\n\n![Density by layer of the gumbel masks, by source]({PICTURE})\n"


def shares(values: Sequence[float]) -> str:
    """Return mean and sample deviation of accuracies."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def adapted_rows() -> str:
    """Return the gains with adapted statistics, and frozen and adapted side by side, over all pairs."""
    seeds = {name: own for name in PACS if (own := finished(name, "adapt"))}
    if not seeds:
        return ""
    found, before = gathered(seeds, "adapt"), gathered(seeds)
    lines = []
    for mask, start in (("plain fine-tuning", ""), *product(MASKS, STARTS)):
        cells = [mask, start]
        for key, one in product(("source", "target"), (before, found)):
            which = (None, None) if not start else (mask, start)
            cells.append(
                shares([r[key] for domain in seeds for to in targets(domain) for r in one[domain, to, *which]])
            )
        lines.append(cells)
    columns = ["mask", "start", "S, frozen", "S, adapted", "T, frozen", "T, adapted"]
    count = sum(len(own) * len(targets(name)) for name, own in seeds.items())
    note = f"Accuracies: mean ± sample deviation over {count} trainings, which differ in source, target and seed."
    return f"{gains(found, list(seeds))}\n{table(columns, lines, 2)}\n{note}\n"


def claims() -> str:
    """Return how often a mask is best on source and target, over all pairs and seeds, by start."""
    lines = []
    for statistics in (None, "adapt"):
        found = gathered({name: own for name in PACS if (own := finished(name, statistics))}, statistics)
        for start, key in product(STARTS, ("source", "target")):
            best, over, ahead, count = dict.fromkeys(MASKS, 0), dict.fromkeys(MASKS, 0), 0, 0
            for domain, to, *_ in [which for which in found if which[1] is not None and which[2] is None]:
                for at, plain in enumerate(found[domain, to, None, None]):
                    each = {mask: found[domain, to, mask, start][at][key] for mask in MASKS}
                    count += 1
                    ahead += each["edit"] > each["gumbel"]
                    best[max(each, key=lambda mask: each[mask])] += 1
                    for mask, accuracy in each.items():
                        over[mask] += accuracy > plain[key]
            if count:
                cells = [f"{best[mask]}, {over[mask]}" for mask in MASKS]
                lines.append([STATISTICS[statistics or "freeze"], start, key, *cells, ahead, count])
    columns = ["statistics", "start", "on the", *(f"{mask}: best, above plain" for mask in MASKS)]
    columns += ["edit above gumbel", "of"]
    return table(columns, lines, 3) if lines else ""


def more_rows() -> str:
    """Return the gains of more masks beside those of the usual ones with the same seeds, means over all pairs."""
    several = [one for one in trials(NAME, statistics=None) if one.get("mask") in MORE and one.get("target")]
    seeds = {name: sorted({one["seed"] for one in several if one["source"] == name}) for name in PACS}
    if not all(seeds.values()):
        return ""
    found, lines = gathered(seeds), []
    for mask, start in product((*MASKS, *MORE), STARTS[:2]):
        if not all((name, to, mask, start) in found for name in PACS for to in targets(name)):
            continue
        each = [[over_plain(found, name, mask, start, key) for name in PACS] for key in ("source", "target")]
        of = [one for name in PACS for one in found[name, None, mask, None]]
        through = [one["through_mask"] for one in of]
        cells = [signed([mean(own) for own in one]) for one in each]
        lines.append([mask, start, *cells, shares(through), shares([one["density"] for one in of])])
    note = "Means ± sample deviation over the four sources."
    return table(["mask", "start", "S", "T", "S through the mask", "density"], lines, 2) + f"\n{note}\n"


def threshold_rows(folder: Path) -> str:
    """Return the gains by threshold over the sources, each with one target, and draw them over the density."""
    several = [one for one in trials(NAME, statistics=None) if one.get("mask") in THRESHOLDS and one.get("target")]
    seeds = {name: sorted({one["seed"] for one in several if one["source"] == name}) for name in PACS}
    if not all(seeds.values()):
        return ""
    found, start = gathered(seeds), STARTS[0]
    lines, curves = [], dict[str, list[tuple[float, float, None]]]()
    for mask in sorted((*MASKS, *THRESHOLDS)):
        if not all((name, NEXT[name], mask, start) in found for name in PACS):
            continue
        density = [one["density"] for name in PACS for one in found[name, None, mask, None]]
        cells = []
        for key in ("source", "target"):
            own = [mean(over_plain(found, name, mask, start, key, [NEXT[name]])) for name in PACS]
            cells.append(signed(own))
            curves.setdefault(f"{mask.split(',')[0]}, {key}", []).append((mean(density), mean(own), None))
        lines.append([mask, shares(density), *cells])
    figure, axes = draw_curves([(name, sorted(own), look(at)) for at, (name, own) in enumerate(curves.items())])
    axes.set(xlabel="density: share of the weights that stay", ylabel="accuracy over plain fine-tuning")
    save_figure(figure, folder / "transfer-thresholds.svg")
    picture = "\n![Accuracy on source and target over the density, by threshold](transfer-thresholds.svg)\n"
    return table(["mask", "density", "S", "T"], lines, 1) + picture


def xray_rows() -> str:
    """Return accuracies on source and target where the target is chest X-rays."""
    lines = []
    for domain, (key, statistics) in product(XRAY_SOURCES, STATISTICS.items()):
        for mask, start in ((None, None), *product(MASKS, STARTS)):
            about = {"source": domain, "target": XRAY, "statistics": None if key == "freeze" else key}
            own = [one["result"] for one in trials(NAME, **about, mask=mask, start=start)]
            if own:
                cells = [shares([one[what] for one in own]) for what in ("source", "target")]
                lines.append([domain, statistics, mask or "plain fine-tuning", start or "", *cells])
    return table(["source", "statistics", "mask", "start", "S", "T"], lines, 4) if lines else ""


def main() -> None:
    jobs: dict[str, Callable[[], None]] = {domain: partial(run, domain) for domain in PACS}
    further = {"adapted": adapted, "more": more, "thresholds": thresholds, "xray": xray}
    for seed, (name, one) in product(SEEDS, further.items()):
        jobs[f"{name}/{seed}"] = partial(one, seed)
    command(__doc__, jobs, write_pages, default=PACS)


if __name__ == "__main__":
    main()
