"""Contract of a masking method.

A method is a frozen dataclass in a file of this folder, and its fields are its options. It maps a weight to scores
(`init_scores`) and scores to a mask (`binarize`), and says which weight to compute with meanwhile (`effective`).
Attaching scores to a model, training, saving and applying are the same for all methods and lie elsewhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...mask import Op, PackedMask, masked_weight
from ...registry import Options, Registry, make_options


@dataclass(frozen=True)
class State:
    """The state of training, for the scores of one parameter.

    Attributes:
        progress: share of the training steps that are done, 0 to 1; 1 for finished scores.
        training: masks may be drawn at random. False in evaluation mode and for the stored mask.
        shared: this parameter's part of `Method.shared`.
        shape: of the weight; None if the scores have the same shape.
        batch_size: examples of an optimiser step.
    """

    progress: float = 1.0
    training: bool = False
    shared: Tensor | None = None
    shape: tuple[int, ...] | None = None
    batch_size: int = 1


FINISHED = State()


@dataclass(frozen=True)
class Method(Options, ABC):
    """A way to learn a mask.

    Attributes:
        op: what a zero of the mask does to its weight.
        learns: scores are trained; False if they follow from the weights.
        draws: `effective` draws at random in training, so the backward pass cannot call it again.
        hardens: the stored weight differs from the one that training ended with, because masks were soft or random, or
            small edits are dropped. BatchNorm statistics are then taken anew.
        rising: each weight has one score, is kept above some value of it and removed (op "zero") or flipped below. So a
            number added to all scores makes the mask denser, on which byte budgets and density penalties rely.
        partial: each weight has one score and the mask is all that is stored, so some weights may have scores alone.
        detach_scale: the scale has no gradient.
    """

    id: ClassVar[str]
    reference: ClassVar[str]
    op: ClassVar[Op] = "zero"
    learns: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    hardens: ClassVar[bool] = False
    rising: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    detach_scale = False

    @abstractmethod
    def init_scores(self, weight: Tensor) -> Tensor:
        """Return the initial scores: float32, on the weight's device, of any shape.

        Random scores are drawn from PyTorch's default generator. ConfigError: if the weight's shape does not suit.
        """

    def shared(self, scores: Sequence[Tensor], progress: float) -> Sequence[Tensor] | None:
        """Return one tensor per parameter (`State.shared`), computed from the scores of all; None: always nothing.

        Called again whenever a score or the progress has changed.
        """
        return None

    @abstractmethod
    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        """Return the mask: bool, of the weight's shape, True = weight kept. Deterministic."""

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        """Return the weight to compute with, differentiable in the scores.

        Where `state.training` is False it equals, to the bit, the weight under a loaded adapter. Default: the masked
        weight with a straight-through gradient (Bengio et al., 2013).
        """
        mask = self.binarize(scores.detach(), state)
        return straight_through(weight, scores, mask, scale, detach_scale=self.detach_scale)

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        """Return a scalar to add to the loss of a step for one parameter, or None."""
        return None

    def packed(self, scores: Tensor, scale: bool, state: State = FINISHED) -> PackedMask:
        """Return the mask to store."""
        return PackedMask.from_tensor(self.binarize(scores, state), self.op, scale)

    def values(self, weight: Tensor, scores: Tensor) -> Tensor:
        """Return the values for the zeros of a mask with op "replace", of the weight's shape and dtype."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method", "maskpack.training.methods")


def build_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return the method with this id and these options."""
    method: Method = make_options(METHODS[name], f"the method {name!r}", options or {})
    return method


def methods_that_are(what: Literal["rising", "partial"]) -> str:
    """Return the ids of the methods that have a property, joined for a message."""
    *others, last = (cls.id for cls in METHODS.all() if getattr(cls, what))
    return f"{', '.join(others)} or {last}"


def alpha(mask: Tensor) -> Tensor:
    """Return sqrt(mean(mask)) as float32, computed in float64 as the adapter does; an empty mask counts as one kept."""
    kept = mask.count_nonzero().clamp(min=1).to(torch.float64)
    return (kept / max(mask.numel(), 1)).sqrt().to(torch.float32)


def straight_through(
    weight: Tensor, scores: Tensor, mask: Tensor, scale: bool, *, detach_scale: bool = False
) -> Tensor:
    """Return the masked weight with the gradient of `StraightThrough`; `scale` divides it by `alpha(mask)`."""
    divisor = alpha(mask) if scale else None
    result: Tensor = StraightThrough.apply(
        scores, weight, masked_weight(weight, mask, divisor), divisor, None if detach_scale else mask
    )
    return result


class StraightThrough(torch.autograd.Function):
    """w' = w * m / alpha with dL/dS := dL/dM and alpha = sqrt(mean(m)) in the graph (Self-Masking Networks).

    g_i = (w_i / alpha) G_i - (1 / (2 N alpha^3)) sum_j G_j w_j m_j. Only the first term remains without a scale
    (alpha = 1) and without a mask (detached scale). The frozen weight gets no gradient. The result is computed by the
    caller, by `where` and no product: infinite weights give no NaN, and nothing becomes -0.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, weight: Tensor, result: Tensor, scale: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, None if scale is None else mask)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, mask = ctx.saved_tensors
        product = gradient.to(torch.float32) * weight
        if scale is None:
            return product, None, None, None, None
        through = product / scale
        if mask is not None:
            through = through - torch.where(mask, product, 0.0).sum() / (2 * mask.numel() * scale**3)
        return through, None, None, None, None
