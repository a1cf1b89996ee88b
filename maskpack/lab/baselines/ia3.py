"""(IA)3."""

from typing import ClassVar

import torch
from torch import Tensor

from .base import BASELINES, Rates
from .layers import Effect, Reweighted


@BASELINES.register
class IA3(Reweighted):
    """(IA)3: one factor for each output of the layers that masks are for, and a head."""

    id = "ia3"
    reference = "https://arxiv.org/abs/2205.05638"
    grouped = True
    rates: ClassVar[Rates] = {"adam": (3e-3, 1e-2, 3e-2), "sgd": (0.1, 0.3, 1.0)}

    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        factors = torch.ones(len(rows), 1, device=rows.device)
        return {"factors": factors}, lambda rows, factors: rows * factors
