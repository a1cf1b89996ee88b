"""The supervised objective: cross-entropy on labels, with a linear head trained beside the scores."""

from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.classifier import Classifier, accuracy, features
from ..backbone.head import Head
from ..backbone.load import Backbone
from ..data.base import Data, Examples
from ..data.batches import loader, readable
from ..errors import DataError
from .config import TrainConfig

CENTROID_SCALE = 10.0  # logits of unit embeddings against unit centroids, as sharp as a trained head's


class Supervised:
    """Cross-entropy on the labels.

    Args:
        backbone: its head is replaced by a fresh one for the data's classes until training ends.
    """

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        if data.train is None:
            raise DataError(f"the data {data.id!r} have no training split")
        if data.task != backbone.task:
            raise DataError(f"the data {data.id!r} are for {data.task}, the backbone {backbone.id} for {backbone.task}")
        if len(data.class_names) < 2:
            raise DataError(f"the data {data.id!r} have one class, {data.class_names[0]!r}; at least two are needed")
        self.backbone, self.data, self.config = backbone, data, config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            linear = nn.Linear(backbone.features, len(data.class_names))
        example = next(backbone.model.parameters())
        linear.to(example.device, example.dtype)
        self.module = Classifier(backbone.model, linear, backbone.head, backbone.pooling, backbone.normalize)
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def start(self) -> None:
        """Start the head of an encoder from the class centroids of the frozen embeddings."""
        if not (self.backbone.pooling and self.backbone.normalize):
            return
        assert self.data.train is not None
        x, y = features(self.module, readable(self.batches(self.data.train)))
        with torch.no_grad():
            centroids = torch.zeros(self.module.linear.weight.shape).index_add_(0, y, x)
            self.module.linear.weight.copy_(nn.functional.normalize(centroids, dim=-1) * CENTROID_SCALE)
            self.module.linear.bias.zero_()

    def batches(self, examples: Examples, **options: Any) -> Any:
        """Return a loader of this data set's batches."""
        return loader(
            examples,
            self.backbone.preprocess,
            self.backbone.tokenizer,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            **options,
        )

    def trained(self) -> list[nn.Parameter]:
        """Return the tensors trained beside the scores."""
        return list(self.module.linear.parameters())

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Return the loss of one batch, a scalar."""
        inputs, labels = batch
        loss: Tensor = self.loss_function(module(inputs).float(), labels)
        return loss

    def accuracy(self, examples: Examples) -> float:
        """Return the share of examples classified correctly, with the masks as they are now."""
        return accuracy(self.module, readable(self.batches(examples)))[0]

    def head(self) -> Head:
        """Return the trained head."""
        return self.module.head()
