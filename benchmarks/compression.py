"""The published compression experiment again: what off-the-shelf compressors make of masks and of weights.

    MASKPACK_DATA=… make compression

Published: "reduction %" of the masks and of the fine-tuned weights of a ResNet-50, and "79x" between the two. How the
masks were laid out before compression was not published, so that the percentages are compared with three layouts here.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from .general import PLAIN, Sizes
from .mask_sets import CORPUS, Bools, binary_entropy, cases, densities, drawn_masks
from .report import table
from .results import DATA, minilm, resnet

# Self-Masking Networks, supplement, tables 2 and 3: 1 - compressed / raw, in percent, of 23,462,592 masks and weights
PUBLISHED = {
    "C100": {"gzip": 78.32, "bz2": 79.24, "lzma": 80.73, "lz4": 59.06, "snappy": 62.57},
    "SUN397": {"gzip": 81.25, "bz2": 82.11, "lzma": 83.32, "lz4": 62.52, "snappy": 66.54},
}
PUBLISHED_WEIGHTS = {
    "C100": {"gzip": 6.99, "bz2": 4.69, "lzma": 7.70, "lz4": -0.39, "snappy": -0.0046},
    "SUN397": {"gzip": 6.99, "bz2": 4.69, "lzma": 7.69, "lz4": -0.39, "snappy": -0.0046},
}
LAYOUTS: dict[str, tuple[int, Callable[[Bools], bytes]]] = {
    "1 bit": (1, lambda bits: np.packbits(bits, bitorder="little").tobytes()),
    # the packed bits as hex digits: each holds four mask bits in eight
    "2 bits": (2, lambda bits: np.packbits(bits, bitorder="little").tobytes().hex().encode()),
    "1 byte": (8, lambda bits: bits.astype(np.uint8).tobytes()),
}


def reductions(data: bytes, sizes: Sizes) -> dict[str, float]:
    """Return compressor -> 1 - compressed / raw, in percent."""
    return {name: 100 - 100 * sizes.of(name, compress, [data]) / len(data) for name, compress in PLAIN.items()}


def layouts(bits: Bools, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return layout -> compressor -> reduction, of mask bits in name order."""
    return {name: reductions(lay(bits), sizes) for name, (_, lay) in LAYOUTS.items()}


def joined(masks: Iterable[Bools]) -> Bools:
    """Return all masks as one row of bits."""
    return np.concatenate([mask.reshape(-1) for mask in masks])


def entropy(masks: Iterable[Bools]) -> float:
    """Return bits per mask bit: the mean over tensors of the entropy of their densities."""
    parts = [(mask.size, binary_entropy(float(mask.mean()))) for mask in masks if mask.size]
    return sum(size * bits for size, bits in parts) / sum(size for size, _ in parts)


def weights_of(model: torch.nn.Module) -> bytes:
    """Return the parameters of two and more dimensions as float32 bytes, in name order."""
    named = sorted((name, p) for name, p in model.named_parameters() if p.dim() > 1)
    return b"".join(p.detach().float().contiguous().numpy().tobytes() for _, p in named)


def derivation() -> str:
    """Return how the published ratio between compressed weights and compressed masks arises."""
    lines = []
    for data, mask, weight in (("C100", "lzma", "lzma"), ("SUN397", "gzip", "lzma"), ("SUN397", "lzma", "lzma")):
        masks, weights = PUBLISHED[data][mask], PUBLISHED_WEIGHTS[data][weight]
        for bits in (2, 1):
            share = bits * (1 - masks / 100) / (32 * (1 - weights / 100))
            lines.append((data, f"{mask}, {masks} %", f"{weight}, {weights} %", bits, f"{100 * share:.4f} %",
                          f"{1 / share:.1f}x"))  # fmt: skip
    head = ("data", "masks", "weights", "raw bits per mask", "compressed masks / compressed weights", "times smaller")
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=CORPUS, help="folder of ROW-SEED.safetensors")
    parser.add_argument("--output", type=Path, default=Path("runs/compression.json"))
    arguments = parser.parse_args()
    if not (DATA / "weights").is_dir():
        parser.error(f"there is no folder {DATA / 'weights'}; set MASKPACK_DATA, see docs/results.md")
    sizes = Sizes(arguments.output.with_name("general-sizes.json"))
    found: dict[str, dict[str, dict[str, float]]] = {}
    entropies: dict[str, float] = {}
    for data in densities():
        masks = list(drawn_masks(data).values())
        found[f"drawn-{data}"], entropies[f"drawn-{data}"] = layouts(joined(masks), sizes), entropy(masks)
    for name, make in cases(arguments.adapters):
        if not name.startswith("drawn-") and (case := make()).kind == "trained":
            masks = [mask.tensor().numpy() for mask in case.masks.values()]
            found[name], entropies[name] = layouts(joined(masks), sizes), entropy(masks)

    print("\n## Reduction in percent\n")
    rows = []
    for name, by_layout in found.items():
        published = PUBLISHED.get(name.removeprefix("drawn-"))
        if published:
            rows.append((name, "published", *(f"{published[c]:.2f}" for c in PLAIN)))
        rows += [(name, layout, *(f"{by[c]:.2f}" for c in PLAIN)) for layout, by in by_layout.items()]
    print(table(("masks", "raw layout", *PLAIN), rows))

    print("\n## Bits per mask bit\n")
    rows = []
    for name, by_layout in found.items():
        published = PUBLISHED.get(name.removeprefix("drawn-"))
        if published:
            rows.append((name, "published, of 2 bits", *(f"{2 - 2 * published[c] / 100:.3f}" for c in PLAIN), ""))
        for layout, (bits, _) in LAYOUTS.items():
            values = (f"{bits - bits * by_layout[layout][c] / 100:.3f}" for c in PLAIN)
            rows.append((name, layout, *values, f"{entropies[name]:.3f}"))
    print(table(("masks", "raw layout", *PLAIN, "entropy of the densities"), rows))

    print("\n## Float32 weights, reduction in percent\n")
    models = {"ResNet-20": resnet(20), "ResNet-32": resnet(32), "all-MiniLM-L6-v2": minilm()}
    weights = {name: reductions(weights_of(backbone.model), sizes) for name, backbone in models.items()}
    shown = {**{f"ResNet-50, {data}, published": row for data, row in PUBLISHED_WEIGHTS.items()}, **weights}
    print(table(("weights", *PLAIN), [(name, *(f"{row[c]:.2f}" for c in PLAIN)) for name, row in shown.items()]))

    print("\n## The published ratio\n")
    print(derivation())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"masks": found, "entropy": entropies, "weights": weights}
    arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
