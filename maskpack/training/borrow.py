"""Borrowing a backbone for training: it comes back with the bits, flags and modes that it had."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..backbone.classifier import modes_kept
from ..backbone.head import swap_module
from ..backbone.load import Backbone
from ..backbone.parameters import named_parameters
from ..backbone.select import match_parameters
from .scored import detach_scores


@contextmanager
def borrowed(backbone: Backbone, train: Iterable[str] = ()) -> Iterator[None]:
    """On exit, whatever happened: scores detached, head, buffers, `requires_grad`, device and modes as before.

    Args:
        train: globs of parameters that may change meanwhile.
    """
    model = backbone.model
    parameters = named_parameters(model)
    changing = {name: parameters[name] for name in match_parameters(model, train, "train", backbone.outside)}
    values = {name: parameter.detach().clone() for name, parameter in changing.items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    head = model.get_submodule(backbone.head) if backbone.head is not None else None
    try:
        with modes_kept(model):
            yield
    finally:
        detach_scores(model)
        if backbone.head is not None and head is not None:
            swap_module(model, backbone.head, head)
        model.to(device)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for name, parameter in changing.items():
                parameter.copy_(values[name])
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
            p.grad = None
