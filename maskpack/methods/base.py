"""The contract of a masking method.

A method is a frozen dataclass in a file of this folder: its fields are its parameters, `id` and `reference` are
class attributes. It maps a weight to scores and scores to a mask, and nothing else: attaching scores to a model,
training, saving and applying exist once, in `training`, `adapter` and `apply`.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..mask import masked_weight
from ..registry import Registry, make_options


@dataclass(frozen=True)
class Method(ABC):
    """A way to learn a mask. Subclasses are final.

    Every parameter has a default, whose type is the parameter's.

    Attributes:
        id: name on the command line.
        reference: the paper.
    """

    id: ClassVar[str]
    reference: ClassVar[str]

    @abstractmethod
    def init_scores(self, weight: Tensor) -> Tensor:
        """Return the scores to start from: float32, of the weight's shape and device."""

    @abstractmethod
    def binarize(self, scores: Tensor) -> Tensor:
        """Return the mask: bool, of the scores' shape, True = weight kept. Deterministic."""

    def effective(self, weight: Tensor, scores: Tensor, scale: bool) -> Tensor:
        """Return the weight to compute with during training, differentiable in the scores.

        By default the mask's forward pass with a straight-through gradient (Bengio et al., 2013): exactly the weight
        that a loaded adapter has.
        """
        mask = self.binarize(scores.detach())
        result: Tensor = StraightThrough.apply(scores, weight, mask, alpha(mask) if scale else None)
        return result


METHODS: Registry[Method] = Registry("method", "maskpack.methods")


def build_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """Make the method called `name` with these parameters.

    Raises:
        UnknownNameError: if there is no such method.
        ConfigError: if it has no such parameter, or a value is impossible.
    """
    method: Method = make_options(METHODS[name], f"the method {name!r}", options or {})
    return method


def method_config(method: Method) -> dict[str, Any]:
    """Return the method as JSON: its id and its parameters."""
    return {"id": method.id, **asdict(method)}


def alpha(mask: Tensor) -> Tensor:
    """Return sqrt(mean(mask)) as float32, computed in float64 as the adapter does; an empty mask counts as one kept."""
    kept = mask.count_nonzero().clamp(min=1).to(torch.float64)
    return (kept / max(mask.numel(), 1)).sqrt().to(torch.float32)


class StraightThrough(torch.autograd.Function):
    """w' = w * m / alpha with dL/dS := dL/dM, alpha = sqrt(mean(m)) in the graph (Self-Masking Networks).

    g_i = (w_i / alpha) G_i - (1 / (2 N alpha^3)) sum_j G_j w_j m_j; without a scale only the first term, alpha = 1.
    The weight is frozen and gets no gradient. `where` is used in place of a product, so that infinite weights give no
    NaN and nothing becomes -0.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, mask: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, mask, scale)
        return masked_weight(weight, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, scale = ctx.saved_tensors
        product = gradient.to(torch.float32) * weight
        if scale is not None:
            kept = torch.where(mask, product, 0.0).sum()
            product = product / scale - kept / (2 * mask.numel() * scale**3)
        return product, None, None, None
