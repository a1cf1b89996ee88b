"""Effective weights made again in backward passes, so that no second copy of the weights is in memory."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..backbone.load import encoder_of
from ..errors import TrainingError


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to make an effective weight again, in place of what an operation saved for its backward pass.

    Attributes:
        make: gives the weight, without gradients. sources: what it follows from; versions: theirs when it was made.
        shape, stride: of what the operation saved.
    """

    make: Callable[[], Tensor]
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


@dataclass(eq=False)
class Recompute:
    """Replaces effective weights among what autograd saves in the forward passes of a model.

    Compiled code decides for itself what it makes again.

    Attributes:
        made: in this forward pass, by address.
    """

    made: dict[int, tuple["weakref.ref[Tensor]", Recipe]] = field(default_factory=dict)
    _open: list[saved_tensors_hooks] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Begin: in every forward pass of the model, or of its encoder alone, from now on."""
        for one in dict.fromkeys((model, encoder_of(model))):
            self._handles.append(one.register_forward_pre_hook(self._begin))
            self._handles.append(one.register_forward_hook(self._end, always_call=True))

    def stop(self) -> None:
        """End: the model has no hooks of ours any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def note(self, result: Tensor, make: Callable[[], Tensor], *sources: Tensor) -> None:
        """Note an effective weight that is about to be used; outside of a forward pass nothing is noted."""
        if self._open:
            recipe = Recipe(make, sources, tuple(source._version for source in sources))
            self.made[result.data_ptr()] = weakref.ref(result), recipe

    def _begin(self, *_: object) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            hooks = saved_tensors_hooks(self._pack, unpack)
            hooks.__enter__()
            self._open.append(hooks)

    def _end(self, *_: object) -> None:
        if self._open:
            self._open.pop().__exit__()
            self.made.clear()

    def _pack(self, tensor: Tensor) -> Tensor | Recipe:
        noted = self.made.get(tensor.data_ptr())
        # an address may be another tensor's by now
        if noted is None or noted[0]() is None or tensor.numel() != noted[0]().numel():  # type: ignore[union-attr]
            return tensor.detach()  # the tensor itself would be a cycle of references where it is an output
        return replace(noted[1], shape=tuple(tensor.shape), stride=tensor.stride())


def unpack(saved: Tensor | Recipe) -> Tensor:
    """Return what was saved.

    Raises:
        TrainingError: if what a weight follows from was changed since.
    """
    if isinstance(saved, Tensor):
        return saved
    if any(source._version != version for source, version in zip(saved.sources, saved.versions, strict=True)):
        raise TrainingError(
            "scores or weights were changed between the forward pass and its backward pass, which makes the masked "
            "weight from them again; call backward() before optimizer.step()"
        )
    with torch.no_grad():
        return saved.make().as_strided(saved.shape, saved.stride)
