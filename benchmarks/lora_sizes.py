"""Bytes of a mask and of LoRA matrices for square weight matrices: part of `make compression`.

    python -m benchmarks.lora_sizes --plot docs/mask-lora-sizes.png

A mask of a d x d matrix at density p takes H(p) d^2 / 8 bytes, LoRA of rank r in float16 takes 4 r d bytes. The mask is
smaller where r > H(p) d / 32. Sizes only: which rank does what a mask does is a question of training.
"""

import argparse
from pathlib import Path

from .mask_sets import binary_entropy
from .report import table

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
    """Draw both families of curves."""
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
    parser.add_argument("--plot", type=Path, default=Path("runs/mask-lora-sizes.png"))
    arguments = parser.parse_args()
    rows = [(d, *(f"{break_even(d, p):.2f}" for p in DENSITIES), f"{lora_bytes(d, 8):,}") for d in SIZES]
    print("\n## Rank at which LoRA has the bytes of the mask; LoRA is smaller below it\n")
    print(table(("d", *(f"density {p}" for p in DENSITIES), "bytes of rank 8"), rows))
    plot(arguments.plot)


if __name__ == "__main__":
    main()
