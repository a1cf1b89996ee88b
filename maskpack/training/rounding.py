"""Stochastic rounding of scores in bfloat16, in the steps of any optimiser."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..backbone.shards import local


def rounded(values: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down at random, so that the mean is the value; what is exact stays."""
    bits = values.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


@dataclass(eq=False)
class Rounding:
    """Adds an optimiser's updates to scores in bfloat16 in float32, and rounds the sums at random.

    Nearest rounding would lose every update below 1/512 of a score. While an optimiser steps, the scores are put aside
    and zero, so that what it leaves is its update alone. So such scores do not decay, and an optimiser that divides by
    their norm is not for them.

    Attributes:
        aside: scores and what they were, while an optimiser steps, or after such a step failed.
    """

    aside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def watch(self, scores: Sequence[nn.Parameter]) -> None:
        """Begin, with every optimiser that steps these scores."""
        me, known = weakref.ref(self), {id(one) for one in scores}

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            rounding = me()
            members = [one for group in optimizer.param_groups for one in group["params"] if id(one) in known]
            if rounding is None or not any(one.dtype == torch.bfloat16 for one in members):
                return None
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                rounding._put_aside(members)
                return None
            # the closure computes with the scores, so they are put aside behind it
            return args[:1], {**kwargs, "closure": lambda: rounding._behind(closure, members)}

        def after(*_: object) -> None:
            rounding = me()
            if rounding is not None:
                rounding._add()

        self._handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]

    def stop(self) -> None:
        """End: the scores are what they are."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def settle(self) -> None:
        """Put scores back that are aside, because a step failed."""
        while self.aside:
            score, was = self.aside[-1]
            score.copy_(was)
            self.aside.pop()

    def _behind(self, closure: Callable[[], Any], members: Sequence[nn.Parameter]) -> Any:
        found = closure()
        self._put_aside(members)
        return found

    @torch.no_grad()
    def _put_aside(self, members: Sequence[nn.Parameter]) -> None:
        self.settle()
        for one in members:
            if one.dtype == torch.bfloat16:
                self.aside.append((local(one.detach()), local(one.detach()).clone()))
                local(one.detach()).zero_()

    @torch.no_grad()
    def _add(self) -> None:
        while self.aside:
            score, was = self.aside[-1]
            score.copy_(rounded(was.float() + score.float()))
            self.aside.pop()
