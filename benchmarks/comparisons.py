"""Masks and every alternative: the comparisons, cascades and ablations of docs/results/comparison.md.

    MASKPACK_DATA=… python -m benchmarks.comparisons                      all; some hours, resumable
    MASKPACK_DATA=… python -m benchmarks.comparisons cartoon sketch       some of them
    python -m benchmarks.comparisons --write docs/results/comparison.md     tables and pictures of what is recorded

Trials are recorded in benchmarks/measured; checkpoints and adapters are in runs/.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from maskpack import inspect_adapter, load_adapter, load_backbone, save_adapter
from maskpack.adapter.card import parameter_densities
from maskpack.lab import compare, density_figure, label_figure, save_figure
from maskpack.lab.baselines.base import find_baseline
from maskpack.lab.comparison import markdown, result_file, summaries
from maskpack.training import TrainConfig, load_data, train_cascade
from maskpack.training.evaluate import RAW, cascade_table, plain_and_whitened
from maskpack.training.features import disjoint, embed
from maskpack.training.run_folder import write_json

from .measured import trial, trials
from .report import NOTHING, command, percent, table, write_between
from .tasks import IMAGES, PACS, RUNS, SEEDS, TEXTS, VIEWS, data_of, minilm, resnet

MARK = "python -m benchmarks.comparisons --write docs/results/comparison.md"
NAME = "comparisons"
SHARES = (1.0, 0.1, 0.04, 0.01)
FIRST = "cartoon"  # learning rates are chosen here, and taken for the other data sets of the same optimiser
IMAGE_SETS = (*PACS, "mnist")
EPOCHS = 8  # of cascades, whose clusters differ in size: about the 240 steps of the others
FEW = ("probe", "full", "mask", "self-supervised")
TABLE = ("knn", "probe", "full", "lora:4", "mask")
TEXT_TABLE = ("knn", "probe", "full", "lora:8", "mask")
TEXT_RATES = {"mask": (0.02, 0.04, 0.08), "full": (3e-5, 1e-4, 3e-4), "lora:8": (1e-3, 3e-3, 1e-2)}
Layers = Sequence[Mapping[str, float]]  # density by layer, of several masks
NORMS = "*bn*.weight"
BIASES = "*bn*.bias"
WEIGHTS = "*conv*.weight"
# name -> (what differs, settings, random start)
ABLATIONS: dict[str, tuple[str, TrainConfig, bool]] = {
    "prototypes-20": ("20 prototypes", replace(IMAGES, objective_options={**VIEWS, "prototypes": 20}), False),
    "prototypes-200": ("200 prototypes", replace(IMAGES, objective_options={**VIEWS, "prototypes": 200}), False),
    "masked-norms": ("norm weights masked too", replace(IMAGES, include=(WEIGHTS, NORMS)), False),
    "masked-all": ("norm weights and biases masked too", replace(IMAGES, include=(WEIGHTS, NORMS, BIASES)), False),
    "frozen-statistics": ("BatchNorm statistics frozen", replace(IMAGES, bn="freeze"), False),
    "random-start": ("random weights", IMAGES, True),
}


def own_seeds(baseline: str, share: float, seeds: Sequence[int]) -> Sequence[int]:
    """Return the seeds of a baseline: one if it does not depend on the seed."""
    return seeds if share < 1 or find_baseline(baseline).seeded else seeds[:1]


def mask_rate(name: str, config: TrainConfig) -> float:
    """Return the default rate of the scores, by the network that the name of a comparison begins with."""
    assert config.steps is not None
    return config.score_lr(config.steps, 270_000 if name.startswith("resnet20") else 3_000_000)


def compared(
    experiment: str,
    name: str,
    backbone: Mapping[str, Any],
    data: Path,
    baselines: Iterable[str],
    rates: Mapping[str, Sequence[float]],
    config: TrainConfig,
    shares: Sequence[float] = (1.0,),
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Run the baselines of a comparison that are not recorded, and record their trials, densities and settings."""

    def told(event: Mapping[str, Any]) -> None:
        if "settings" not in event:  # of a trial inside, as those of --auto
            return
        settings, adapter = event["settings"], Path(event["folder"]) / "mask.safetensors"
        trial(experiment, {"comparison": name, **settings}, lambda: event["result"])
        if settings["labels_fraction"] == 1 and not settings["search"] and adapter.exists():
            one = inspect_adapter(adapter)["sets"]["default"]
            found = {"density": one["density"], "layers": dict(parameter_densities(one))}
            about = {"comparison": name, "baseline": settings["baseline"], "seed": settings["seed"]}
            trial("densities", about, lambda: found)

    for baseline in baselines:
        wanted = {(share, seed) for share in shares for seed in own_seeds(baseline, share, seeds)}
        found = trials(experiment, comparison=name, baseline=baseline, search=False)
        if wanted <= {(one["labels_fraction"], one["seed"]) for one in found}:
            continue
        for one in trials(experiment, comparison=name, baseline=baseline):  # of runs whose folders are gone
            of = (one["seed"], one["labels_fraction"], one["rate"], one.get("bn"), one["search"])
            path = result_file(RUNS / experiment / name, baseline, *of)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, one["result"])
        whole = compare(
            backbone,
            {"reference": data},
            RUNS / experiment / name,
            baselines=[baseline],
            seeds=seeds,
            fractions=shares,
            rates={baseline: rates[baseline]} if baseline in rates else {},
            config=config,
            report=told,
        )
        about = {key: value for key, value in whole.items() if key != "rows"}
        trial("settings", {"experiment": experiment, "comparison": name}, partial(dict, about))


def rows_of(
    experiment: str,
    name: str,
    baselines: Iterable[str],
    shares: Sequence[float] = (1.0,),
    seeds: Sequence[int] = SEEDS,
) -> list[dict[str, Any]]:
    """Return the rows of a comparison whose trials are all recorded, as `compare` returns them."""
    rows = []
    for baseline in baselines:
        own = trials(experiment, comparison=name, baseline=baseline)
        tried = {(one["rate"], one.get("bn", "")): one["result"]["accuracy"] for one in own if one["search"]}
        if tried:
            best = max(sorted(tried), key=lambda settings: tried[settings])
            own = [one for one in own if (one["rate"], one.get("bn", "")) == best]
        for share in shares:
            wanted = own_seeds(baseline, share, seeds)
            found = {one["seed"]: one for one in own if not one["search"] and one["labels_fraction"] == share}
            if all(seed in found for seed in wanted):
                results = [found[seed]["result"] for seed in wanted]
                first = found[wanted[0]]
                named = summaries(baseline, share, first["rate"], wanted, results)
                rows += [{**row, "bn": first.get("bn")} for row in named]
    return rows


def chosen() -> dict[str, list[float]]:
    """Return the learning rates that were chosen on the first data set."""
    rows = rows_of(NAME, FIRST, dict.fromkeys([*TABLE, *FEW]))
    return {row["method"]: [row["rate"]] for row in rows if row["rate"] is not None}


def images(name: str) -> None:
    """Run the comparison on one data set of images, with few labels and with all."""
    rates = {} if name == FIRST else chosen()
    compared(NAME, name, resnet(20), data_of(name), FEW, rates, IMAGES, SHARES)
    compared(NAME, name, resnet(20), data_of(name), TABLE, rates, IMAGES)


def deeper(name: str) -> None:
    """Run the comparison on one domain with the ResNet of 32 layers."""
    compared(NAME, f"resnet32-{name}", resnet(32), data_of(name), TABLE, chosen(), IMAGES)


def texts() -> None:
    """Run the comparison on Banking77."""
    compared(NAME, "banking77", minilm(), data_of("banking77"), TEXT_TABLE, TEXT_RATES, TEXTS)


def cascades() -> None:
    """Train cascades on the first data set, one for each seed, and measure the rows that need no training."""
    trial("cascades", {"control": "raw"}, raw)
    for seed in SEEDS:
        rate = chosen()["self-supervised"][0]
        config = replace(IMAGES, objective="self-supervised", lr=rate, seed=seed, steps=None, epochs=EPOCHS)
        made = partial(cascade, resnet(20), FIRST, config, RUNS / NAME / f"cascade-{seed}")
        trial("cascades", {"seed": seed}, made)


def raw() -> dict[str, Any]:
    """Return the rows of the backbone without a mask, which the recorded tables of cascades lack."""
    backbone, data = load_backbone(**resnet(20)), load_data(str(data_of(FIRST)))
    (x, y), (test_x, test_y) = (embed(backbone, split, cache=False) for split in disjoint(data))
    classes, rows = len(data.class_names), []
    for row in plain_and_whitened(x, y, test_x, test_y, classes, x.shape[1]):
        width = row["dimensions"]
        size = classes * (width + 1) + (x.shape[1] + width * x.shape[1] + width if row["whitened"] else 0)
        rows.append({"embedding": RAW, "passes": 1, "steps": 0, **row, "bytes": 4 * size})
    return {"rows": rows}


def cascade(start: Mapping[str, Any], name: str, config: TrainConfig, folder: Path, experts: int = 3) -> dict[str, Any]:
    """Train a cascade without labels and return its table."""
    data, unlabelled = (load_data(str(data_of(name)), labelled=labelled) for labelled in (True, False))
    backbone, run = load_backbone(**start), folder / "training"
    only = replace(unlabelled, test=None)
    result = train_cascade(backbone, only, config, experts=experts, output=run, resume=run.exists())
    path = folder / "cascade.safetensors"
    save_adapter(path, result.parts, result.base, result.about, weights=backbone.model, cascade=result.cascade)
    return cascade_table(backbone, load_adapter(path), data)


def ablations() -> None:
    """Train the changes of the self-supervised mask on the first data set, one seed each, and probe random weights."""
    rates = {"self-supervised": chosen()["self-supervised"]}
    for name, (_, config, random_start) in ABLATIONS.items():
        own = (resnet(20, random_start), data_of(FIRST), ablated(name), rates, config)
        compared(NAME, f"ablation-{name}", *own, seeds=SEEDS[:1])


def ablated(name: str) -> tuple[str, ...]:
    return ("probe", "self-supervised") if ABLATIONS[name][2] else ("self-supervised",)


# --- the page --------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write the tables of what is recorded between the page's markers, and pictures into the page's folder."""
    for name, text in {
        "few labels": few_labels(page.parent),
        "cascades": cascade_rows(),
        "tables": tables(),
        "ablations": ablation_rows(),
        "densities": densities(page.parent),
    }.items():
        write_between(page, f"{MARK}: {name}", text or NOTHING)


def few_labels(folder: Path) -> str:
    """Return the table of all data sets, and a picture for each."""
    lines, pictures = [], []
    for name in IMAGE_SETS:
        methods: dict[str, list[dict[str, Any]]] = {}
        for row in rows_of(NAME, name, FEW, SHARES):
            methods.setdefault(row["method"], []).append(row)
        lines += [[name, method, *(percent(row["accuracies"]) for row in own)] for method, own in methods.items()]
        if methods:
            curves = {
                method: [(row["labels_fraction"], row["accuracy"], row["deviation"]) for row in own]
                for method, own in methods.items()
            }
            save_figure(label_figure(curves), folder / f"few-labels-{name}.svg")
            pictures.append(f"\n![Accuracy over the share of the labels, {name}](few-labels-{name}.svg)\n")
    columns = ["data", "baseline", *(f"{100 * share:g} %" for share in SHARES)]
    return table(columns, lines, 2) + "".join(pictures) if lines else ""


def tables() -> str:
    """Return the tables at all labels, of every backbone and data set."""
    texts = []
    for backbone, prefix, names, baselines in (
        ("ResNet-20", "", IMAGE_SETS, TABLE),
        ("ResNet-32", "resnet32-", PACS, TABLE),
        ("all-MiniLM-L6-v2", "", ("banking77",), TEXT_TABLE),
    ):
        for name in names:
            if rows := rows_of(NAME, prefix + name, baselines):
                texts.append(f"**{backbone}, {name}**\n\n{markdown(rows)}")
    return "\n".join(texts)


def cascade_rows(experiment: str = "cascades") -> str:
    """Return the rows of cascade tables, means over the seeds; those without a seed, where there are any, first."""
    controls = [row for one in trials(experiment, control="raw") for row in one["result"]["rows"]]
    found = [one["result"]["rows"] for one in trials(experiment, control=None)]
    lines = []
    for several in [*([row] for row in controls), *zip(*found, strict=True)]:
        first = several[0]
        name = first["embedding"] + (", whitened" if first["whitened"] else "")
        alone = first["embedding"] == RAW  # the same with every seed
        accuracies = [percent([row[key] for row in (several[:1] if alone else several)]) for key in ("knn", "probe")]
        numbers = [f"{mean(row[key] for row in several):,.0f}" for key in ("dimensions", "passes", "steps", "bytes")]
        lines.append([name, numbers[0], *accuracies, *numbers[1:]])
    columns = ["embedding", "dimensions", "k-NN", "probe", "passes", "steps", "bytes"]
    note = f"\nMeans ± sample deviations over {len(found)} seeds.\n"
    return table(columns, lines, 1) + note if found else ""


def ablation_rows() -> str:
    """Return a row for each change of the self-supervised mask, and the rows that it is compared with."""
    plain = rows_of(NAME, FIRST, FEW)
    lines = [[f"{row['method']}, as above", percent(row["accuracies"][:1])] for row in plain]
    for name, (words, _, _) in ABLATIONS.items():
        for row in rows_of(NAME, f"ablation-{name}", ablated(name), seeds=SEEDS[:1]):
            lines.append([f"{row['method']}: {words}", percent(row["accuracies"])])
    return table(["baseline", "accuracy"], lines, 1) if lines else ""


def densities(folder: Path) -> str:
    """Return densities by objective, mean and deviation over the data sets, and draw them by layer."""
    groups: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in sorted(IMAGE_SETS):
        for one in trials("densities", comparison=name):
            groups.setdefault(one["baseline"], {}).setdefault(name, []).append(one["result"]["layers"])
    if not groups:
        return ""
    means, text = over_sets(groups)
    save_figure(density_figure(means), folder / "density-objectives.svg")
    return f"{text}\n![Density by layer, mean and deviation over the data sets](density-objectives.svg)\n"


def over_sets(groups: Mapping[str, Mapping[str, Layers]]) -> tuple[dict[str, list[dict[str, float]]], str]:
    """Return the mean over seeds of each data set's densities by layer, and a table.

    Args:
        groups: density by layer of each seed, by data set, by what the masks were trained with.
    """
    means, lines = dict[str, list[dict[str, float]]](), []
    for words, sets in groups.items():
        for name, seeds in sets.items():
            own = {layer: mean(one[layer] for one in seeds) for layer in seeds[0]}
            means.setdefault(words, []).append(own)
            lines.append([words, name, *density_cells([own])])
        lines.append([words, f"all {len(sets)}", *density_cells(means[words])])
    columns = ("trained", "data", "mean of the layers", "least", "of the layer")
    return means, table(columns, lines, 2) + "\nBehind ± is the sample deviation of the data sets.\n"


def density_cells(found: Layers) -> list[str]:
    """Return cells with densities over data sets: of all layers, of the sparsest layer, and that layer's name."""
    least = min(found[0], key=lambda layer: mean(one[layer] for one in found))
    return [*(percent(each) for each in ([mean(one.values()) for one in found], [one[least] for one in found])), least]


def main() -> None:
    jobs: dict[str, Callable[[], None]] = {name: partial(images, name) for name in IMAGE_SETS}
    jobs |= {"cascades": cascades, "ablations": ablations}
    jobs |= {f"resnet32-{name}": partial(deeper, name) for name in PACS} | {"banking77": texts}
    command(__doc__, jobs, write_pages)


if __name__ == "__main__":
    main()
