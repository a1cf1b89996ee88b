"""The joint run: several tasks learn on shared weights, each with its own head, statistics and, if asked for, gates."""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..backbone.classifier import Batch, to_device
from ..backbone.load import Backbone
from ..backbone.model import swap_module
from ..backbone.select import select_parameters
from ..errors import ConfigError, TrainingError
from ..mask import MaskSet
from ..preprocess import Augment
from .batchnorm import BATCH_NORMS, batchnorm_statistics, set_train_mode
from .checkpoint import MODEL
from .config import JointConfig, TrainConfig
from .data.base import Data, EpochSampler, draw_seed, epoch_seed, numbered
from .gates import GateHistory, Gates, attach_gates
from .learn import base_of, body_parameters, borrowed
from .loop import Position, Run
from .objectives.base import check_data
from .objectives.supervised import Supervised
from .run_folder import RunFolder, RunOptions, write_json
from .trainer import TrainResult, result_of

PASSES = 2**20  # more than a task's data are read in an epoch: orders of different epochs differ
HISTOGRAMS = "histograms.json"  # in the run's folder


@dataclass(frozen=True)
class Task:
    """One of several tasks: its data, and the augmentation of its training images in place of the settings'."""

    data: Data
    augment: Augment | None = None

    def settings(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a run with this task's own among them."""
        return config if self.augment is None else replace(config, augment=self.augment)


class JointRun(Run):
    """A run of several tasks in turn. The backbone is changed; `close` puts everything back but its weights.

    A task has modules and buffers of its own, which are exchanged and not copied.
    """

    def __init__(
        self, backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
    ):
        _check(config)
        splits = {name: check_data(task.data, backbone, Supervised) for name, task in tasks.items()}
        super().__init__(backbone, {name: task.data for name, task in tasks.items()}, config)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"tasks learn together in one process, got {self.accelerator.num_processes}; start one, or train them "
                f"in a row (sequential)"
            )
        self.module = model = backbone.model.to(self.device)
        self.tasks, self.joint = tasks, joint
        self.own_head = None if backbone.head is None else model.get_submodule(backbone.head)
        self.selected = select_parameters(model, config.include, config.exclude, backbone.outside)
        self.objectives = {n: Supervised(backbone, task.data, task.settings(config)) for n, task in tasks.items()}
        self.samplers = {name: EpochSampler(len(split), config.seed) for name, split in splits.items()}
        self.loaders = {n: one.batches(splits[n], self.samplers[n]) for n, one in self.objectives.items()}
        model.requires_grad_(False)
        for parameter in body_parameters(backbone).values():
            parameter.requires_grad_(parameter.is_floating_point())
        self.gates: Gates | None = attach_gates(model, tasks, self.selected, start=joint.gate_start) if gated else None
        self.history = None if self.gates is None else GateHistory(self.gates)
        self.settings = joint.to_json(config.optimizer, len(tasks))
        self.facts = {
            "config": {**config.to_json(), **self.settings, "gated": gated},
            "tasks": {n: [task.data.digest, len(splits[n]), task.augment] for n, task in tasks.items()},
        }
        lr, factor = self.settings["weight_lr"], self.settings["gate_factor"]
        body = [p for p in model.parameters() if p.requires_grad]
        own = [{"params": body, "lr": lr}] if self.gates is None else self.gates.parameter_groups(lr, factor)
        groups = {name: (one["params"], one["lr"]) for name, one in zip(("weights", "gates"), own, strict=False)}
        heads = [p for objective in self.objectives.values() for p in objective.trained()]
        steps_per_epoch = sum(math.ceil(len(one) / config.accumulate) for one in self.loaders.values())
        steps = config.steps * len(tasks) if config.steps else None
        self.prepare({**groups, "head": (heads, config.linear_lr)}, steps_per_epoch, steps)
        norms = [layer for layer in model.modules() if isinstance(layer, BATCH_NORMS)]
        self.slots = [(one, leaf) for one in norms for leaf, buffer in one._buffers.items() if buffer is not None]
        self.own_buffers = [layer._buffers[leaf] for layer, leaf in self.slots]
        self.buffers = {n: [b.clone() for b in self.own_buffers if b is not None] for n in tasks}

    def use(self, name: str) -> Supervised:
        """Make the backbone this task's: head, statistics, gates; return the task's objective."""
        objective = self.objectives[name]
        self._exchange(objective.module.linear, self.buffers[name])
        if self.gates is not None:
            self.gates.use(name)
        return objective

    def _exchange(self, head: nn.Module | None, buffers: list[Any]) -> None:
        if self.backbone.head is not None and head is not None:
            swap_module(self.backbone.model, self.backbone.head, head)
        for (layer, leaf), buffer in zip(self.slots, buffers, strict=True):
            layer._buffers[leaf] = buffer

    def close(self) -> None:
        """Take the gates off; head and statistics are those that the backbone came with."""
        if self.gates is not None:
            self.gates.detach()
        self._exchange(self.own_head, self.own_buffers)

    def start(self) -> None:
        for name in self.tasks:
            self.use(name).start()
        if self.history is not None:
            self.history.add(0)

    def batches(self, at: Position) -> Iterator[tuple[str, list[int], Batch]]:
        """Yield the batches of an epoch, a task drawn anew for each step."""
        seed, accumulate, names = self.config.seed, self.config.accumulate, list(self.tasks)
        order = torch.Generator().manual_seed(epoch_seed(seed, at.epoch))
        drawn = torch.randint(len(names), (self.steps_per_epoch,), generator=order).tolist()
        streams = {name: self.stream(name, at) for name in names}
        for objective in self.objectives.values():
            set_train_mode(objective.module, self.config.bn != "freeze")
        for step in range(at.count // accumulate, self.steps_per_epoch):
            name = names[drawn[step]]
            for part in range(accumulate):
                place, batch = next(streams[name])
                torch.manual_seed(draw_seed(seed, at.epoch, step, part))
                yield name, place, batch

    def stream(self, name: str, at: Position) -> Iterator[tuple[list[int], Batch]]:
        """Yield a task's batches from a position on and without an end, in another order in each pass."""
        first, read = at.batches.get(name, [0, 0])
        for again in itertools.count(first):
            self.samplers[name].epoch = at.epoch * PASSES + again
            loader = self.accelerator.skip_first_batches(self.loaders[name], read) if read else self.loaders[name]
            batch = None
            for number, batch in numbered(loader):
                yield [again, read + number], batch
            if batch is None and not read:
                raise TrainingError(f"no example of the training split of {name!r} can be read")
            read = 0

    def loss(self, stream: str, batch: Batch, progress: float) -> Tensor:
        objective, (inputs, labels) = self.use(stream), batch
        loss = objective.loss(objective.module, (to_device(inputs, self.device), labels.to(self.device)))
        return loss if self.gates is None else loss + self.gates.penalty(self.joint.r1, self.joint.r2)

    def end_epoch(self, at: Position) -> dict[str, float]:
        found = self.accuracies("validation")
        if self.history is not None:
            self.history.add(at.step)
        return found

    def accuracies(self, *splits: str) -> dict[str, float]:
        """Return the accuracies of the tasks that have a split, and their mean, by name."""
        found = dict[str, float]()
        for split in splits:
            examples = {name: one.splits[split] for name, one in self.data.items() if split in one.splits}
            own = {name: self.use(name).evaluate(one)["accuracy"] for name, one in examples.items()}
            if own:
                found[f"{split}_accuracy"] = sum(own.values()) / len(own)
                found |= {f"{split}_accuracy_{name}": value for name, value in own.items()}
        return found

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{MODEL}trained/{at}": parameter.detach() for at, parameter in enumerate(self.trained)}
        for name, buffers in self.buffers.items():
            found.update({f"{MODEL}buffers/{name}/{at}": buffer for at, buffer in enumerate(buffers)})
        return found

    def state(self) -> dict[str, Any]:
        return {**super().state(), "history": None if self.history is None else self.history.content}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().restore(state, tensors)
        if self.history is not None:
            self.history.content = state["history"]

    def parts(self, name: str) -> Parts:
        """Return what a task learned; without gates its mask keeps every weight."""
        objective, model = self.use(name), self.backbone.model
        if self.gates is not None:
            masks = self.gates.masks(name)
        else:
            whole = {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in self.selected}
            masks = MaskSet.from_tensors(whole)
        return Parts(masks, objective.head(), batchnorm_statistics(model) if self.config.bn != "freeze" else {})


def _check(config: TrainConfig) -> None:
    if config.objective != Supervised.id or config.head_kind != "linear":
        raise ConfigError(
            f"tasks learn together with the objective {Supervised.id!r} and linear heads, got {config.objective!r} and "
            f"{config.head_kind!r}; train them in a row (sequential) for others"
        )
    usual = TrainConfig()
    for setting in ("train", "top", "selective", "scale", "bytes_budget", "rate"):
        if getattr(config, setting) != getattr(usual, setting):
            raise ConfigError(
                f"{setting} is for masks on frozen weights, and here all weights learn; leave it out, got "
                f"{getattr(config, setting)!r}"
            )


def train_jointly(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    config: TrainConfig | None = None,
    joint: JointConfig | None = None,
    *,
    gated: bool = True,
    **options: Unpack[RunOptions],
) -> dict[str, TrainResult]:
    """Train one network on several tasks at once ("Like a Light Switch"). The backbone's weights are changed.

    For each step a task is drawn, each with the same chance. It has its own head and BatchNorm statistics; the weights
    of the body are shared and all learn. Those that would be masked have a gate for each task as well. At the end gates
    become masks, the weights stay as they are, and BatchNorm statistics are taken anew with the masks on. Those of the
    backbone become the means of the tasks', for masks that are trained on it later.

    Args:
        config: of the run; `epochs` are passes over the rows of all tasks, `steps` are for each task.
        joint: rates of weights and gates, and regularisers.
        gated: without gates the weights are shared as they are, and every mask keeps all.
        options: as in `train_mask`. With gates the folder also gets `histograms.json`: gates and effective weights by
            task and parameter, after every epoch.

    Returns:
        The results by task, each ready for `save_adapter(path, result.parts, result.base, result.about)`. Metrics are
        those after hardening; "soft_…" are before.
    """
    config, joint, folder = config or TrainConfig(), joint or JointConfig(), RunFolder(options)
    with folder.opened(), borrowed(backbone), closing(JointRun(backbone, tasks, config, joint, gated)) as run:
        last = run.train(folder).metrics
        if folder.path is not None and run.history is not None:
            write_json(folder.path / HISTOGRAMS, run.history.content, None)
        measured = run.accuracies("validation", "test")
        if run.gates is not None:
            soft = {f"soft_{name}": value for name, value in measured.items()}
            run.gates.hard = True
            for name in tasks if config.bn != "freeze" else ():
                run.use(name).recalibrate()
            measured = {**run.accuracies("validation", "test"), **soft}
        parts = {name: run.parts(name) for name in tasks}
        end = {"step": run.steps, "steps": run.steps}
        whole = [name for name in tasks if gated and parts[name].masks.density == 1]
        if whole:
            warning = (
                f"no gate of {', '.join(whole)} has closed, so that the masks keep everything; take more steps, a "
                f"greater gate_factor, or a gate_start nearer to 0"
            )
            folder.write({"event": "warning", **end, "warning": warning})
        folder.write({"event": "end", **end, **last, **measured})
    with torch.no_grad():
        for name in next(iter(parts.values())).statistics:
            every = torch.stack([one.statistics[name] for one in parts.values()])
            backbone.model.get_buffer(name).copy_(every.mean(0))
    base, results = base_of(trained_backbone(backbone)), {}
    more = {"joint": {**run.settings, "gated": gated, "tasks": list(tasks)}}
    for name, task in tasks.items():
        kinds = ("validation_accuracy", "test_accuracy", "soft_validation_accuracy", "soft_test_accuracy")
        metrics = {"train_loss": last["train_loss"], "density": parts[name].masks.density}
        metrics |= {kind: measured[f"{kind}_{name}"] for kind in kinds if f"{kind}_{name}" in measured}
        results[name] = result_of(run, task.data, task.settings(config), parts[name], base, metrics, more)
    return results


def trained_backbone(backbone: Backbone) -> Backbone:
    """Return a backbone that tasks learned on under another name: its weights are not those that its own stands for."""
    return replace(backbone, id=f"trained:{backbone.id}", revision=None)


def plan_jointly(
    backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
) -> dict[str, Any]:
    """Check a joint run without training: build everything, run a batch of each task; return its plan."""
    with borrowed(backbone), closing(JointRun(backbone, tasks, config, joint, gated)) as run:
        for name in tasks:
            _, batch = next(run.stream(name, Position(run.steps)))
            run.loss(name, batch, 0.0).backward()  # type: ignore[no-untyped-call]
        shared = dict(backbone.model.named_parameters()) if run.gates is None else run.gates.weights()
        weights = sum(shared[name].numel() for name in run.selected)
        return {"parameters": len(run.selected), "weights": weights, "epochs": run.epochs, "steps": run.steps}
