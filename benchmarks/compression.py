"""Compressors of other libraries: sizes that masks are compared with, and the published compression experiment.

    MASKPACK_DATA=… python -m benchmarks.compression --plot docs/results/mask-lora-sizes.png

Published: "reduction %" of the masks and of the fine-tuned weights of a ResNet-50, and "79x" between the two. The
layout of the masks before compression was not published, so the percentages are compared with three layouts here.

The last table compares sizes of masks and of LoRA matrices: a mask of a d x d matrix at density p takes H(p) d^2 / 8
bytes, LoRA of rank r in float16 takes 4 r d bytes. The mask is smaller where r > H(p) d / 32.
"""

import argparse
import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import brotli
import constriction
import lz4.frame
import numpy as np
import snappy
import torch
import zstandard
from blake3 import blake3

from maskpack import load_backbone
from maskpack.codecs.base import Bits

from .mask_sets import CORPUS, Bools, binary_entropy, cases, densities, drawn_masks
from .report import table
from .tasks import DATA, minilm, resnet

Compressor = Callable[[bytes], bytes]

STRONG: dict[str, Compressor] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "lz4 high": lambda data: lz4.frame.compress(data, compression_level=lz4.frame.COMPRESSIONLEVEL_MAX),
    "snappy": snappy.compress,
    "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
    "brotli -11": lambda data: brotli.compress(data, quality=11, lgwin=24),
}

# the five of the published experiment, as their Python libraries compress when nothing is said
PLAIN: dict[str, Compressor] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "lzma": lzma.compress,
    "lz4": lz4.frame.compress,
    "snappy": snappy.compress,
}


@dataclass
class Sizes:
    """Compressed sizes, kept in a JSON file under compressor and sha256 of the input."""

    path: Path
    known: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.known = json.loads(self.path.read_text())

    def of(self, name: str, compress: Compressor, pieces: Sequence[bytes]) -> int:
        """Return the sum of the compressed sizes of these pieces, each compressed alone."""
        digests = b"".join(blake3(piece).digest() for piece in pieces)
        key = f"{name} {blake3(digests).hexdigest()}"
        if key not in self.known:
            self.known[key] = sum(len(compress(piece)) for piece in pieces)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.known, indent=0, sort_keys=True))
        return self.known[key]


def strong_sizes(packed: Sequence[bytes], sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return compressor -> bytes of packed masks, as one "stream" and as "each" parameter alone."""
    return {
        name: {"stream": sizes.of(name, compress, [b"".join(packed)]), "each": sizes.of(name, compress, packed)}
        for name, compress in STRONG.items()
    }


class RangeCoder:
    """The range coder of the library `constriction`, as reference: bytes of eight independent bits of one density.

    The densities are taken as known (an adapter's header has the number of true bits), so no bytes are counted for
    them; a constant tensor costs nothing.
    """

    def __init__(self, masks: Iterable[tuple[Bits, float]]):
        self.masks = [(packed.astype(np.int32), density) for packed, density in masks if 0 < density < 1]
        ones = np.array([value.bit_count() for value in range(256)])
        self.models = [
            constriction.stream.model.Categorical(p**ones * (1 - p) ** (8 - ones), perfect=False) for _, p in self.masks
        ]

    def encode(self) -> list[np.ndarray]:
        """Return the words of every mask."""
        made = []
        for (symbols, _), model in zip(self.masks, self.models, strict=True):
            coder = constriction.stream.queue.RangeEncoder()
            coder.encode(symbols, model)
            made.append(coder.get_compressed())
        return made

    def decode(self, made: list[np.ndarray]) -> list[Bits]:
        """Return the packed bits again."""
        return [
            constriction.stream.queue.RangeDecoder(words).decode(model, symbols.size).astype(np.uint8)
            for words, (symbols, _), model in zip(made, self.masks, self.models, strict=True)
        ]


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
    """Return the steps from which the published ratio between compressed weights and masks follows."""
    lines = []
    for data, mask, weight in (("C100", "lzma", "lzma"), ("SUN397", "gzip", "lzma"), ("SUN397", "lzma", "lzma")):
        masks, weights = PUBLISHED[data][mask], PUBLISHED_WEIGHTS[data][weight]
        for bits in (2, 1):
            share = bits * (1 - masks / 100) / (32 * (1 - weights / 100))
            lines.append((data, f"{mask}, {masks} %", f"{weight}, {weights} %", bits, f"{100 * share:.4f} %",
                          f"{1 / share:.1f}x"))  # fmt: skip
    head = ("data", "masks", "weights", "raw bits per mask", "compressed masks / compressed weights", "times smaller")
    return table(head, lines)


SIZES = [2**k for k in range(6, 15)]
DENSITIES = (0.5, 0.7, 0.9, 0.95, 0.99)
RANKS = (1, 2, 4, 8, 16, 32)


def mask_bytes(d: int, density: float) -> float:
    """Return the entropy of a d x d mask, in bytes."""
    return d * d * binary_entropy(density) / 8


def lora_bytes(d: int, rank: int) -> int:
    """Return the size of two float16 matrices, d x rank and rank x d."""
    return 2 * rank * 2 * d


def break_even(d: int, density: float) -> float:
    """Return the rank whose matrices have the bytes of the mask."""
    return binary_entropy(density) * d / 32


def plot(path: Path) -> None:
    """Draw the bytes of masks and of LoRA matrices over d."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 5.2))
    for place, density in enumerate(DENSITIES):
        colour = pyplot.get_cmap("viridis")(0.85 * place / (len(DENSITIES) - 1))
        axis.plot(SIZES, [mask_bytes(d, density) for d in SIZES], color=colour, label=f"mask, density {density}")
    for rank in RANKS:
        axis.plot(SIZES, [lora_bytes(d, rank) for d in SIZES], color="tab:red", linestyle="--", linewidth=0.9)
        axis.annotate(f"r={rank}", (SIZES[-1], lora_bytes(SIZES[-1], rank)), xytext=(4, -3), textcoords="offset points",
                      color="tab:red", fontsize=8)  # fmt: skip
    axis.plot([], [], color="tab:red", linestyle="--", linewidth=0.9, label="LoRA, rank r, float16")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(SIZES, [str(d) for d in SIZES])
    axis.set_xlim(SIZES[0], SIZES[-1] * 1.5)
    axis.set_xlabel("d, for a weight matrix of d x d")
    axis.set_ylabel("bytes for the matrix")
    axis.grid(color="0.92")
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=CORPUS, help="folder of ROW-SEED.safetensors")
    parser.add_argument("--output", type=Path, default=Path("runs/compression.json"))
    parser.add_argument("--plot", type=Path, default=Path("runs/mask-lora-sizes.png"))
    arguments = parser.parse_args()
    if not (DATA / "weights").is_dir():
        parser.error(f"there is no folder {DATA / 'weights'}; set MASKPACK_DATA, see docs/results/index.md")
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
    models = {"ResNet-20": resnet(20), "ResNet-32": resnet(32), "all-MiniLM-L6-v2": minilm(tokens=None)}
    weights = {name: reductions(weights_of(load_backbone(**own).model), sizes) for name, own in models.items()}
    shown = {**{f"ResNet-50, {data}, published": row for data, row in PUBLISHED_WEIGHTS.items()}, **weights}
    print(table(("weights", *PLAIN), [(name, *(f"{row[c]:.2f}" for c in PLAIN)) for name, row in shown.items()]))

    print("\n## The published ratio\n")
    print(derivation())

    print("\n## Rank at which LoRA has the bytes of the mask; LoRA is smaller below it\n")
    rows = [(d, *(f"{break_even(d, p):.2f}" for p in DENSITIES), f"{lora_bytes(d, 8):,}") for d in SIZES]
    print(table(("d", *(f"density {p}" for p in DENSITIES), "bytes of rank 8"), rows))
    plot(arguments.plot)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"masks": found, "entropy": entropies, "weights": weights}
    arguments.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
