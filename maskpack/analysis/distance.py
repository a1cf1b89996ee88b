"""How far networks lie apart in their parameters, and masks in their bits."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..mask import MaskSet, PackedMask
from .network import Network, State


def parameter_distance(
    first: State, second: State, groups: Mapping[str, Sequence[str]], initial: State
) -> dict[str, Any]:
    """Return Euclidean distances of parameters, by module and in all.

    Args:
        groups: names of parameters by module. initial: that norms are taken of, for the names that it has.

    Returns:
        {"distance", "relative": to the norm of the initial parameters (None without any), "modules": {name: the same}}.
    """
    every = [name for names in groups.values() for name in names]
    modules = {group: _between(first, second, names, initial) for group, names in groups.items()}
    return {**_between(first, second, every, initial), "modules": modules}


def mask_distance(first: MaskSet, second: MaskSet, weights: State) -> dict[str, Any]:
    """Return distances of two masks of one base, by parameter and in all.

    A parameter that one of them does not mask counts as kept whole there.

    Args:
        weights: of the base, by name.

    Returns:
        {"hamming": share of the weights that are treated differently, "weighted": norm of W * (M1 - M2), where M is 0
        for a weight that is removed and -1 for one whose sign is inverted, "relative": the same by the norm of W,
        "parameters": {name: the same}}.

    Raises:
        ConfigError: if there is no mask, or a weight has another shape.
    """
    rows, whole = {}, torch.zeros(4, dtype=torch.float64)
    for name in sorted(first.keys() | second.keys()):
        known = [one[name] for one in (first, second) if name in one]
        if name not in weights or any(one.shape != tuple(weights[name].shape) for one in known):
            raise ConfigError(
                f"the masks of {name!r} are not for the weights given; give masks of one base, and that base"
            )
        difference = _multiplier(first.get(name), known[0].shape) - _multiplier(second.get(name), known[0].shape)
        weight = weights[name].double()
        sums = (
            float((difference != 0).sum()),
            float((weight * difference).square().sum()),
            float(weight.square().sum()),
        )
        parts = torch.tensor([*sums, difference.numel()], dtype=torch.float64)
        rows[name], whole = _mask_row(parts), whole + parts
    if not rows:
        raise ConfigError("there is no mask to compare; give adapters that have masks")
    return {**_mask_row(whole), "parameters": rows}


def distances(networks: Sequence[Network], groups: Mapping[str, Sequence[str]], base: State) -> list[dict[str, Any]]:
    """Return for every pair of networks {"first", "second", "kinds", "parameters": as `parameter_distance`} and, if
    both are masks, "masks": as `mask_distance`.

    Args:
        base: the backbone's parameters.
    """
    rows = []
    for first, second in combinations(networks, 2):
        row: dict[str, Any] = {
            "first": first.name,
            "second": second.name,
            "kinds": " - ".join(sorted((first.kind, second.kind))),
            "parameters": parameter_distance(first.state, second.state, groups, base),
        }
        if first.masks is not None and second.masks is not None:
            row["masks"] = mask_distance(first.masks, second.masks, base)
        rows.append(row)
    return rows


def _between(first: State, second: State, names: Iterable[str], initial: State) -> dict[str, float | None]:
    names = list(names)
    distance = _norm(first[name].double() - second[name].double() for name in names)
    known = [name for name in names if name in initial]
    size = _norm(initial[name].double() for name in known)
    apart = _norm(first[name].double() - second[name].double() for name in known)
    return {"distance": distance, "relative": apart / size if size else None}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(one.square().sum()) for one in tensors))


def _multiplier(mask: PackedMask | None, shape: tuple[int, ...]) -> Tensor:
    """What a mask multiplies each weight with, without its scale: 1, 0 or -1; op "replace" counts as 0."""
    if mask is None:
        return torch.ones(shape, dtype=torch.float64)
    bits = mask.tensor().double()
    if mask.op == "flip":
        return 2 * bits - 1
    if mask.signs is not None:
        bits *= 2 * PackedMask(mask.signs, mask.shape).tensor().double() - 1
    return bits


def _mask_row(parts: Tensor) -> dict[str, float | None]:
    """From weights treated differently, squares of their differences, squares of all weights, and all weights."""
    differ, square, whole, count = parts.tolist()
    relative = math.sqrt(square / whole) if whole else None
    return {"hamming": differ / max(count, 1), "weighted": math.sqrt(square), "relative": relative}
