"""Values stored beside masks (norms, statistics, other parameters, heads), and how BatchNorm is trained."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..adapter.steps import Norm, rounded_rows, row_steps
from ..backbone.classifier import Batch, to_device
from ..backbone.model import STATISTICS, Head, canonical, inside, named_buffers, named_parameters, unwrap
from ..backbone.shards import whole
from .config import Store

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
Tensors = Mapping[str, Tensor]


def beside_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what may change beside masks: parameters of normalisation layers and buffers, by name."""
    layers = dict(_layers(model))
    own = {name: p for name, p in named_parameters(model).items() if name.rpartition(".")[0] in layers}
    return {name: tensor.detach().clone() for name, tensor in {**own, **named_buffers(model)}.items()}


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield normalisation layers with a weight of their own, one number a channel, by name."""
    for name, layer in unwrap(model).named_modules():
        weight = layer._parameters.get("weight")
        if "norm" in type(layer).__name__.lower() and weight is not None and weight.dim() == 1:
            yield canonical(name), layer


def _tensors(name: str, layer: nn.Module, before: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a layer's tensors now and before, by their last names."""
    found = {leaf: getattr(layer, leaf, None) for leaf in ("weight", "bias", *STATISTICS)}
    now = {leaf: tensor.detach() for leaf, tensor in found.items() if isinstance(tensor, Tensor)}
    return now, {leaf: before[f"{name}.{leaf}"] for leaf in now}


@torch.no_grad()
def settle(model: nn.Module, before: Tensors, learned: Tensors, store: Store) -> bool:
    """Put the values that will be stored into a model, in place; return True if that changed any.

    BatchNorm's statistics and affine become one scale and one shift a channel: weight and bias for the statistics that
    the base has, in `before`, as `beside_masks` gave it. "coded": in steps from the base's, where there are such, else
    as "float16". "float16": rounded, as are the parameters `learned`. "float32": nothing changes. What float16 does not
    hold stays as it is.
    """
    changed, layers = False, dict(_layers(model)) if store != "float32" else {}
    for name, layer in layers.items():
        now, old = _tensors(name, layer, before)
        folded = _folded(layer, now, old) if any(not torch.equal(now[leaf], old[leaf]) for leaf in now) else None
        if folded is None:
            continue
        norm = Norm.nearest(old["weight"], old.get("bias"), *folded) if store == "coded" else None
        new, shift = folded if norm is None else norm.values(old["weight"], old.get("bias"))
        found = {"weight": new} | ({} if shift is None else {"bias": shift})
        if norm is None:
            found = {leaf: one.half() for leaf, one in found.items()}
        changed |= _put(now, {**old, **found})
    for name, parameter in learned.items():
        if store != "float32" and name.rpartition(".")[0] not in layers:
            changed |= _put({name: parameter}, {name: parameter.half()})
    return changed


def _put(now: Tensors, new: Tensors) -> bool:
    """Copy tensors into others if all are finite; return True if that changes any."""
    if not all(one.isfinite().all() for one in new.values()):
        return False
    changed = any(not torch.equal(new[name].to(tensor), tensor) for name, tensor in now.items())
    for name, tensor in now.items():
        tensor.copy_(new[name])
    return changed


def _folded(layer: nn.Module, now: Tensors, old: Tensors) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias, float64, with which a layer computes the same by its old statistics, or None."""
    weight, bias = now["weight"].double(), now["bias"].double() if "bias" in now else None
    if not isinstance(layer, BATCH_NORMS) or "running_var" not in now:
        return weight, bias
    if bias is None:
        return None
    scale = weight / (now["running_var"].double() + layer.eps).sqrt()
    shift = bias - (now["running_mean"].double() - old["running_mean"].double()) * scale
    return scale * (old["running_var"].double() + layer.eps).sqrt(), shift


def shortened(parts: Parts, model: nn.Module, before: Tensors, heads: Sequence[str] = ()) -> Parts:
    """Return parts, which have parameters and statistics whole, with each tensor as short as it comes back to the bit.

    `settle` makes norms short. Of `heads`, modules that the base has not, everything is kept.
    """
    norms, parameters = dict[str, Norm](), dict(parts.parameters)
    for name, layer in _layers(model):
        if inside(name, heads):
            continue
        now, old = ({leaf: whole(one) for leaf, one in own.items()} for own in _tensors(name, layer, before))
        differing = {leaf for leaf, tensor in now.items() if not torch.equal(tensor, old[leaf])}
        for leaf in ("weight", "bias"):
            parameters.pop(f"{name}.{leaf}", None)
        norm = None if not differing or differing & {*STATISTICS} else _exact(now, old)
        if norm is not None:
            norms[name] = norm
        else:
            parameters |= {f"{name}.{leaf}": now[leaf] for leaf in sorted(differing - {*STATISTICS})}
    buffers = named_buffers(model)
    statistics = {
        n: one for n, one in parts.statistics.items() if inside(n, heads) or not torch.equal(buffers[n], before[n])
    }
    short = {name: shortest(one) for name, one in parameters.items()}
    return replace(parts, statistics=statistics, parameters=short, norms=norms)


def _exact(now: Tensors, old: Tensors) -> Norm | None:
    """Return the steps of a layer from what it was, if they give just what it is now."""
    norm = Norm.nearest(old["weight"], old.get("bias"), now["weight"], now.get("bias"))
    if norm is None:
        return None
    values = zip(("weight", "bias"), norm.values(old["weight"], old.get("bias")), strict=True)
    same = all(one is None or torch.equal(one.to(now[leaf]), now[leaf]) for leaf, one in values)
    return norm if same else None


def shortest(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, in float16 if that holds the same values."""
    own = tensor.detach().cpu()
    return own.half() if torch.equal(own.half().to(own.dtype), own) else own.clone()


def halved(tensor: Tensor) -> Tensor:
    """Return a tensor rounded to float16, in its own dtype; as it is if float16 does not hold it."""
    own = tensor.half().to(tensor.dtype)
    return own if own.isfinite().all() else tensor


@torch.no_grad()
def settle_head(linear: nn.Linear, store: Store) -> bool:
    """Put the values of a head that will be stored into it, in place; return True if that changed any: see `settle`."""
    changed = False
    for name, parameter in linear.named_parameters() if store != "float32" else ():
        rows = store == "coded" and name == "weight"
        changed |= _put({name: parameter}, {name: rounded_rows(parameter) if rows else parameter.half()})
    return changed


def kept_head(head: Head) -> Head:
    """Return a head as it is stored: in steps, or in float16, where that holds the same values."""
    bias = None if head.bias is None else shortest(head.bias)
    if head.weight.dtype == torch.float32 and torch.equal(rounded_rows(head.weight), head.weight):
        return replace(head, bias=bias, steps=row_steps(head.weight))
    return replace(head, weight=shortest(head.weight), bias=bias)


def set_train_mode(module: nn.Module, adapt_batchnorm: bool) -> None:
    """Put a module into training mode, with its BatchNorm layers in evaluation mode unless they adapt."""
    module.train()
    if not adapt_batchnorm:
        for layer in module.modules():
            if isinstance(layer, BATCH_NORMS):
                layer.eval()


def batchnorm_statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return running mean and variance of every BatchNorm layer, float32 on the CPU, by buffer name."""
    return {
        f"{name}.{leaf}": getattr(m, leaf).detach().to("cpu", torch.float32, copy=True)
        for name, m in model.named_modules()
        if isinstance(m, BATCH_NORMS) and m.running_mean is not None
        for leaf in STATISTICS
    }


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Batch]) -> None:
    """Replace BatchNorm statistics by the means over these batches, all counted alike; dropout is off.

    Layers without running statistics stay as they are. The module is left in evaluation mode.
    """
    layers = [one for one in module.modules() if isinstance(one, BATCH_NORMS) and one.running_mean is not None]
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
