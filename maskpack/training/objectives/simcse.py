"""Contrastive learning of text embeddings with dropout as augmentation (SimCSE)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import Inputs, encode
from ...backbone.load import Backbone
from ...backbone.model import Embedding
from ...errors import ConfigError
from ...registry import Options, Positive
from ..config import TrainConfig
from ..data.base import Data
from .base import OBJECTIVES, CollapseWatch, Objective

VIEWS = 2


@dataclass(frozen=True)
class SimcseOptions(Options):
    """Options of the objective: divisor of the cosine similarities; the default is the paper's."""

    temperature: Positive = 0.05


class SimcseNetwork(nn.Module):
    """Embeddings (2 B, D) of B texts, the first view of all texts first; dropout makes the views differ."""

    def __init__(self, model: nn.Module, embedding: Embedding):
        super().__init__()
        self.model, self.embedding = model, embedding

    def forward(self, inputs: Inputs) -> Tensor:
        assert isinstance(inputs, dict)
        doubled: Inputs = {name: torch.cat([one] * VIEWS) for name, one in inputs.items()}
        return encode(self.model, doubled, self.embedding).float()


@OBJECTIVES.register
class Simcse(Objective):
    """Contrast two dropout views of each text with the batch's other texts (SimCSE); needs no labels."""

    id: ClassVar[str] = "simcse"
    reference: ClassVar[str] = "https://arxiv.org/abs/2104.08821"
    tasks: ClassVar[tuple[str, ...]] = ("text-classification",)
    needs_labels: ClassVar[bool] = False
    options_class = SimcseOptions
    augments: ClassVar[bool] = False
    self_supervised: ClassVar[bool] = True
    options: SimcseOptions
    module: SimcseNetwork
    watch: CollapseWatch

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        if backbone.embedding.pooling is None:
            raise ConfigError(
                f"the objective 'simcse' is for encoders with a pooled embedding; {backbone.id} has the head "
                f"{backbone.head!r}"
            )
        if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in backbone.model.modules()):
            raise ConfigError(
                f"the objective 'simcse' needs dropout, and {backbone.id} has none; set it in the model's configuration"
            )
        self.module = SimcseNetwork(backbone.model, backbone.embedding)
        self.watch = CollapseWatch()

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        first, second = module(batch[0]).chunk(VIEWS)
        self.watch.add(first)
        similar = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        own = torch.arange(len(first), device=first.device)
        return nn.functional.cross_entropy(similar / self.options.temperature, own)
