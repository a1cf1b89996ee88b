"""What tasks look like to the base: which is an input nearest to?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone.classifier import Inputs, embeddings, example_count
from ..backbone.head import find_head
from ..backbone.load import Backbone
from ..errors import ConfigError
from .bank import MaskBank

OWN = 0.99  # share of a task's own examples that lie within its limit


@dataclass(frozen=True, slots=True)
class Identified:
    """Which adapter a batch is for.

    Attributes:
        name: of the adapter; None: none of them. likeliest: of the best one in any case.
        confidence: 0 to 1. scores: of each adapter, greater is likelier; their unit depends on how they were found.
        passes: forward passes of the batch, a backward pass counted as two.
    """

    name: str | None
    likeliest: str
    confidence: float
    scores: Mapping[str, float]
    passes: int


@dataclass(frozen=True, slots=True, eq=False)
class Profiles:
    """What tasks look like to the base: where their examples lie in its features.

    Attributes:
        names: of the tasks. means: (k, D). deviation: of features within a task, (D,). limits: distance within which
            OWN of a task's own examples lie, (k,).
        head, pooling, normalize: where the features are taken, as of `Backbone`.
    """

    names: tuple[str, ...]
    means: Tensor
    deviation: Tensor
    limits: Tensor
    head: str | None
    pooling: str | None
    normalize: bool

    def nearest(self, inputs: Inputs, model: nn.Module, least: float) -> Identified:
        """Return the task that most of a batch is nearest to; none if the batch lies outside of its limit."""
        features = _features(model, self.head, self.pooling, self.normalize, inputs)
        distances = _distances(features, self.means, self.deviation)
        votes = torch.bincount(distances.argmin(1), minlength=len(self.names)) / len(features)
        best = int(votes.argmax())
        confidence = float(votes[best])
        far = float(distances[:, best].median()) > float(self.limits[best])
        name = None if far or confidence < least else self.names[best]
        scores = dict(zip(self.names, (-distances.mean(0)).tolist(), strict=True))
        return Identified(name, self.names[best], confidence, scores, 1)


def profiles(bank: MaskBank, examples: Mapping[str, Tensor | Mapping[str, Tensor]]) -> Profiles:
    """Note where some examples of each task lie in the features of the base, for `identify`.

    Args:
        examples: by the name of a task's adapter, preprocessed, two or more of each.

    Raises:
        UnknownNameError: if the bank has no adapter of a name. ConfigError: if a task has less than two examples.
    """
    if not examples:
        raise ConfigError("there are no examples of any task; give some by the names of adapters")
    head = bank.parts(next(iter(examples))).head
    pooling = None if head is None else head.pooling
    place = None if pooling is not None else find_head(bank.model) if head is None else head.module
    normalize = head is not None and head.normalize
    found = {}
    for name, inputs in examples.items():
        bank.parts(name)
        batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
        with bank.disabled():
            found[name] = _features(bank.model, place, pooling, normalize, batch)
        if len(found[name]) < 2:
            raise ConfigError(f"a profile needs two examples at least, and {name!r} has {len(found[name])}")
    means = torch.stack([one.mean(0) for one in found.values()])
    within = torch.cat([one - mean for one, mean in zip(found.values(), means, strict=True)])
    deviation = within.std(0).clamp(min=1e-6)
    limits = [
        _distances(one, mean[None], deviation)[:, 0].quantile(OWN)
        for one, mean in zip(found.values(), means, strict=True)
    ]
    return Profiles(tuple(found), means, deviation, torch.stack(limits), place, pooling, normalize)


def _features(model: nn.Module, head: str | None, pooling: str | None, normalize: bool, inputs: Inputs) -> Tensor:
    backbone = Backbone(model, "the model", head=head, pooling=pooling, normalize=normalize)  # type: ignore[arg-type]
    return embeddings(backbone, [(inputs, torch.zeros(example_count(inputs), dtype=torch.long))])[0]


def _distances(features: Tensor, means: Tensor, deviation: Tensor) -> Tensor:
    """Return root mean squares of (features - mean) / deviation, (B, k)."""
    return torch.cdist(features / deviation, means / deviation) / math.sqrt(len(deviation))
