"""The mask sets that benchmarks measure: trained ones, ones drawn from logged densities, and a large one from a seed.

    MASKPACK_DATA=… python -m benchmarks.mask_sets eurosat-sgd eurosat-adam cartoon-flip cartoon-largest smollm2

trains those that are for codecs alone, and keeps their masks without head and statistics. The last is of the folder
runs/smollm2, which benchmarks/smollm2.py makes.
The set of seven billion weights is too large for the tables here: `benchmarks/scale.py` measures it, memory included.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import nn

from maskpack import load_backbone
from maskpack.adapter.read import read_adapter
from maskpack.adapter.write import save_adapter
from maskpack.backbone.fingerprint import fingerprint
from maskpack.backbone.load import Backbone
from maskpack.backbone.model import Fingerprint
from maskpack.mask import MaskSet, PackedMask
from maskpack.safetensors_io import read_tensors
from maskpack.training import TrainConfig, attach_scores, extract_masks, load_data, train_mask
from maskpack.training.data.base import Data

from .recipe import lite0
from .tasks import DATA, RUNS, minilm, resnet

Bools = NDArray[np.bool_]
Shapes = dict[str, tuple[int, ...]]
DENSITIES = "masks/resnet50_swav_densities.json"
CORPUS = Path(__file__).with_name("corpus")  # trained adapters, kept so that sizes can be compared over releases
LANGUAGE = "smollm2"
SHARED = "masks/resnet20_cifar10_to_pacs_sketch.safetensors"


@dataclass(frozen=True)
class Task:
    """One model with one data set: `settings` are those of TrainConfig, `labels` the share of the training rows."""

    backbone: Callable[[], Mapping[str, Any]]
    data: str
    settings: dict[str, Any]
    labels: float = 1.0

    def load(self) -> Backbone:
        return load_backbone(**self.backbone())

    def examples(self, seed: int) -> Data:
        """Read the data; the seed chooses which training rows are used."""
        return load_data(str(DATA / self.data), labels_fraction=self.labels, seed=seed)


SGD = {"scale": True, "train": (), "bn": "adapt", "optimizer": "sgd", "head_lr": 0.1, "warmup": 0.2}
TASKS = {
    "sketch": Task(partial(resnet, 20), "data/pacs/sketch", {**SGD, "lr": 50.0, "epochs": 25, "augment": "flip"}),
    "photo": Task(partial(resnet, 32), "data/pacs/photo", {**SGD, "lr": 10.0, "epochs": 25, "augment": "flip"}),
    # 10,000 of 60,000 images; digits are not mirrored
    "mnist": Task(partial(resnet, 20), "data/mnist", {**SGD, "lr": 20.0, "epochs": 6, "augment": "none"}, 1 / 6),
    "banking77": Task(
        partial(minilm, tokens=None),
        "data/banking77",
        {"top": 1.0, "train": (), "lr": 0.02, "head_lr": 0.01, "epochs": 4, "label_smoothing": 0.05},
    ),
}
SHORT = {"steps": 120, "batch_size": 32, "augment": "flip"}
FOR_CODECS = {
    "eurosat-sgd": Task(partial(lite0, 64), "data/eurosat", {**SGD, **SHORT, "lr": 10.0}),
    "eurosat-adam": Task(partial(lite0, 64), "data/eurosat", {"top": 1.0, "train": (), "lr": 0.05, **SHORT}),
    "cartoon-flip": Task(
        partial(resnet, 20), "data/pacs/cartoon", {"method": "flip", "top": 1.0, "train": (), "lr": 0.1, **SHORT}
    ),
    "cartoon-largest": Task(partial(resnet, 20), "data/pacs/cartoon", {**SHORT}),  # of each tensor the largest tenth
}


@dataclass(frozen=True)
class Case:
    """One mask set.

    Attributes:
        kind: "trained"; "drawn" (independent bits, one density a tensor); "made" (rows and columns differ).
        weights: the frozen base, where there is one.
        floor: bytes that no codec can beat on average: the entropy of what the bits were drawn from, where known.
    """

    name: str
    kind: Literal["trained", "drawn", "made"]
    masks: MaskSet
    base: Fingerprint
    weights: nn.Module | None = None
    floor: float | None = None

    @property
    def packed(self) -> list[bytes]:
        """The packed bits of every payload, in name order."""
        return [bits.tobytes() for mask in self.masks.values() for _, bits in mask.payloads()]

    @property
    def entropy(self) -> float:
        """Bytes: the sum over tensors of size times the entropy of its density."""
        return sum(
            len(bits) * binary_entropy(bits.count() / len(bits)) / 8
            for mask in self.masks.values()
            for _, bits in mask.payloads()
            if len(bits)
        )

    @property
    def lora_rank_bytes(self) -> int:
        """Bytes of LoRA matrices of rank 1 in float16 on the same layers, a convolution taken as (out, in k k)."""
        return sum(2 * (m.shape[0] + math.prod(m.shape[1:])) for m in self.masks.values() if len(m.shape) > 1)


def binary_entropy(p: float) -> float:
    """Return the entropy in bits of one bit that is set with probability p."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0)


def cases(adapters: Path) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield (name, function that makes the case); what is missing is named on stderr and left out."""
    if (DATA / SHARED).exists():
        yield "sketch-shared", _shared
    else:
        _missing(SHARED, "MASKPACK_DATA")
    for row in TASKS | FOR_CODECS:
        found = sorted(adapters.glob(f"{row}-*.safetensors"))
        for file in found:
            yield file.stem, partial(_of_adapter, partial(_base_of, row), file)
        if not found:
            _missing(f"{row}-*.safetensors", str(adapters))
    file = adapters / f"{LANGUAGE}-0.safetensors"
    if file.exists() and (RUNS / LANGUAGE).is_dir():
        yield file.stem, partial(_of_adapter, smollm2, file)
    else:
        _missing(file.name if not file.exists() else LANGUAGE, str(adapters if not file.exists() else RUNS))
    if (DATA / DENSITIES).exists():
        for data in densities():
            yield f"drawn-{data}", partial(_drawn, data)
    else:
        _missing(DENSITIES, "MASKPACK_DATA")
    yield "vit-b16-made", vit


def _missing(what: str, where: str) -> None:
    print(f"left out: there is no {what} in {where}", file=sys.stderr)


def _shared() -> Case:
    model = TASKS["sketch"].load()
    masks = MaskSet.from_tensors(read_tensors(DATA / SHARED))
    return Case(
        "sketch-shared", "trained", masks, fingerprint(model.model, id=model.id, head=model.outside), model.model
    )


def _base_of(row: str) -> nn.Module:
    return (TASKS | FOR_CODECS)[row].load().model


def _of_adapter(base: Callable[[], nn.Module], file: Path) -> Case:
    model, adapter = base(), read_adapter(file)
    return Case(file.stem, "trained", adapter.parts(base=model).masks, adapter.base, model)


def smollm2() -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(RUNS / LANGUAGE, dtype=torch.float32)  # type: ignore[no-any-return]


def train_smollm2(steps: int = 60, rows: int = 4, length: int = 64, lr: float = 0.05) -> None:
    """Train masks of the last two of 30 blocks on Shakespeare, in a loop of one's own, and keep them."""
    from transformers import AutoTokenizer

    model, text = smollm2(), (DATA / "data/shakespeare/train.txt").read_text(encoding="utf-8")[:400_000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(RUNS / LANGUAGE)(text)["input_ids"])
    base = fingerprint(model, id="hf/smollm2")  # as benchmarks/smollm2.py makes it, not the Hub's
    torch.manual_seed(0)
    scores = attach_scores(model, select=[f"model.layers.{n}.*_proj.weight" for n in (28, 29)])
    optimizer = torch.optim.Adam(scores.values(), lr)
    for _ in range(steps):
        batch = tokens.unfold(0, length, length)[torch.randint(len(tokens) // length, (rows,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    masks = extract_masks(model)
    save_adapter(CORPUS / f"{LANGUAGE}-0.safetensors", masks, base, profile="max", weights=model)
    print(f"{LANGUAGE}: {masks.total} weights, {masks.density:.4f} kept, last loss {loss.item():.3f}", flush=True)


def densities() -> dict[str, dict[str, float]]:
    """Return data set -> parameter -> density of four self-supervised ResNet-50 masks, as their authors logged them."""
    found: dict[str, dict[str, float]] = json.loads((DATA / DENSITIES).read_text())
    return found


def resnet50_shapes() -> Shapes:
    """Return names and shapes of timm's ResNet-50."""
    import timm

    return {name: tuple(p.shape) for name, p in timm.create_model("resnet50", pretrained=False).named_parameters()}


def drawn_masks(data: str, seed: int = 0) -> dict[str, Bools]:
    """Draw masks for a ResNet-50: independent bits with the logged density of each tensor."""
    shapes = resnet50_shapes()
    return {
        name: np.random.default_rng([seed, row]).random(shapes[name], dtype=np.float32) < density
        for row, (name, density) in enumerate(sorted(densities()[data].items()))
    }


def _drawn(data: str) -> Case:
    return _made(f"drawn-{data}", "drawn", drawn_masks(data), None)


def vit(seed: int = 0, spread: float = 0.5) -> Case:
    """Make a mask set for the 48 linears of a ViT-B/16 (85 million weights) whose rows and columns differ in density.

    The log-odds of a bit are those of its tensor's density (0.9 to 0.99) plus a normal term for its row and one for
    its column, both of deviation `spread`. That is the structure that trained masks were seen to have, not their
    magnitude-dependence: there is no base here.
    """
    rng = np.random.default_rng(seed)
    masks: dict[str, Bools] = {}
    floor = 0.0
    for block in range(12):
        for name, shape in (
            ("attn.qkv", (2304, 768)),
            ("attn.proj", (768, 768)),
            ("mlp.fc1", (3072, 768)),
            ("mlp.fc2", (768, 3072)),
        ):
            density = rng.uniform(0.9, 0.99)
            odds = math.log(density / (1 - density))
            rows, columns = (rng.normal(0, spread, size).astype(np.float32) for size in shape)
            p = 1 / (1 + np.exp(-(odds + rows[:, None] + columns)))
            masks[f"blocks.{block}.{name}.weight"] = rng.random(shape, dtype=np.float32) < p
            floor -= float((p * np.log2(p) + (1 - p) * np.log2(1 - p)).sum(dtype=np.float64)) / 8
    return _made("vit-b16-made", "made", masks, floor)


def _made(name: str, kind: Literal["drawn", "made"], masks: dict[str, Bools], floor: float | None) -> Case:
    packed = {
        key: PackedMask.from_bytes(np.packbits(bits, bitorder="little"), bits.shape) for key, bits in masks.items()
    }
    digests = {dtype: blake3(dtype.encode()).hexdigest() for dtype in ("float32", "bfloat16", "float16")}
    tensors = {key: blake3(key.encode()).digest()[:6] for key in masks}
    # no network has these digests, and nothing is loaded onto one: an adapter cannot be written without
    return Case(
        name, kind, MaskSet(packed), Fingerprint(f"made/{name}", None, "float32", (), digests, tensors), None, floor
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*FOR_CODECS, LANGUAGE])
    for row in parser.parse_args().rows:
        if row == LANGUAGE:
            train_smollm2()
            continue
        task = FOR_CODECS[row]
        backbone = task.load()
        result = train_mask(backbone, task.examples(0), TrainConfig(seed=0, **task.settings))
        masks, path = result.parts.masks, CORPUS / f"{row}-0.safetensors"
        save_adapter(path, masks, result.base, profile="max", weights=backbone.model)
        print(f"{row}: {masks.total} weights, {masks.density:.4f} kept, {result.metrics}", flush=True)


if __name__ == "__main__":
    main()
