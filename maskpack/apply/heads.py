"""Heads that are modules of the model: where they go."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..backbone.head import Head
from ..errors import BackboneMismatchError


def head_module(model: nn.Module, head: Head) -> nn.Module:
    """Return the module that a head is for; raises BackboneMismatchError if the model has none there."""
    assert head.module is not None
    try:
        return model.get_submodule(head.module)
    except AttributeError:
        raise BackboneMismatchError(
            f"the model has no module {head.module!r} for the adapter's head; pass head='keep' to leave the head alone"
        ) from None


def head_fits(module: nn.Module, head: Head) -> bool:
    """Whether a head's tensors can be copied into a module, so that compiled code and CUDA graphs stay valid."""
    same = isinstance(module, nn.Linear) and module.weight.shape == head.weight.shape
    return same and (module.bias is None) == (head.bias is None)


def new_head(model: nn.Module, old: nn.Module, head: Head) -> nn.Linear:
    """Return a layer for a head that does not fit into the module `old`, of its device, dtype and modes."""
    example = next(old.parameters(), next(model.parameters()))
    classes, features = head.weight.shape
    with torch.inference_mode(False):  # it may be trained later
        new = nn.Linear(features, classes, head.bias is not None, example.device, example.dtype)
    new.weight.detach().copy_(head.weight)
    if head.bias is not None:
        new.bias.detach().copy_(head.bias)
    new.requires_grad_(example.requires_grad)
    return new.train(old.training)


def head_tensors(head: Head) -> Mapping[str, Tensor]:
    """Return the tensors of a head that is a module of the model, by dotted name."""
    found = {f"{head.module}.weight": head.weight}
    return found if head.bias is None else {**found, f"{head.module}.bias": head.bias}
