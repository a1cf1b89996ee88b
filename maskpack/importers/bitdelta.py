"""Files of BitDelta: one bit for each weight of a matrix, whose sign times one number is added to the base's."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BackboneMismatchError, DataError
from .base import IMPORTERS, Found, exact, known
from .pickled import saved, tensor

BITS = 32


@IMPORTERS.register
class BitDelta:
    """File of BitDelta (`diff.pt`): packed signs and a scale for each matrix, other parameters whole."""

    id: ClassVar[str] = "bitdelta"
    reference: ClassVar[str] = "https://arxiv.org/abs/2402.10193"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        found = saved(path)
        if not isinstance(found, dict) or not any(str(name).endswith(".mask") for name in found):
            raise DataError(f"{path} has no signs of BitDelta (X.mask and X.coeff for each matrix); give its diff.pt")
        matrices = {str(name).removesuffix(".mask") + ".weight" for name in found if str(name).endswith(".mask")}
        rest = {str(name) for name in found if not str(name).endswith((".mask", ".coeff"))}
        names = {own: name for name, own in known(path, matrices | rest, base).items()}

        def make(own: str) -> Tensor:
            name, weight = names[own], base[own].detach().cpu()
            if name in matrices:
                packed, coeff = (tensor(found[name.removesuffix("weight") + one], path) for one in ("mask", "coeff"))
                if packed.dtype != torch.int32 or (packed.shape[0] * BITS, *packed.shape[1:]) != weight.T.shape:
                    raise _unlike(path, name, packed, weight)
                bits = packed.unsqueeze(1) >> torch.arange(BITS, dtype=torch.int32)[:, None] & 1
                signs = (2 * bits - 1).reshape(weight.T.shape).T
                return weight + (signs * coeff).to(weight.dtype)
            whole = tensor(found[name], path)
            if whole.shape != weight.shape:
                raise _unlike(path, name, whole, weight)
            return whole.to(weight.dtype)

        return exact(path, names, make, base)


def _unlike(path: Path, name: str, found: Tensor, weight: Tensor) -> BackboneMismatchError:
    return BackboneMismatchError(
        f"{path}: {name!r} is stored as {found.dtype} of shape {list(found.shape)}, and the backbone has "
        f"{list(weight.shape)}; give the backbone that it was made for, embeddings resized before"
    )
