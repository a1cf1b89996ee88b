"""Common mistakes: which examples several networks get wrong together (arXiv 2008.11687)."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .network import Evaluations, Network, Progress, kept


def common_mistakes(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Compare what two networks get right.

    Args:
        first, second: for each example whether its class was given, (N,) bool.

    Returns:
        {"both", "only_first", "only_second": numbers of errors, "overlap": errors of both / errors of any (None if
        there are none), "kappa": Cohen's kappa of being right (None where chance explains all)}.

    Raises:
        ConfigError: if they are of other numbers of examples, or of none.
    """
    if first.shape != second.shape or not len(first):
        raise ConfigError(f"mistakes are compared on the same examples, got {len(first)} and {len(second)}")
    a, b = ~first.bool(), ~second.bool()
    both, either, count = int((a & b).sum()), int((a | b).sum()), len(a)
    p, q = int(a.sum()) / count, int(b.sum()) / count
    chance, agreed = p * q + (1 - p) * (1 - q), float((a == b).double().mean())
    return {
        "both": both,
        "only_first": int((a & ~b).sum()),
        "only_second": int((b & ~a).sum()),
        "overlap": both / either if either else None,
        "kappa": (agreed - chance) / (1 - chance) if chance < 1 else None,
    }


def mistakes(evaluations: Evaluations, networks: Sequence[Network], report: Progress | None = None) -> dict[str, Any]:
    """Compare the mistakes of every pair of networks.

    Returns:
        {"networks": {"network", "kind", "accuracy"}, "pairs": {"first", "second", "kinds", …} with what
        `common_mistakes` gives, "examples"}.

    Raises:
        ConfigError: if there are fewer than two networks.
    """
    if len(networks) < 2:
        raise ConfigError(f"common mistakes are of two networks; give at least two, got {len(networks)}")
    found = []
    with kept(evaluations.module):
        for one in networks:
            found.append(evaluations.of(one.state, rows=True))
            if report is not None:
                report(len(found), len(networks))
    rows = [
        {"network": one.name, "kind": one.kind, "accuracy": row["accuracy"]}
        for one, row in zip(networks, found, strict=True)
    ]
    pairs = []
    for (one, first), (other, second) in combinations(zip(networks, found, strict=True), 2):
        kinds = " - ".join(sorted((one.kind, other.kind)))
        right = (torch.tensor(row["right"], dtype=torch.bool) for row in (first, second))
        pairs.append({"first": one.name, "second": other.name, "kinds": kinds, **common_mistakes(*right)})
    return {"networks": rows, "pairs": pairs, "examples": found[0]["examples"]}
