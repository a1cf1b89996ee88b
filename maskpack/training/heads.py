"""New heads for a data set's classes: trained, random under a mask, or made of text embeddings."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ..backbone.classifier import Classifier, linear_from
from ..backbone.load import Backbone, text_head
from ..backbone.model import Head
from ..backbone.random_weights import MAX_WEIGHTS, RandomWeight, random_weight
from ..errors import ConfigError
from .config import TrainConfig
from .methods.base import build_method
from .scores import attach, extract_masks, scored_weights


def new_classifier(backbone: Backbone, class_names: Sequence[str], config: TrainConfig) -> Classifier:
    """Return a backbone with the head that `config.head_kind` asks for; a masked one has scores attached."""
    masked, classes, features = config.head_kind == "masked", len(class_names), backbone.features
    if masked and classes * features > MAX_WEIGHTS:
        raise ConfigError(
            f"a masked head for {classes} classes would have {classes * features} weights, at most {MAX_WEIGHTS} are "
            f"allowed; take a linear head"
        )
    if config.head_kind == "own":
        own = backbone.linear
        if own is None or own.out_features != classes:
            found = "no linear head" if own is None else f"a head for {own.out_features} classes"
            raise ConfigError(
                f"head_kind 'own' keeps the model's head, and {backbone.id} has {found}, the data have {classes} "
                f"classes; take a linear head"
            )
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


def finished_head(classifier: Classifier, config: TrainConfig) -> Head:
    """Return the head to store; scores that it has are detached."""
    head = classifier.head()
    if config.head_kind != "masked":
        return head
    random = RandomWeight(config.seed, extract_masks(classifier.linear)["weight"])
    # not the layer's own values: those may be in another dtype than float32
    return replace(head, weight=random.dense(), random=random)
