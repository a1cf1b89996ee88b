"""The contract of a masking method.

A method is a frozen dataclass in a file of this folder: its fields are its parameters, `id` and `reference` are
class attributes. It maps a weight to scores and scores to a mask, and nothing else: attaching scores to a model,
training, saving and applying exist once, in `training`, `adapter` and `apply`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...mask import Op, PackedMask, masked_weight
from ...registry import Registry, make_options


@dataclass(frozen=True)
class State:
    """What a method is told beside the scores of one parameter.

    Attributes:
        progress: share of the training steps that are done, from 0 to 1; 1 for scores that are finished.
        training: masks may be drawn at random; False in evaluation mode and for the mask that is stored.
        shared: what `Method.shared` gave for this parameter, or None.
        shape: of the weight; None where the scores have it.
        batch_size: examples of an optimiser step.
    """

    progress: float = 1.0
    training: bool = False
    shared: Tensor | None = None
    shape: tuple[int, ...] | None = None
    batch_size: int = 1


FINISHED = State()


@dataclass(frozen=True)
class Method(ABC):
    """A way to learn a mask. Subclasses are final.

    Every parameter has a default, whose type is the parameter's.

    Attributes:
        id: name on the command line.
        reference: the paper.
        op: what a zero of the mask does to its weight.
        learns: the scores are trained; False where they follow from the weights.
        draws: `effective` draws at random while training, so that it cannot be called again for the backward pass.
        hardens: another weight is stored than training ends with: masks were soft or random until then, or small edits
            are dropped. BatchNorm statistics are taken anew then.
        rising: there is a score for each weight, with op "zero" or "flip", and each weight is kept above some score and
            not below. Then a number added to all scores makes the mask denser, which budgets and pressures rely on.
    """

    id: ClassVar[str]
    reference: ClassVar[str]
    op: ClassVar[Op] = "zero"
    learns: ClassVar[bool] = True
    draws: ClassVar[bool] = False
    hardens: ClassVar[bool] = False
    rising: ClassVar[bool] = False

    @abstractmethod
    def init_scores(self, weight: Tensor) -> Tensor:
        """Return the scores to start from: float32, on the weight's device, of its shape or another one.

        What is random is drawn from torch's own generator.

        Raises:
            ConfigError: if the method is not for weights of this shape.
        """

    def shared(self, scores: Sequence[Tensor], progress: float) -> Sequence[Tensor] | None:
        """Return what each parameter is to be told of all of them, in their order; None, always, if nothing.

        If it gives something, it is asked for again whenever a score or the progress has changed.
        """
        return None

    @abstractmethod
    def binarize(self, scores: Tensor, state: State = FINISHED) -> Tensor:
        """Return the mask: bool, of the weight's shape, True = weight kept. Deterministic."""

    def effective(self, weight: Tensor, scores: Tensor, scale: bool, state: State = FINISHED) -> Tensor:
        """Return the weight to compute with during training, differentiable in the scores.

        By default the mask's forward pass with a straight-through gradient (Bengio et al., 2013): exactly the weight
        that a loaded adapter has. Methods that compute with something else while `state.training` give that weight too
        where it is False.
        """
        return straight_through(weight, scores, self.binarize(scores.detach(), state), scale)

    def penalty(self, scores: Tensor, state: State) -> Tensor | None:
        """Return what is added to the loss of a step for one parameter, or None."""
        return None

    def packed(self, scores: Tensor, scale: bool, state: State = FINISHED) -> PackedMask:
        """Return the mask as it is stored."""
        return PackedMask.from_tensor(self.binarize(scores, state), self.op, scale)

    def values(self, weight: Tensor, scores: Tensor) -> Tensor:
        """Return what the zeros of a mask with op "replace" put in place, of the weight's shape and dtype."""
        raise NotImplementedError


METHODS: Registry[Method] = Registry("method", "maskpack.training.methods")


def build_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """Make the method called `name` with these parameters.

    Raises:
        UnknownNameError: if there is no such method.
        ConfigError: if it has no such parameter, or a value is impossible.
    """
    method: Method = make_options(METHODS[name], f"the method {name!r}", options or {})
    return method


def rising_methods() -> str:
    """Return the names of the methods whose masks are the denser the higher the scores are, for messages."""
    *others, last = (cls.id for cls in METHODS.all() if cls.rising)
    return f"{', '.join(others)} or {last}"


def method_config(method: Method) -> dict[str, Any]:
    """Return the method as JSON: its id and its parameters."""
    return {"id": method.id, **asdict(method)}


def alpha(mask: Tensor) -> Tensor:
    """Return sqrt(mean(mask)) as float32, computed in float64 as the adapter does; an empty mask counts as one kept."""
    kept = mask.count_nonzero().clamp(min=1).to(torch.float64)
    return (kept / max(mask.numel(), 1)).sqrt().to(torch.float32)


def straight_through(
    weight: Tensor, scores: Tensor, mask: Tensor, scale: bool, *, detach_scale: bool = False
) -> Tensor:
    """Return the masked weight, differentiable in the scores as `StraightThrough` says.

    Args:
        scores: of the weight's shape.
        scale: divide by `alpha(mask)`. detach_scale: its gradient is left out.
    """
    divisor = alpha(mask) if scale else None
    result: Tensor = StraightThrough.apply(
        scores, weight, masked_weight(weight, mask, divisor), divisor, None if detach_scale else mask
    )
    return result


class StraightThrough(torch.autograd.Function):
    """w' = w * m / alpha with dL/dS := dL/dM, alpha = sqrt(mean(m)) in the graph (Self-Masking Networks).

    g_i = (w_i / alpha) G_i - (1 / (2 N alpha^3)) sum_j G_j w_j m_j; without a scale only the first term, alpha = 1, and
    with a detached one only the first term. The weight is frozen and gets no gradient. The result is computed outside,
    by `where` in place of a product, so that infinite weights give no NaN and nothing becomes -0.
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
