"""The supervised objective."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, accuracy, embeddings
from ...backbone.load import Backbone
from ...backbone.model import Head
from ..config import TrainConfig
from ..data.base import Data, Examples, readable
from ..features import Probe, embed, fit_probe
from ..heads import finished_head, new_classifier
from ..scores import scored_weights
from .base import OBJECTIVES, Objective

LEAST_BIAS = -100.0  # of a class without a row: finite in any precision and under label smoothing
CENTROID_SCALE = 10.0  # logits of unit embeddings against unit centroids, as sharp as a trained head's


@OBJECTIVES.register
class Supervised(Objective):
    """Cross-entropy on labels, with a linear head trained beside the scores.

    The backbone's head is replaced by one for the data's classes until training ends.
    """

    id: ClassVar[str] = "supervised"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "text-classification")
    needs_labels: ClassVar[bool] = True
    module: Classifier

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.probe: Probe | None = None
        if config.head_kind == "linear" and config.head_start == "probe":
            assert data.train is not None
            self.probe = fit_probe(*embed(backbone, data.train, batch_size=config.batch_size), len(data.class_names))
        self.module = new_classifier(backbone, data.class_names, config)
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def start(self) -> None:
        """Give a linear head its first values: the probe, or class centroids of an encoder's frozen embeddings."""
        if self.probe is not None:
            with torch.no_grad():
                self.module.linear.weight.copy_(self.probe.weight)
                self.module.linear.bias.copy_(self.probe.bias.clamp(min=LEAST_BIAS))
            return
        if self.config.head_kind != "linear" or not self.backbone.embedding.normalize:
            return
        assert self.data.train is not None
        x, y = embeddings(self.backbone, readable(self.batches(self.data.train)))
        with torch.no_grad():
            centroids = torch.zeros(self.module.linear.weight.shape).index_add_(0, y, x)
            self.module.linear.weight.copy_(nn.functional.normalize(centroids, dim=-1) * CENTROID_SCALE)
            self.module.linear.bias.zero_()

    def trained(self) -> list[nn.Parameter]:
        return list(self.module.linear.parameters()) if self.config.head_kind == "linear" else []

    def scores(self) -> list[nn.Parameter]:
        """Return the scores of a masked head."""
        return [one.scores for one in scored_weights(self.module.linear).values()]

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, labels = batch
        loss: Tensor = self.loss_function(module(inputs).float(), labels)
        return loss

    def evaluate(self, examples: Examples) -> dict[str, float]:
        return {"accuracy": accuracy(self.module, readable(self.batches(examples)))[0]}

    def head(self) -> Head:
        return finished_head(self.module, self.config)
