"""Numbers rounded to a few bits after training, and the bytes that they take."""

import math

import torch
from torch import Tensor

STEP_BITS = 16  # of a row's step, float16
SHARES = torch.linspace(0.05, 1.0, 39)  # of the step that reaches a row's greatest value, to choose from


def quantized(rows: Tensor, bits: int) -> tuple[Tensor, float]:
    """Return rows of numbers rounded to `bits` bits each, and the bits that they take together.

    The levels of a row are the odd multiples of half a step, as many above zero as below it: with one bit, a sign. The
    step is the one of smallest squared error among 39, each fitted by least squares, and is stored as float16. The
    levels are coded by an adaptive arithmetic coder, or as they are; one more bit says which.

    Args:
        rows: (R, N) float32.
        bits: from 1 to 8.
    """
    half = 2 ** (bits - 1)
    widest = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / (half - 0.5)
    levels, values = torch.zeros_like(rows), torch.zeros_like(rows)
    least = torch.full((len(rows), 1), math.inf, device=rows.device)
    for share in SHARES:
        found = (rows / (share * widest)).floor().clamp(-half, half - 1) + 0.5
        step = (rows * found).sum(1, keepdim=True) / (found * found).sum(1, keepdim=True)
        rounded = found * step.half().float()
        error = (rounded - rows).square().sum(1, keepdim=True)
        levels, values = torch.where(error < least, found, levels), torch.where(error < least, rounded, values)
        least = torch.minimum(error, least)
    counts = torch.bincount((levels - 0.5).long().flatten() + half, minlength=2 * half)
    return values, len(rows) * STEP_BITS + 1 + min(code_bits(counts), rows.numel() * bits)


def code_bits(counts: Tensor) -> float:
    """Return the length of an adaptive arithmetic code of symbols that occur so often, (S,); it needs no table.

    Each symbol is coded with the probability (times that it came before + 1/2) / (symbols before + S/2).
    """
    seen, kinds = counts.double(), len(counts)
    logarithm = torch.lgamma(seen.sum() + kinds / 2) - math.lgamma(kinds / 2)
    logarithm -= (torch.lgamma(seen + 0.5) - math.lgamma(0.5)).sum()
    return float(logarithm) / math.log(2)
