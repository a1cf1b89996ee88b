"""Performance barriers: what two networks lose on the straight line between them (arXiv 2008.11687)."""

from collections.abc import Sequence
from itertools import combinations
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .evaluations import Evaluations, Progress
from .network import Network, State, kept


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
