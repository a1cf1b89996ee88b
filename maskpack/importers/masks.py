"""Masks as plain tensors: what `maskpack pack` takes without --from."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..mask import PackedMask
from ..safetensors_io import open_tensors
from .base import IMPORTERS, Found


@IMPORTERS.register
class Masks:
    """Safetensors file of bool tensors, or uint8 zeros and ones, named as the parameters; True = weight kept."""

    id: ClassVar[str] = "masks"
    reference: ClassVar[str] = ""

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)

        def make(name: str) -> PackedMask:
            try:
                return PackedMask.from_tensor(tensors[name])
            except ConfigError as error:
                raise ConfigError(
                    f"mask {name!r}: {error}; if another tool wrote {path}, name its format with --from"
                ) from None

        return Found(tensors.shapes, make)
