"""BatchNorm in training: its mode, what is stored of it, and statistics taken anew."""

from collections.abc import Iterable

import torch
from torch import nn

from ..backbone.classifier import Batch, to_device

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def set_train_mode(module: nn.Module, adapt_batchnorm: bool) -> None:
    """Put a module into training mode, with its BatchNorm layers in evaluation mode unless they adapt."""
    module.train()
    if not adapt_batchnorm:
        for layer in _layers(module):
            layer.eval()


def batchnorm_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return running mean and variance of every BatchNorm layer, float32 on the CPU, by buffer name."""
    return {
        f"{name}.{leaf}": getattr(m, leaf).detach().to("cpu", torch.float32, copy=True)
        for name, m in model.named_modules()
        if isinstance(m, BATCH_NORMS) and m.running_mean is not None
        for leaf in ("running_mean", "running_var")
    }


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Batch]) -> None:
    """Replace BatchNorm statistics by the means over these batches, all counted alike; dropout is off.

    Layers without running statistics stay as they are. The module is left in evaluation mode.
    """
    layers = [layer for layer in _layers(module) if layer.running_mean is not None]
    if not layers:
        return
    device = next(module.parameters()).device
    momenta = [layer.momentum for layer in layers]
    module.eval()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        for inputs, _ in batches:
            module(to_device(inputs, device))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()


def _layers(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, BATCH_NORMS)]
