"""Masks that change nothing of what a network says: as many weights as possible go, its outputs stay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, Inputs, modes_kept, to_device
from ...backbone.load import Backbone
from ...errors import ConfigError
from ...registry import make_options
from ..batchnorm import batchnorm_statistics
from ..config import TrainConfig
from ..data.base import Data, Examples, readable
from ..heads import own_linear
from ..methods.base import METHODS, rising_methods
from ..scores import scored_weights, without_scores
from .base import OBJECTIVES, Objective


@dataclass(frozen=True)
class DistributionOptions:
    """Options of the objective.

    Attributes:
        strength: of the pressure to remove weights: the density times it is added to the divergence.
        temperature: that logits are divided by.
    """

    strength: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf or not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"strength must be a finite number of at least 0 and temperature above 0, got {self.strength} and "
                f"{self.temperature}"
            )


class TwiceNetwork(nn.Module):
    """A network that gives its logits with the masks, and those that it would give without."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the logits (B, classes) with masks, and without in evaluation mode."""
        with torch.no_grad(), without_scores(self.classifier), modes_kept(self.classifier):
            whole = self.classifier.eval()(inputs)
        return self.classifier(inputs).float(), whole.float()


@OBJECTIVES.register
class Distribution(Objective):
    """Keep the output distribution of the unmasked network with as few weights as possible; needs no labels.

    The loss is KL(unmasked || masked) + strength * density, with the network's own head. The density has the gradient 1
    / weights for every score (straight through).
    """

    id: ClassVar[str] = "distribution"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    needs_labels: ClassVar[bool] = False
    module: TwiceNetwork

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.options: DistributionOptions = make_options(
            DistributionOptions, "the objective 'distribution'", config.objective_options
        )
        own = own_linear(backbone)
        if own is None:
            raise ConfigError(
                f"the objective 'distribution' compares outputs, and {backbone.id} has no head that gives any; take a "
                f"backbone with its head"
            )
        if self.options.strength and not METHODS[config.method].rising:
            raise ConfigError(
                f"the objective 'distribution' lowers all scores to remove weights, and those of the method "
                f"{config.method!r} do not keep more weights the higher they are; take {rising_methods()}, or the "
                f"option strength=0"
            )
        if config.train:
            raise ConfigError(
                f"the objective 'distribution' compares with the network as it is, of which train would change "
                f"{', '.join(config.train)}; leave out train"
            )
        if config.bn == "adapt" and batchnorm_statistics(backbone.model):
            raise ConfigError(
                "the objective 'distribution' compares with the network as it is, whose BatchNorm statistics stay; "
                "take bn 'freeze'"
            )
        self.module = TwiceNetwork(Classifier(backbone.model, own, backbone.embedding))
        self.sums = [0.0, 0.0, 0.0]

    def trained(self) -> list[nn.Parameter]:
        return []

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, _ = batch
        return self._divergence(*module(inputs)) + self.options.strength * self._density()

    def state(self) -> dict[str, Tensor]:
        return {"sums": torch.tensor(self.sums, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        divergence, agreed, count = state["sums"].tolist()
        self.sums = [divergence, agreed, count]

    def metrics(self) -> dict[str, float]:
        """Return the mean divergence since the last time, in nats, and how often the class stayed."""
        divergence, agreed, count = self.sums
        self.sums = [0.0, 0.0, 0.0]
        return {"divergence": divergence / max(count, 1), "agreement": agreed / max(count, 1)}

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> dict[str, float]:
        """Return the same two of a held-out split."""
        device = next(self.module.parameters()).device
        with modes_kept(self.module):
            self.module.eval()
            for inputs, _ in readable(self.batches(examples)):
                self._divergence(*self.module(to_device(inputs, device)))
        return self.metrics()

    def _divergence(self, masked: Tensor, whole: Tensor) -> Tensor:
        """Return the divergence of a batch, and note it for `metrics`."""
        log_p, log_q = ((one / self.options.temperature).log_softmax(-1) for one in (whole, masked))
        divergence = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        agreed = float((masked.argmax(1) == whole.argmax(1)).sum())
        found = (float(divergence.detach()) * len(masked), agreed, len(masked))
        self.sums = [one + more for one, more in zip(self.sums, found, strict=True)]
        return divergence

    def _density(self) -> Tensor:
        every = list(scored_weights(self.backbone.model).values())
        total = sum(math.prod(one.shape) for one in every)
        parts = [one.binary().sum() + one.scores.sum() - one.scores.sum().detach() for one in every]
        return torch.stack(parts).sum() / total
