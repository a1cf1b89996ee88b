"""Borrowing a backbone for training: it comes back with the bits, flags and modes that it had."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..backbone.classifier import modes_kept
from ..backbone.head import swap_module
from ..backbone.load import Backbone
from .scored import detach_scores


@contextmanager
def borrowed(backbone: Backbone) -> Iterator[None]:
    """On exit, whatever happened: scores detached, head, buffers, `requires_grad`, device and modes as before."""
    model = backbone.model
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
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
            p.grad = None
