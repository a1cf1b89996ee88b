"""Linear centred kernel alignment of layers (arXiv 1905.00414)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, Inputs, predictions
from ...backbone.model import canonical
from ...errors import ConfigError
from ...training.features import digest_of, keep_features, kept_features
from .evaluation import Evaluations, Progress, counted
from .network import Network, State, body_of, kept
from .pairs import each_pair

LEAST = 512  # examples, below which a note is due


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Return ||Yc'Xc||² / (||Xc'Xc|| ||Yc'Yc||) of features of the same examples, (examples, features), centred.

    From 0 to 1; 1 if they are equal up to a rotation, a shift and one scale. None where one has no variance.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ConfigError(
            f"CKA compares rows of the same examples, got features of {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = (one.double() - one.double().mean(0) for one in (x, y))
    if max(x.shape[1], y.shape[1]) > len(x):
        # the same numbers by products of examples, where those are fewer than features
        x, y = x @ x.T, y @ y.T
        shared, own = (x * y).sum(), x.norm() * y.norm()
    else:
        shared, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float((shared / own).clamp(0, 1)) if own > 0 else None


def layer_features(evaluations: Evaluations, state: State, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return what these modules of a state put out, (examples, features) float32 for each, cached as features are.

    Maps are averaged over their positions, tokens over those that are no padding.
    """
    content = evaluations.content(state)
    keys = {} if content is None else {name: digest_of(["layer", name, content]) for name in layers}
    there = {name: kept_features(key, len(evaluations.examples)) for name, key in keys.items()}
    found = {name: one[0] for name, one in there.items() if one is not None}
    if len(found) < len(layers):
        found = _computed(evaluations, state, layers)
        for name, key in keys.items():
            keep_features(key, found[name], evaluations.examples)
    return found


def _computed(evaluations: Evaluations, state: State, layers: Sequence[str]) -> dict[str, Tensor]:
    module = evaluations.module
    collected: dict[str, list[Tensor]] = {name: [] for name in layers}
    attention: list[Tensor | None] = [None]

    def entering(_: nn.Module, inputs: tuple[Inputs]) -> None:
        attention[0] = inputs[0].get("attention_mask") if isinstance(inputs[0], dict) else None

    def seen(name: str) -> Any:
        return lambda _, __, output: collected[name].append(_pooled(output, attention[0]).float().cpu())

    evaluations.put(state)
    named = {canonical(name): one for name, one in body_of(module).named_modules()}
    hooks = [named[name].register_forward_hook(seen(name)) for name in layers]
    hooks.append(module.register_forward_pre_hook(entering))
    try:
        predictions(module, evaluations.batches)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in collected.items()}


def similarities(
    evaluations: Evaluations, networks: Sequence[Network], names: Iterable[str], report: Progress | None = None
) -> dict[str, Any]:
    """Measure linear CKA between the same layer of every pair of networks.

    Args:
        names: of modules or blocks, as of `grouped`; those that put nothing out, and the head, are left out.

    Returns:
        {"layers": names in order, "pairs": [{"first", "second", "kinds", "cka": of each layer}], "examples"}.
    """
    module = evaluations.module
    head = module.embedding.module if isinstance(module, Classifier) else None
    known = {canonical(name) for name, _ in body_of(module).named_modules()} - {"", head}
    layers = [name for name in names if name in known]
    with kept(module):
        features = [layer_features(evaluations, one.state, layers) for one in counted(networks, report)]
    pairs = each_pair(networks, features, lambda x, y: {"cka": [linear_cka(x[name], y[name]) for name in layers]})
    return {"layers": layers, "pairs": pairs, "examples": len(evaluations.examples)}


def _pooled(output: Any, attention: Tensor | None) -> Tensor:
    """One vector for each example of what a module puts out: a tensor, or what starts with one."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if output.ndim == 4:
        return output.mean((2, 3))
    if output.ndim == 3 and attention is not None and attention.shape == output.shape[:2]:
        weights = attention.unsqueeze(-1).to(output)
        return (output * weights).sum(1) / weights.sum(1).clamp(min=1)
    return output.mean(1) if output.ndim == 3 else output.flatten(1)
