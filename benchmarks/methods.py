"""Ways to learn a mask: methods side by side, some of the scores, a budget of bytes beside LoRA's ranks.

    MASKPACK_DATA=… python -m benchmarks.methods                          all, some hours; what is finished is read back
    MASKPACK_DATA=… python -m benchmarks.methods sketch selective         some of it
    MASKPACK_DATA=… python -m benchmarks.methods sketch/topk bytes/mask   some lines
    python -m benchmarks.methods --write docs/results.md                  tables and curves from what is finished

Every line is a comparison of one row in a folder of its own in benchmarks/measured/methods: rates chosen on validation
rows with seed 0, then three seeds. Banking77 is cut and trained as in `benchmarks.comparisons`.
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from maskpack import inspect_adapter
from maskpack.training import TrainConfig
from maskpack.training.run_folder import write_json

from .comparisons import DATA, IMAGES, ROOT, TEXTS, measured, minilm, resnet

MEASURED = ROOT / "measured" / "methods"
ADAM = replace(IMAGES, optimizer="adam", head_lr=0.01)
UNSCALED = replace(IMAGES, scale=False)
MIXED = replace(TEXTS, precision="bf16")  # a third of the time, where processors have it
GROUPS = {"exclude": ("conv1.weight",)}  # its three input channels make no groups of four


@dataclass(frozen=True)
class Line:
    """What is trained.

    Attributes:
        config, settings: how. rates: to choose from. row: of `maskpack compare`. words: its label.
        like: the line whose rate is taken.
    """

    config: TrainConfig
    rates: tuple[float, ...]
    row: str = "mask"
    words: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""

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
LINES: dict[str, dict[str, Line]] = {"sketch": SKETCH, "selective": SELECTIVE, "bytes": BYTES, "minilm": MINILM}
TEXT_GROUPS = ("bytes", "minilm")


def run(wanted: str, output: Path = MEASURED) -> None:
    """Run what is missing of a group, or one line of it."""
    group, _, only = wanted.partition("/")
    texts = group in TEXT_GROUPS
    backbone = minilm(output.parent) if texts else resnet(20)
    data = {"reference": DATA / ("data/banking77" if texts else "data/pacs/sketch")}
    for name, line in LINES[group].items():
        folder = output / f"{group}-{name}"
        path = folder / "line.json"
        if path.exists() or only not in ("", name):
            continue
        rates = line.rates
        if line.like:
            rates = (json.loads((output / f"{group}-{line.like}" / "line.json").read_text())["rate"],)
        (row,) = measured(folder.name, backbone, data, output, (line.row,), {line.row: rates}, line.whole)["rows"]
        adapters = [
            inspect_adapter(path)["sets"]["default"] for path in sorted(folder.glob("mask/seed-*/*.safetensors"))
        ]
        write_json(path, {**row, "densities": [one["density"] for one in adapters]})
        print(f"{folder.name}: {row['accuracy']:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(LINES)}, or group/line; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="only write the tables into this page")
    given = parser.parse_args()
    if given.write is not None:
        from .method_pages import write_pages

        write_pages(MEASURED, given.write)
        return
    known = {*LINES, *(f"{group}/{name}" for group, lines in LINES.items() for name in lines)}
    if unknown := [name for name in given.groups if name not in known]:
        parser.error(f"there is no group or line {unknown[0]!r}; known: {', '.join(sorted(known))}")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads)
    for wanted in given.groups or LINES:
        run(wanted)


if __name__ == "__main__":
    main()
