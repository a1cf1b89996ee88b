"""Histograms of gates and of the weights that tasks compute with, as they change while tasks learn together."""

from typing import Any

import torch
from torch import Tensor

from .gated import Gates

BINS = 40
INNER = 0.999  # share of the first weights that lies within 2/3 of the axis; what lies beyond its ends counts to them


class GateHistory:
    """Histograms over time, by task and parameter.

    Attributes:
        content: JSON values: `bins`; `weight_end`, the histograms of effective weights go from -weight_end to it, those
            of gates from 0 to 1; `rows`, one for each time: {"step", "gates": {task: {parameter: counts}},
            "weights": the same}.
    """

    def __init__(self, gates: Gates):
        self.gates = gates
        values = torch.cat([weight.detach().abs().float().flatten() for weight in gates.weights().values()])
        end = 1.5 * float(values.kthvalue(max(1, int(INNER * len(values)))).values)
        self.content: dict[str, Any] = {"bins": BINS, "weight_end": end or 1.0, "rows": []}

    def add(self, step: int) -> None:
        """Note the gates and weights as they are after this step."""
        end = self.content["weight_end"]
        row: dict[str, Any] = {"step": step, "gates": {}, "weights": {}}
        for task in self.gates.tasks:
            gates, weights = self.gates.values(task), self.gates.effective(task)
            row["gates"][task] = {name: counts(values, 0.0, 1.0) for name, values in gates.items()}
            row["weights"][task] = {name: counts(values, -end, end) for name, values in weights.items()}
        self.content["rows"].append(row)


def counts(values: Tensor, low: float, high: float, bins: int = BINS) -> list[int]:
    """Return how many values lie in each of `bins` equal parts from low to high; those beyond count to the ends."""
    found: list[int] = torch.histc(values.float().clamp(low, high), bins, low, high).long().tolist()
    return found


def divergence(first: Tensor, second: Tensor) -> float:
    """Return the Jensen-Shannon divergence of two histograms in bits: 0 for equal shapes, 1 where no bin is common."""
    p, q = (one.double() / one.sum() for one in (first, second))
    middle = (p + q) / 2
    return float(sum(torch.xlogy(one, one / middle).nansum() for one in (p, q)) / 2 / torch.log(torch.tensor(2.0)))
