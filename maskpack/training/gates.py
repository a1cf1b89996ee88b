"""Gates: weights that several tasks share, each multiplying them by a soft mask of its own; all learn together."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.model import all_names, unwrap
from ..backbone.select import select_parameters
from ..errors import ConfigError, StateError, UnknownNameError, brief
from ..mask import MaskSet, masked_weight
from .config import GATE_START
from .scores import Orders, original, owner, put_on, take_off


class GatedWeight(nn.Module):
    """Parametrization that multiplies a weight by the gates of the task in use, from float32 logits for each task."""

    def __init__(self, weight: Tensor, gates: "Gates", start: float):
        super().__init__()
        self.gates = gates
        # apart, so that a step of one task leaves the others without a gradient, and no optimiser moves them
        self.logits = nn.ParameterList(torch.full_like(weight, start, dtype=torch.float32) for _ in gates.tasks)

    def forward(self, weight: Tensor) -> Tensor:
        logits = self.logits[self.gates.index]
        if self.gates.off:
            return weight
        if self.gates.hard:
            return masked_weight(weight, logits > 0, None)  # as a loaded adapter computes it
        return weight * torch.sigmoid(logits).to(weight.dtype)


class Gates:
    """The gates of a model; see `attach_gates`.

    Attributes:
        hard: compute with hardened gates: a weight is kept where its logit is above 0, and is 0 elsewhere.
        off: compute with the weights as they are.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[str]):
        self.model, self.tasks = model, tuple(tasks)
        self.index, self.hard, self.off = 0, False, False
        self.members: dict[str, GatedWeight] = {}
        self.orders: Orders = {}

    def __repr__(self) -> str:
        return f"Gates({type(self.model).__name__}, tasks={brief(self.tasks)}, {len(self.members)} parameters)"

    def use(self, task: str) -> None:
        """Compute with the gates of this task from now on."""
        self.index = self._index(task)

    def logits(self, task: str) -> dict[str, nn.Parameter]:
        """Return the logits of a task by parameter name."""
        at = self._index(task)
        return {name: one.logits[at] for name, one in self.members.items()}

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the shared weights by parameter name."""
        return {name: original(self.model, name) for name in self.members}

    def values(self, task: str) -> dict[str, Tensor]:
        """Return the gates of a task, from 0 to 1, by parameter name."""
        return {name: torch.sigmoid(logits.detach()) for name, logits in self.logits(task).items()}

    def masks(self, task: str) -> MaskSet:
        """Return the hardened gates of a task: True where the logit is above 0."""
        return MaskSet.from_tensors({name: logits.detach() > 0 for name, logits in self.logits(task).items()})

    def penalty(self, r1: float = 0.0, r2: float = 0.0) -> Tensor:
        """Return r1 * sum exp(-|l|) + r2 * sum exp(-l^2) over the logits of the task in use, a scalar.

        Both push gates away from one half. At l = 0 the gradient of either is 0: a logit that starts there is not
        pushed. That of the second is greatest at |l| = sqrt(1/2).
        """
        total = torch.zeros(())
        for one in self.members.values():
            logits = one.logits[self.index]
            total = total.to(logits.device)
            if r1:
                total = total + r1 * (-logits.abs()).exp().sum()
            if r2:
                total = total + r2 * (-logits.square()).exp().sum()
        return total

    def parameter_groups(
        self, lr: float, factor: float | None = None, most: float | None = None
    ) -> list[dict[str, Any]]:
        """Return parameter groups for an optimiser: all else in the model that learns, at the rate `lr`, and the gates.

        Gates learn at `factor` times `lr`, at most at `most`; default: 4 times the number of tasks.
        """
        rate = lr * (4 * len(self.tasks) if factor is None else factor)
        gates = [logits for one in self.members.values() for logits in one.logits]
        known = set(gates)
        others = [p for p in self.model.parameters() if p.requires_grad and p not in known]
        return [{"params": others, "lr": lr}, {"params": gates, "lr": rate if most is None else min(rate, most)}]

    def harden(self) -> dict[str, MaskSet]:
        """Return the mask of each task and take the gates off; the model has the shared weights as they are."""
        found = {task: self.masks(task) for task in self.tasks}
        self.detach()
        return found

    def detach(self) -> None:
        """Take the gates off; the model has the shared weights as they are."""
        take_off(self.model, GatedWeight, [self.orders])
        self.members = {}

    def _index(self, task: str) -> int:
        if not self.members:
            raise StateError("these gates were taken off the model already; attach gates anew")
        if task not in self.tasks:
            raise UnknownNameError(f"there are no gates for a task {task!r}; the tasks are: {', '.join(self.tasks)}")
        return self.tasks.index(task)


def attach_gates(
    model: nn.Module, tasks: Iterable[str], select: Iterable[str] | None = None, *, start: float = GATE_START
) -> Gates:
    """Attach a gate to each weight for each task; weights and gates learn together.

    For users who keep their own training loop, with any loss: before each step call `use(task)`, make the optimiser of
    `parameter_groups(lr)`, at the end call `harden()`. Where each task has a head of its own, leave it out by `select`.

    Args:
        select: globs on dotted parameter names; default: every parameter of the model, biases included.
        start: of every logit. Above 0, since hardening a gate that never moved would remove its weight otherwise.

    Raises:
        StateError: if the model has gates already. ConfigError: if there is no task, or one comes twice.
        SelectionError: if nothing matches, or a match cannot be masked.

    Example:
        gates = attach_gates(model, ["birds", "ships"], ["conv*.weight"])
        gates.use("birds")
        optimizer = torch.optim.Adam(gates.parameter_groups(0.001))
    """
    names = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else []
    if not names or not all(isinstance(one, str) for one in names) or len(set(names)) != len(names):
        raise ConfigError(f"tasks is {tasks!r:.80}, expected a list of names; give each once, as in ['birds', 'ships']")
    model = unwrap(model)
    if any(isinstance(chain, GatedWeight) for chain in model.modules()):
        raise StateError("this model has gates already; call harden() or detach() on them first")
    gates = Gates(model, names)
    chosen, tied = select_parameters(model, select or ("*",)), all_names(model)
    for name in chosen:
        place, leaf = owner(model, name)
        weight = getattr(place, leaf)
        gates.members[name] = GatedWeight(weight, gates, start)
        put_on(model, tied[name], gates.members[name], gates.orders)
        weight.requires_grad_(True)
    return gates


BINS = 40
INNER = 0.999  # share of the first weights that lies within 2/3 of the axis; what lies beyond its ends counts to them


class GateHistory:
    """Histograms of gates, from 0 to 1, and of effective weights, from -weight_end to it, at several steps.

    `content`, JSON values: {"bins", "weight_end", "rows": [{"step", "gates": {task: {parameter: counts}}, "weights"}]}.
    """

    def __init__(self, gates: Gates):
        self.gates = gates
        values = torch.cat([weight.detach().abs().float().flatten() for weight in gates.weights().values()])
        end = 1.5 * float(values.kthvalue(max(1, int(INNER * len(values)))).values)
        self.content: dict[str, Any] = {"bins": BINS, "weight_end": end or 1.0, "rows": []}

    def add(self, step: int) -> None:
        """Add the histograms of gates and weights after this step."""
        end, weights = self.content["weight_end"], self.gates.weights()
        row: dict[str, Any] = {"step": step, "gates": {}, "weights": {}}
        for task in self.gates.tasks:
            gates = self.gates.values(task)
            row["gates"][task] = {name: counts(gate, 0.0, 1.0) for name, gate in gates.items()}
            row["weights"][task] = {n: counts(weights[n].detach() * gate, -end, end) for n, gate in gates.items()}
        self.content["rows"].append(row)


def counts(values: Tensor, low: float, high: float, bins: int = BINS) -> list[int]:
    """Return a histogram of values in `bins` equal parts from low to high; those beyond count to the ends."""
    found: list[int] = torch.histc(values.float().clamp(low, high), bins, low, high).long().tolist()
    return found
