"""Self-supervised masks for texts: one text, two dropout masks (SimCSE)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import Inputs, pool
from ...backbone.load import Backbone
from ...backbone.model import Embedding
from ...errors import ConfigError
from ...registry import check_above_zero, make_options
from ..config import TrainConfig
from ..data.base import Data
from .base import OBJECTIVES, CollapseWatch, Objective, collapse_warning

VIEWS = 2


@dataclass(frozen=True)
class SimcseOptions:
    """Options of the objective; the default is the paper's.

    Attributes:
        temperature: that cosine similarities are divided by.
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        check_above_zero(self, "temperature")


class SimcseNetwork(nn.Module):
    """An encoder with its pooling, that sees every text twice."""

    def __init__(self, model: nn.Module, embedding: Embedding):
        super().__init__()
        self.model, self.embedding = model, embedding

    def forward(self, inputs: Inputs) -> Tensor:
        """Return embeddings (2 B, D), the first view of all texts first; dropout tells the views apart."""
        assert isinstance(inputs, dict)
        doubled = {name: torch.cat([one] * VIEWS) for name, one in inputs.items()}
        hidden = self.model(**doubled).last_hidden_state
        return pool(hidden, doubled["attention_mask"], self.embedding).float()


@OBJECTIVES.register
class Simcse(Objective):
    """Find a text again, among the batch's others, under another dropout (SimCSE); needs no labels."""

    id: ClassVar[str] = "simcse"
    reference: ClassVar[str] = "https://arxiv.org/abs/2104.08821"
    tasks: ClassVar[tuple[str, ...]] = ("text-classification",)
    needs_labels: ClassVar[bool] = False
    augments: ClassVar[bool] = False
    self_supervised: ClassVar[bool] = True
    module: SimcseNetwork

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.options: SimcseOptions = make_options(SimcseOptions, "the objective 'simcse'", config.objective_options)
        if backbone.embedding.pooling is None:
            raise ConfigError(
                f"the objective 'simcse' is for encoders, whose embedding is pooled; {backbone.id} has the head "
                f"{backbone.head!r}"
            )
        if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in backbone.model.modules()):
            raise ConfigError(
                f"{backbone.id} has no dropout, by which the objective 'simcse' tells two views of a text apart; "
                f"set it in the model's configuration"
            )
        self.module = SimcseNetwork(backbone.model, backbone.embedding)
        self.watch = CollapseWatch()

    def trained(self) -> list[nn.Parameter]:
        return []

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, _ = batch
        z = module(inputs)
        first, second = z.chunk(VIEWS)
        self.watch.add(first)
        similar = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        return nn.functional.cross_entropy(
            similar / self.options.temperature, torch.arange(len(first), device=z.device)
        )

    def state(self) -> dict[str, Tensor]:
        return self.watch.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.watch.restore(state)

    def metrics(self) -> dict[str, float]:
        return self.watch.metrics()

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        return collapse_warning(metrics)
