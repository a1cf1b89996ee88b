"""The joint run: several tasks learn on shared weights, each with its own head, statistics and, if asked for, gates."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.content import Parts
from ..backbone.classifier import Batch, to_device
from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone
from ..backbone.model import Fingerprint, inside, swap_module
from ..backbone.select import select_parameters
from ..errors import ConfigError, TrainingError
from ..mask import MaskSet
from ..preprocess import Augment
from ..safetensors_io import replacing
from .batchnorm import BATCH_NORMS, batchnorm_statistics, set_train_mode
from .config import JointConfig, TrainConfig, learning_rate
from .data.base import Data, EpochSampler, draw_seed, epoch_seed, numbered
from .gates import GateHistory, Gates, attach_gates
from .objectives.base import check_data
from .objectives.supervised import Supervised
from .run_folder import Keeper, Position, Report, RunLog, new_accelerator, note_unreadable, run_folder, unreadable_rows
from .trainer import LOG_EVERY, TrainResult, borrowed, finished, training_record


@dataclass(frozen=True)
class Task:
    """One of several tasks.

    Attributes:
        data: its examples.
        augment: of its training images, in place of the settings'.
    """

    data: Data
    augment: Augment | None = None

    def settings(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a run with this task's own among them."""
        return config if self.augment is None else replace(config, augment=self.augment)


PASSES = 2**20  # more than a task's data are read in an epoch: orders of different epochs differ


class JointRun:
    """The objects of a joint run. The backbone is changed; `close` puts everything back but its weights.

    Args: as `train_jointly`.
    """

    def __init__(
        self, backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
    ):
        if config.objective != Supervised.id or config.head_kind != "linear":
            raise ConfigError(
                f"tasks learn together with the objective {Supervised.id!r} and linear heads, got "
                f"{config.objective!r} and {config.head_kind!r}; train them in a row (sequential) for others"
            )
        usual = TrainConfig()
        for setting in ("train", "selective", "scale", "bytes_budget", "rate"):
            if getattr(config, setting) != getattr(usual, setting):
                raise ConfigError(
                    f"{setting} is for masks on frozen weights, and here all weights learn; leave it out, got "
                    f"{getattr(config, setting)!r}"
                )
        splits = {name: check_data(task.data, backbone, Supervised) for name, task in tasks.items()}
        self.accelerator = new_accelerator(config)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"tasks learn together in one process, got {self.accelerator.num_processes}; start one, or train them "
                f"in a row (sequential)"
            )
        torch.manual_seed(config.seed)
        model = backbone.model.to(self.accelerator.device)
        self.backbone, self.tasks, self.config, self.names = backbone, tasks, config, list(tasks)
        self.own_head = None if backbone.head is None else model.get_submodule(backbone.head)
        self.selected = select_parameters(model, config.include, config.exclude, backbone.outside)
        self.objectives = {n: Supervised(backbone, task.data, task.settings(config)) for n, task in tasks.items()}
        self.samplers = {name: EpochSampler(len(split), config.seed) for name, split in splits.items()}
        self.loaders = {n: one.batches(splits[n], self.samplers[n]) for n, one in self.objectives.items()}
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and not inside(name, backbone.outside))
        self.gates: Gates | None = attach_gates(model, tasks, self.selected, start=joint.gate_start) if gated else None
        self.history = None if self.gates is None else GateHistory(self.gates)
        self.joint, self.settings = joint, joint.to_json(config.optimizer, len(tasks))
        lr, factor = self.settings["weight_lr"], self.settings["gate_factor"]
        body = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": body, "lr": lr}] if self.gates is None else self.gates.parameter_groups(lr, factor)
        heads = [p for objective in self.objectives.values() for p in objective.trained()]
        groups.append({"params": heads, "lr": config.linear_lr})
        self.trained = [p for group in groups for p in group["params"]]
        for parameter in heads:
            parameter.requires_grad_(True)
        self.peaks = [float(group["lr"]) for group in groups]
        optimizer = torch.optim.SGD(groups, momentum=0.9) if config.optimizer == "sgd" else torch.optim.Adam(groups)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.slots = [
            (layer, leaf)
            for layer in model.modules()
            if isinstance(layer, BATCH_NORMS)
            for leaf, buffer in layer._buffers.items()
            if buffer is not None
        ]
        self.own_buffers = [layer._buffers[leaf] for layer, leaf in self.slots]
        self.buffers = {n: [b.clone() for b in self.own_buffers if b is not None] for n in tasks}
        self.steps_per_epoch = sum(math.ceil(len(one) / config.accumulate) for one in self.loaders.values())
        self.steps = config.steps * len(tasks) if config.steps else config.epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)

    def use(self, name: str) -> Supervised:
        """Make the backbone this task's: head, statistics, gates; return the task's objective."""
        objective = self.objectives[name]
        if self.backbone.head is not None:
            swap_module(self.backbone.model, self.backbone.head, objective.module.linear)
        for (layer, leaf), buffer in zip(self.slots, self.buffers[name], strict=True):
            layer._buffers[leaf] = buffer
        if self.gates is not None:
            self.gates.use(name)
        return objective

    def close(self) -> None:
        """Take the gates off; head and statistics are those that the backbone came with."""
        if self.gates is not None:
            self.gates.detach()
        if self.backbone.head is not None and self.own_head is not None:
            swap_module(self.backbone.model, self.backbone.head, self.own_head)
        for (layer, leaf), buffer in zip(self.slots, self.own_buffers, strict=True):
            layer._buffers[leaf] = buffer

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the run changes, by name."""
        found = {f"trained/{at}": parameter.detach() for at, parameter in enumerate(self.trained)}
        for name, buffers in self.buffers.items():
            found.update({f"buffers/{name}/{at}": buffer for at, buffer in enumerate(buffers)})
        return found

    def more(self) -> dict[str, Any]:
        """Return what else there is to the run's state, as JSON values."""
        history = None if self.history is None else self.history.content
        return {"history": history, "unreadable": unreadable_rows(self._data())}

    def take_back(self, more: Mapping[str, Any], objective: Mapping[str, Tensor]) -> None:
        """Go on from what `more` gave."""
        if self.history is not None:
            self.history.content = more["history"]
        note_unreadable(self._data(), more["unreadable"])

    def _data(self) -> dict[str, Data]:
        return {name: task.data for name, task in self.tasks.items()}

    def train(
        self, base: Fingerprint, folder: Path | None, resume: bool, log: RunLog, every: str | None = None
    ) -> dict[str, float]:
        """Run the epochs that are left; return what the last one showed. `every` is as of `parse_every`."""
        ours = {
            "config": {**self.config.to_json(), **self.settings, "gated": self.gates is not None},
            "tasks": {n: [t.data.digest, len(self.loaders[n].dataset), t.augment] for n, t in self.tasks.items()},
            "base": base.digests[base.dtype],
        }
        keeper = Keeper(self, folder, every, ours, log)
        if resume:
            at = keeper.resume(self.steps)
        else:
            at = Position(self.steps)
            for name in self.names:
                self.use(name).start()
            if self.history is not None:
                self.history.add(0)
        with keeper.watching():
            while not at.done:
                self._epoch(at, keeper, log)
                at.metrics = {"train_loss": at.loss / at.count, **self.accuracies("validation")}
                if self.history is not None:
                    self.history.add(at.step)
                log.write(at.event("epoch", **at.metrics))
                at.next_epoch()
                at.done = at.epoch == self.epochs
                keeper.after_epoch(at)
        return at.metrics

    def accuracies(self, split: str) -> dict[str, float]:
        """Return the accuracies of the tasks that have this split, and their mean, by name."""
        found = {}
        for name, task in self.tasks.items():
            examples = getattr(task.data, split)
            if examples is not None:
                found[name] = self.use(name).evaluate(examples)["accuracy"]
        if not found:
            return {}
        mean = {f"{split}_accuracy": sum(found.values()) / len(found)}
        return {**mean, **{f"{split}_accuracy_{name}": value for name, value in found.items()}}

    def loss(self, objective: Supervised, batch: Batch) -> Tensor:
        """Return the loss of a batch of the task in use, with the regularisers."""
        inputs, labels = batch
        device = self.accelerator.device
        with self.accelerator.autocast():
            loss = objective.loss(objective.module, (to_device(inputs, device), labels.to(device)))
        return loss if self.gates is None else loss + self.gates.penalty(self.joint.r1, self.joint.r2)

    def _epoch(self, at: Position, keeper: Keeper, log: RunLog) -> None:
        """Run an epoch, or what is left of it, a task drawn anew for each step."""
        seed, accumulate = self.config.seed, self.config.accumulate
        order = torch.Generator().manual_seed(epoch_seed(seed, at.epoch))
        drawn = torch.randint(len(self.names), (self.steps_per_epoch,), generator=order).tolist()
        streams = {name: self.stream(name, at) for name in self.names}
        for objective in self.objectives.values():
            set_train_mode(objective.module, self.config.bn == "adapt")
        for name in (self.names[index] for index in drawn[at.count : at.count + self.steps - at.step]):
            objective = self.use(name)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * learning_rate(self.config, at.step, self.steps)
            value = 0.0
            for part in range(accumulate):
                batch = next(streams[name])
                # everything random in a batch follows from its place, and so a run may go on at any
                torch.manual_seed(draw_seed(seed, at.epoch, at.count, part))
                loss = self.loss(objective, batch)
                value += float(loss.detach()) / accumulate
                self.accelerator.backward(loss)  # divides by `accumulate`
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss of {name!r} is {value} at step {at.step + 1} of {self.steps}; lower the learning rates "
                    f"(weights {self.settings['weight_lr']}, head {self.config.linear_lr}), or clip gradients; the "
                    f"last checkpoint is kept"
                )
            if self.config.clip is not None:
                self.accelerator.clip_grad_norm_(self.trained, self.config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            at.loss, at.count, at.step = at.loss + value, at.count + 1, at.step + 1
            if at.step % LOG_EVERY == 0 or at.step == self.steps:
                rate = float(self.optimizer.param_groups[0]["lr"])
                log.write(at.event("step", loss=value, lr=rate))
            keeper.after_step(at)

    def stream(self, name: str, at: Position) -> Iterator[Batch]:
        """Give a task's batches from a position on and without an end, its examples in another order in each pass.

        What was read is noted in the position.

        Raises:
            TrainingError: if no example can be read.
        """
        first, read = at.batches.get(name, [0, 0])
        for again in itertools.count(first):
            self.samplers[name].epoch = at.epoch * PASSES + again
            loader = self.accelerator.skip_first_batches(self.loaders[name], read) if read else self.loaders[name]
            batch = None
            for number, batch in numbered(loader):
                at.batches[name] = [again, read + number]
                yield batch
            if batch is None and not read:
                raise TrainingError(f"no example of the training split of {name!r} can be read")
            read = 0


HISTOGRAMS = "histograms.json"  # in the run's folder


@dataclass(frozen=True, slots=True, eq=False)
class JointResult:
    """What tasks learned together. The backbone's model has the shared weights.

    Attributes:
        base: fingerprint of the shared weights.
        results: by task, each ready for `save_adapter(path, result.parts, result.base, result.about)`. Its metrics
            are those after hardening; "soft_…" are before.
    """

    base: Fingerprint
    results: dict[str, TrainResult]


def train_jointly(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    config: TrainConfig | None = None,
    joint: JointConfig | None = None,
    *,
    gated: bool = True,
    output: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: str | None = None,
    report: Report | None = None,
) -> JointResult:
    """Train one network on several tasks at once ("Like a Light Switch"). The backbone's weights are changed.

    For each step a task is drawn, each with the same chance. It has its own head and BatchNorm statistics; the weights
    of the body are shared and all learn. Those that would be masked have a gate for each task as well. At the end gates
    become masks, the weights stay as they are, and BatchNorm statistics are taken anew with the masks on. Those of the
    backbone become the means of the tasks', for masks that are trained on it later.

    Args:
        tasks: by name.
        config: of the run; `epochs` are passes over the rows of all tasks, `steps` are for each task.
        joint: rates of weights and gates, and regularisers.
        gated: without gates the weights are shared as they are, and every mask keeps all.
        output, resume, checkpoint_every, report: as in `train_mask`. With gates the folder also gets `histograms.json`:
            gates and effective weights by task and parameter, after every epoch.

    Raises:
        ConfigError: if the objective or the heads are others than linear ones trained on labels, or there are several
            processes. Others: as `train_mask`.
    """
    config, joint = config or TrainConfig(), joint or JointConfig()
    before = fingerprint(backbone.model, id=backbone.id, revision=backbone.revision, head=backbone.outside)
    with (
        run_folder(output, resume) as folder,
        borrowed(backbone),
        RunLog(folder, report, resume) as log,
        _run(backbone, tasks, config, joint, gated) as run,
    ):
        last = run.train(before, folder, resume, log, checkpoint_every)
        if folder is not None and run.history is not None:
            with replacing(folder / HISTOGRAMS) as (temporary,):
                temporary.write_text(json.dumps(run.history.content, sort_keys=True), encoding="utf-8")
        hard, soft = _accuracies(run), dict[str, float]()
        if run.gates is not None:
            soft = hard
            run.gates.hard = True
            for name in tasks if config.bn == "adapt" else ():
                run.use(name).recalibrate()
            hard = _accuracies(run)
        parts = {name: _parts(run, name) for name in tasks}
        whole = [name for name in tasks if gated and parts[name].masks.density == 1]
        if whole:
            warning = (
                f"no gate of {', '.join(whole)} has closed, so that the masks keep everything; take more steps, a "
                f"greater gate_factor, or a gate_start nearer to 0"
            )
            log.write({"event": "warning", "step": run.steps, "steps": run.steps, "warning": warning})
        measured = {**hard, **{f"soft_{key}": value for key, value in soft.items()}}
        log.write({"event": "end", "step": run.steps, "steps": run.steps, **last, **measured})
    with torch.no_grad():
        for name in next(iter(parts.values())).statistics:
            every = torch.stack([one.statistics[name] for one in parts.values()])
            backbone.model.get_buffer(name).copy_(every.mean(0))
    backbone = trained_backbone(backbone)
    base = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    results = {}
    for name, task in tasks.items():
        metrics = {"train_loss": last["train_loss"], "density": parts[name].masks.density}
        for kind in ("validation_accuracy", "test_accuracy", "soft_validation_accuracy", "soft_test_accuracy"):
            if f"{kind}_{name}" in measured:
                metrics[kind] = measured[f"{kind}_{name}"]
        record = training_record(task.settings(config), task.data, run.steps, 1, metrics)
        record["joint"] = {**run.settings, "gated": gated, "tasks": list(tasks)}
        results[name] = finished(backbone, task.data, parts[name], base, record)
    return JointResult(base, results)


def trained_backbone(backbone: Backbone) -> Backbone:
    """Return a backbone that tasks learned on under another name: its weights are not those that its own stands for."""
    return replace(backbone, id=f"trained:{backbone.id}", revision=None)


def plan_jointly(
    backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
) -> dict[str, Any]:
    """Check a joint run without training: build everything, run a batch of each task; return its plan.

    Raises:
        What `train_jointly` raises before its first step.
    """
    with borrowed(backbone), _run(backbone, tasks, config, joint, gated) as run:
        for name in tasks:
            run.loss(run.use(name), next(run.stream(name, Position(run.steps)))).backward()  # type: ignore[no-untyped-call]
        shared = dict(backbone.model.named_parameters()) if run.gates is None else run.gates.weights()
        weights = sum(shared[name].numel() for name in run.selected)
        return {"parameters": len(run.selected), "weights": weights, "epochs": run.epochs, "steps": run.steps}


@contextmanager
def _run(
    backbone: Backbone, tasks: Mapping[str, Task], config: TrainConfig, joint: JointConfig, gated: bool
) -> Iterator[JointRun]:
    run = JointRun(backbone, tasks, config, joint, gated)
    try:
        yield run
    finally:
        run.close()


def _accuracies(run: JointRun) -> dict[str, float]:
    return {**run.accuracies("validation"), **run.accuracies("test")}


def _parts(run: JointRun, name: str) -> Parts:
    objective = run.use(name)
    if run.gates is not None:
        masks = run.gates.masks(name)
    else:
        model = run.backbone.model
        masks = MaskSet.from_tensors(
            {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in run.selected}
        )
    statistics = batchnorm_statistics(run.backbone.model) if run.config.bn == "adapt" else {}
    return Parts(masks, objective.head(), statistics)
