"""Dense checkpoints of pruned networks."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..safetensors_io import open_tensors
from .base import IMPORTERS, Found, match, pruned, read_weights


@IMPORTERS.register
class Zeros:
    """Safetensors state dict whose pruned weights are zeros and whose others are the base's."""

    id: ClassVar[str] = "zeros"
    reference: ClassVar[str] = ""

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)
        stored = {own: name for name, own in match(path, tensors, base).items() if base[own].is_floating_point()}
        return pruned(path, stored, lambda name: read_weights(tensors, stored[name], tuple(base[name].shape)), base)
