"""Several masks at once: a convex combination of what each of them makes of the base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..backbone.classifier import Inputs, classifier_from
from ..backbone.head import Head
from ..backbone.parameters import named_buffers, named_parameters, unwrap
from ..errors import ConfigError
from ..mask import PackedMask
from ..parts import Parts
from .heads import head_tensors
from .patch import at_places, patch_of, rewritten


@dataclass(frozen=True, slots=True, eq=False)
class Superposition:
    """The networks theta(a) = sum of a_i theta_i, after "Supermasks in Superposition" (Wortsman et al., 2020).

    theta_i are all tensors as adapter i leaves them: masked weights, statistics, parameters, head. Nothing is written
    into the model, which has its base's bits.

    Attributes:
        module: what computes: the model, or an encoder with a head behind it.
        base: the tensors of `module` that some adapter changes, by name.
        changes: for each adapter, by the same names, a mask or what stands in the place of the tensor.
        values: for each adapter, what masks with op "replace" put in.
    """

    module: nn.Module
    base: Mapping[str, Tensor]
    changes: Sequence[Mapping[str, PackedMask | Tensor]]
    values: Sequence[Mapping[str, Tensor]]

    def theta(self, index: int, name: str) -> Tensor:
        """Return a tensor as one adapter leaves it: a new one, in the base's dtype."""
        base, change = self.base[name], self.changes[index].get(name)
        if isinstance(change, Tensor):
            return change.to(base)
        if change is None:
            return base.detach().clone()
        if not at_places(change):
            return rewritten(base.detach(), change)
        result = base.detach().clone()
        patch_of(result, change, self.values[index].get(name)).put(result)
        return result

    def added(self, weights: Tensor) -> dict[str, Tensor]:
        """Return theta(a) by name, for a of shape (k,); added up in float32, one tensor at a time."""
        found = {}
        for name, base in self.base.items():
            parts = [self.theta(i, name).float() * weight for i, weight in enumerate(weights.tolist()) if weight]
            found[name] = torch.stack(parts).sum(0).to(base.dtype)
        return found

    def slopes(self, inputs: Inputs, weights: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """Return the loss of the logits at a, and its gradient for a, (k,): sum of dL/dtheta * theta_i.

        One forward and one backward pass, whatever k is. Statistics are added up as all else is, and count as
        constants: PyTorch's BatchNorm has no gradient for them.
        """
        point = self.added(weights)
        learned = [name for name in point if isinstance(self.base[name], nn.Parameter)]
        with torch.enable_grad():
            inner = [point[name].requires_grad_() for name in learned]
            value = loss(self.logits(inputs, point))
            slopes = torch.autograd.grad(value, inner, allow_unused=True)
        found = torch.zeros(len(self.changes))
        for name, slope in zip(learned, slopes, strict=True):
            if slope is not None:
                products = [(slope.float() * self.theta(i, name).float()).sum() for i in range(len(found))]
                found += torch.stack(products).cpu()
        return float(value.detach()), found

    def logits(self, inputs: Inputs, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs with these tensors, (B, classes)."""
        named = isinstance(inputs, dict) and not hasattr(self.module, "pooling")
        arguments: tuple[Any, ...] = () if named else (inputs,)
        output = functional_call(self.module, dict(tensors), arguments, dict(inputs) if named else None)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def superposition(model: nn.Module, parts: Mapping[str, Parts]) -> Superposition:
    """Return the superposition of some adapters on a model that has its base's bits.

    Raises:
        ConfigError: if their heads have not one shape, so that they cannot be added up.
    """
    heads = [one.head for one in parts.values()]
    if len({_shape(head) for head in heads}) != 1:
        raise ConfigError(
            f"masks are added up with their heads, and those of {', '.join(map(repr, parts))} have not one shape; "
            f"choose others, or how='each', which asks one mask after the other"
        )
    first = heads[0]
    behind = first is not None and first.kind == "pooled-linear"
    module: nn.Module = unwrap(model)
    if behind:
        assert first is not None
        module = classifier_from(module, first).eval()
    prefix = "model." if behind else ""
    changes = []
    for one in parts.values():
        body: dict[str, PackedMask | Tensor] = {**one.masks, **one.statistics, **one.parameters}
        changes.append({**{prefix + name: change for name, change in body.items()}, **_head(one.head)})
    state = {**named_buffers(module), **named_parameters(module)}
    base = {name: state[name] for name in sorted({name for own in changes for name in own})}
    values = [{prefix + name: tensor for name, tensor in one.values.items()} for one in parts.values()]
    return Superposition(module, base, changes, values)


def _shape(head: Head | None) -> tuple[object, ...]:
    return () if head is None else (head.kind, head.module, tuple(head.weight.shape), head.bias is not None)


def _head(head: Head | None) -> dict[str, Tensor]:
    """Return the tensors of a head by their names in what computes."""
    if head is None:
        return {}
    if head.kind == "linear":
        return dict(head_tensors(head))
    named = {"linear.weight": head.weight, "linear.bias": head.bias}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of each row, in nats, (B,)."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
