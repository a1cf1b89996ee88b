"""One mask set with all that travels beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .backbone.head import Head
from .mask import MaskSet


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
