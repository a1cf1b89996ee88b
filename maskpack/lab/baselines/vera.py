"""VeRA."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from .base import BASELINES, Rates
from .layers import Effect, Reweighted

START = 0.1  # of the factors between the matrices; those of the outputs start at 0


@BASELINES.register
class Vera(Reweighted):
    """VeRA: factors of the rows of two random matrices for each layer, and a head.

    The matrices are drawn from a seed, the same for all layers of one shape, so that only the factors are stored.
    """

    id = "vera"
    reference = "https://arxiv.org/abs/2310.11454"
    argument = "rank"
    usual = 256
    rates: ClassVar[Rates] = {"adam": (3e-3, 1e-2, 3e-2), "sgd": (0.1, 0.3, 1.0)}

    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        rank, (outputs, inputs) = self.rank(), rows.shape
        random = torch.Generator().manual_seed(0)
        left, right = (_uniform(shape, random).to(rows.device) for shape in ((outputs, rank), (rank, inputs)))
        first = {
            "outer": torch.zeros(outputs, 1, device=rows.device),
            "inner": torch.full((rank, 1), START, device=rows.device),
        }
        return first, lambda rows, outer, inner: rows + (outer * left) @ (inner * right)


def _uniform(shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """Return a matrix with the distribution of He's initialisation."""
    return (2 * torch.rand(shape, generator=random) - 1) * math.sqrt(6 / shape[1])
