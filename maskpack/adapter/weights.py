"""The base's weights as base-conditioned codecs see them: magnitude classes and signs."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone.parameters import canonical, named_parameters
from ..codecs.base import Bits
from ..codecs.classes import weight_classes
from ..errors import BackboneMismatchError

Weights = nn.Module | Mapping[str, Tensor]


def by_name(weights: Weights) -> Mapping[str, Tensor]:
    """Return weights by canonical parameter name, whether they come as a module or as a state dict.

    No tensor is asked for where all names are canonical: a mapping that reads them from a file stays one.
    """
    if isinstance(weights, nn.Module):
        return dict(named_parameters(weights))
    if all(canonical(name) == name for name in weights):
        return weights
    return {canonical(name): tensor for name, tensor in weights.items()}


def base_classes(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Bits:
    """Return the magnitude classes and signs of one parameter of the base, one uint8 per weight, row-major.

    Raises:
        BackboneMismatchError: if the base has no such parameter, or it has another shape or was cast to a dtype that
            no longer tells which classes its weights had.
    """
    tensor = weights.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        what = "no such parameter" if tensor is None else f"one of shape {tuple(tensor.shape)}"
        raise BackboneMismatchError(
            f"the mask of {name!r} is coded with the base's weights of shape {shape}, and the base given has {what}; "
            f"give the backbone that the adapter was made for"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise BackboneMismatchError(
            f"the mask of {name!r} is coded with the base's weights, and the base given has them as {tensor.dtype}, "
            f"expected torch.float32 or torch.bfloat16; load the adapter before casting the model"
        )
    rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous()
    return weight_classes(rounded.view(torch.int16).numpy().view(np.uint16))
