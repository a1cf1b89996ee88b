"""Distances and performance barriers between networks (arXiv 2008.11687)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mask import MaskSet, PackedMask
from .network import Evaluations, Network, Progress, State, kept


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


def interpolated(first: State, second: State, t: float) -> dict[str, Tensor]:
    """Return (1 - t) first + t second, entry by entry; the ends keep their bits, integers are those of the first."""
    if t in (0, 1):
        return dict(second if t else first)
    return {name: torch.lerp(one, second[name], t) if one.is_floating_point() else one for name, one in first.items()}


def barrier(
    evaluations: Evaluations, first: State, second: State, points: int = 11, report: Progress | None = None
) -> dict[str, Any]:
    """Measure the networks on the line between two.

    Args:
        points: values of t, evenly from 0 to 1, ends included.

    Returns:
        {"points": {"t", "accuracy", "loss"} of each, "barrier": the most that accuracy lies below the straight line
        between those of the ends, 0 or more, "loss_barrier": the same of the loss, above that line}.

    Raises:
        ConfigError: if there are fewer than 3 points, or the states have other entries.
    """
    if points < 3:
        raise ConfigError(f"a barrier needs at least 3 points, the ends and one between them; got {points}")
    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ConfigError(f"the two networks have other entries, first {differing[0]!r}; give two of one architecture")
    found = []
    with kept(evaluations.module):
        for at in range(points):
            one = evaluations.of(interpolated(first, second, at / (points - 1)))
            found.append({"t": at / (points - 1), "accuracy": one["accuracy"], "loss": one["loss"]})
            if report is not None:
                report(at + 1, points)
    return {"points": found, "barrier": _height(found, "accuracy", 1), "loss_barrier": _height(found, "loss", -1)}


def barriers(
    evaluations: Evaluations, networks: Sequence[Network], points: int = 11, report: Progress | None = None
) -> dict[str, Any]:
    """Measure the barrier of every pair of networks.

    Returns:
        {"networks": {"network", "kind", "accuracy", "loss"}, "pairs": {"first", "second", "kinds", …} with what
        `barrier` gives, "deviations": of each kind with several networks the sample deviation of their accuracies,
        which barriers are to be compared with}.

    Raises:
        ConfigError: if there are fewer than two networks. Others: as `barrier`.
    """
    if len(networks) < 2:
        raise ConfigError(f"a barrier lies between networks; give at least two, got {len(networks)}")
    pairs, every = [], list(combinations(networks, 2))
    for done, (first, second) in enumerate(every):

        def told(at: int, of: int, before: int = done) -> None:
            if report is not None:
                report(before * of + at, len(every) * of)

        kinds = " - ".join(sorted((first.kind, second.kind)))
        names = {"first": first.name, "second": second.name, "kinds": kinds}
        pairs.append({**names, **barrier(evaluations, first.state, second.state, points, told)})
    ends: dict[str, dict[str, float]] = {}
    for pair in pairs:
        ends.setdefault(pair["first"], pair["points"][0])
        ends.setdefault(pair["second"], pair["points"][-1])
    rows = [
        {"network": one.name, "kind": one.kind, "accuracy": ends[one.name]["accuracy"], "loss": ends[one.name]["loss"]}
        for one in networks
    ]
    return {"networks": rows, "pairs": pairs, "deviations": _deviations(rows), "examples": len(evaluations.examples)}


def _height(points: Sequence[dict[str, float]], key: str, sign: int) -> float:
    first, last = points[0][key], points[-1][key]
    return max(sign * ((1 - one["t"]) * first + one["t"] * last - one[key]) for one in points)


def _deviations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row["accuracy"])
    return {kind: stdev(values) for kind, values in kinds.items() if len(values) > 1}
