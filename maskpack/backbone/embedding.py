"""What of a model is an embedding."""

from dataclasses import dataclass

from .head import Pooling


@dataclass(frozen=True, slots=True)
class Embedding:
    """Where an embedding is taken: what goes into a model's head, or an encoder's pooled last hidden state.

    Attributes:
        module: dotted name of the head; None for an encoder.
        pooling, normalize: of an encoder, as in `backbone.load.Backbone`; None and False where there is a module.
    """

    module: str | None = None
    pooling: Pooling | None = None
    normalize: bool = False
