"""Detection of single flipped bits of a base, by everything that verifies a base.

    python -m benchmarks.base_bits --write docs/reliability.md      # about ten minutes on one core

For each dtype, every bit position is flipped at --places random places of a small and of a large tensor, one flip at
a time, and the tensor's digest is compared. Then one bit is flipped at each of --places random places of a model,
positions in turn, and an adapter is loaded in every way. A flip is noticed if the call refuses the base.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maskpack import MaskBank, load_cascade, load_mask, load_masked, save_adapter
from maskpack.adapter.content import Parts
from maskpack.backbone.fingerprint import fingerprint, tensor_digest
from maskpack.backbone.model import body, same_size_int
from maskpack.errors import BackboneMismatchError
from maskpack.safetensors_io import write_tensors
from tests.helpers_adapter import random_masks
from tests.helpers_cascade import SETS, cascade_parts

from .measured import FOLDER, rewrite
from .report import table, write_between

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """Flips of one kind, and how many were noticed."""

    what: str
    dtype: str
    positions: int
    flips: int
    noticed: int


def flip(tensor: Tensor, index: int, bit: int, counted: bool) -> None:
    """Flip one bit in place, as a write that PyTorch counts or as one that it does not."""
    with torch.no_grad():
        bits = same_size_int(tensor if counted else tensor.data)
        bits.view(-1)[index] ^= torch.tensor(1, dtype=bits.dtype) << bit


def digests(dtype: torch.dtype, places: int) -> Iterator[Row]:
    """Flip bits of single tensors and compare digests."""
    width = 8 * dtype.itemsize
    for what, size in (("digest, 1,000 weights", 1_000), ("digest, 100,000 weights", 100_000)):
        tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        expected, noticed = tensor_digest(tensor, dtype), 0
        drawn = random.Random(size)
        for bit in range(width):
            for _ in range(places):
                index = drawn.randrange(size)
                flip(tensor, index, bit, counted=True)
                noticed += tensor_digest(tensor, dtype) != expected
                flip(tensor, index, bit, counted=True)
        assert tensor_digest(tensor, dtype) == expected
        yield Row(what, str(dtype).removeprefix("torch."), width, places * width, noticed)


def network(dtype: torch.dtype) -> nn.Sequential:
    """Return a network with small and large tensors, linear and convolutional, and statistics."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 200)]
    return nn.Sequential(*layers, nn.Linear(200, 600), nn.Linear(600, 6)).to(dtype).eval()


def calls(dtype: torch.dtype, places: int, folder: Path) -> Iterator[Row]:
    """Flip bits of a base and load adapters for it in every way."""
    model, width = network(dtype), 8 * dtype.itemsize
    base = fingerprint(model, id="x", head=["6"])
    masked = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("6.")}
    one = save_adapter(folder / "one.safetensors", random_masks(masked), base)
    sets = {name: Parts(random_masks(masked, seed=seed)) for seed, name in enumerate(SETS)}
    cascade = save_adapter(folder / "cascade.safetensors", sets, base, cascade=cascade_parts(600))
    weights = folder / "weights.safetensors"
    write_tensors(weights, dict(model.state_dict()), {"format": "pt"})
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = body(model, ["6"])

    def bank(index: int) -> None:
        with MaskBank(model) as made:
            made.add(one, f"m{index}")

    def trained(index: int) -> None:
        if fingerprint(model, id="x", head=["6"]).digests != base.digests:  # as training does before and after
            raise BackboneMismatchError("changed")

    ways: dict[str, Callable[[int], object]] = {
        "load_mask": lambda _: load_mask(model, one),
        "MaskBank.add": bank,
        "load_cascade": lambda _: load_cascade(model, cascade),
        "training, before and after": trained,
    }
    names = list(tensors)
    for what, call in ways.items():
        drawn, noticed = random.Random(width), 0
        for place in range(places):
            name = names[place % len(names)]  # small tensors as often as large ones
            index, bit, counted = drawn.randrange(tensors[name].numel()), place % width, bool(place // len(names) % 2)
            flip(tensors[name], index, bit, counted)
            noticed += refused(call, place)
            flip(tensors[name], index, bit, counted)
            if place % 1000 == 0:
                assert not refused(trained, place)
        yield Row(what, str(dtype).removeprefix("torch."), width, places, noticed)
    drawn, noticed = random.Random(width), 0
    with weights.open("r+b", buffering=0) as file, torch.device("meta"):
        empty = network(dtype)
        for place in range(places):
            name = names[place % len(names)]
            index, bit = drawn.randrange(tensors[name].numel()), place % width
            at = start + header[name]["data_offsets"][0] + index * dtype.itemsize + bit // 8
            byte = content[at]
            for value in (byte ^ 1 << bit % 8, byte):
                file.seek(at)
                file.write(bytes([value]))
                if value != byte:
                    noticed += refused(lambda _: load_masked(empty, weights, one), place)
    assert not refused(lambda _: load_masked(network(dtype), weights, one), 0)
    yield Row("load_masked", str(dtype).removeprefix("torch."), width, places, noticed)


def refused(call: Callable[[int], object], place: int) -> bool:
    """Return True if a call refuses the base."""
    try:
        call(place)
    except BackboneMismatchError:
        return True
    return False


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=10_000)
    parser.add_argument("--write", type=Path, help="Markdown file that gets the table between its markers")
    options = parser.parse_args()
    began, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES.values():
            for row in (*digests(dtype, options.places), *calls(dtype, options.places, Path(folder))):
                print(row, flush=True)
                rows.append(row)
    head = ("what compares", "dtype", "bit positions", "flips", "noticed")
    text = table(head, [(r.what, r.dtype, r.positions, f"{r.flips:,}", f"{r.noticed:,}") for r in rows])
    missed = sum(row.flips - row.noticed for row in rows)
    text = f"{sum(row.flips for row in rows):,} flips of one bit each, {missed:,} not noticed.\n\n{text}"
    print(text, f"{time.monotonic() - began:.0f} s")
    if options.write:
        rewrite(FOLDER / "base-bits.jsonl", map(asdict, rows), "what", "dtype", "positions", "flips")
        write_between(options.write, "make bench-bits", text)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
