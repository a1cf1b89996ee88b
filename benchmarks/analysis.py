"""What is transferred: starts and masks of small networks, by every analysis of `maskpack analyze`.

    MASKPACK_DATA=… python -m benchmarks.analysis                         all, about three hours of one core
    MASKPACK_DATA=… python -m benchmarks.analysis basins shuffle          some of it
    python -m benchmarks.analysis --write docs/results.md                 tables and pictures from what is finished

A ResNet-20 that knows CIFAR-10, or starts at random, learns PACS sketches or MNIST; CIFAR-10 itself is learned from a
random start alone. Every trial is a JSON file in benchmarks/measured/analysis; what is there is not run again, a
training that was interrupted goes on, and evaluations are kept by content. Test rows describe; what chooses is measured
on training rows.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from maskpack import load_adapter, load_backbone, save_adapter
from maskpack.backbone.load import export_state
from maskpack.lab.analysis.criticality import Noise, criticality, rewound
from maskpack.lab.analysis.evaluation import Evaluations, some
from maskpack.lab.analysis.network import Network, State, grouped, read_networks, state_of
from maskpack.lab.analysis.pairs import barrier, distances, mistakes
from maskpack.lab.analysis.similarity import similarities
from maskpack.lab.analysis.starts import feature_reuse, from_checkpoints
from maskpack.lab.baselines.masks import stored
from maskpack.mask import MaskSet
from maskpack.training import load_data, train_mask
from maskpack.training.checkpoint import FILE
from maskpack.training.data.base import Data
from maskpack.training.dense import body_parameters, train_dense
from maskpack.training.run_folder import read_json, write_json

from .analysis_networks import KINDS, MASK, TARGETS, TEXT_KINDS, Study, study
from .comparisons import DATA, IMAGES, ROOT, SEEDS, resnet

MEASURED = ROOT / "measured" / "analysis"


POINTS = 11
PATH = 4  # steps of the direct path, of the first seed
NOISE = Noise(draws=2)
NOISY = 512  # test rows
CHOOSING = 1024  # training rows that tell which modules are critical
TEXT_ROWS = 1000
SHUFFLED = replace(IMAGES, augment="none", steps=160, lr=0.09)
BLOCKS = (32, 16, 8, 4, 2, 1)
PRETRAINING = replace(IMAGES, objective_options={}, augment="crop-flip", lr=0.1, head_lr=0.1, steps=None, epochs=10)
PRETRAINING_ROWS = 20_000
EPOCHS = (0, 1, 2, 3, 5, 7, 10)
FROM_CHECKPOINT = replace(IMAGES, steps=160, lr=0.03)


def trial(path: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured now or earlier."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measure())
        print(path.parent.name, path.stem, flush=True)
    return read_json(path, frozenset(), "delete it, and it is measured again")


def basins(output: Path) -> None:
    """Lines between networks of a kind, and between a pretrained and a random start."""
    for target in TARGETS:
        one = study(target, output)
        own = {(name, seed): one.network(name, kind, seed) for name, kind in KINDS.items() for seed in SEEDS}
        pairs = [((name, a), (name, b)) for name in KINDS for a, b in combinations(SEEDS, 2)]
        pairs += [(("pretrained", seed), ("random", seed)) for seed in SEEDS]
        evaluations = one.evaluations()
        lines(output / "basins" / target, evaluations, [(own[a], own[b]) for a, b in pairs])


def lines(folder: Path, evaluations: Evaluations, pairs: Sequence[tuple[Network, Network]]) -> None:
    """Measure the barriers of pairs, each a trial."""
    for first, second in pairs:
        trial(folder / f"{first.name} - {second.name}.json", partial(line, evaluations, first, second))


def line(evaluations: Evaluations, first: Network, second: Network) -> dict[str, Any]:
    """Return the barrier of a pair and its names."""
    names = {"first": first.name, "second": second.name, "kinds": f"{first.kind} - {second.kind}"}
    return {**names, **barrier(evaluations, first.state, second.state, POINTS)}


def features(output: Path) -> None:
    """Similarity of features, distances and common mistakes."""
    for target in TARGETS:
        one = study(target, output)
        networks = [one.network(name, kind, seed) for name, kind in KINDS.items() for seed in SEEDS]
        evaluations = one.evaluations()
        groups, base = grouped(evaluations.module, "block"), state_of(one.backbone().model)
        body = {name: own for name, own in groups.items() if name != "linear"}
        trial(output / "features" / f"{target}-cka.json", partial(similarities, evaluations, networks, groups))
        trial(output / "features" / f"{target}-mistakes.json", partial(mistakes, evaluations, networks))
        trial(output / "features" / f"{target}-distance.json", partial(apart, networks, body, base))


def apart(networks: Sequence[Network], groups: Mapping[str, Sequence[str]], base: State) -> dict[str, Any]:
    """Return the distances of all pairs."""
    return {"pairs": distances(networks, groups, base)}


def critical(output: Path) -> None:
    """Criticality of modules: rewound, of the first seed of sketches with its path and noise."""
    for target in TARGETS:
        one = study(target, output)
        for name in ("pretrained", "random"):
            for seed in SEEDS if target == "sketch" else SEEDS[:1]:
                network = one.network(name, KINDS[name], seed)
                evaluations = one.evaluations()
                groups = grouped(evaluations.module)
                points = PATH if target == "sketch" and seed == SEEDS[0] else 1
                own = (network.state, network.initial, groups)
                place = output / "critical"
                trial(place / f"{target}-{network.name}.json", partial(criticality, evaluations, *own, points=points))
                if target == "sketch" and seed == SEEDS[0]:
                    few = one.evaluations(limit=NOISY)
                    trial(place / f"noise-{network.name}.json", partial(criticality, few, *own, noise=NOISE))


def masks(output: Path) -> None:
    """Criticality of masks, and what masking the critical half alone costs and saves."""
    one = study("sketch", output)
    for seed in SEEDS:
        network = one.network("mask", MASK, seed)
        groups = grouped(one.evaluations().module, names=network.initial)
        for split, limit in (("train", CHOOSING), ("test", None)):
            measure = partial(
                criticality, one.evaluations(split=split, limit=limit), network.state, network.initial, groups
            )
            found = trial(output / "masks" / f"{split}-{seed}.json", measure)
            if split == "train":
                order = [name for row in found["rows"] for name in groups[row["module"]]]
        half = (len(order) + 1) // 2
        trial(output / "masks" / f"halves-{seed}.json", partial(halves, one, network, seed, order[:half], order[half:]))


def halves(one: Study, network: Network, seed: int, upper: Sequence[str], lower: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, bytes and weights of the whole mask and of halves of it."""
    evaluations, rows = one.evaluations(), {}
    assert network.masks is not None
    for name, dropped in (("all modules", ()), ("critical half", lower), ("other half", upper)):
        kept = MaskSet({key: mask for key, mask in network.masks.items() if key not in dropped})
        accuracy = evaluations.of(rewound(network.state, network.initial, dropped))["accuracy"]
        rows[name] = {"accuracy": accuracy, "weights": kept.total, **_bytes(one, network, kept, f"{name}-{seed}")}
    for name, trained in (("critical half, trained alone", upper), ("other half, trained alone", lower)):
        config = replace(one.config, include=tuple(trained))
        path = one.output / "networks" / f"{one.name}-{name}-{seed}.safetensors"
        if not path.exists():
            backbone = one.backbone()
            result = train_mask(backbone, one.training, replace(config, lr=MASK.lr, seed=seed))
            save_adapter(path, result.parts, result.base, result.about, weights=backbone.model)
        _, _, (alone,) = read_networks(one.backbone(), [(name, str(path))])
        assert alone.masks is not None
        accuracy = evaluations.of(alone.state)["accuracy"]
        rows[name] = {"accuracy": accuracy, "weights": alone.masks.total, "bytes": stored(load_adapter(path))["masks"]}
    return {"rows": rows, "critical": list(upper), "other": list(lower)}


def _bytes(one: Study, network: Network, kept: MaskSet, name: str) -> dict[str, int]:
    """The bytes of these masks in a file of their own."""
    from maskpack import fingerprint
    from maskpack.adapter.content import Parts

    backbone = one.backbone()
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    base = replace(base, tensors={key: base.tensors[key] for key in kept})
    adapter = save_adapter(one.output / "networks" / f"masks-{name}.safetensors", Parts(kept), base)
    return {"bytes": stored(adapter)["masks"]}


def shuffle(output: Path) -> None:
    """Sketches in shuffled blocks, from a pretrained and from a random start."""
    folder = output / "shuffle"
    data = study("sketch", output).data
    measure = partial(feature_reuse, resnet(20), data, folder, config=SHUFFLED, blocks=BLOCKS, seeds=SEEDS, report=told)
    trial(folder / "shuffle.json", measure)


def checkpoints(output: Path) -> None:
    """A random start learns CIFAR-10; sketches are learned from its checkpoints."""
    folder = output / "checkpoints"
    cifar = load_data(str(DATA / "data/cifar10"))
    assert cifar.train is not None
    pretrained(folder, replace(cifar, train=some(cifar.train, PRETRAINING_ROWS), test=None))
    files = [folder / "pretraining" / f"epoch-{epoch}.safetensors" for epoch in EPOCHS]
    reference = {"reference": resnet(20)["reference"]}
    data = study("sketch", output).data
    own: dict[str, Any] = {"config": FROM_CHECKPOINT, "pretraining": cifar, "seeds": SEEDS}
    trial(folder / "checkpoints.json", partial(from_checkpoints, reference, files, data, folder, **own, report=told))


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


def texts(output: Path) -> None:
    """A masked and a fine-tuned MiniLM, and the lines between them (Zhao et al., arXiv 2004.12406)."""
    one = study("banking77", output)
    own = {(name, seed): one.network(name, kind, seed) for name, kind in TEXT_KINDS.items() for seed in SEEDS}
    pairs = [(own["masked", seed], own["fine-tuned", seed]) for seed in SEEDS]
    pairs += [(own[name, a], own[name, b]) for name in TEXT_KINDS for a, b in combinations(SEEDS, 2)]
    lines(output / "texts", one.evaluations(limit=TEXT_ROWS), pairs)


def told(event: Mapping[str, Any]) -> None:
    if event["event"] == "trial":
        print(f"{event['part']}: {event['accuracy']:.4f}", flush=True)


JOBS: dict[str, Callable[[Path], None]] = {
    "basins": basins,
    "features": features,
    "critical": critical,
    "masks": masks,
    "texts": texts,
    "shuffle": shuffle,
    "checkpoints": checkpoints,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(JOBS)}; default: all")
    parser.add_argument("--output", type=Path, default=MEASURED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="only write tables and pictures into this page")
    given = parser.parse_args()
    if given.write is not None:
        from .analysis_pages import write_pages

        write_pages(given.output, given.write)
        return
    unknown = [name for name in given.names if name not in JOBS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]!r}; known: {', '.join(JOBS)}")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads)
    for name in given.names or JOBS:
        JOBS[name](given.output)


if __name__ == "__main__":
    main()
