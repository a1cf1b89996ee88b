"""Analyses of transfer learning: starts and masks of small networks, by every analysis of `maskpack analyze`.

    MASKPACK_DATA=… python -m benchmarks.analysis                         all; about three hours of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.analysis lines shuffle           some of it
    python -m benchmarks.analysis --write docs/results/analysis.md        tables and pictures of what is recorded

A ResNet-20 that knows CIFAR-10, or starts at random, learns PACS sketches or MNIST; CIFAR-10 itself is learned from a
random start alone. Networks are kept in runs/analysis, and evaluations by content. Test rows describe; what chooses is
measured on training rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from maskpack import Parts, fingerprint, load_adapter, load_backbone, save_adapter
from maskpack.backbone.classifier import Classifier
from maskpack.backbone.load import Backbone, export_state
from maskpack.lab import (
    barrier_figure,
    checkpoint_figure,
    criticality_figure,
    save_figure,
    shuffle_figure,
    similarity_figure,
)
from maskpack.lab.baselines.masks import stored
from maskpack.lab.networks import Evaluations, Network, grouped, read_networks, some, state_of, write_network
from maskpack.lab.pairs import Noise, barrier, criticality, distances, mistakes, rewound, similarities
from maskpack.lab.starts import STARTS, feature_reuse, from_checkpoints
from maskpack.mask import MaskSet
from maskpack.safetensors_io import read_tensors
from maskpack.training import load_data, train_mask
from maskpack.training.data.base import Data
from maskpack.training.learn import body_parameters
from maskpack.training.objectives.supervised import new_classifier
from maskpack.training.run_folder import FILE, read_json
from maskpack.training.trainer import train_dense

from .measured import trial, trials
from .report import NOTHING, command, percent, table, write_between
from .tasks import IMAGES, RUNS, SEEDS, TEXTS, data_of, minilm, resnet

NAME = "analysis"
MARK = "python -m benchmarks.analysis --write docs/results/analysis.md"
OUTPUT = RUNS / "analysis"
POINTS = 11
PATH = 4  # steps of the direct path, of the first seed
NOISE = Noise(draws=2)
NOISY = 512  # test rows
CHOOSING = 1024  # training rows that tell which modules are critical
TEXT_ROWS = 1000
SHUFFLED = replace(IMAGES, augment="none", steps=160, lr=0.09)
BLOCKS = (32, 16, 8, 4, 2, 1)
XRAY, FEW_BLOCKS = "chest_xray", (32, 8, 1)  # a target that is like none of the images of pretraining
PRETRAINING = replace(IMAGES, objective_options={}, augment="crop-flip", lr=0.1, head_lr=0.1, steps=None, epochs=10)
PRETRAINING_ROWS = 20_000
EPOCHS = (0, 1, 2, 3, 5, 7, 10)
FROM_CHECKPOINT = replace(IMAGES, steps=160, lr=0.03)


@dataclass(frozen=True)
class Kind:
    """A kind of network: its start, and the peak rate of its weights or scores."""

    random: bool = False
    lr: float = 0.03
    mask: bool = False


# the rate with which fine-tuning is best at this budget, and a third of it
KINDS = {"pretrained": Kind(lr=0.03), "pretrained, rate 0.09": Kind(lr=0.09), "random": Kind(True, 0.09)}
MASK = Kind(lr=60.0, mask=True)
TEXT_KINDS = {"masked": Kind(lr=0.02, mask=True), "fine-tuned": Kind(lr=3e-4)}
SUPERVISED = replace(IMAGES, objective_options={})
TARGETS = {"sketch": replace(SUPERVISED, augment="flip"), "mnist": replace(SUPERVISED, augment="none")}
TEXT_TARGET = "banking77"


class Study:
    """The networks of one target: trained when they are asked for, read back when they are there.

    Args:
        name: a target of `TARGETS`, or `TEXT_TARGET`.
    """

    def __init__(self, name: str):
        self.name, texts = name, name == TEXT_TARGET
        self.data = load_data(str(data_of(name)))
        self.config = TEXTS if texts else TARGETS[name]
        self.training = replace(self.data, test=None)
        self.given = minilm() if texts else resnet(20)

    def backbone(self, random: int | None = None) -> Backbone:
        """Return the backbone, pretrained or drawn from a seed."""
        start = {} if random is None else {"weights": None, "random_weights": random}
        return load_backbone(**{**self.given, **start})

    def started(self, kind: Kind, seed: int) -> Classifier:
        """Return a network before its training, with the head that the seed draws."""
        return new_classifier(
            self.backbone(seed if kind.random else None), self.data.class_names, replace(self.config, seed=seed)
        )

    def network(self, name: str, kind: Kind, seed: int) -> Network:
        """Return a network that was trained now or earlier."""
        folder = OUTPUT / "networks"
        path = folder / f"{self.name}-{name}-{seed}.safetensors"
        if not path.exists():
            run = folder / "training" / path.stem
            run.mkdir(parents=True, exist_ok=True)
            options: dict[str, Any] = {"output": run, "resume": (run / FILE).exists()}
            config = replace(self.config, lr=kind.lr, seed=seed)
            backbone = self.backbone(seed if kind.random else None)
            if kind.mask:
                result = train_mask(backbone, self.training, config, **options)
                save_adapter(path, result.parts, result.base, result.about, weights=backbone.model)
            else:
                dense = train_dense(backbone, self.training, config, lambda own, _: body_parameters(own), **options)
                write_network(path, state_of(dense.objective.module))
            print(path.stem, flush=True)
        if kind.mask:
            _, _, (found,) = read_networks(self.backbone(), [(f"{name} {seed}", str(path))])
            return replace(found, kind=name)
        return Network(f"{name} {seed}", name, read_tensors(path), state_of(self.started(kind, seed)))

    def evaluations(self, **options: Any) -> Evaluations:
        """Return the `Evaluations` of networks of this target."""
        classifier = self.started(Kind(), 0)
        backbone = replace(self.backbone(), model=classifier.model)
        return Evaluations(classifier, backbone, self.data, folder=OUTPUT / "evaluations", **options)


@cache
def study(name: str) -> Study:
    return Study(name)


def lines(target: str, kinds: Mapping[str, Kind], across: tuple[str, str], limit: int | None = None) -> None:
    """Measure the barriers between networks of a kind, and between the kinds `across` with the same seed."""
    pairs = [((name, a), (name, b)) for name in kinds for a, b in combinations(SEEDS, 2)]
    pairs += [((across[0], seed), (across[1], seed)) for seed in SEEDS]

    def line(ends: Sequence[tuple[str, int]]) -> dict[str, Any]:
        one = study(target)
        first, second = (one.network(name, kinds[name], seed) for name, seed in ends)
        found = barrier(one.evaluations(limit=limit), first.state, second.state, POINTS)
        return {"kinds": f"{first.kind} - {second.kind}", **found}

    for ends in pairs:
        first, second = (f"{name} {seed}" for name, seed in ends)
        trial(NAME, {"what": "lines", "target": target, "first": first, "second": second}, partial(line, ends))


def basins() -> None:
    """Measure barriers between networks of a kind, and between a pretrained and a random start."""
    for target in TARGETS:
        lines(target, KINDS, ("pretrained", "random"))


def texts() -> None:
    """Measure barriers between masked and fine-tuned MiniLMs (Zhao et al., arXiv 2004.12406)."""
    lines(TEXT_TARGET, TEXT_KINDS, ("masked", "fine-tuned"), limit=TEXT_ROWS)


def features() -> None:
    """Measure the similarity of features, distances and common mistakes."""

    def measured(target: str, measure: str) -> dict[str, Any]:
        one = study(target)
        networks = [one.network(name, kind, seed) for name, kind in KINDS.items() for seed in SEEDS]
        evaluations = one.evaluations()
        groups = grouped(evaluations.module, "block")
        if measure == "cka":
            return similarities(evaluations, networks, groups)
        if measure == "mistakes":
            return mistakes(evaluations, networks)
        body = {name: own for name, own in groups.items() if name != "linear"}
        return {"pairs": distances(networks, body, state_of(one.backbone().model))}

    for target, measure in product(TARGETS, ("cka", "mistakes", "distance")):
        trial(NAME, {"what": "features", "target": target, "measure": measure}, partial(measured, target, measure))


def critical() -> None:
    """Measure the criticality of modules; for the first seed of sketches also along the path and with noise."""

    def measured(target: str, name: str, seed: int, limit: int | None, **options: Any) -> dict[str, Any]:
        one = study(target)
        network, evaluations = one.network(name, KINDS[name], seed), one.evaluations(limit=limit)
        return criticality(evaluations, network.state, network.initial, grouped(evaluations.module), **options)

    for target, name in product(TARGETS, ("pretrained", "random")):
        for seed in SEEDS if target == "sketch" else SEEDS[:1]:
            about = {"target": target, "network": f"{name} {seed}"}
            whole = target == "sketch" and seed == SEEDS[0]
            rewind = partial(measured, target, name, seed, None, points=PATH if whole else 1)
            trial(NAME, {"what": "criticality", **about, "noise": False}, rewind)
            if whole:
                noisy = partial(measured, target, name, seed, NOISY, noise=NOISE)
                trial(NAME, {"what": "criticality", **about, "noise": True}, noisy)


def masks() -> None:
    """Measure the criticality of masks, and what masking the critical half alone costs and saves."""

    def measured(split: str, seed: int) -> dict[str, Any]:
        one = study("sketch")
        network = one.network("mask", MASK, seed)
        evaluations = one.evaluations(split=split, limit=CHOOSING if split == "train" else None)
        groups = grouped(evaluations.module, names=network.initial)
        return criticality(evaluations, network.state, network.initial, groups)

    for split, seed in product(("train", "test"), SEEDS):
        trial(NAME, {"what": "masks", "split": split, "seed": seed}, partial(measured, split, seed))
    for seed in SEEDS:
        trial(NAME, {"what": "halves", "seed": seed}, partial(halves, seed))


def halves(seed: int) -> dict[str, Any]:
    """Return accuracy, bytes and weights of the whole mask and of halves of it."""
    one = study("sketch")
    network, evaluations, folder = one.network("mask", MASK, seed), one.evaluations(), OUTPUT / "networks"
    assert network.masks is not None
    (ranked,) = trials(NAME, what="masks", split="train", seed=seed)
    groups = grouped(evaluations.module, names=network.initial)
    order = [name for row in ranked["result"]["rows"] for name in groups[row["module"]]]
    upper, lower = order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]
    backbone, rows = one.backbone(), {}
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    for name, dropped in (("all modules", []), ("critical half", lower), ("other half", upper)):
        kept = MaskSet({key: mask for key, mask in network.masks.items() if key not in dropped})
        accuracy = evaluations.of(rewound(network.state, network.initial, dropped))["accuracy"]
        own = replace(base, tensors={key: base.tensors[key] for key in kept})
        adapter = save_adapter(folder / f"masks-{name}-{seed}.safetensors", Parts(kept), own)
        rows[name] = {"accuracy": accuracy, "weights": kept.total, "bytes": stored(adapter)["masks"]}
    for name, trained in (("critical half, trained alone", upper), ("other half, trained alone", lower)):
        path = folder / f"{one.name}-{name}-{seed}.safetensors"
        if not path.exists():
            config = replace(one.config, include=tuple(trained), lr=MASK.lr, seed=seed)
            backbone = one.backbone()
            result = train_mask(backbone, one.training, config)
            save_adapter(path, result.parts, result.base, result.about, weights=backbone.model)
        _, _, (alone,) = read_networks(one.backbone(), [(name, str(path))])
        assert alone.masks is not None
        accuracy = evaluations.of(alone.state)["accuracy"]
        rows[name] = {"accuracy": accuracy, "weights": alone.masks.total, "bytes": stored(load_adapter(path))["masks"]}
    return {"rows": rows, "critical": upper, "other": lower}


def shuffle(target: str = "sketch") -> None:
    """Train on images in shuffled blocks, from a pretrained and from a random start."""
    blocks = FEW_BLOCKS if target == XRAY else BLOCKS
    expected = list(product(blocks, STARTS, SEEDS))
    about = {} if target == "sketch" else {"target": target}
    if len(trials(NAME, what="shuffle", target=about.get("target"))) == len(expected):
        return
    folder, data = OUTPUT / "-".join(["shuffle", *about.values()]), load_data(str(data_of(target)))
    feature_reuse(resnet(20), data, folder, config=SHUFFLED, blocks=blocks, seeds=SEEDS, report=told)
    for block, start, seed in expected:
        path = folder / f"{start}-{block}-{seed}" / "result.json"
        trial(NAME, {"what": "shuffle", **about, "block": block, "start": start, "seed": seed}, partial(read, path))
    trial("settings", {"experiment": f"analysis-{folder.name}"}, partial(read, folder / "settings.json"))


def checkpoints() -> None:
    """Train on sketches from the checkpoints of a network that learned CIFAR-10 from a random start."""
    if len(trials(NAME, what="checkpoints")) == len(EPOCHS) * len(SEEDS):
        return
    folder = OUTPUT / "checkpoints"
    cifar = load_data(str(data_of("cifar10")))
    assert cifar.train is not None
    pretrained(folder, replace(cifar, train=some(cifar.train, PRETRAINING_ROWS), test=None))
    files = [folder / "pretraining" / f"epoch-{epoch}.safetensors" for epoch in EPOCHS]
    own: dict[str, Any] = {"config": FROM_CHECKPOINT, "pretraining": cifar, "seeds": SEEDS, "report": told}
    found = from_checkpoints({"reference": resnet(20)["reference"]}, files, study("sketch").data, folder, **own)
    for row in found["rows"]:
        name = row["checkpoint"]
        trial(NAME, {"what": "pretraining", "checkpoint": name}, partial(dict, accuracy=row["pretraining"]))
        for seed in SEEDS:
            path = folder / f"{name}-{seed}" / "result.json"
            trial(NAME, {"what": "checkpoints", "checkpoint": name, "seed": seed}, partial(read, path))
    trial("settings", {"experiment": "analysis-checkpoints"}, partial(read, folder / "settings.json"))


def read(path: Path) -> dict[str, Any]:
    return read_json(path, frozenset(), "delete it, and it is measured again")


def pretrained(folder: Path, data: Data) -> None:
    """Train on CIFAR-10 from a random start, and keep the network of some epochs."""
    run, place = folder / "training", folder / "pretraining"
    if (place / f"epoch-{EPOCHS[-1]}.safetensors").exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone(resnet(20)["reference"], random_weights=0)
    export_state(place / "epoch-0.safetensors", backbone.model)

    def kept(event: Mapping[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] in EPOCHS:
            export_state(place / f"epoch-{event['epoch']}.safetensors", backbone.model)
            print("pretraining", event["epoch"], flush=True)

    run.mkdir(parents=True, exist_ok=True)
    resume = (run / FILE).exists()
    train_dense(
        backbone, data, PRETRAINING, lambda own, _: body_parameters(own), output=run, resume=resume, report=kept
    )


def told(event: Mapping[str, Any]) -> None:
    if event["event"] == "trial":
        print(f"{event['part']}: {event['accuracy']:.4f}", flush=True)


JOBS: dict[str, Callable[[], None]] = {
    "basins": basins,
    "features": features,
    "critical": critical,
    "masks": masks,
    "texts": texts,
    "shuffle": shuffle,
    "shuffle-xray": partial(shuffle, XRAY),
    "checkpoints": checkpoints,
}


# --- the page --------------------------------------------------------------------------------------------------------

STAGES = ("conv1", "layer1", "layer2", "layer3", "linear")
TEXT_TITLES = {TEXT_TARGET: "Banking77"}
Drawn = Callable[[Any, str, str], str]


def write_pages(page: Path) -> None:
    """Write tables and pictures of what is recorded between the page's markers."""

    def drawn(figure: Any, name: str, words: str) -> str:
        """Save a picture beside the page and return the link to it."""
        save_figure(figure, page.parent / f"analysis-{name}.svg")
        return f"\n![{words}](analysis-{name}.svg)\n"

    parts = {
        "Lines between networks": line_rows(drawn, {name: name for name in TARGETS}),
        "Features, parameters and mistakes": feature_rows(drawn),
        "Criticality": critical_rows(drawn),
        "Criticality of masks": mask_rows(drawn),
        "A masked and a fine-tuned MiniLM": line_rows(drawn, TEXT_TITLES, "masked and fine-tuned MiniLM"),
        "Shuffled blocks": shuffle_rows(drawn),
        "Shuffled blocks of chest X-rays": shuffle_rows(drawn, XRAY),
        "Which checkpoint": checkpoint_rows(drawn),
    }
    found = [f"**{title}**\n\n{text}" for title, text in parts.items() if text]
    write_between(page, MARK, "\n".join(found) or NOTHING)


def by_kinds(pairs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for pair in pairs:
        found.setdefault(pair["kinds"], []).append(pair)
    return found


def line_rows(drawn: Drawn, titles: Mapping[str, str], words: str = "") -> str:
    """Return a row for pairs of the same kinds: accuracies of their ends with the seeds' deviation, and barriers."""
    rows, pictures = [], []
    for target, title in titles.items():
        own = [{**one, **one["result"]} for one in trials(NAME, what="lines", target=target)]
        pairs = sorted(own, key=lambda one: f"{one['first']} - {one['second']}")
        for kinds, alike in by_kinds(pairs).items():
            ends: dict[str, dict[str, float]] = {}
            for pair in alike:
                for name, at in ((pair["first"], 0), (pair["second"], -1)):
                    ends.setdefault(name.rpartition(" ")[0], {})[name] = pair["points"][at]["accuracy"]
            barriers = [pair["barrier"] for pair in alike]
            heights = (percent(barriers), f"{100 * max(barriers):.1f}", f"{mean(p['loss_barrier'] for p in alike):.3f}")
            accuracies = "; ".join(percent(list(one.values())) for one in ends.values())
            rows.append((title, kinds, len(alike), accuracies, *heights))
        if pairs:
            between = words or f"networks, {target}"
            pictures.append(drawn(barrier_figure(pairs), f"barrier-{target}", f"Accuracy on lines between {between}"))
    columns = ("target", "pairs", "how many", "accuracy at the ends", "barrier", "highest", "barrier of the loss")
    return table(columns, rows, 2) + "".join(pictures) if rows else ""


def feature_rows(drawn: Drawn) -> str:
    """Return a row for pairs of the same kinds: CKA of some blocks, distance, common mistakes."""
    rows, pictures, columns = [], [], ["first", "middle", "last"]
    for target in TARGETS:
        found = {one["measure"]: one["result"] for one in trials(NAME, what="features", target=target)}
        if len(found) < 3:
            continue
        cka, layers = found["cka"], found["cka"]["layers"]
        places = [0, len(layers) // 2, len(layers) - 1]
        columns = [layers[at] for at in places]
        far, wrong = by_kinds(found["distance"]["pairs"]), by_kinds(found["mistakes"]["pairs"])
        for kinds, own in by_kinds(cka["pairs"]).items():
            alike = [f"{mean(pair['cka'][at] or 0.0 for pair in own):.2f}" for at in places]
            apart = f"{mean(pair['parameters']['relative'] for pair in far[kinds]):.2f}"
            same = [f"{mean(pair[key] or 0.0 for pair in wrong[kinds]):.2f}" for key in ("overlap", "kappa")]
            rows.append([target, kinds, *alike, apart, *same])
        pictures.append(
            drawn(similarity_figure(layers, cka["pairs"]), f"cka-{target}", f"Linear CKA by block, {target}")
        )
    heads = ["target", "pairs", *(f"CKA {name}" for name in columns), "distance / backbone"]
    return table([*heads, "overlap of errors", "kappa"], rows, 2) + "".join(pictures) if rows else ""


def critical_rows(drawn: Drawn) -> str:
    """Return mean drops by stage, a picture of the first seed with its path, and the formal measure."""
    rows, pictures, noisy = [], [], []
    for target, kind in product(TARGETS, ("pretrained", "random")):
        own = [one for one in trials(NAME, what="criticality", target=target) if one["network"].startswith(f"{kind} ")]
        found = [one["result"]["rows"] for one in own if not one["noise"]]
        if found:
            rows.append([target, kind, str(len(found)), *stages(found, "drop", 100, 1)])
            if target == "sketch":
                words = f"Criticality of modules, {kind} start"
                pictures.append(drawn(criticality_figure(found[0]), f"criticality-{kind}", words))
        for one in own:
            if one["noise"]:
                total = one["result"]["criticality"]
                means = stages([one["result"]["rows"]], "criticality", 1, 2)
                noisy.append([one["network"], *means, "-" if total is None else f"{total:.4g}"])
    if not rows:
        return ""
    text = "Accuracy lost, mean over the modules of a stage and the seeds:\n\n"
    text += table(["target", "start", "seeds", *STAGES], rows, 2) + "".join(pictures)
    note = "Formal measure, mean over the modules of a stage (-: at no point is any noise borne), and their sum:"
    return f"{text}\n{note}\n\n{table(['network', *STAGES, 'sum'], noisy, 1)}" if noisy else text


def stages(found: Sequence[Sequence[Mapping[str, Any]]], key: str, factor: float, digits: int) -> list[str]:
    """Return the mean of a number by stage of a ResNet."""
    cells = []
    for stage in STAGES:
        values = [row[key] for rows in found for row in rows if row["module"].split(".")[0] == stage]
        known = [factor * value for value in values if value is not None]
        cells.append(f"{mean(known):.{digits}f}" if known else "-")
    return cells


def mask_rows(drawn: Drawn) -> str:
    """Return accuracy and bytes of masks of halves, and a picture of the accuracy lost by rewinding."""
    found = [one["result"]["rows"] for one in trials(NAME, what="halves")]
    if not found:
        return ""
    rows = []
    for name in found[0]:
        own = [one[name] for one in found]
        sizes = [f"{mean(row[key] for row in own):,.0f}" for key in ("weights", "bytes")]
        rows.append([name, percent([row["accuracy"] for row in own]), *sizes])
    drops: dict[str, list[float]] = {}
    for one in trials(NAME, what="masks", split="test"):
        for row in one["result"]["rows"]:
            drops.setdefault(row["module"], []).append(row["drop"])
    means = sorted(((mean(own), name) for name, own in drops.items()), key=lambda one: -one[0])
    ranked = [{"module": name, "drop": drop} for drop, name in means]
    words = "Accuracy lost when the mask of a module is all ones"
    picture = drawn(criticality_figure(ranked), "criticality-mask", words)
    return table(["masked", "accuracy", "masked weights", "bytes of the masks"], rows, 1) + picture


def summaries(what: str, *keys: str, target: str | None = None) -> list[dict[str, Any]]:
    """Return mean and deviation over seeds of an analysis's trials, for each combination of these settings."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for one in trials(NAME, what=what, target=target):
        found.setdefault(tuple(one[key] for key in keys), []).append(one["result"]["accuracy"])
    return [
        {
            **dict(zip(keys, values, strict=True)),
            "accuracies": own,
            "accuracy": mean(own),
            "deviation": stdev(own) if len(own) > 1 else None,
        }
        for values, own in found.items()
    ]


def shuffle_rows(drawn: Drawn, target: str | None = None) -> str:
    """Return accuracies of both starts by the side of the blocks."""
    found = summaries("shuffle", "block", "start", target=target)
    if not found:
        return ""
    own = {(row["block"], row["start"]): row for row in found}
    rows = []
    for block in dict.fromkeys(row["block"] for row in found):
        pretrained, random = (own[block, start] for start in STARTS)
        gain = f"{100 * (pretrained['accuracy'] - random['accuracy']):+.1f}"
        rows.append([block, percent(pretrained["accuracies"]), percent(random["accuracies"]), gain])
    name = f"shuffle-{target}" if target else "shuffle"
    picture = drawn(shuffle_figure(found), name, "Accuracy over the side of shuffled blocks")
    return table(["side of the blocks", "pretrained start", "random start", "gain"], rows, 1) + picture


def checkpoint_rows(drawn: Drawn) -> str:
    """Return accuracies on the target by checkpoint."""
    before = {one["checkpoint"]: one["result"]["accuracy"] for one in trials(NAME, what="pretraining")}
    found = [{**row, "pretraining": before[row["checkpoint"]]} for row in summaries("checkpoints", "checkpoint")]
    if not found:
        return ""
    rows = [(row["checkpoint"], f"{100 * row['pretraining']:.1f}", percent(row["accuracies"])) for row in found]
    picture = drawn(checkpoint_figure(found), "checkpoints", "Accuracy on sketches by checkpoint")
    return table(["checkpoint", "accuracy on CIFAR-10", "accuracy on sketches"], rows, 1) + picture


def main() -> None:
    command(__doc__, JOBS, write_pages)


if __name__ == "__main__":
    main()
