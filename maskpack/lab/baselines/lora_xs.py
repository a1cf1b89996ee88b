"""LoRA-XS."""

from typing import ClassVar

import torch
from torch import Tensor

from .base import BASELINES, Rates
from .layers import Effect, Reweighted


@BASELINES.register
class LoraXs(Reweighted):
    """LoRA-XS: a square matrix for each layer between its weight's greatest singular vectors, and a head.

    The vectors follow from the base, so that only the squares are stored. They start at zero.
    """

    id = "lora-xs"
    reference = "https://arxiv.org/abs/2405.17604"
    argument = "rank"
    rates: ClassVar[Rates] = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.03, 0.1, 0.3)}

    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        rank = min(self.rank(), *rows.shape)
        left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
        left, right = (left * sizes)[:, :rank], right[:rank]
        square = torch.zeros(rank, rank, device=rows.device)
        return {"square": square}, lambda rows, square: rows + left @ square @ right
