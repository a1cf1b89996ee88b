"""Borrowing a backbone for training: it comes back with the bits, flags and modes that it had."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..backbone.head import swap_module
from ..backbone.load import Backbone
from .scored import detach_scores

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@contextmanager
def borrowed(backbone: Backbone) -> Iterator[None]:
    """On exit, whatever happened: scores detached, head, buffers, `requires_grad`, device and modes as before."""
    model = backbone.model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    head = model.get_submodule(backbone.head) if backbone.head is not None else None
    try:
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
        for module, mode in modes.items():
            module.training = mode


def set_train_mode(module: nn.Module, adapt_batchnorm: bool) -> None:
    """Put a module into training mode, with its BatchNorm layers in evaluation mode unless they adapt."""
    module.train()
    if not adapt_batchnorm:
        for m in module.modules():
            if isinstance(m, BATCH_NORMS):
                m.eval()


def batchnorm_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return running mean and variance of every BatchNorm layer, float32 on the CPU, by buffer name."""
    return {
        f"{name}.{leaf}": getattr(m, leaf).detach().to("cpu", torch.float32, copy=True)
        for name, m in model.named_modules()
        if isinstance(m, BATCH_NORMS) and m.running_mean is not None
        for leaf in ("running_mean", "running_var")
    }
