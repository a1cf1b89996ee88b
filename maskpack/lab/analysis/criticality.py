"""Module criticality: what a network loses when one module goes back to where it started (arXiv 1912.00528)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .evaluation import Evaluations, Progress, counted
from .network import State, kept


@dataclass(frozen=True)
class Noise:
    """How noise radii and the formal measure are searched.

    Attributes:
        draws: Gaussian draws that a loss is the mean of; `seed` and the draw's number decide them.
        excess: the loss that is tolerated, in nats above that of the network.
        scales: standard deviations to try, relative to the root mean square of the module's trained parameters.
    """

    draws: int = 3
    excess: float = 0.1
    scales: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.excess <= 0 or not self.scales or not all(one > 0 for one in self.scales):
            raise ConfigError(f"noise needs at least one draw, an excess above 0 and scales above 0; got {self}")

    def borne(
        self, evaluations: Evaluations, state: State, names: Sequence[str], unit: float, limit: float
    ) -> float | None:
        """Return the largest scale, in units of `unit`, with which the loss stays within a limit; None if none does."""
        for scale in sorted(self.scales, reverse=True):
            losses = []
            for draw in range(self.draws):
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
                noisy = dict(state)
                for name in names:
                    drawn = torch.randn(state[name].shape, generator=generator).to(state[name])
                    noisy[name] = state[name] + scale * unit * drawn
                losses.append(evaluations.of(noisy)["loss"])
            if sum(losses) / len(losses) <= limit:
                return scale
        return None


def rewound(state: State, initial: State, names: Iterable[str], share: float = 0.0) -> dict[str, Tensor]:
    """Return a state in which these tensors are (1 - share) initial + share trained; share 0 gives the initial bits."""
    changed = {name: initial[name] if share == 0 else torch.lerp(initial[name], state[name], share) for name in names}
    return {**state, **changed}


def criticality(
    evaluations: Evaluations,
    state: State,
    initial: State,
    groups: Mapping[str, Sequence[str]],
    *,
    points: int = 1,
    noise: Noise | None = None,
    report: Progress | None = None,
) -> dict[str, Any]:
    """Rewind one module at a time, and measure what is lost.

    Args:
        state, initial: the network after and before training.
        groups: names of parameters by module or block, all of them in `initial`: see `grouped`.
        points: steps of the direct path a = 0, 1 / points, …, 1 from initial (0) to trained (1).
        noise: look for noise radii and the formal measure; None: do not.

    Returns:
        {"accuracy", "loss", "examples", "rows"}: a row for each module, by falling "drop": {"module",
        "parameters", "distance": Frobenius norm of trained - initial, "accuracy", "loss": rewound, "drop": of accuracy,
        "path": {"a", "accuracy", "loss"} of each point}. With noise also "radius": the largest standard deviation that
        the trained module bears, as one of the scales, None if none of them, and "criticality": the least
        a² distance² / sigma² over the points and scales that are borne, None if none is; beside the rows "criticality"
        is their sum, None if one is None.
    """
    if points < 1:
        raise ConfigError(f"points must be at least 1, got {points}")
    if not groups:
        raise ConfigError("there is no module to rewind: the network has no parameter whose initial value is known")
    rows = []
    with kept(evaluations.module):
        own = evaluations.of(state)
        for name, names in counted(groups.items(), report):
            mixed = [rewound(state, initial, names, at / points) for at in range(points)] + [state]
            path = [
                {"a": at / points, "accuracy": found["accuracy"], "loss": found["loss"]}
                for at, found in enumerate([*map(evaluations.of, mixed[:-1]), own])
            ]
            moved = float(_flat(state, names).sub(_flat(initial, names)).norm())
            row = {
                "module": name,
                "parameters": sum(state[one].numel() for one in names),
                "distance": moved,
                "accuracy": path[0]["accuracy"],
                "loss": path[0]["loss"],
                "drop": own["accuracy"] - path[0]["accuracy"],
                "path": path,
            }
            if noise is not None:
                limit, unit = own["loss"] + noise.excess, float(_flat(state, names).square().mean().sqrt()) or 1.0
                borne = [
                    (point["a"], noise.borne(evaluations, at, names, unit, limit))
                    for point, at in zip(path, mixed, strict=True)
                    if point["loss"] <= limit
                ]
                found = [(a * moved / (scale * unit)) ** 2 for a, scale in borne if scale is not None]
                row |= {"radius": borne[-1][1], "criticality": min(found, default=None)}
            rows.append(row)
    rows.sort(key=lambda row: (-row["drop"], -row["loss"]))
    if noise is None:
        return {**own, "rows": rows}
    each = [row["criticality"] for row in rows]
    return {**own, "rows": rows, "criticality": None if None in each else sum(each)}


def _flat(state: State, names: Iterable[str]) -> Tensor:
    return torch.cat([state[name].double().flatten() for name in names])
