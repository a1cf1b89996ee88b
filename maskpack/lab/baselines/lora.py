"""LoRA."""

import re
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from ...backbone.load import Backbone
from ...errors import require
from ...training.config import TrainConfig
from .base import BASELINES, Rates
from .layers import Layers


@BASELINES.register
class Lora(Layers):
    """LoRA of a rank on the layers that masks are for, alpha twice the rank, not merged; and a head."""

    id = "lora"
    reference = "https://arxiv.org/abs/2106.09685"
    argument = "rank"
    rates: ClassVar[Rates] = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.01, 0.03, 0.1)}
    bits = (8, 4, 2, 1)
    relative = False

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        require("peft", "lab", "the baseline 'lora'")
        super().check(backbone, config)

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        rank, peft = self.rank(), require("peft", "lab", "the baseline 'lora'")
        names, _ = self.weights(backbone, config)
        layers = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
        # a pattern that is matched as a whole: as a list, names would match the ends of others
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"(?:{layers})")
        peft.inject_adapter_in_model(settings, backbone.model)
        return {name: one for name, one in backbone.model.named_parameters() if ".lora_" in name}

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        matrix = tensor.flatten(1)
        return matrix if ".lora_A." in name else matrix.T  # one row for each of the rank
