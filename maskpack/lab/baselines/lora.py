"""LoRA, by PEFT."""

import re
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from ...backbone.load import Backbone
from ...backbone.select import select_parameters
from ...errors import ConfigError, require
from ...training.config import TrainConfig
from .base import ROWS, Fitted, Row, Trial, fit_dense

RANK = 8


@ROWS.register
class Lora(Row):
    """LoRA of a rank on the layers that masks are for, alpha twice the rank, not merged; and a head."""

    id: ClassVar[str] = "lora"
    reference: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    argument: ClassVar[str | None] = "rank"
    rates: ClassVar[Mapping[str, tuple[float, ...]]] = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.01, 0.03, 0.1)}

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        self.number(RANK, least=1)
        require("peft", "compare", "the row 'lora'")
        _layers(backbone, config)

    def fit(self, trial: Trial) -> Fitted:
        rank = self.number(RANK, least=1)
        peft = require("peft", "compare", "the row 'lora'")

        def add(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
            layers = "|".join(re.escape(name) for name in _layers(backbone, config))
            # a pattern that is matched as a whole: as a list, names would match the ends of others
            settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"(?:{layers})")
            peft.inject_adapter_in_model(settings, backbone.model)
            return {name: one for name, one in backbone.model.named_parameters() if ".lora_" in name}

        return fit_dense(trial, add)


def _layers(backbone: Backbone, config: TrainConfig) -> list[str]:
    """Return the modules whose weights a mask would be for."""
    names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    known = dict(backbone.model.named_modules())
    modules = [name.rpartition(".")[0] for name in names]
    foreign = [
        name
        for name, module in zip(names, modules, strict=True)
        if not name.endswith(".weight")
        or not (isinstance(known[module], nn.Linear | nn.modules.conv._ConvNd) or _is_conv1d(known[module]))
    ]
    if foreign:
        raise ConfigError(
            f"LoRA is for weights of linear and convolution layers, and {len(foreign)} of the {len(names)} chosen are "
            f"others, first {foreign[0]!r}; leave them out with exclude, or the row 'lora'"
        )
    return modules


def _is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D"
