"""The supervised objective, and the heads that it trains: whole, random under a mask, or made of text embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, accuracy, classifier_from, embeddings, linear_from, predictions
from ...backbone.load import Backbone, text_head
from ...backbone.model import MAX_WEIGHTS, Head, RandomWeight, random_weight
from ...errors import AdapterError, ConfigError, DataError
from ..config import TrainConfig
from ..data.base import Data, Examples, loader, readable
from ..features import Probe, by_class, embed, fit_probe, probe_accuracies
from ..methods.base import build_method
from ..own_loop import extract_masks
from ..scores import attach, scored_weights
from ..stored import kept_head, settle_head
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
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "text-classification", "token-classification")
    needs_labels: ClassVar[bool] = True
    supervised: ClassVar[bool] = True
    trains_head: ClassVar[bool] = True
    module: Classifier

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.probe: Probe | None = None
        if config.head_kind == "linear" and config.head_start == "probe":
            self.probe = fit_probe(*embed(backbone, self.rows, batch_size=config.batch_size), len(data.class_names))
        self.module = new_classifier(backbone, data.class_names, config)
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def start(self) -> None:
        """Give a linear head its first values: the probe, or class centroids of an encoder's frozen embeddings."""
        linear = self.module.linear
        with torch.no_grad():
            if self.probe is not None:
                linear.weight.copy_(self.probe.weight)
                linear.bias.copy_(self.probe.bias.clamp(min=LEAST_BIAS))
            elif self.config.head_kind == "linear" and self.backbone.embedding.normalize:
                x, y = embeddings(self.backbone, readable(self.batches(self.rows)))
                centroids = torch.zeros(linear.weight.shape).index_add_(0, y, x)
                linear.weight.copy_(nn.functional.normalize(centroids, dim=-1) * CENTROID_SCALE)
                linear.bias.zero_()

    def trained(self) -> list[nn.Parameter]:
        return list(self.module.linear.parameters()) if self.config.head_kind == "linear" else []

    def scores(self) -> list[nn.Parameter]:
        """Return the scores of a masked head."""
        return [one.scores for one in scored_weights(self.module.linear).values()]

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, labels = batch
        loss: Tensor = self.loss_function(module(inputs).float().flatten(0, -2), labels.flatten())
        return loss

    def evaluate(self, examples: Examples) -> dict[str, float]:
        return {"accuracy": accuracy(self.module, readable(self.batches(examples)))[0]}

    def baseline(self) -> Mapping[str, float]:
        return probe_accuracies(self.backbone, self.data, self.config.batch_size)

    @classmethod
    def measured(cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int) -> dict[str, Any]:
        """Return accuracies as `by_class` over the examples that can be read."""
        return by_class(*cls.logits(backbone, examples, head, batch_size))

    @classmethod
    def logits(
        cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return the logits that a backbone gives that has an adapter loaded, and the labels."""
        logits, y = cls.outputs(backbone, examples, head, batch_size)
        if int(y.max()) >= logits.shape[1]:
            raise DataError(
                f"the adapter's head has {logits.shape[1]} classes and no names for them, and the data have a class "
                f"{int(y.max())} (counted from 0); measure it on the data that it was made for"
            )
        return logits, y

    @classmethod
    def outputs(
        cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return outputs of a backbone that has an adapter with a head loaded, and targets."""
        if head is None:
            raise AdapterError(
                "this adapter has no head or no preprocessing, so it has no accuracy of its own; measure its features "
                "by k-NN or a linear probe (--knn, --probe)"
            )
        batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
        return predictions(classifier_from(backbone.model, head), readable(batches))

    def settle(self) -> bool:
        return self.config.head_kind in ("linear", "text") and settle_head(self.module.linear, self.config.store)

    def head(self) -> Head:
        """Return the head to store; scores that it has are detached."""
        head = self.module.head()
        if self.config.head_kind != "masked":
            return kept_head(head)
        random = RandomWeight(self.config.seed, extract_masks(self.module.linear)["weight"])
        # not the layer's own values: those may be in another dtype than float32
        return replace(head, weight=random.dense(), random=random)


def new_classifier(backbone: Backbone, class_names: Sequence[str], config: TrainConfig) -> Classifier:
    """Return a backbone with the head that `config.head_kind` asks for; a masked one has scores attached."""
    masked, classes, features = config.head_kind == "masked", len(class_names), backbone.features
    if masked and classes * features > MAX_WEIGHTS:
        raise ConfigError(
            f"a masked head for {classes} classes would have {classes * features} weights, at most {MAX_WEIGHTS} are "
            f"allowed; take a linear head"
        )
    if config.head_kind == "own":
        own = backbone.head_for(classes, "head_kind 'own' keeps the model's head", "take a linear head")
        return Classifier(backbone.model, own, backbone.embedding)
    if config.head_kind == "text":
        linear = linear_from(text_head(backbone, class_names, config.head_template))
    else:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(config.seed)
            linear = nn.Linear(features, classes, bias=not masked)
            if masked:
                linear.weight.copy_(random_weight(config.seed, classes, features))
    example = next(backbone.model.parameters())
    linear.to(example.device, example.dtype)
    if masked:
        method = build_method(config.method, dict(config.method_options))
        try:
            attach(linear, method, ["weight"], config.scale)
        except ConfigError as error:
            raise ConfigError(f"the masked head's {error}, or take a linear head") from None
        if method.op != "zero" or scored_weights(linear)["weight"].mask().signs is not None:
            raise ConfigError(
                f"head_kind 'masked' stores a mask whose zeros remove weights, and the method {config.method!r} makes "
                f"others; take another method or a linear head"
            )
    # random weights give embeddings of length 1 nearly equal logits
    embedding = replace(backbone.embedding, normalize=backbone.embedding.normalize and not masked)
    return Classifier(backbone.model, linear, embedding)
