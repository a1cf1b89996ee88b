"""Ways to learn a mask: methods, selective training, and budgets of bytes with LoRA's ranks.

    MASKPACK_DATA=… python -m benchmarks.methods                          all; some hours, resumable
    MASKPACK_DATA=… python -m benchmarks.methods sketch selective         some of it
    MASKPACK_DATA=… python -m benchmarks.methods sketch/topk bytes/mask   some lines
    python -m benchmarks.methods --write docs/results/methods.md         tables and curves of what is recorded

Every line of a table is a comparison of one baseline: rates chosen on validation rows with seed 0, then three seeds.
Banking77 is cut and trained as in `benchmarks.comparisons`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from maskpack.lab import bytes_figure, save_figure
from maskpack.training import TrainConfig

from .comparisons import compared, rows_of
from .measured import trials
from .report import NOTHING, command, percent, table, write_between
from .tasks import IMAGES, TEXTS, data_of, minilm, resnet

MARK = "python -m benchmarks.methods --write docs/results/methods.md"
NAME = "methods"
Curves = dict[str, list[tuple[float, float, float | None]]]
TITLES = {
    "sketch": "ResNet-20 on sketch",
    "minilm": "MiniLM on Banking77",
    "random": "ResNet-20 with random weights on MNIST",
    "long": "ResNet-20 on sketch, five times the steps",
}
ADAM = replace(IMAGES, optimizer="adam", head_lr=0.01)
UNSCALED = replace(IMAGES, scale=False)
MIXED = replace(TEXTS, precision="bf16")  # a third of the time, where processors have it
GROUPS = {"exclude": ("conv1.weight",)}  # its three input channels make no groups of four


@dataclass(frozen=True)
class Line:
    """Settings of one line of the table.

    Attributes:
        config, settings: how. rates: to choose from. baseline: of `maskpack compare`. words: its label.
        like: the line whose rate is taken. random: factory of a network of random weights, in place of the pretrained.
    """

    config: TrainConfig
    rates: tuple[float, ...]
    baseline: str = "mask"
    words: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""
    random: str = ""

    @property
    def whole(self) -> TrainConfig:
        return replace(self.config, **self.settings)


def method(config: TrainConfig, name: str, rates: tuple[float, ...], words: str = "", **settings: Any) -> Line:
    """Return the line of a method; `options` are its own."""
    options = settings.pop("options", {})
    return Line(config, rates, "mask", words or name, {"method": name, "method_options": options, **settings})


SKETCH = {
    "threshold-sgd": method(IMAGES, "threshold", (10.0, 25.0, 60.0), "threshold, SGD"),
    "threshold-adam": method(ADAM, "threshold", (0.01, 0.03, 0.1), "threshold, Adam"),
    "masked-head": method(IMAGES, "threshold", (10.0, 25.0, 60.0), "threshold, SGD, masked head", head_kind="masked"),
    "topk": method(IMAGES, "topk", (0.1, 1.0, 10.0), "topk, share 0.8", options={"share": 0.8, "init": "magnitude"}),
    "topk-half": method(IMAGES, "topk", (0.1, 1.0, 10.0), "topk, share 0.5", options={"init": "magnitude"}),
    "nm": method(ADAM, "nm", (0.001, 0.003, 0.01), "nm, 2:4", scale=False, **GROUPS),
    "gumbel": method(ADAM, "gumbel", (0.03, 0.1, 0.3), scale=False, clip=1.0),
    "flip": method(UNSCALED, "flip", (10.0, 25.0, 60.0)),
    "ternary": method(UNSCALED, "ternary", (10.0, 25.0, 60.0)),
    "edit": method(ADAM, "edit", (0.001, 0.003, 0.01), "edit, share 0.2", scale=False, options={"share": 0.2}),
    "edit-gentle": method(
        ADAM,
        "edit",
        (0.001, 0.003, 0.01),
        "edit, share 0.2, strength 0.01",
        scale=False,
        options={"share": 0.2, "strength": 0.01},
    ),
    "naive": method(IMAGES, "naive", (1.0,)),
}
RULES = {f"random-{share}": f"random:{share}" for share in (0.05, 0.1, 0.2, 0.4, 0.7)}
RULES |= {f"largest-{share}": f"largest:{share}" for share in (0.05, 0.1, 0.2, 0.4, 0.7)}
RULES |= {f"first-{stages}": f"first:{stages}" for stages in (1, 2, 3)}
SELECTIVE = {
    name: Line(IMAGES, (60.0,), words=rule, settings={"selective": rule})
    for name, rule in {**RULES, "all": "all"}.items()
}
MINILM = {
    "threshold": method(MIXED, "threshold", (0.02,)),
    "topk": method(MIXED, "topk", (0.001, 0.003), "topk, share 0.95", options={"share": 0.95, "init": "magnitude"}),
    "nm": method(MIXED, "nm", (0.003, 0.01), "nm, 2:4"),
    "gumbel": method(MIXED, "gumbel", (0.02, 0.06), clip=1.0),
    "flip": method(MIXED, "flip", (0.02, 0.06)),
    "ternary": method(MIXED, "ternary", (0.01, 0.03)),
    "edit": method(MIXED, "edit", (0.0003, 0.001), "edit, share 0.05", options={"share": 0.05}),
    "naive": method(MIXED, "naive", (1.0,)),
}
# a subnetwork of a random network with twice the channels and a quarter of its weights, beside the narrow one trained
FROM_RANDOM = replace(IMAGES, steps=480)
WIDE = {"init": "kaiming", "share": 0.25}
RANDOM = {
    "dense": Line(FROM_RANDOM, (0.03, 0.1, 0.3), "full", "trained whole", random="resnet20"),
    "narrow": replace(
        method(FROM_RANDOM, "topk", (1.0, 10.0, 30.0), "topk, share 0.5", options={"share": 0.5}), random="resnet20"
    ),
    "wide": replace(
        method(FROM_RANDOM, "topk", (), "twice the width, topk, share 0.25", options=WIDE),
        random="resnet20_wide",
        like="narrow",
    ),
}
FAR = replace(IMAGES, steps=1200)  # with the rates that are best in 240 steps
HALF = {"init": "magnitude"}
FAR_LINES = {
    "full": Line(FAR, (0.09,), "full", "full fine-tuning"),
    "threshold": method(FAR, "threshold", (60.0,), "threshold, SGD"),
    "topk-half": method(FAR, "topk", (1.0,), "topk, share 0.5", options=HALF),
}
LONG = replace(MIXED, steps=624)  # four epochs: masks need them to pass the probe
BUDGETS = (160_000, 80_000, 40_000, 20_000)
BYTES = {"mask": Line(LONG, (0.01, 0.02, 0.04), words="no budget")}
BYTES |= {
    f"mask-{budget // 1000}kB": Line(
        LONG, (), words=f"{budget // 1000} kB", settings={"bytes_budget": budget}, like="mask"
    )
    for budget in BUDGETS
}
BYTES |= {"lora-4": Line(LONG, (1e-3, 3e-3, 1e-2), "lora:4", "rank 4")}
BYTES |= {f"lora-{rank}": Line(LONG, (), f"lora:{rank}", f"rank {rank}", like="lora-4") for rank in (8, 2, 1)}
LINES: dict[str, dict[str, Line]] = {
    "sketch": SKETCH,
    "selective": SELECTIVE,
    "bytes": BYTES,
    "minilm": MINILM,
    "random": RANDOM,
    "long": FAR_LINES,
}
TEXT_GROUPS = ("bytes", "minilm")


def row_of(group: str, name: str) -> dict[str, Any] | None:
    """Return the row of a line whose trials are all recorded."""
    return next(iter(rows_of(NAME, f"{group}-{name}", [LINES[group][name].baseline])), None)


def run(group: str, only: str = "") -> None:
    """Run what is not recorded of a group, or one line of it."""
    texts = group in TEXT_GROUPS
    backbone, data = (minilm(), data_of("banking77")) if texts else (resnet(20), data_of("sketch"))
    for name, line in LINES[group].items():
        if line.random:
            reference = f"{Path(__file__).with_name('backbones.py')}:{line.random}"
            backbone, data = {"reference": reference, "random_weights": "signed-constant:0"}, data_of("mnist")
        if only in ("", name):
            like = row_of(group, line.like) if line.like else None
            rates = {line.baseline: (like["rate"],) if like else line.rates}
            compared(NAME, f"{group}-{name}", backbone, data, [line.baseline], rates, line.whole)


# --- the page --------------------------------------------------------------------------------------------------------


def write_pages(page: Path) -> None:
    """Write tables and curves of what is recorded between the page's markers."""
    for name, text in {
        "methods": "\n".join(methods(group) for group in TITLES),
        "selective": selective(page.parent),
        "bytes": budgets(page.parent),
    }.items():
        write_between(page, f"{MARK}: {name}", text)


def found(group: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a group that are recorded, by name, each with the density of its masks as text."""
    rows = {name: row for name in LINES[group] if (row := row_of(group, name))}
    for name, row in rows.items():
        every = [one["result"]["density"] for one in trials("densities", comparison=f"{group}-{name}")]
        row["density"] = f"{mean(every):.3f}" if every else "-"
    return rows


def masks(row: Mapping[str, Any]) -> float:
    """Return the bytes of an adapter or of LoRA matrices without the head."""
    return float(row["bytes"] - row["sizes"].get("head", 0))


def methods(group: str) -> str:
    """Return the table of the methods on one task."""
    rows = found(group)
    if not rows:
        return f"**{TITLES[group]}**: nothing is finished yet.\n"
    lines = []
    for name, row in rows.items():
        rate = "-" if row["rate"] is None else f"{row['rate']:g}"
        own = (percent(row["accuracies"]), row["density"], f"{masks(row):,.0f}", rate)
        lines.append((LINES[group][name].words, *own))
    columns = ("method", "accuracy", "density", "bytes without the head", "rate")
    return f"**{TITLES[group]}**\n\n{table(columns, lines, 1)}"


def selective(folder: Path) -> str:
    """Return the table of the rules that choose which scores learn."""
    lines: list[Sequence[str]] = []
    curves: Curves = {}
    for name, row in found("selective").items():
        size = row["sizes"]["masks"]
        words = LINES["selective"][name].words
        lines.append((words, percent(row["accuracies"]), row["density"], f"{size:,.0f}"))
        curves.setdefault(name.split("-")[0], []).append((size, row["accuracy"], row["deviation"]))
    columns = ("scores that learn", "accuracy", "density", "bytes of masks")
    return with_curves(table(columns, lines, 1), curves, folder / "selective.svg", "the bytes of the masks, by rule")


def budgets(folder: Path) -> str:
    """Return a table and draw a curve of accuracy over bytes: masks within budgets, LoRA's ranks."""
    lines: list[Sequence[str]] = []
    curves: Curves = {}
    for name, row in found("bytes").items():
        kind = "LoRA" if name.startswith("lora") else "mask"
        words = f"{kind}, {LINES['bytes'][name].words}"
        lines.append((words, percent(row["accuracies"]), f"{masks(row):,.0f}", row["density"]))
        curves.setdefault(kind, []).append((masks(row), row["accuracy"], row["deviation"]))
    columns = ("row", "accuracy", "bytes without the head", "density")
    return with_curves(table(columns, lines, 1), curves, folder / "bytes-budget.svg", "bytes, masks and LoRA")


def with_curves(text: str, curves: Curves, path: Path, over: str) -> str:
    """Draw curves, and return a table with a link to the picture."""
    if not curves:
        return NOTHING
    save_figure(bytes_figure(curves), path)
    return f"{text}\n![Accuracy over {over}]({path.name})\n"


def main() -> None:
    jobs = {group: partial(run, group) for group in LINES}
    single = {f"{group}/{name}": partial(run, group, name) for group, lines in LINES.items() for name in lines}
    command(__doc__, jobs | single, write_pages, default=list(LINES))


if __name__ == "__main__":
    main()
