"""Masks that keep a network's output distribution (Differentiable Weight Masks)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, Inputs, modes_kept, to_device
from ...backbone.load import Backbone
from ...errors import ConfigError
from ...registry import NonNegative, Options, Positive
from ..config import TrainConfig
from ..data.base import Data, Examples, readable
from ..methods.base import METHODS, methods_that_are
from ..scores import scored_weights, without_scores
from ..stored import batchnorm_statistics
from .base import OBJECTIVES, Objective


@dataclass(frozen=True)
class DistributionOptions(Options):
    """Options of the objective: strength of the density penalty, temperature of both softmaxes."""

    strength: NonNegative = 1.0
    temperature: Positive = 1.0


class MaskedAndWhole(nn.Module):
    """Logits (B, classes) with the masks, and without them in evaluation mode."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), without_scores(self.classifier), modes_kept(self.classifier):
            whole = self.classifier.eval()(inputs)
        return self.classifier(inputs).float(), whole.float()


@OBJECTIVES.register
class Distribution(Objective):
    """Sparsest mask under an output-KL penalty; needs no labels.

    The loss is KL(unmasked || masked) + strength * density, with the network's own head. The gradient of the density is
    1 / weights for every score (straight through).
    """

    id: ClassVar[str] = "distribution"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    needs_labels: ClassVar[bool] = False
    options_class = DistributionOptions
    options: DistributionOptions
    module: MaskedAndWhole

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        if backbone.linear is None:
            raise ConfigError(
                f"the objective 'distribution' compares logits, and {backbone.id} has no head; take a backbone with "
                f"its head"
            )
        if self.options.strength and not METHODS[config.method].rising:
            raise ConfigError(
                f"the objective 'distribution' lowers all scores to remove weights, and higher scores of the method "
                f"{config.method!r} do not keep more weights; take {methods_that_are('rising')}, or the option "
                f"strength=0"
            )
        changed = f"train would change {', '.join(config.beside)}; leave out train" if config.beside else None
        if config.bn == "adapt" and batchnorm_statistics(backbone.model):
            changed = changed or "bn 'adapt' would change its BatchNorm statistics; take bn 'freeze'"
        if changed is not None:
            raise ConfigError(f"the objective 'distribution' compares with the unchanged network, and {changed}")
        self.module = MaskedAndWhole(Classifier(backbone.model, backbone.linear, backbone.embedding))
        self.sums = torch.zeros(3, dtype=torch.float64)  # divergence, equal classes, examples

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        return self._divergence(*module(batch[0])) + self.options.strength * self._density()

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])

    def metrics(self) -> dict[str, float]:
        """Return the mean divergence in nats, and the share of examples whose class stayed, and start anew."""
        divergence, agreed, count = self.sums.tolist()
        self.sums.zero_()
        return {"divergence": divergence / max(count, 1), "agreement": agreed / max(count, 1)}

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> dict[str, float]:
        device = next(self.module.parameters()).device
        with modes_kept(self.module):
            self.module.eval()
            for inputs, _ in readable(self.batches(examples)):
                self._divergence(*self.module(to_device(inputs, device)))
        return self.metrics()

    def _divergence(self, masked: Tensor, whole: Tensor) -> Tensor:
        """Return the mean divergence of a batch, and add it to `sums`."""
        log_p, log_q = ((one / self.options.temperature).log_softmax(-1) for one in (whole, masked))
        divergence = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        agreed = float((masked.argmax(1) == whole.argmax(1)).sum())
        self.sums += torch.tensor([float(divergence.detach()) * len(masked), agreed, len(masked)], dtype=torch.float64)
        return divergence

    def _density(self) -> Tensor:
        every = list(scored_weights(self.backbone.model).values())
        total = sum(math.prod(one.shape) for one in every)
        parts = [one.binary().sum() + one.scores.sum() - one.scores.sum().detach() for one in every]
        return torch.stack(parts).sum() / total
