"""docs/gallery: adapters trained on real data by the commands that the page shows, with cards, reports and pictures.

A training whose adapter is in runs/gallery is not run again; delete its folder to repeat it.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskpack import inspect_adapter
from maskpack.adapter.card import lora_sizes, metrics
from maskpack.adapter.read import CONFIG_FILE, MODEL_FILE

from .measured import FOLDER, rewrite
from .tasks import DATA, RUNS, minilm

GALLERY = Path(__file__).parent.parent / "docs" / "gallery"
TRAINED = RUNS / "gallery"
RESNET20 = "--backbone benchmarks/backbones.py:resnet20 --weights $MASKPACK_DATA/weights/resnet20_cifar10.safetensors"
LITE0 = "--backbone timm/tf_efficientnet_lite0 --weights $MASKPACK_DATA/weights/efficientnet_lite0_imagenet.safetensors"
MINILM = "--backbone hf/$MINILM"
# name: what it is, how its backbone is given, how it is trained
ADAPTERS: dict[str, tuple[str, str, str]] = {
    "resnet20-cartoon": (
        "ResNet-20 of CIFAR-10 on the cartoons of PACS, 32 pixels",
        RESNET20,
        "--data $MASKPACK_DATA/data/pacs/cartoon --steps 400 --bn adapt",
    ),
    "lite0-flowers": (
        "EfficientNet-Lite0 of ImageNet on photographs of flowers, 64 pixels",
        LITE0,
        "--data $MASKPACK_DATA/data/tf_flowers --image-size 64 --steps 120",
    ),
    "minilm-trec6": (
        "all-MiniLM-L6-v2 on kinds of questions",
        MINILM,
        "--data $MASKPACK_DATA/data/trec6 --label-column label --steps 100",
    ),
}
PICTURES = ("density.svg", "confusion.svg")
COLUMNS = (
    *("adapter", "base", "accuracy", "linear probe", "masks taken out", "density"),
    *("masks, bytes", "file, bytes", "LoRA rank 1, bytes", "LoRA rank 8, bytes"),
)


def commands(name: str) -> dict[str, str]:
    """Return the command lines that make an entry, by what they make."""
    _, backbone, training = ADAPTERS[name]
    place, data = f"runs/gallery/{name}", shlex.split(training)[1]
    return {
        "train": f"maskpack train {backbone} {training} --output {place}",
        "report": f"maskpack report ./{place} {backbone} --data {data} --examples 0 --overwrite --output {place}.html",
        "density": f"maskpack plot density {name}=./{place} --output {place}/density.svg",
        "eval": f"maskpack eval ./{place} {backbone} --data {data} --json > {place}/eval.json",
        "confusion": f"maskpack plot confusion {place}/eval.json --output {place}/confusion.svg",
    }


def make(name: str) -> None:
    """Write report and pictures of an entry of docs/gallery; train its adapter if there is none."""
    trained, shown = TRAINED / name, GALLERY / name
    environment = {**os.environ, "MASKPACK_DATA": str(DATA), "MINILM": minilm()["reference"].removeprefix("hf/")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for kind, line in commands(name).items():
        if kind != "train" or not (trained / MODEL_FILE).exists():
            subprocess.run(["bash", "-c", line], env=environment, check=True)
    shown.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(f"{trained}.html", shown / "report.html")
    for file in (MODEL_FILE, CONFIG_FILE, "README.md", *PICTURES):
        shutil.copyfile(trained / file, shown / file)


def page() -> Iterator[str]:
    """Yield the lines of docs/gallery/index.md, from the adapters that are there."""
    yield "# Gallery\n"
    yield (
        "Adapters that `make gallery` trained on real data with the tool's own commands, one run each. A folder has "
        "the adapter, its card, its report\n(`maskpack report`) and pictures. The backbones are not here: an adapter "
        "names its base, and its digest decides whether a model is that base.\n"
    )
    found = {name: inspect_adapter(GALLERY / name) for name in ADAPTERS if (GALLERY / name / MODEL_FILE).exists()}
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}"
    for name, one in found.items():
        yield f"| [{name}]({name}/README.md) | {one['base']['id']} | {' | '.join(figures(one))} |"
    yield (
        "\nAccuracies are of the test split. Masks taken out: head, norms and statistics stay. LoRA: bytes for the "
        "same weights at 4 bits a number, without a\nhead; it was not trained here, see "
        "[accuracy over bytes](../results/frontier.md).\n"
    )
    for name in found:
        what, lines = ADAPTERS[name][0], commands(name)
        yield f"## {name}\n\n{what}. [Card]({name}/README.md) · [report]({name}/report.html)\n"
        yield f"![Density of the masks, layer by layer]({name}/density.svg)\n"
        yield f"![What is taken for what on the test split]({name}/confusion.svg)\n"
        yield "```text\n" + "\n".join(lines.values()) + "\n```\n"
        yield f"The base's digest (BLAKE3, float32): `{found[name]['base']['digests']['float32']}`\n"


def figures(description: dict[str, Any]) -> list[str]:
    """Return the cells of an adapter's row behind its name and base."""
    record, one = description["training"], description["sets"]["default"]
    results, lora = metrics(record), lora_sizes(record) or {}
    shares = ("test_accuracy", "test_probe_accuracy", "test_accuracy_without_masks")
    shown = [f"{100 * results[key]:.2f} %" if key in results else "-" for key in shares]
    sizes = (one["payload_bytes"], description["size"], lora.get(1), lora.get(8))
    return [*shown, f"{one['density']:.4f}", *("-" if size is None else f"{size:,}" for size in sizes)]


def rows() -> Iterator[dict[str, Any]]:
    """Yield what was measured of each adapter that is there, with the command that made it."""
    for name in ADAPTERS:
        if (GALLERY / name / MODEL_FILE).exists():
            found = inspect_adapter(GALLERY / name)
            sizes = {"file_bytes": found["size"], "mask_bytes": found["sets"]["default"]["payload_bytes"]}
            yield {"adapter": name, "command": commands(name)["train"], **metrics(found["training"]), **sizes}


def main() -> None:
    """Make the entries that are named, or all of them, and write the page."""
    for name in sys.argv[1:] or ADAPTERS:
        make(name)
    (GALLERY / "index.md").write_text("\n".join(page()), encoding="utf-8")
    rewrite(FOLDER / "gallery.jsonl", rows(), "adapter", "command")


if __name__ == "__main__":
    main()
