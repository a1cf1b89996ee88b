"""Self-Masking Networks once more on an ImageNet backbone: with labels, with few, without, cascades, some scores.

    MASKPACK_DATA=… python -m benchmarks.imagenet                            all; five hours of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.imagenet labels/eurosat starts      some of it
    python -m benchmarks.imagenet --write docs/results/imagenet.md          tables and pictures of what is recorded

EfficientNet-Lite0 sees 64 pixels. Rates, and frozen or adapted statistics of BatchNorm, are chosen on a fifth of the
training rows of the first data set, and taken for the others. Another start is measured beside those of `starts` with
MASKPACK_START="NAME REFERENCE WEIGHTS", as "dino timm/resnet50 ./dino.safetensors".
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from maskpack import MaskSet, load_backbone
from maskpack.backbone.load import Backbone
from maskpack.lab import density_figure, label_figure, save_figure
from maskpack.training import TrainConfig, load_data, train_mask
from maskpack.training.budget import coded_bytes
from maskpack.training.config import RECIPES
from maskpack.training.data.base import HELD, LABELS_SEED, Data, few_labels, hold_out
from maskpack.training.evaluate import applied_parts
from maskpack.training.features import MEASURES, disjoint, embed, measured
from maskpack.training.run_folder import FILE

from .comparisons import SHARES, cascade, cascade_rows, compared, over_sets, rows_of
from .measured import Trial, trial, trials
from .methods import Curves, with_curves
from .recipe import lite0
from .report import NOTHING, command, percent, table, write_between
from .tasks import RUNS, SEEDS, data_of, resnet

NAME, UNLABELLED = "imagenet", "imagenet-unlabelled"
MARK = "python -m benchmarks.imagenet --write docs/results/imagenet.md"
SETS = ("sign_digits", "eurosat", "cartoon", "tf_flowers")
FIRST, FEW_SETS = SETS[0], SETS[:2]
STEPS, BATCH, LONG = 240, 32, 1000
Settings = dict[str, Any]

# --- with labels -----------------------------------------------------------------------------------------------------

DEFAULT = TrainConfig(steps=STEPS, batch_size=BATCH)
PUBLISHED = TrainConfig(**{**RECIPES["source"], "lr": None, "steps": STEPS, "batch_size": BATCH})


@dataclass(frozen=True)
class Way:
    """A row of the table: a baseline of `compare` with its settings and the rates to choose from.

    `few` are the data sets on which few labels are tried.
    """

    baseline: str
    config: TrainConfig = DEFAULT
    rates: tuple[float, ...] = ()
    few: tuple[str, ...] = FEW_SETS


MASK_RATE = (DEFAULT.score_lr(STEPS, 3_000_000),)
WAYS = {
    "k-NN": Way("knn", few=()),
    "linear probe": Way("probe"),
    "norms": Way("norms", few=()),
    "full": Way("full", rates=(3e-4, 1e-3, 3e-3)),
    "mask, default": Way("mask", rates=MASK_RATE),
    "mask, as published": Way("mask", PUBLISHED, (5.0, 15.0, 50.0), few=(FIRST,)),
}
LONGER = ("norms", "full", "mask, default")  # in `LONG` steps as well, on the first data set


def labels(name: str) -> None:
    """Run what is not recorded of a data set."""
    for words, way in WAYS.items():
        run(name, words, way.config, SHARES if name in way.few else SHARES[:1])


def longer() -> None:
    """Run rows with four times the steps on the first data set."""
    for words in LONGER:
        run(FIRST, words, replace(WAYS[words].config, steps=LONG), SHARES[:1])


def run(name: str, words: str, config: TrainConfig, shares: Sequence[float]) -> None:
    """Run a row; its rate and statistics are those of the first data set, where they are searched."""
    way = WAYS[words]
    rates, first = way.rates, row_of(FIRST, words)
    if compared_as(name, words, config) != compared_as(FIRST, words, way.config) and first and first["rate"]:
        rates, config = (first["rate"],), replace(config, bn=config.bn or first["bn"])
    given = {way.baseline: rates} if rates else {}
    about = compared_as(name, words, config)
    compared(NAME, about, lite0(64), data_of(name), [way.baseline], given, config, shares)


def compared_as(name: str, words: str, config: TrainConfig) -> str:
    return f"{name}: {words}" + (f", {config.steps} steps" if config.steps != STEPS else "")


def row_of(name: str, words: str, steps: int = STEPS, share: float = 1.0) -> dict[str, Any] | None:
    """Return a row whose trials are all recorded."""
    about = compared_as(name, words, replace(WAYS[words].config, steps=steps))
    return next(iter(rows_of(NAME, about, [WAYS[words].baseline], (share,))), None)


# --- without labels --------------------------------------------------------------------------------------------------

# the published objective; prototypes, queue and crops for small images and few classes
CROPS = {
    "prototypes": 60,
    "epsilon": 0.02,
    "queue": 256,
    "freeze_prototypes": 50,
    "small_crops": 4,
    "large_least": 0.3,
    "small_least": 0.1,
    "small_most": 0.3,
}
VIEWS = TrainConfig(
    objective="self-supervised",
    objective_options=CROPS,
    optimizer="sgd",
    top=1.0,
    train=(),
    scale=True,
    warmup=0.0,
    batch_size=BATCH,
)
RATES, SEARCH_STEPS = (5.0, 15.0, 50.0), 150
LITE = "EfficientNet-Lite0, ImageNet"
SOME_STEPS, CASCADE_EPOCHS = 200, 5
RULES: dict[str, Settings] = {
    **{f"random:{share}": {"selective": f"random:{share}"} for share in (0.1, 0.2, 0.5)},
    **{f"largest:{share}": {"selective": f"largest:{share}"} for share in (0.1, 0.2, 0.5)},
    **{
        f"stem and {count} of 7 blocks": {
            "include": ["conv_stem.weight", f"blocks.[0-{count - 1}].*conv*.weight"],
        }
        for count in (2, 4, 6)
    },
    "all": {},
}


def starts() -> dict[str, Settings]:
    """Return the arguments of `load_backbone` for each start by name; the one of MASKPACK_START is the last."""
    random = {"weights": None, "random_weights": 0}
    found = {
        "ResNet-20, random": resnet(20, random_start=True),
        "ResNet-20, CIFAR-10": resnet(20),
        "EfficientNet-Lite0, random": {**lite0(64), **random},
        LITE: lite0(64),
    }
    if given := os.environ.get("MASKPACK_START"):
        name, reference, weights = given.split(maxsplit=2)
        found[name] = {"reference": reference, "weights": weights}
    return found


def unlabelled(data: str, steps: int, start: str = LITE, seed: int = 0, **changes: Any) -> Trial:
    """Return the result of a mask without labels, recorded or trained now; with no steps that of the raw backbone."""
    about = {"data": data, "start": start, "steps": steps, "seed": seed, **changes}
    found: Trial = trial(UNLABELLED, about, partial(without_labels, about))
    return found


def without_labels(about: Mapping[str, Any]) -> dict[str, Any]:
    """Train a mask without labels; measure k-NN and probe of its features by the share of the labels."""
    own = dict(about)
    start, steps, validation = own.pop("start"), own.pop("steps"), own.pop("validation", False)
    data, backbone = load_data(str(data_of(own.pop("data")))), load_backbone(**starts()[start])
    assert data.train is not None
    if validation:
        train, held = hold_out(data.train, HELD, about["seed"])
        data = replace(data, train=train, test=held)
    if not steps:
        return by_share(backbone, data, about["seed"])
    config = changed(VIEWS, {**own, "steps": steps})
    folder = RUNS / NAME / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    rows = replace(data, test=None, class_names=())
    parts = train_mask(backbone, rows, config, output=folder, resume=(folder / FILE).exists()).parts
    with applied_parts(backbone.model, parts, "target"):
        return {**by_share(backbone, data, config.seed), **described(parts.masks)}


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return settings with changes that are JSON values."""
    own: Settings = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return replace(config, **own)


def described(masks: MaskSet) -> dict[str, Any]:
    """Return density in all and by parameter, the number of weights with scores, and the bytes of masks."""
    layers = {name: mask.density for name, mask in masks.items()}
    return {"density": masks.density, "layers": layers, "weights": masks.total, "bytes": coded_bytes(masks.values())}


def by_share(backbone: Backbone, data: Data, seed: int) -> dict[str, Any]:
    """Return test accuracies of k-NN and probe by the share of the labels, which are drawn as by `compare`."""
    train, test = disjoint(data)
    test_x, test_y = embed(backbone, test, cache=False)
    found: dict[str, Any] = {measure: {} for measure in MEASURES}
    for share in SHARES:
        x, y = embed(backbone, few_labels(train, share, LABELS_SEED + seed), cache=False)
        for measure in MEASURES:
            one = measured(measure, x, y, test_x, test_y, len(data.class_names))
            found[measure][f"{share:g}"] = one["accuracy"]
    return found


def chosen(start: str = LITE) -> Settings:
    """Return rate and statistics of BatchNorm whose probe is best on validation rows of the first data set.

    Frozen and adapted statistics are compared at the middle rate, in a short training.
    """

    def probe(lr: float, bn: str) -> float:
        found: float = unlabelled(FIRST, SEARCH_STEPS, start, lr=lr, bn=bn, validation=True)["probe"]["1"]
        return found

    bn = max(("adapt", "freeze"), key=partial(probe, RATES[len(RATES) // 2]))
    return {"lr": max(RATES, key=lambda lr: probe(lr, bn)), "bn": bn}


def few(name: str) -> None:
    """Train masks without labels on a data set, with three seeds, and measure the raw backbone beside them."""
    for seed in SEEDS:
        unlabelled(name, 0, seed=seed)
        unlabelled(name, LONG, seed=seed, **chosen())


def converged() -> None:
    """Train masks without labels on the first data set, in half and in twice the steps."""
    for steps in (LONG // 2, 2 * LONG):
        unlabelled(FIRST, steps, **chosen())


def cascades() -> None:
    """Train cascades of three experts on the first data set."""
    for seed in SEEDS:
        config = replace(VIEWS, **chosen(), seed=seed, epochs=CASCADE_EPOCHS)
        made = partial(cascade, lite0(64), FIRST, config, RUNS / NAME / f"cascade-{seed}")
        trial(f"{NAME}-cascades", {"data": FIRST, "seed": seed, "epochs": CASCADE_EPOCHS}, made)


def selective() -> None:
    """Train masks of which some scores learn, without labels and with."""
    for rule, changes in RULES.items():
        unlabelled(FIRST, SOME_STEPS, **chosen(), **changes)
        trial(f"{NAME}-selective", {"data": FIRST, "rule": rule, "steps": STEPS}, partial(with_labels, changes))


def with_labels(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train a mask with labels, without norms; return its accuracy and its `described` figures."""
    config = changed(replace(DEFAULT, top=1.0, train=(), lr=MASK_RATE[0]), changes)
    result = train_mask(load_backbone(**lite0(64)), load_data(str(data_of(FIRST))), config)
    return {"accuracy": result.metrics["test_accuracy"], **described(result.parts.masks)}


def from_starts() -> None:
    """Train masks without labels from every start, each with a rate and statistics of its own."""
    for start in starts():
        unlabelled(FIRST, 0, start)
        unlabelled(FIRST, SOME_STEPS, start, **chosen(start))


# --- the page --------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write the tables of what is recorded between the page's markers, and pictures into the page's folder."""
    for name, text in {
        "labels": label_rows(),
        "few labels": few_rows(page.parent),
        "convergence": convergence_rows(),
        "cascades": cascade_rows(f"{NAME}-cascades"),
        "selective": selective_rows(page.parent),
        "starts": start_rows(),
        "densities": density_rows(page.parent),
    }.items():
        write_between(page, f"{MARK}: {name}", text or NOTHING)


def label_rows() -> str:
    """Return test accuracies by row and data set, and bytes beside the head."""
    lines = []
    for words in WAYS:
        own = [row_of(name, words) for name in SETS]
        far = row_of(FIRST, words, LONG) if words in LONGER else None
        known = [row for row in own if row]
        if not known:
            continue
        size = mean(row["bytes"] - row["sizes"].get("head", 0) for row in known)
        cells = [percent(row["accuracies"]) if row else "-" for row in (*own, far)]
        lines.append([words, *cells, f"{size:,.0f}"])
    columns = ["row", *SETS, f"{FIRST}, {LONG} steps", "bytes beside the head"]
    return table(columns, lines, 1) if lines else ""


def recorded(start: str = LITE, steps: int = LONG, data: str = FIRST, **changes: Any) -> list[Trial]:
    """Return the results of masks without labels that are no part of a search, in the order of their seeds."""
    own = ("selective", "include", "validation")
    wanted = {name: changes.get(name) for name in own}
    found = trials(UNLABELLED, start=start, steps=steps, data=data, **wanted)
    return [one["result"] for one in sorted(found, key=lambda one: int(one["seed"]))]


def few_rows(folder: Path) -> str:
    """Return accuracies by share of the labels, and a picture for each data set."""
    lines, pictures = [], []
    for name in FEW_SETS:
        curves: dict[str, list[list[float]]] = {}
        for words, way in WAYS.items():
            if name in way.few:
                rows = [row_of(name, words, share=share) for share in SHARES]
                if all(rows):
                    curves[words] = [row["accuracies"] for row in rows if row]
        for steps, words in ((0, "raw"), (LONG, "without labels")):
            found = recorded(steps=steps, data=name)
            for measure, title in zip(MEASURES, ("k-NN", "probe"), strict=True):
                if found and (steps or measure == "knn"):
                    each = [[one[measure][f"{share:g}"] for one in found] for share in SHARES]
                    curves[f"{words}, then {title}"] = [
                        own if share < 1 or steps else own[:1] for share, own in zip(SHARES, each, strict=True)
                    ]
        lines += [[name, words, *map(percent, own)] for words, own in curves.items()]
        if curves:
            drawn = {
                words: [(share, mean(one), None) for share, one in zip(SHARES, own, strict=True)]
                for words, own in curves.items()
            }
            save_figure(label_figure(drawn), folder / f"imagenet-few-{name}.svg")
            pictures.append(f"\n![Accuracy over the share of the labels, {name}](imagenet-few-{name}.svg)\n")
    columns = ["data", "row", *(f"{100 * share:g} %" for share in SHARES)]
    return table(columns, lines, 2) + "".join(pictures) if lines else ""


def convergence_rows() -> str:
    """Return k-NN and probe by the number of steps, of the first data set and seed."""
    lines = []
    for steps in (0, SOME_STEPS, LONG // 2, LONG, 2 * LONG):
        if found := recorded(steps=steps)[:1]:
            density = f"{found[0]['density']:.4f}" if steps else "-"
            lines.append([steps, *(percent([found[0][measure]["1"]]) for measure in MEASURES), density])
    return table(["steps", "k-NN", "probe", "density"], lines, 0) if lines else ""


def selective_rows(folder: Path) -> str:
    """Return k-NN without labels and accuracy with labels by the rule that says which scores learn, and curves."""
    lines, curves = list[Sequence[str]](), Curves()
    everything = max((one["weights"] for one in recorded(steps=SOME_STEPS)), default=0)
    for rule, changes in RULES.items():
        without = recorded(steps=SOME_STEPS, **changes)[:1]
        with_them = [one["result"] for one in trials(f"{NAME}-selective", rule=rule)]
        if not without or not with_them or not everything:
            continue
        (one,), (other,) = without, with_them
        share = float(rule.split(":")[1]) if ":" in rule else one["weights"] / everything
        measures = (percent([one["knn"]["1"]]), percent([one["probe"]["1"]]), f"{one['bytes']:,}")
        lines.append((rule, f"{100 * share:.1f} %", *measures, percent([other["accuracy"]]), f"{other['bytes']:,}"))
        kinds = ("random", "largest", "stem and blocks")
        for kind in kinds if rule == "all" else [kind for kind in kinds if rule.startswith(kind[:4])]:
            curves.setdefault(f"{kind}, no labels, k-NN", []).append((one["bytes"], one["knn"]["1"], None))
            curves.setdefault(f"{kind}, labels", []).append((other["bytes"], other["accuracy"], None))
    columns = ("scores that learn", "share", "k-NN", "probe", "bytes", "with labels", "bytes")
    if not lines:
        return ""
    path = folder / "imagenet-selective.svg"
    return with_curves(table(columns, lines, 1), curves, path, "the bytes of the masks, by rule")


def start_rows() -> str:
    """Return k-NN and probe of the raw backbone and of a mask without labels, by start."""
    lines = []
    for start in dict.fromkeys(one["start"] for one in trials(UNLABELLED, data=FIRST, steps=0)):
        raw, own = recorded(start, 0)[:1], recorded(start, SOME_STEPS)[:1]
        if raw and own:
            cells = [percent([one[measure]["1"]]) for measure in MEASURES for one in (raw[0], own[0])]
            lines.append([start, *cells, f"{own[0]['density']:.4f}"])
    columns = ["start", "k-NN, raw", "k-NN, mask", "probe, raw", "probe, mask", "density"]
    return table(columns, lines, 1) if lines else ""


def density_rows(folder: Path) -> str:
    """Return densities with labels and without, mean and deviation over the data sets, and draw them by layer."""
    groups: dict[str, dict[str, list[dict[str, float]]]] = {}
    for words in ("mask, default", "mask, as published"):
        for name in SETS:
            found = [one["result"]["layers"] for one in trials("densities", comparison=f"{name}: {words}")]
            if found:
                groups.setdefault(words, {})[name] = found
    for name in SETS:
        if found := [one["layers"] for one in recorded(data=name)]:
            groups.setdefault("without labels", {})[name] = found
    if not groups:
        return ""
    means, text = over_sets(groups)
    save_figure(density_figure(means), folder / "imagenet-densities.svg")
    return f"{text}\n![Density by layer, mean and deviation over the data sets](imagenet-densities.svg)\n"


def main() -> None:
    jobs: dict[str, Callable[[], object]] = {f"labels/{name}": partial(labels, name) for name in SETS}
    jobs |= {f"few/{name}": partial(few, name) for name in FEW_SETS}
    jobs |= {"longer": longer, "converged": converged, "cascades": cascades, "selective": selective}
    jobs |= {"starts": from_starts}
    command(__doc__, jobs, write_pages)


if __name__ == "__main__":
    main()
