"""Is the representation collapsing? Measures of an epoch's features and prototype assignments."""

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

KEPT = 1024  # rows of features that the rank is taken of
LEAST_USAGE, LEAST_RANK = 0.5, 2.0


class CollapseWatch:
    """Collects an epoch's features, and which prototype each is nearest to.

    Args:
        prototypes: their number, or 0 if the objective has none.
    """

    def __init__(self, prototypes: int = 0):
        self.used = torch.zeros(prototypes, dtype=torch.int64)
        self.rows: deque[Tensor] = deque()

    def add(self, features: Tensor, scores: Tensor | None = None) -> None:
        """Note a batch: features (N, D) of the backbone, and prototype scores (N, K)."""
        self.rows.append(features.detach().float().cpu())
        while sum(len(rows) for rows in self.rows) - len(self.rows[0]) >= KEPT:
            self.rows.popleft()
        if scores is not None:
            self.used += torch.bincount(scores.detach().argmax(-1).cpu(), minlength=len(self.used))

    def state(self) -> dict[str, Tensor]:
        """Return what was noted since the last metrics."""
        lengths = torch.tensor([len(rows) for rows in self.rows], dtype=torch.int64)
        rows = torch.cat(list(self.rows)) if self.rows else torch.zeros(0, 0)
        return {"used": self.used.clone(), "lengths": lengths, "rows": rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.used.copy_(state["used"])
        self.rows = deque(torch.split(state["rows"], state["lengths"].tolist()))

    def metrics(self) -> dict[str, float]:
        """Return `feature_rank` and, with prototypes, `prototype_usage`, and begin again.

        `feature_rank` is the exponential of the entropy of the features' singular values (RankMe, arXiv 2210.02885):
        1 if all features are alike up to length, at most D. `prototype_usage` is the entropy of how often each
        prototype is the nearest, over its greatest value: 0 if one takes all, 1 if all are used alike, or, by fewer
        images than prototypes, no one twice.
        """
        found = {"feature_rank": _effective(torch.linalg.svdvals(torch.cat(list(self.rows)).double()))}
        if len(self.used):
            most = min(len(self.used), int(self.used.sum()))
            found["prototype_usage"] = math.log(_effective(self.used)) / math.log(most) if most > 1 else 1.0
        self.used.zero_()
        self.rows.clear()
        return found


def _effective(amounts: Tensor) -> float:
    """The exponential of the entropy of shares."""
    shares = amounts.double() / amounts.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


def collapse_warning(metrics: Mapping[str, float]) -> str | None:
    """Return what to say if the metrics show a collapse, or None."""
    usage, rank = metrics.get("prototype_usage", 1.0), metrics["feature_rank"]
    if usage >= LEAST_USAGE and rank >= LEAST_RANK:
        return None
    if "prototype_usage" not in metrics:
        return (
            f"the representation is collapsing (feature rank {rank:.1f}; healthy is over {LEAST_RANK:.0f}); lower the "
            f"learning rate of the scores"
        )
    return (
        f"the representation is collapsing (prototype usage {usage:.2f}, feature rank {rank:.1f}; healthy are over "
        f"{LEAST_USAGE} and {LEAST_RANK:.0f}); lower the learning rate of the scores, or use more prototypes"
    )
