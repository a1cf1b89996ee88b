"""The objective of a regression: a number for each input."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import predictions
from ...backbone.load import Backbone
from ...backbone.model import Head
from ...errors import ConfigError, DataError
from ..config import TrainConfig
from ..data.base import LABEL_NAMES, Data, Examples, find_input, readable
from ..features import SPLITS, embed
from .base import OBJECTIVES
from .supervised import Supervised

NUMBER_NAMES = ("score", "value", "rating", "stars", *LABEL_NAMES)
RIDGE = 1e-3  # times the mean variance of the features


@OBJECTIVES.register
class Regression(Supervised):
    """Squared error of a number, given by a linear head that is trained beside the scores.

    While it learns, numbers are less their mean and divided by their standard deviation, over the training rows.
    """

    id: ClassVar[str] = "regression"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    tasks: ClassVar[tuple[str, ...]] = ("regression",)
    least_classes: ClassVar[int] = 1
    figure: ClassVar[str] = "r2"

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        if config.head_kind != "linear" or config.head_start != "plain":
            raise ConfigError("a regression has a linear head with a plain start; leave head_kind and head_start out")
        super().__init__(backbone, data, config)
        numbers = torch.tensor([self.rows.labels[row] for row in self.rows.indices])
        self.mean, self.deviation = float(numbers.mean()), float(numbers.std(correction=0)) or 1.0

    @classmethod
    def columns(
        cls, features: Mapping[str, Any], column: str | None, label: str | None, task: str | None
    ) -> tuple[str, str | None]:
        label = label or next((name for name in NUMBER_NAMES if name in features), None)
        if label is None:
            raise DataError(
                f"cannot tell which column holds the numbers among {', '.join(features)}; name it with --label-column"
            )
        return column or find_input(features, label), label

    @classmethod
    def targets(
        cls, rows: Any, column: str | None, names: Sequence[str] | None, split: str
    ) -> tuple[list[Any], tuple[str, ...]]:
        """Return the number of each row, and the column's name."""
        assert column is not None
        values = rows[column][:]
        wrong = [
            one for one in values if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one)
        ]
        if wrong:
            raise DataError(
                f"the {split} split has {wrong[0]!r} in column {column!r}, expected numbers; correct such rows, or "
                f"remove them"
            )
        return [float(one) for one in values], (column,)

    def start(self) -> None:
        """Give the head its first values: the linear fit to the frozen embeddings."""
        x, y = embed(self.backbone, self.rows, batch_size=self.config.batch_size, cache=False)
        weight, bias = least_squares(x, (y - self.mean) / self.deviation)
        with torch.no_grad():
            self.module.linear.weight.copy_(weight)
            self.module.linear.bias.fill_(float(bias))

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, numbers = batch
        found = module(inputs).float().squeeze(-1)
        return nn.functional.mse_loss(found, (numbers - self.mean) / self.deviation)

    def evaluate(self, examples: Examples) -> dict[str, float]:
        outputs, numbers = predictions(self.module, readable(self.batches(examples)))
        return {"r2": explained(outputs[:, 0] * self.deviation + self.mean, numbers)}

    def baseline(self) -> Mapping[str, float]:
        size, held = self.config.batch_size, {name: one for name, one in self.data.splits.items() if name in SPLITS}
        if not held:
            return {}
        x, y = embed(self.backbone, self.rows, batch_size=size)
        weight, bias = least_squares(x, y)
        found = {name: embed(self.backbone, one, batch_size=size) for name, one in held.items()}
        return {f"{name}_probe_r2": explained(x.double() @ weight + bias, y) for name, (x, y) in found.items()}

    @classmethod
    def measured(cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int) -> dict[str, Any]:
        outputs, numbers = cls.outputs(backbone, examples, head, batch_size)
        return {"r2": explained(outputs[:, 0], numbers)}

    def settle(self) -> bool:
        """Make the head give the numbers as they are, as it is stored."""
        with torch.no_grad():
            self.module.linear.weight.mul_(self.deviation)
            self.module.linear.bias.mul_(self.deviation).add_(self.mean)
        self.mean, self.deviation = 0.0, 1.0
        super().settle()
        return True


def explained(found: Tensor, numbers: Tensor) -> float:
    """Return the share of the numbers' variance that is explained: 1 of exact ones, 0 of the mean."""
    error = (found.double() - numbers.double()).square().sum()
    whole = (numbers.double() - numbers.double().mean()).square().sum()
    return float(1 - error / whole) if whole > 0 else float(error == 0)


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the linear fit of numbers to features, with a little ridge."""
    x, y = x.double(), y.double()
    centre = x - x.mean(0)
    gram = centre.T @ centre
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centre.T @ (y - y.mean()))
    return weight, y.mean() - x.mean(0) @ weight
