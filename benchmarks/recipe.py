"""The search behind the default recipe of `maskpack train`: trials on validation rows, never on test rows.

    MASKPACK_DATA=… python -m benchmarks.recipe                       every stage; hours of one core, resumable
    MASKPACK_DATA=… python -m benchmarks.recipe rates                 one stage
    python -m benchmarks.recipe --write docs/results/defaults.md      the table of what is recorded

A trial holds a fifth of a pair's training rows out, by its seed, trains on the others, and records accuracy and loss on
those held out, with and without the masks. Each line of measured/recipe-search.jsonl has all settings that differ from
those of `BASE`. Data in `KEPT` are no part of the search.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from maskpack import load_backbone
from maskpack.backbone.classifier import predictions
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import all_names, named_parameters
from maskpack.lab.baselines.dense import quantized
from maskpack.lab.baselines.layers import Changed
from maskpack.preprocess import ImagePreprocess
from maskpack.training.budget import coded_bytes
from maskpack.training.config import TrainConfig
from maskpack.training.data.base import HELD, Data, Examples, hold_out, load_data, loader, readable
from maskpack.training.features import embed, fit_probe
from maskpack.training.learn import body_parameters, borrowed, learn_scores, learning_names
from maskpack.training.objectives.supervised import train_teacher
from maskpack.training.run_folder import RunFolder
from maskpack.training.scores import density, owner, put_on, without_scores
from maskpack.training.trainer import ObjectiveRun

from .measured import Trial, trial, trials
from .report import NOTHING, command, percent, table, write_between
from .tasks import DATA, RUNS, data_of, minilm, resnet

NAME = "recipe-search"
MARK = "python -m benchmarks.recipe --write docs/results/defaults.md"
REDUCED = 0.2  # rate of factors of rows, times that of scores
Settings = dict[str, Any]


def lite0(pixels: int) -> Settings:
    """Return the arguments of `load_backbone` for EfficientNet-Lite0."""
    weights = DATA / "weights/efficientnet_lite0_imagenet.safetensors"
    return {"reference": "timm/tf_efficientnet_lite0", "weights": weights, "image_size": pixels}


IMAGE_SETS = ("eurosat", "sign_digits", "cartoon", "tf_flowers")
SMALL_SETS = ("cartoon", "sketch", "photo", "eurosat", "sign_digits")  # shrunk to 32 pixels
TEXT_SETS = ("trec6", "banking77", "sst2")
PAIRS: dict[str, tuple[Callable[[], Settings], str]] = {
    **{f"lite0-{name}": (partial(lite0, 96), name) for name in IMAGE_SETS},
    **{f"lite0-64-{name}": (partial(lite0, 64), name) for name in IMAGE_SETS},  # less than half the time of 96 pixels
    **{f"resnet20-{name}": (partial(resnet, 20), name) for name in SMALL_SETS},
    **{f"minilm-{name}": (minilm, name) for name in TEXT_SETS},
}
KEPT = ("tf_flowers", "sst2")
# as before any search, without what differs by candidate
BASE = TrainConfig(batch_size=32, steps=200, lr=0.05, head_lr=0.01, top=1.0, train=(), bn="freeze")
NORMS: Settings = {"kind": "norms", "lr": 0.01}
MASK: Settings = {"kind": "mask", "top": 0.1, "train": ["norms"]}
ALL: Settings = {**MASK, "top": 1.0}


@dataclass
class InMemory(Examples):
    """Examples whose images are decoded and resized once."""

    images: dict[int, Any] = field(default_factory=dict)

    def __getitem__(self, index: Any) -> Any:
        row = self.indices[index]
        return (self.images[row], self.labels[row]) if self.images else super().__getitem__(index)


@cache
def loaded(pair: str) -> tuple[Backbone, Data]:
    """Return the backbone and the training rows of a pair; its test rows are not read."""
    make, name = PAIRS[pair]
    backbone, data = load_backbone(**make()), load_data(str(data_of(name)))
    assert data.train is not None
    train = data.train
    if isinstance(backbone.preprocess, ImagePreprocess):
        images = {row: resized(train[i][0], backbone.preprocess) for i, row in enumerate(train.indices)}
        train = InMemory(**{one.name: getattr(train, one.name) for one in fields(train)}, images=images)
    return backbone, replace(data, train=train, test=None)


def resized(image: Any, preprocess: ImagePreprocess) -> Any:
    """Return an image in the size before the crop; the transform then leaves its size alone."""
    from torchvision.transforms import v2

    mode = v2.InterpolationMode(preprocess.interpolation)
    steps = [v2.ToImage(), v2.Resize(preprocess.resize, interpolation=mode, antialias=True), v2.ToPILImage()]
    return v2.Compose(steps)(image)


def tried(pair: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded result of a trial, or run it.

    Args:
        settings: "kind": mask, rows (a mask and factors of rows), norms, full or probe; what differs from `BASE`.
    """
    found: dict[str, Any] = trial(NAME, {"pair": pair, **settings}, partial(measure, pair, settings))
    return found


def measure(pair: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train, and measure on the rows held out."""
    own = dict(settings)
    kind = own.pop("kind")
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    config = replace(BASE, **own)
    backbone, whole = loaded(pair)
    assert whole.train is not None
    train, held = hold_out(whole.train, HELD, config.seed)
    assert held is not None
    data = replace(whole, train=train)
    started, row_bits = time.perf_counter(), dict[str, float]()
    if kind == "probe":
        probe = fit_probe(*embed(backbone, train), len(data.class_names))
        x, y = embed(backbone, held)
        return scored(probe.logits(x), y) | {"seconds": time.perf_counter() - started}
    state = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    if config.objective == "distill":
        teacher = train_teacher(backbone, data, config, RUNS / NAME / f"{pair}-{config.seed}", resume=True)
        config = replace(config, objective_options={"teacher": str(teacher)})
    learn = {"mask": learn_scores, "rows": rows}.get(kind) or partial(learned, kind)
    try:
        with borrowed(backbone):
            run = ObjectiveRun(backbone, data, config, learn)
            at = run.train(RunFolder({}))
            module = run.objective.module
            factors = {name: one for name, one in run.scores.items() if name.endswith(".factors")}
            for name, one in factors.items():  # as they would be stored: 4 bits each
                rounded, bits = quantized(one.detach().view(1, -1), 4)
                one.data.copy_(rounded.view_as(one))
                row_bits[name] = bits
            batches = partial(loader, held, backbone.preprocess, backbone.tokenizer, batch_size=64)
            found = {"train_loss": at.metrics["train_loss"], "trained_seconds": time.perf_counter() - started}
            found |= scored(*predictions(module, readable(batches())))
            if factors:
                found["row_bytes"] = math.ceil(sum(row_bits.values()) / 8)
            if run.scored:
                found["density"] = density(run.scored)
                found["mask_bytes"] = coded_bytes(one.mask() for one in run.scored)
                with without_scores(backbone.model):
                    alone = scored(*predictions(module, readable(batches())))
                found |= {f"{name}_without_masks": value for name, value in alone.items()}
    finally:
        backbone.model.load_state_dict(state)
    return found | {"seconds": time.perf_counter() - started}


def learned(kind: str, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
    """Return the parameters that learn in a baseline."""
    body = body_parameters(backbone)
    return body if kind == "full" else {name: body[name] for name in learning_names(backbone.model, [kind])}


def rows(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
    """Attach scores and a factor for each output of the masked layers; return both.

    Nothing stores such factors: it is tried whether they are worth it. They learn at `REDUCED` times the rate of
    scores. Where a BatchNorm with trained scale and shift and frozen statistics follows, they change nothing that these
    could not, and where its statistics adapt, nothing at all.
    """
    model, weights = backbone.model, named_parameters(backbone.model)
    tied, found = all_names(model), dict(learn_scores(backbone, config))
    for name in list(found):
        transposed = type(owner(model, name)[0]).__name__ == "Conv1D"
        outputs = weights[name].shape[-1 if transposed else 0]

        def effect(rows: Tensor, factors: Tensor) -> Tensor:
            return rows * (1 + REDUCED * factors)

        changed = Changed({"factors": torch.zeros(outputs, 1)}, effect, transposed)
        put_on(model, tied[name], changed, {})
        found[f"{name}.factors"] = changed.learned["factors"]
    return found


def scored(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy and loss."""
    right = float((logits.argmax(1) == labels).double().mean())
    return {"accuracy": right, "loss": float(nn.functional.cross_entropy(logits, labels))}


def stage(pairs: Sequence[str], *candidates: Settings) -> list[tuple[str, Settings]]:
    """Return the trials of all candidates on pairs."""
    return [(pair, one) for pair in pairs for one in candidates]


def mixed(*candidates: Settings) -> list[Settings]:
    """Return candidates in mixed precision, which halves the time of a transformer on processors that have bfloat16."""
    return [{**one, "precision": "bf16"} for one in candidates]


def better(usual: Settings) -> list[Settings]:
    """Return candidates that may give masks more accuracy for their bytes, and the usual settings, with two seeds."""
    found = [
        usual,
        {**usual, "top": 0.1},
        {**usual, "method": "flip"},
        {**usual, "method": "flip", "top": 0.1},
        {**usual, "method": "topk", "method_options": {"share": 0.95, "init": "magnitude", "progressive": True}},
        {**usual, "method_options": {"init": 0.5}},
        {**usual, "bytes_budget": 10_000},
        {**usual, "top": 0.3, "bytes_budget": 10_000},
        {**usual, "train": ["norms", "biases"]},
        {**usual, "scale": True},
        {**usual, "kind": "rows"},
        {**usual, "objective": "distill"},
        {**usual, "steps": 600},
        {**NORMS, "bn": usual["bn"]},
        {**NORMS, "bn": usual["bn"], "steps": 600},
    ]
    return [{**one, "seed": seed} for seed in (0, 1) for one in found]


STAGES: dict[str, list[tuple[str, Settings]]] = {
    "probe": stage(tuple(PAIRS), {"kind": "probe"}),
    "small": stage(
        ("resnet20-cartoon",),
        {"kind": "probe"},
        NORMS,
        MASK,
        {**MASK, "bn": "adapt"},
        {**NORMS, "bn": "adapt"},
        {**MASK, "head_start": "probe"},
        {**MASK, "top": 1.0},
        {"kind": "full", "lr": 0.001},
        {"kind": "full", "lr": 0.001, "bn": "adapt"},
        {**MASK, "lr": 0.02},
        {**MASK, "train_lr": 0.003},
    ),
    "distances": stage(
        ("lite0-64-eurosat",), {**MASK, "lr": 0.02}, {**MASK, "lr": 0.02, "head_start": "probe"}, {**MASK, "top": 1.0}
    ),
    # a budget that is never reached: statistics are taken anew at the end
    "statistics": stage(
        ("lite0-64-eurosat", "resnet20-cartoon"),
        {**MASK, "bn": "adapt", "bytes_budget": 10_000_000},
        {**MASK, "bn": "adapt"},
        {**MASK, "top": 1.0, "bn": "adapt"},
    ),
    # the rates of a run of another length: of scores by their distance, of norms and head as they are or not
    "steps": stage(
        ("resnet20-cartoon",),
        *[
            {**one, "steps": steps}
            for steps, one in (
                (100, NORMS),
                (100, {**ALL, "lr": 0.1}),
                (100, {**ALL, "lr": 0.1, "head_start": "probe"}),
                (100, {**NORMS, "head_start": "probe"}),
                (200, {**ALL, "head_start": "probe"}),
                (100, {**ALL, "lr": 0.05}),
                (1000, {**ALL, "lr": 0.01}),
                (1000, {**ALL, "lr": 0.05}),
                (1000, NORMS),
                (1000, {**ALL, "lr": 0.01, "train_lr": 0.003, "head_lr": 0.003}),
                (1000, {"kind": "full", "lr": 0.001}),
            )
        ],
    ),
    "text": stage(
        ("minilm-trec6",),
        {"kind": "probe"},
        *mixed(
            NORMS,
            MASK,
            {**MASK, "head_start": "probe"},
            {**MASK, "top": 1.0},
            {**NORMS, "lr": 0.003},
            {"kind": "full", "lr": 0.0001},
            {**MASK, "train": []},
            {**MASK, "lr": 0.02},
        ),
    ),
    "image": stage(
        ("lite0-64-eurosat",),
        {"kind": "probe"},
        NORMS,
        MASK,
        {**MASK, "head_start": "probe"},
        {**MASK, "top": 1.0},
        {"kind": "full", "lr": 0.001},
        {**MASK, "lr": 0.02},
        {**MASK, "train_lr": 0.003},
    ),
    "adapted": stage(
        ("resnet20-cartoon",),
        *[
            {**one, "bn": "adapt", "steps": steps}
            for steps, one in (
                (100, {**ALL, "lr": 0.1}),
                (100, {**ALL, "lr": 0.2}),
                (100, {**ALL, "lr": 0.1, "head_start": "probe"}),
                (100, {"kind": "full", "lr": 0.001}),
                (200, {**ALL, "lr": 0.2}),
                (1000, ALL),
                (1000, {**ALL, "lr": 0.1}),
                (1000, {"kind": "full", "lr": 0.001}),
            )
        ],
    ),
    # a small network, on many data sets
    "wide": stage(
        tuple(f"resnet20-{name}" for name in SMALL_SETS),
        {"kind": "probe"},
        NORMS,
        {**NORMS, "bn": "adapt"},
        ALL,
        {**ALL, "bn": "adapt"},
        {**ALL, "bn": "adapt", "head_start": "probe"},
        {**ALL, "lr": 0.1},
        {"kind": "full", "lr": 0.001},
        {"kind": "full", "lr": 0.001, "bn": "adapt"},
        {**ALL, "bn": "adapt", "lr": 0.1},
    ),
    # a small network without norms of its own, or with slower ones
    "bare": stage(
        tuple(f"resnet20-{name}" for name in SMALL_SETS),
        {**ALL, "bn": "adapt", "lr": 0.1, "train": []},
        {**ALL, "bn": "adapt", "lr": 0.1, "train_lr": 0.003},
        {**ALL, "bn": "adapt", "lr": 0.1, "train_lr": 0.001},
        {**ALL, "bn": "adapt", "lr": 0.2, "train": []},
    ),
    "more": stage(("lite0-eurosat", "lite0-sign_digits", "lite0-cartoon"), NORMS, MASK, ALL)
    + stage(("minilm-banking77",), *mixed(NORMS, MASK, ALL)),
    "large": stage(
        ("lite0-sign_digits", "lite0-cartoon"),
        {**ALL, "head_start": "probe"},
        {**ALL, "steps": 100},
        {**ALL, "steps": 100, "head_start": "probe"},
        {**ALL, "steps": 100, "lr": 0.1},
        {**NORMS, "steps": 100},
        {**ALL, "lr": 0.1},
        {**ALL, "bn": "adapt"},
        {"kind": "full", "lr": 0.001},
        {"kind": "full", "lr": 0.0003},
        {"kind": "full", "lr": 0.001, "steps": 100},
        {**ALL, "lr": 0.03},
        {**ALL, "top": 0.3},
    ),
    "better": stage(("resnet20-cartoon", "resnet20-eurosat"), *better({**ALL, "bn": "adapt", "lr": 0.1}))
    + stage(("lite0-64-sign_digits", "lite0-64-eurosat"), *better({**ALL, "bn": "freeze", "lr": 0.05})),
    # when everything is chosen, once
    "check": stage(
        tuple(pair for pair in PAIRS if pair.endswith(KEPT) and "64" not in pair),
        NORMS,
        MASK,
        {"kind": "full", "lr": 0.001},
        {"kind": "full", "lr": 0.0001},
    ),
}


def write_pages(page: Path) -> None:
    """Write the table of the trials between the page's markers."""
    write_between(page, MARK, search_table() or NOTHING)


def search_table() -> str:
    """Return one line for each pair, number of steps and candidate, seeds together."""
    rows: dict[tuple[str, ...], list[Trial]] = {}
    for one in sorted(trials(NAME), key=lambda one: (list(PAIRS).index(one["pair"]), one.get("steps", BASE.steps))):
        steps = "-" if one["kind"] == "probe" else str(one.get("steps", BASE.steps))
        rows.setdefault((one["pair"], steps, words(one)), []).append(one["result"])
    lines = []
    for about, found in rows.items():
        cells = [percent([one["accuracy"] for one in found]), f"{mean(one['loss'] for one in found):.3f}"]
        if "mask_bytes" in found[0]:
            cells.append(percent([one["accuracy_without_masks"] for one in found]))
            cells.append(f"{mean(one['density'] for one in found):.3f}")
            cells.append(f"{mean(one['mask_bytes'] for one in found):,.0f}")
        lines.append([*about, *cells, *["-"] * (5 - len(cells))])
    columns = ("pair", "steps", "trained", "accuracy", "loss", "without the masks", "density", "bytes of masks")
    return table(columns, lines, 3) if lines else ""


def words(one: Mapping[str, Any]) -> str:
    """Return a candidate in words."""
    if one["kind"] == "probe":
        return "linear probe"
    parts = ["full" if one["kind"] == "full" else "norms" if one["kind"] == "norms" else one.get("method", BASE.method)]
    if one["kind"] == "mask":
        top = one.get("top", BASE.top)
        parts.append("all scores" if top == 1 else f"top {top:g}")
        parts += [f"+ {', '.join(one['train'])}"] if one.get("train") else []
    parts.append(f"at {one['lr']:g}" if "lr" in one else f"at {BASE.lr:g}")
    shown = ("kind", "pair", "method", "top", "train", "lr", "steps", "seed", "result")
    parts += [f"{name} {value}" for name, value in one.items() if name not in shown]
    return ", ".join(parts).replace(", +", " +")


def main() -> None:
    jobs = {name: partial(run_stage, name) for name in STAGES}
    command(__doc__, jobs, write_pages)


def run_stage(name: str) -> None:
    """Run the trials of a stage that are not recorded."""
    for pair, settings in STAGES[name]:
        tried(pair, settings)


if __name__ == "__main__":
    main()
