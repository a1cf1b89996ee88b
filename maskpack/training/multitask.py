"""Many tasks on one backbone: trained together, with a gate of each task for each weight, or a mask after the other."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.card import member, metrics
from ..adapter.content import Parts
from ..adapter.describe import inspect_adapter
from ..adapter.read import MODEL_FILE, Adapter, read_adapter
from ..adapter.write import save_adapter
from ..backbone.classifier import Batch, to_device
from ..backbone.load import Backbone, export_state, load_weights
from ..backbone.model import named_parameters, swap_module
from ..backbone.select import select_parameters
from ..codecs.base import Profile
from ..errors import ConfigError, StateError, TrainingError, check_argument, check_choice
from ..mask import MaskSet
from ..preprocess import Augment
from .config import JointConfig, Mode, TrainConfig
from .data.base import Data, EpochSampler, draw_seed, epoch_seed, numbered
from .evaluate import percent, table
from .features import beside_baseline, probe_accuracies, worth
from .gates import GateHistory, Gates, attach_gates
from .learn import base_of, body_parameters, borrowed, resolved
from .loop import Position, Run
from .objectives.base import check_data
from .objectives.supervised import Supervised
from .progress import shown
from .run_folder import (
    MODEL,
    PartOptions,
    RunFolder,
    RunOptions,
    claim,
    differing,
    is_main_process,
    locked,
    part_options,
    write_json,
)
from .stored import BATCH_NORMS, batchnorm_statistics, beside_masks, set_train_mode, settle, shortened
from .trainer import TrainResult, as_backbone, plan_training, result_of, train_mask

TOGETHER = ("gated", "shared")
BASE, CLAIM, RESULT, RUNS = "backbone.safetensors", "multitask.json", "results.json", "training"
JOINT = "jointly"  # the joint run's folder inside RUNS
PASSES = 2**20  # more than a task's data are read in an epoch: orders of different epochs differ
HISTOGRAMS = "histograms.json"  # in the run's folder
# metrics of a task by what is measured of all
KINDS = {
    "validation_accuracy": "validation_accuracy",
    "test_accuracy": "test_accuracy",
    "soft_validation_accuracy": "soft_validation_accuracy",
    "soft_test_accuracy": "soft_test_accuracy",
    "whole_test_accuracy": "test_accuracy_without_masks",
}
NOT_CLOSED = (
    "no gate has closed, so that the mask keeps everything; take more steps, a greater gate_factor, or a gate_start "
    "nearer to 0"
)


@dataclass(frozen=True)
class Task:
    """One of several tasks: its data, and the augmentation of its training images in place of the settings'.

    Example:
        tasks = {"low": Task(load_data("digits:0-1")), "high": Task(load_data("digits:8-9"))}
    """

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
        _check_settings(config)
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
        facts = {name: [task.data.digest, len(splits[name]), task.augment] for name, task in tasks.items()}
        self.facts = {"config": {**config.to_json(), **self.settings, "gated": gated}, "tasks": facts}
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
        # weights and biases of norms, of all tasks and of each, once its statistics are in them; and what these were
        self.norms, self.before = dict[str | None, dict[str, Tensor]](), dict[str, Tensor]()

    def use(self, name: str) -> Supervised:
        """Give the backbone a task's head, statistics and gates; return the task's objective."""
        objective = self.objectives[name]
        self._exchange(objective.module.linear, self.buffers[name])
        self._put_norms(name)
        if self.gates is not None:
            self.gates.use(name)
        return objective

    @torch.no_grad()
    def _put_norms(self, name: str | None) -> None:
        parameters = named_parameters(self.backbone.model)
        for key, tensor in self.norms.get(name, {}).items():
            parameters[key].copy_(tensor)

    @torch.no_grad()
    def settle(self) -> None:
        """Put the values that are stored into heads and norms; the base's statistics are the means of the tasks'."""
        model, statistics = self.backbone.model, dict[str, dict[str, Tensor]]()
        for name in self.tasks:
            self.use(name).settle()
            statistics[name] = batchnorm_statistics(model)
        if self.config.bn == "freeze":
            return
        now, parameters = beside_masks(model), named_parameters(model)
        means = {n: torch.stack([one[n] for one in statistics.values()]).mean(0) for n in statistics[name]}
        self.before = {**now, **{n: mean.to(now[n]) for n, mean in means.items()}}
        learned: dict[str | None, dict[str, Tensor]] = {None: {n: now[n] for n in now if n in parameters}}
        for name in self.tasks:
            self.use(name)
            settle(model, self.before, {}, self.config.store)
            learned[name] = {n: parameters[n].detach().clone() for n in learned[None]}
            for key, tensor in learned[None].items():
                parameters[key].copy_(tensor)
        self.norms = learned

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
        self._put_norms(None)

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
        """Return the parts of a task; without gates its mask keeps every weight."""
        objective, model = self.use(name), self.backbone.model
        if self.gates is not None:
            masks = self.gates.masks(name)
        else:
            whole = {n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in self.selected}
            masks = MaskSet.from_tensors(whole)
        if self.config.bn == "freeze":
            return Parts(masks, objective.head())
        return shortened(Parts(masks, objective.head(), batchnorm_statistics(model)), model, self.before)


def _check_settings(config: TrainConfig) -> None:
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
        gated: without gates the weights are shared as they are, and every mask keeps all.
        options: with gates the folder also gets `histograms.json`: gates and effective weights by task and parameter,
            after every epoch.

    Returns:
        The results by task. Metrics are those after hardening; "soft_…" are before.
    """
    config, joint, folder = config or TrainConfig(), joint or JointConfig(), RunFolder(options)
    probes = {name: probe_accuracies(backbone, task.data, config.batch_size) for name, task in tasks.items()}
    with folder.opened(), borrowed(backbone), closing(JointRun(backbone, tasks, config, joint, gated)) as run:
        last = run.train(folder).metrics
        if folder.path is not None and run.history is not None:
            write_json(folder.path / HISTOGRAMS, run.history.content, None)
        soft = {} if run.gates is None else run.accuracies("validation", "test")
        soft = {f"soft_{name}": value for name, value in soft.items()}
        if run.gates is not None:
            run.gates.hard = True
            for name in tasks if config.bn != "freeze" else ():
                run.use(name).recalibrate()
        run.settle()
        measured = run.accuracies("validation", "test")
        if run.gates is not None:
            run.gates.off = True
            whole = {f"whole_{name}": value for name, value in run.accuracies("test").items()}
            measured = {**measured, **soft, **whole}
        parts = {name: run.parts(name) for name in tasks}
        end = {"step": run.steps, "steps": run.steps}
        found, records = dict[str, dict[str, float]](), dict[str, dict[str, Any]]()
        for name in tasks:
            own = {"train_loss": last["train_loss"], "density": parts[name].masks.density}
            own |= {kind: measured[f"{key}_{name}"] for key, kind in KINDS.items() if f"{key}_{name}" in measured}
            found[name] = beside_baseline(own, probes[name])
            records[name] = worth(found[name], [mask.shape for mask in parts[name].masks.values()], masks=False)
            if gated and own["density"] == 1:
                records[name]["warnings"] = [NOT_CLOSED, *records[name].get("warnings", [])]
            for one in records[name].get("warnings", []):
                folder.write({"event": "warning", **end, "warning": f"{name}: {one}"})
        folder.write({"event": "end", **end, **last, **measured})
    with torch.no_grad():
        for name in batchnorm_statistics(backbone.model) if run.before else ():
            backbone.model.get_buffer(name).copy_(run.before[name])
    base, results = base_of(trained_backbone(backbone)), {}
    more = {"joint": {**run.settings, "gated": gated, "tasks": list(tasks)}}
    for name, task in tasks.items():
        record = {**more, **records[name]}
        results[name] = result_of(run, task.data, task.settings(config), parts[name], base, found[name], record)
    return results


def trained_backbone(backbone: Backbone) -> Backbone:
    """Return a backbone whose weights tasks have changed under another name than that of its first weights."""
    return replace(backbone, id=f"trained:{backbone.id}", revision=None)


@shown
def train_tasks(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    output: str | Path,
    *,
    mode: Mode = "sequential",
    config: TrainConfig | None = None,
    joint: JointConfig | None = None,
    profile: Profile = "default",
    **options: Unpack[PartOptions],
) -> dict[str, Any]:
    """Train a mask for each task on weights that all share; tasks that are finished in `output` are left alone.

    `output` gets `backbone.safetensors`, the base of all masks, and for each task a folder with its adapter. Called
    again with more tasks it trains those alone, as masks on that base; if "separate", as the others.

    Args:
        backbone: from `load_backbone`; ends with the weights of the base (those of the last task if "separate").
        tasks: by name, which is the name of the folder.
        mode: "sequential": the backbone stays as it is, a mask is trained for each task in turn. "gated": tasks learn
            together on shared weights with gates, which become the masks. For comparison "shared", the same without
            gates, and "separate", a network for each task.
        config: of every run. joint: rates of weights and gates, and regularisers, for modes in which weights learn.
        profile: as in `save_adapter`.
        options: `resume`, `checkpoint_every` and `report`, as in `train_mask`.

    Returns:
        {"mode", "backbone", "rows": [{"task", "accuracy", "soft_accuracy", "density", …}]}, which is also in
        `results.json`.

    Raises:
        ConfigError: if a name or a setting is impossible. StateError: if `output` was made with another mode or
            backbone, or a finished task with other settings or data. Others: as the runs raise.

    Example:
        tasks = {"low": Task(load_data("digits:0-1")), "high": Task(load_data("digits:8-9"))}
        print(train_tasks(backbone, tasks, "./tasks", config=TrainConfig(steps=10))["rows"])
    """
    config, joint, folder = TrainConfig() if config is None else config, joint or JointConfig(), Path(output)
    how = "as in {'birds': Task(load_data(…))}"
    check_argument("tasks", tasks, Mapping, "tasks by name", f"give a dictionary, {how}")
    for name, task in tasks.items():
        check_argument(f"the task {name!r}", task, Task, "a Task", f"make one, {how}")
    backbone = as_backbone(backbone, config, *(task.data for task in tasks.values()))
    with locked(folder):
        start = _state(backbone) if mode == "separate" else {}
        about, done, left = survey(backbone, tasks, folder, mode, config, joint)
        main, masks_only = is_main_process(), mode != "separate" and JOINT not in left
        claim(folder / CLAIM, about)
        if masks_only and main and not (folder / BASE).exists():
            export_state(folder / BASE, backbone.model)
        base = trained_backbone(backbone) if mode in TOGETHER else backbone
        for run, own in left.items():
            parts = part_options(options, folder / RUNS, run)
            if mode == "separate":
                backbone.model.load_state_dict(start)
            if masks_only:
                settings = own[run].settings(config)
                results = {run: train_mask(base, own[run].data, settings, longer=False, **parts)}
            else:
                results = train_jointly(backbone, own, config, joint, gated=mode == "gated", **parts)
            for name, one in results.items() if main else ():
                said, saved = replace(one.about, training={**(one.about.training or {}), "mode": mode}), folder / name
                written: dict[str, Any] = {"profile": profile, "weights": backbone.model, "overwrite": True}
                done[name] = save_adapter(saved, one.parts, one.base, said, **written)
            if not masks_only:  # last: a base that is there says that its tasks are finished
                export_state((folder / run if mode == "separate" else folder) / BASE, backbone.model)
        if not main:
            return about
        found = {**about, "rows": [row_of(name, done[name]) for name in tasks]}
        write_json(folder / RESULT, found)
        return found


def plan_tasks(
    backbone: Backbone,
    tasks: Mapping[str, Task],
    output: str | Path,
    mode: Mode,
    config: TrainConfig,
    joint: JointConfig,
) -> dict[str, Any]:
    """Check everything without training or writing, with a batch of every task that is not finished.

    Return {"mode", "finished": names, "missing": names, "steps": of all runs that are left}.
    """
    start, steps = _state(backbone), 0
    try:
        _, done, left = survey(backbone, tasks, Path(output), mode, config, joint)
        for name, own in left.items():
            if mode != "separate" and name != JOINT:
                steps += plan_training(backbone, own[name].data, own[name].settings(config))["steps"]
                continue
            with borrowed(backbone), closing(JointRun(backbone, own, config, joint, mode == "gated")) as run:
                for task in own:
                    _, batch = next(run.stream(task, Position(run.steps)))
                    run.loss(task, batch, 0.0).backward()  # type: ignore[no-untyped-call]
                steps += run.steps
    finally:
        backbone.model.load_state_dict(start)
    missing = [name for name in tasks if name not in done]
    return {"mode": mode, "finished": list(done), "missing": missing, "steps": steps}


def _state(backbone: Backbone) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def survey(
    backbone: Backbone, tasks: Mapping[str, Task], folder: Path, mode: Mode, config: TrainConfig, joint: JointConfig
) -> tuple[dict[str, Any], dict[str, Adapter], dict[str, Mapping[str, Task]]]:
    """Return the folder's claim, the adapters of finished tasks, and the tasks of each run that is left, by name.

    Loads the base that tasks learned together, if it is there.
    """
    _check(tasks, mode, joint)
    about = {"mode": mode, "backbone": backbone.id, "weights": base_of(backbone).digest}
    claim(folder / CLAIM, about, write=False)
    if mode in TOGETHER:
        if not (folder / BASE).exists():
            return about, {}, {JOINT: tasks}  # what an interrupted run may have written is written again
        load_weights(backbone.model, folder / BASE)
    base, done = base_of(backbone), dict[str, Adapter]()
    for name, task in tasks.items():
        if not (folder / name / (BASE if mode == "separate" else MODEL_FILE)).exists():  # what is written last
            continue
        done[name] = read_adapter(folder / name)
        _check_finished(done[name], name, task, folder, config, joint, backbone)
        if mode != "separate" and done[name].base.digests != base.digests:
            raise StateError(
                f"{folder / BASE} is not the base of the task {name!r}: one of them was changed; put the files back, "
                f"or take another output folder"
            )
    return about, done, {name: {name: task} for name, task in tasks.items() if name not in done}


def _check(tasks: Mapping[str, Task], mode: str, joint: JointConfig) -> None:
    check_choice("mode", mode, Mode)
    if not tasks:
        raise ConfigError("there is no task; name at least one")
    if mode == "sequential" and joint != JointConfig():
        raise ConfigError(
            "weight_lr, gate_factor, gate_start, r1 and r2 are for weights that learn; in sequence only masks do"
        )
    if mode in ("shared", "separate") and joint != JointConfig(weight_lr=joint.weight_lr):
        raise ConfigError(
            f"gate_factor, gate_start, r1 and r2 are for gates, and the mode {mode!r} has none; leave them out"
        )
    seen: set[str] = set()
    for name in tasks:
        plain = name.replace("-", "").replace("_", "").replace(".", "").isalnum() and name.isascii()
        if not plain or name.startswith(".") or name in (RUNS, JOINT) or name.casefold() in seen:
            raise ConfigError(
                f"a task cannot be called {name!r}: its folder has this name; take letters, digits, '-', '_' and '.', "
                f"another name for each task, and not {RUNS!r} or {JOINT!r}"
            )
        seen.add(name.casefold())


def _check_finished(
    adapter: Adapter, name: str, task: Task, folder: Path, config: TrainConfig, joint: JointConfig, backbone: Backbone
) -> None:
    """Compare what a finished task was trained with and what it would be trained with now."""
    record = adapter.about.training
    there, data, jointly = dict(member(record, "settings")), member(record, "data"), member(record, "joint")
    there |= {"data": data.get("digest"), "rows": data.get("rows"), "classes": list(adapter.about.class_names or ())}
    rows = {split: len(examples) for split, examples in task.data.splits.items()}
    tasks, settings = jointly.get("tasks"), task.settings(config)
    if isinstance(tasks, list):
        there |= jointly
        own = {**settings.to_json(), **joint.to_json(config.optimizer, len(tasks))}
    else:
        own = resolved(settings, backbone).to_json()
    ours = {**own, "data": task.data.digest, "rows": rows, "classes": task.data.class_names}
    ours = json.loads(json.dumps(ours))  # as the record has been
    other = differing(ours, there)
    if other:
        said = [
            key if key in ("data", "rows", "classes") else f"{key} {there.get(key)}, now {ours[key]}" for key in other
        ]
        raise StateError(
            f"the task {name!r} in {folder} is finished, and was trained with other settings or data: "
            f"{'; '.join(said)}; take the earlier ones, another name, or another output folder"
        )


def row_of(name: str, adapter: Adapter) -> dict[str, Any]:
    """Return the row of a finished task in the table of results."""
    record: Mapping[str, Any] = adapter.about.training or {}
    found = metrics(record)
    whole = inspect_adapter(adapter)["sets"]["default"]
    return {
        "task": name,
        "jointly": "joint" in record,
        "accuracy": found.get("test_accuracy"),
        "soft_accuracy": found.get("soft_test_accuracy"),
        "probe_accuracy": found.get("test_probe_accuracy"),
        "accuracy_without_masks": found.get("test_accuracy_without_masks"),
        "density": whole["density"],
        "mask_bytes": whole["payload_bytes"],
        "file_bytes": adapter.size,
        **{f"lora_{name}_bytes": size for name, size in member(record, "lora_bytes").items()},
        "warnings": record.get("warnings", []),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the rows of `train_tasks` as a Markdown table."""
    shares = {
        "accuracy": "accuracy",
        "before hardening": "soft_accuracy",
        "without the masks": "accuracy_without_masks",
        "linear probe": "probe_accuracy",
    }
    shares = {n: key for n, key in shares.items() if key == "accuracy" or any(row[key] for row in result["rows"])}
    rows = [
        [
            row["task"],
            *(percent(row[key]) for key in shares.values()),
            f"{row['density']:.4f}",
            f"{row['mask_bytes']:,}",
            f"{row['file_bytes']:,}",
        ]
        for row in result["rows"]
    ]
    return table(["task", *shares, "density", "mask bytes", "file bytes"], rows)
