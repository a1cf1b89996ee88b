"""Adapters of SHiRA, as PEFT saves them: places in a matrix, and what is added there."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BackboneMismatchError, DataError
from ..safetensors_io import open_tensors
from .base import IMPORTERS, Found, exact, known

WEIGHT, PLACES = ".shira_weight", ".shira_indices"


@IMPORTERS.register
class Shira:
    """Adapter of SHiRA (`adapter_model.safetensors` of PEFT): what is added to a few weights of each matrix."""

    id: ClassVar[str] = "shira"
    reference: ClassVar[str] = "https://arxiv.org/abs/2406.13175"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)
        matrices = {name.removesuffix(WEIGHT) + ".weight" for name in tensors if name.endswith(WEIGHT)}
        if not matrices:
            raise DataError(f"{path} has no tensors of SHiRA (X{WEIGHT} and X{PLACES}); give what PEFT saved of one")
        rest = {name for name in tensors if not name.endswith((WEIGHT, PLACES))}
        names = {own: name for name, own in known(path, matrices | rest, base).items()}

        def make(own: str) -> Tensor:
            name, weight = names[own], base[own].detach().cpu()
            if name not in matrices:
                return tensors[name].to(weight.dtype)
            stem = name.removesuffix(".weight")
            values, places = tensors[stem + WEIGHT], tensors[stem + PLACES].long()
            # as many as a LoRA of some rank has
            fits = weight.ndim == 2 and places.shape == (2, values.numel()) and not values.numel() % sum(weight.shape)
            if not fits or (places < 0).any() or (places >= torch.tensor(weight.shape)[:, None]).any():
                raise BackboneMismatchError(
                    f"{path}: the places of {stem!r} are not those of a matrix of shape {list(weight.shape)}; give the "
                    f"backbone that the adapter was made for"
                )
            return weight.clone().index_put_((places[0], places[1]), values.to(weight.dtype), accumulate=True)

        for own, name in names.items():
            if name in rest and tensors.shapes[name] != tuple(base[own].shape):
                raise BackboneMismatchError(
                    f"{path}: {name!r} has shape {list(tensors.shapes[name])}, and the backbone {list(base[own].shape)}"
                )
        return exact(path, names, make, base)
