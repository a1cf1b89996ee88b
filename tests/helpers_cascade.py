"""Small cascades for tests."""

from typing import Any

import torch

from maskpack.adapter.content import Cascade, Router, Whitening
from maskpack.backbone.model import Embedding

SETS = ("dispatcher", "expert-0", "expert-1")


def whitening(inputs: int, outputs: int, generator: torch.Generator) -> Whitening:
    """Return orthonormal directions with positive scales."""
    directions = torch.linalg.qr(torch.randn(inputs, outputs, generator=generator)).Q.T
    mean, scale = 0.1 * torch.randn(inputs, generator=generator), torch.rand(outputs, generator=generator) + 0.1
    return Whitening(mean, directions, scale)


def router(features: int, experts: int, coordinates: int = 3, seed: int = 0) -> Router:
    """Return a mixture with full covariances."""
    generator = torch.Generator().manual_seed(seed)
    precisions = 0.3 * torch.randn(experts, coordinates, coordinates, generator=generator).triu()
    precisions.diagonal(dim1=1, dim2=2).abs_().add_(0.8)
    weights = torch.rand(experts, generator=generator) + 0.1
    means = torch.randn(experts, coordinates, generator=generator)
    return Router(whitening(features, coordinates, generator), weights / weights.sum(), means, precisions)


def cascade_parts(
    features: int = 6, experts: int = 2, *, reduced: int = 0, classes: int = 0, **options: Any
) -> Cascade:
    """Return a cascade of `dispatcher`, `expert-0`, …; with a reduction and a head if their sizes are not 0."""
    generator = torch.Generator().manual_seed(1)
    width = features * (experts + 1)
    options.setdefault("embedding", Embedding("fc"))
    if reduced:
        options["reduction"] = whitening(width, reduced, generator)
    if classes:
        options["weight"] = torch.randn(classes, reduced or width, generator=generator)
        options["bias"] = torch.randn(classes, generator=generator)
    names = tuple(f"expert-{k}" for k in range(experts))
    return Cascade("dispatcher", names, router=router(features, experts), **options)
