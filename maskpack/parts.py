"""What an adapter is made of: mask sets with all that travels beside them, and what makes a cascade of several."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .backbone.embedding import Embedding
from .backbone.head import Head
from .mask import MaskSet
from .router import Router, Whitening

Combine = Literal["conditional", "unconditional"]
COMBINES: tuple[Combine, ...] = ("conditional", "unconditional")
# the Hub's names for what a network of a task does without its head
FEATURES = {"image-classification": "image-feature-extraction", "text-classification": "feature-extraction"}


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A mask set and its dense tensors.

    Attributes:
        statistics: BatchNorm buffers by name, float32.
        parameters: trained parameters that are stored whole, by name.
        values: for masks with op "replace": the values for the zeros of the mask, row-major, by parameter name.
    """

    masks: MaskSet
    head: Head | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory of the masks, at a bit a weight, and of the tensors beside them."""
        packed = sum((len(bits) + 7) // 8 for mask in self.masks.values() for _, bits in mask.payloads())
        head = () if self.head is None else (self.head.weight, self.head.bias)
        dense: list[Tensor | None] = [
            *self.statistics.values(),
            *self.parameters.values(),
            *self.values.values(),
            *head,
        ]
        return packed + sum(int(tensor.nbytes) for tensor in dense if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class CascadeParts:
    """What makes a cascade of mask sets: a dispatcher's embedding says which expert embeds the input once more.

    The combined embedding is [D, E1, …, EK], of the dispatcher and every expert, (K + 1) times as long as one.

    Attributes:
        dispatcher: name of the set whose embeddings are routed.
        experts: names of the other sets, one for each component of the router, in its order.
        embedding: what of the model an embedding is.
        router: from embeddings of the dispatcher to components.
        combine: "conditional": blocks of experts other than the routed one are zero, so that an input takes two passes;
            "unconditional": every block is computed.
        reduction: of combined embeddings to fewer numbers, or None.
        weight, bias: of a linear head on the combined (and, if so, reduced) embedding, (classes, …) and (classes,);
            None where there is no head.
    """

    dispatcher: str
    experts: tuple[str, ...]
    embedding: Embedding
    router: Router
    combine: Combine = "conditional"
    reduction: Whitening | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
