"""Baselines that change weights: full fine-tuning, BitFit, norms, LoRA."""

import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from ...backbone.classifier import Classifier
from ...backbone.load import Backbone
from ...backbone.select import select_parameters
from ...errors import ConfigError, require
from ...training.batchnorm import batchnorm_statistics
from ...training.checkpoint import FILE
from ...training.config import TrainConfig
from ...training.learn import body_parameters
from ...training.scores import learning_names
from ...training.trainer import train_dense
from .base import BASELINES, Baseline, Fitted, Rates, Trial, classified, parameters

RANK = 8


class Dense(Baseline):
    """Trains some parameters and a head, by the loop that masks are trained by."""

    @abstractmethod
    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        """Return the parameters that learn; may put modules into the model."""

    def fit(self, trial: Trial) -> Fitted:
        folder = trial.folder / "training"
        steps = train_dense(
            trial.backbone,
            trial.data,
            trial.settings("supervised"),
            self.learn,
            output=folder,
            resume=(folder / FILE).exists(),
            report=trial.report,
        )
        for parameter in steps.scores.values():
            parameter.data.copy_(parameter.data.half())  # measured as stored, with 2 bytes a number
        classifier = steps.objective.module
        assert isinstance(classifier, Classifier)
        learned, head = parameters(*steps.scores.values()), parameters(*classifier.linear.parameters())
        statistics = batchnorm_statistics(trial.backbone.model) if trial.config.adapts else {}
        # statistics and head keep 4 bytes a number, as beside a mask
        sizes = {"weights": 2 * learned, "statistics": 4 * parameters(*statistics.values()), "head": 4 * head}
        return Fitted(classified(classifier), learned + head, sizes, steps.steps)


@BASELINES.register
class Full(Dense):
    """Full fine-tuning: every weight of the body learns, and a head."""

    id = "full"
    reference = ""
    rates: ClassVar[Rates] = {"adam": (1e-4, 3e-4, 1e-3), "sgd": (0.003, 0.01, 0.03)}

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        return body_parameters(backbone)


class Named(Dense):
    """Parameters of one kind learn alone, and a head.

    Attributes:
        word: of `learning_names`.
    """

    word: ClassVar[str]

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        if not self.learn(backbone, config):
            raise ConfigError(
                f"the backbone {backbone.id} has no {self.word}, so there is no baseline {self.id!r}; leave it out"
            )

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        body = body_parameters(backbone)
        return {name: body[name] for name in learning_names(backbone.model, [self.word], backbone.outside)}


@BASELINES.register
class BitFit(Named):
    """Biases alone learn, those of normalisation layers included, and a head."""

    id = "bitfit"
    reference = "https://arxiv.org/abs/2106.10199"
    rates: ClassVar[Rates] = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1)}
    word = "biases"


@BASELINES.register
class Norms(Named):
    """Scales and shifts of normalisation layers alone learn, and a head."""

    id = "norms"
    reference = "https://arxiv.org/abs/2003.00152"
    rates: ClassVar[Rates] = {"adam": (3e-3, 1e-2, 3e-2), "sgd": (0.01, 0.03, 0.1)}
    word = "norms"


@BASELINES.register
class Lora(Dense):
    """LoRA of a rank on the layers that masks are for, alpha twice the rank, not merged; and a head.

    Convolutions in groups that do not divide the rank, as depthwise ones, are left out.
    """

    id = "lora"
    reference = "https://arxiv.org/abs/2106.09685"
    argument = "rank"
    rates: ClassVar[Rates] = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.01, 0.03, 0.1)}

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        require("peft", "lab", "the baseline 'lora'")
        _layers(backbone, config, self.number(RANK, least=1))

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        rank, peft = self.number(RANK, least=1), require("peft", "lab", "the baseline 'lora'")
        layers = "|".join(re.escape(name) for name in _layers(backbone, config, rank))
        # a pattern that is matched as a whole: as a list, names would match the ends of others
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"(?:{layers})")
        peft.inject_adapter_in_model(settings, backbone.model)
        return {name: one for name, one in backbone.model.named_parameters() if ".lora_" in name}


def _layers(backbone: Backbone, config: TrainConfig, rank: int) -> list[str]:
    """Return the modules whose weights a mask would be for, without those that PEFT has no LoRA of this rank for."""
    names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    known = dict(backbone.model.named_modules())
    layers = {name: name.rpartition(".")[0] for name in names}

    def possible(name: str) -> bool:
        layer = known[layers[name]]
        linear = isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or type(layer).__name__ == "Conv1D"
        return linear and name.endswith(".weight")

    foreign = [name for name in names if not possible(name)]
    if foreign:
        raise ConfigError(
            f"LoRA is for weights of linear and convolution layers, and {len(foreign)} of the {len(names)} chosen are "
            f"others, first {foreign[0]!r}; leave them out with exclude, or the baseline 'lora'"
        )
    apart = [layer for layer in layers.values() if rank % getattr(known[layer], "groups", 1)]
    if apart:
        warnings.warn(
            f"LoRA of rank {rank} leaves out {len(apart)} of {len(layers)} layers, because their groups do not divide "
            f"the rank; the first is {apart[0]!r}",
            stacklevel=2,
        )
    return [layer for layer in layers.values() if layer not in apart]
