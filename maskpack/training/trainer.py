"""The trainer: one run with its objects, epochs and record, seeded and resumable, on Accelerate; and train_mask."""

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.content import FEATURES, About, Parts
from ..backbone.classifier import modes_kept
from ..backbone.fingerprint import fingerprint
from ..backbone.load import Backbone
from ..backbone.model import Embedding, Fingerprint, find_head, named_parameters, swap_module
from ..backbone.select import match_parameters, select_parameters
from ..errors import ConfigError, TrainingError
from ..preprocess import preprocess_to_json
from .batchnorm import batchnorm_statistics, set_train_mode
from .budget import rate_control
from .checkpoint import FILE, OBJECTIVE, checkpoint_digest, take_over, trained_tensors
from .config import ALL, TrainConfig, learning_rate
from .data.base import Data, EpochSampler, Examples, draw_seed, empty_classes, numbered, readable
from .methods.base import build_method
from .objectives.base import check_data, find_objective
from .run_folder import (
    Keeper,
    Position,
    Report,
    RunLog,
    is_main_process,
    new_accelerator,
    note_unreadable,
    parse_every,
    run_folder,
    unreadable_rows,
)
from .scores import (
    attach,
    density,
    detach_scores,
    extract_masks,
    learning_weights,
    replaced_values,
    scored_models,
    scored_weights,
)

Learn = Callable[[Backbone, TrainConfig], Mapping[str, nn.Parameter]]


def learn_scores(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
    """Attach scores to the weights that the settings select; return the scores by name.

    Raises:
        SelectionError: if the settings select nothing, or what cannot be masked.
        ConfigError: if `config.selective` is not for the method, or there are fewer stages than it says.
    """
    names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    order = [name for name, _ in backbone.model.named_parameters() if name in names]
    weights = named_parameters(backbone.model)
    learning = learning_weights(config.selective, {name: weights[name] for name in order}, config.seed)
    scores = attach(backbone.model, build_method(config.method, dict(config.method_options)), names, config.scale)
    if config.selective != ALL:
        for name, one in scored_weights(backbone.model).items():
            if one.scores.shape != learning[name].shape or not one.binary().all():
                raise ConfigError(
                    f"selective {config.selective!r} leaves the other scores as they begin, and those of the method "
                    f"{config.method!r} do not begin with every weight kept; take the method threshold, gumbel or flip"
                )
            _only(one.scores, learning[name])
    return scores


def _only(scores: nn.Parameter, learning: Tensor) -> None:
    """Let these scores learn alone: the others' gradients are zero, so that no optimiser here moves them."""
    learning = learning.to(scores.device)
    scores.register_hook(lambda gradient: torch.where(learning, gradient, 0.0))  # type: ignore[no-untyped-call]


def learn_whole(backbone: Backbone, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Return the parameters that learn themselves beside scores, by name; to be asked before scores are attached.

    Raises:
        SelectionError: if a pattern matches nothing. ConfigError: if one of them is to be masked.
    """
    names = match_parameters(backbone.model, config.train, "train", backbone.outside)
    scored = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    masked = [name for name in names if name in scored]
    if masked:
        raise ConfigError(
            f"train would train {len(masked)} parameters that are masked, first {masked[0]!r}; a mask needs frozen "
            f"weights: leave them out of train, or out of the mask with exclude"
        )
    parameters = named_parameters(backbone.model)
    return {name: parameters[name] for name in names}


@contextmanager
def borrowed(backbone: Backbone, train: Iterable[str] = ()) -> Iterator[None]:
    """On exit, whatever happened: scores detached, head, buffers, `requires_grad`, device and modes as before.

    Args:
        train: globs of parameters that may change meanwhile.
    """
    model = backbone.model
    parameters = named_parameters(model)
    changing = {name: parameters[name] for name in match_parameters(model, train, "train", backbone.outside)}
    values = {name: parameter.detach().clone() for name, parameter in changing.items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    head = model.get_submodule(backbone.head) if backbone.head is not None else None
    try:
        with modes_kept(model):
            yield
    finally:
        detach_scores(model)
        if backbone.head is not None and head is not None:
            swap_module(model, backbone.head, head)
        model.to(device)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for name, parameter in changing.items():
                parameter.copy_(values[name])
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
            p.grad = None


def training_record(
    config: TrainConfig,
    data: Data,
    steps: int,
    processes: int,
    metrics: Mapping[str, float],
    extended: Sequence[str] = (),
) -> dict[str, Any]:
    """Return settings, steps, data, versions and metrics of a run as JSON values.

    Args:
        extended: what is to be said of steps that were added when the run went on.
    """
    assert data.train is not None
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "settings": config.to_json(),
        "steps": steps,
        **({"extended": list(extended)} if extended else {}),
        "processes": processes,
        "data": {
            "id": data.id,
            "source": data.source,
            "digest": data.digest,
            "rows": {name: len(split) for name, split in splits.items() if split is not None},
            "unreadable": sum(len(split.unreadable) for split in splits.values() if split is not None),
            "empty_classes": empty_classes(data.train, data.class_names),
        },
        "versions": {
            "maskpack": version("maskpack"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "metrics": dict(metrics),
    }


STREAM = "train"  # of batches
LOG_EVERY = 10  # optimiser steps between two step events: counting the mask's bits takes a moment


class Run:
    """The objects of one run, and its progress.

    Args:
        learn: returns what learns at the rate of scores, by name; it may put modules into the frozen backbone.

    Attributes:
        whole: parameters that learn themselves beside scores, by name.
        control: keeps the masks within a budget of bytes, or None.
        extended: what is to be said of steps that were added when the run went on.
    """

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig, learn: Learn = learn_scores):
        self.accelerator = new_accelerator(config)
        objective = find_objective(config.objective, backbone.task)
        self.train_split: Examples = check_data(data, backbone, objective)
        if config.head_kind != "linear" and not objective.needs_labels:
            raise ConfigError(
                f"head_kind {config.head_kind!r} is for a head, and the objective {config.objective!r} trains none; "
                f"leave it out"
            )
        torch.manual_seed(config.seed)
        self.backbone, self.data, self.config = backbone, data, config
        backbone.model.to(self.accelerator.device)
        self.objective = objective(backbone, data, config)
        backbone.model.requires_grad_(False)
        self.whole = learn_whole(backbone, config) if learn is learn_scores else {}
        self.scores = learn(backbone, config)
        self.scored = [one for name, one in scored_weights(backbone.model).items() if name in self.scores]
        self.control = rate_control(config, self.scored)
        learned = self.scores.values() if all(one.method.learns for one in self.scored) else ()
        scores = [*learned, *self.objective.scores()]
        beside = [*self.objective.trained(), *self.whole.values()]
        self.trained = [*scores, *beside]
        if not self.trained:
            raise ConfigError(
                f"nothing would learn: the method {config.method!r} follows from the weights, and no head is trained "
                f"beside it; take another method, or head_kind 'linear' with labels"
            )
        for parameter in self.trained:
            parameter.requires_grad_(True)
        groups = [{"params": scores, "lr": config.score_lr}, {"params": beside, "lr": config.linear_lr}]
        self.peaks = [config.score_lr, config.linear_lr]
        optimizer = torch.optim.SGD(groups, momentum=0.9) if config.optimizer == "sgd" else torch.optim.Adam(groups)
        self.sampler = EpochSampler(len(self.train_split), config.seed)
        batches = self.objective.batches(self.train_split, self.sampler)
        self.module, self.optimizer, self.loader = self.accelerator.prepare(self.objective.module, optimizer, batches)
        self.steps_per_epoch = math.ceil(len(self.loader) / config.accumulate)
        self.steps = config.steps or config.epochs * self.steps_per_epoch
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)
        self.extended: list[str] = []
        self.models = scored_models(self.objective.module)
        for model in self.models:
            model.batch_size = config.batch_size * config.accumulate * self.accelerator.num_processes

    def facts(self, base: Fingerprint, start_from: Path | None) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return {
            "start": None if start_from is None else checkpoint_digest(start_from / FILE),
            "config": self.config.to_json(),
            "data": [self.data.digest, len(self.train_split), len(self.data.class_names)],
            "base": base.digests[base.dtype],
            "processes": self.accelerator.num_processes,
        }

    def train(
        self,
        base: Fingerprint,
        folder: Path | None,
        resume: bool,
        start_from: Path | None,
        log: RunLog,
        every: str | None = None,
        longer: bool = False,
    ) -> dict[str, float]:
        """Run the epochs that are left; return the metrics.

        Args:
            every: as of `parse_every`. longer: a run that goes on may have more steps than before.
        """
        ours = self.facts(base, start_from)
        keeper = Keeper(self, folder, every, ours, log)
        if resume:
            at = keeper.resume(self.steps, longer)
        else:
            at = Position(self.steps)
            self.objective.start()
            if start_from is not None:
                take_over(trained_tensors(self.objective.module), start_from / FILE, ours["base"], self.objective.fresh)
        with keeper.watching():
            while not at.done:
                over = self._epoch(at, keeper, log)
                last = not over or at.epoch + 1 == self.epochs
                size = {} if self.control is None else {"mask_bytes": self.control.end_epoch(last)}
                if last and self.config.bn == "adapt" and self._stores_another():
                    self.objective.recalibrate()
                at.metrics = {"train_loss": at.loss / at.count, **self._density(), **size, **self.objective.metrics()}
                if self.data.validation is not None:
                    at.metrics |= self._held_out("validation", self.data.validation)
                log.write(at.event("epoch", **at.metrics))
                warning = self.objective.warning(at.metrics)
                if warning is not None:
                    log.write(at.event("warning", warning=warning))
                at.done = last
                if over:  # one that the last step cut short goes on where a longer run does
                    at.next_epoch()
                keeper.after_epoch(at)
        self.extended = at.extended
        self._progress(1.0)
        metrics = dict(at.metrics)
        if self.data.test is not None:
            metrics |= self._held_out("test", self.data.test)
        log.write({"event": "end", "step": at.step, "steps": self.steps, **metrics})
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the run changes, by name."""
        kept = {OBJECTIVE + name: tensor for name, tensor in self.objective.state().items()}
        return trained_tensors(self.objective.module) | kept

    def more(self) -> dict[str, Any]:
        """Return what else there is to the run's state, as JSON values."""
        return {
            "control": None if self.control is None else self.control.state(),
            "unreadable": unreadable_rows({"data": self.data}),
        }

    def take_back(self, more: Mapping[str, Any], objective: Mapping[str, Tensor]) -> None:
        """Go on from what `more` and `tensors` gave."""
        if self.control is not None:
            self.control.restore(more["control"])
        self.objective.restore({name.removeprefix(OBJECTIVE): tensor for name, tensor in objective.items()})
        note_unreadable({"data": self.data}, more["unreadable"])

    def _stores_another(self) -> bool:
        """Tell whether BatchNorm saw other inputs or another network in training than it will."""
        hardens = any(one.method.hardens for one in self.scored)
        return self.objective.other_inputs or hardens or self.control is not None

    def _progress(self, share: float) -> None:
        for model in self.models:
            model.progress = share

    def _penalty(self) -> Tensor | float:
        found = [penalty for model in self.models for one in model.members if (penalty := one.penalty()) is not None]
        found += [] if self.control is None else [self.control.penalty()]
        return torch.stack(found).sum() if found else 0.0

    def _density(self) -> dict[str, float]:
        return {"density": density(self.scored)} if self.scored else {}

    def _held_out(self, split: str, examples: Examples) -> dict[str, float]:
        return {f"{split}_{name}": value for name, value in self.objective.evaluate(examples).items()}

    def _epoch(self, at: Position, keeper: Keeper, log: RunLog) -> bool:
        """Run an epoch, or what is left of it; return False if the last step cut it short."""
        # everything random in a batch follows from its place, and so a run may go on at any
        self.sampler.epoch = at.epoch
        set_train_mode(self.module, self.config.bn == "adapt")
        self.objective.begin_epoch(at.epoch, self.epochs)
        self.accelerator.step = 0  # of a batch that was left over nothing is kept
        for parameter in self.trained:
            parameter.grad = None
        read = at.batches.get(STREAM, [0, 0])[1]
        loader = self.accelerator.skip_first_batches(self.loader, read) if read else self.loader
        started, steps_before = time.monotonic(), at.step
        for number, batch in numbered(loader):
            if at.step == self.steps:
                return False
            place = read + number
            torch.manual_seed(draw_seed(self.config.seed, at.epoch, place, self.accelerator.process_index))
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * learning_rate(self.config, at.step, self.steps)
            self._progress(at.step / max(self.steps - 1, 1))
            with self.accelerator.accumulate(self.module):
                with self.accelerator.autocast():
                    loss = self.objective.loss(self.module, batch) + self._penalty()
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value} at step {at.step + 1} of {self.steps}; lower the learning rates (scores "
                        f"{self.config.score_lr}, head {self.config.linear_lr}), or clip gradients; the last "
                        f"checkpoint is kept"
                    )
                self.accelerator.backward(loss)
                self.objective.after_backward(at.step)
                if self.config.clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, self.config.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            at.loss, at.count = at.loss + value, at.count + 1
            if self.accelerator.sync_gradients:
                at.step += 1
                at.batches[STREAM] = [0, place]
                if self.control is not None:
                    self.control.follow()
                if at.step % LOG_EVERY == 0 or at.step == self.steps:
                    pace = (time.monotonic() - started) / (at.step - steps_before)
                    rate = float(self.optimizer.param_groups[0]["lr"])
                    left = pace * (self.steps - at.step)
                    log.write(at.event("step", loss=value, lr=rate, **self._density(), seconds_left=left))
                keeper.after_step(at)
        if at.count == 0:
            raise TrainingError(f"no example of the training split could be read in epoch {at.epoch + 1}")
        return True

    def record(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the training record that travels with the adapter."""
        processes = self.accelerator.num_processes
        return training_record(self.config, self.data, self.steps, processes, metrics, self.extended)


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """What a run learned, ready for `save_adapter(path, result.parts, result.base, result.about)`.

    Attributes:
        parts: masks, head (None without labels), BatchNorm statistics, parameters that learned themselves.
        base: fingerprint of the backbone.
        about: task, class names, preprocessing and training record.
        metrics: train_loss, density, and what the objective measures of the splits that exist.
    """

    parts: Parts
    base: Fingerprint
    about: About
    metrics: dict[str, float]


def train_mask(
    model: Backbone | nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | None = None,
    checkpoint_every: str | None = None,
    longer: bool = True,
    learn: Learn = learn_scores,
    report: Report | None = None,
) -> TrainResult:
    """Train a mask on a frozen backbone.

    Args:
        model: from `load_backbone`, or any module that gives logits for images; its tensors have the same bits
            afterwards.
        data: from `load_data`. The test split is only read after the last step.
        output: folder for the checkpoint, `log.jsonl` and TensorBoard curves; None keeps nothing. One run at a time.
        resume: continue from the checkpoint in `output`. On one process and CPU the masks are, bit for bit, those of
            a run that was not interrupted.
        checkpoint_every: a time or a number of optimiser steps, as in "10min" or "500steps"; None: every epoch.
        longer: `epochs` or `steps` may be greater than those of the run that is resumed. False: that is an error.
        start_from: `output` of a finished run on the same backbone, with whose scores, head and statistics this one
            starts; the optimiser starts afresh.
        learn: attaches what is trained as scores, and returns it; the default does what `config` says.
        report: called, in the main process, with every event: {"event": "step" | "epoch" | "warning" | "end",
            "step", "steps", "loss", "density", …}.

    Raises:
        TrainingError: if the loss is not finite, or no example of an epoch can be read.
        StateError: if the checkpoint is damaged or belongs to another run, `output` has one and `resume` is not asked
            for, or another run writes into it.
        StoppedError: after SIGTERM or SIGUSR1, at the next optimiser step, when the checkpoint is written. Only with
            `output`, in the main thread; a second signal is not waited for.
        SelectionError, DataError: if patterns or data do not fit the backbone.
    """
    config = config or TrainConfig()
    parse_every(checkpoint_every)
    backbone = (
        model
        if isinstance(model, Backbone)
        else Backbone(model, type(model).__name__, embedding=Embedding(find_head(model)))
    )
    main = is_main_process()
    before = fingerprint(backbone.model, id=backbone.id, revision=backbone.revision, head=backbone.outside)
    start = None if start_from is None else Path(start_from)
    with (
        run_folder(output, resume) as folder,
        borrowed(backbone, config.train),
        RunLog(folder if main else None, report if main else None, resume) as log,
    ):
        run = Run(backbone, data, config, learn)
        metrics = run.train(before, folder, resume, start, log, checkpoint_every, longer)
        statistics = batchnorm_statistics(backbone.model) if config.bn == "adapt" else {}
        head = run.objective.head()
        values = replaced_values(backbone.model)
        whole = {name: parameter.detach().cpu().clone() for name, parameter in run.whole.items()}
        parts = Parts(extract_masks(backbone.model), head, statistics, whole, values)
    after = fingerprint(backbone.model, id=backbone.id, head=backbone.outside)
    if after.digests != before.digests:
        raise TrainingError(
            "the backbone's tensors changed during training: its forward pass changes them, or this is a defect of "
            "maskpack; report it"
        )
    return finished(backbone, data, parts, before, run.record(metrics))


def plan_training(backbone: Backbone, data: Data, config: TrainConfig) -> dict[str, Any]:
    """Check a run without training: build everything, run one batch forward and backward; return its plan.

    Raises:
        What `train_mask` raises before its first step.
    """
    with borrowed(backbone):
        run = Run(backbone, data, config)
        batch = next(readable(run.loader), None)
        if batch is None:
            raise TrainingError("no example of the training split can be read")
        loss = run.objective.loss(run.module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return {
            "backbone": backbone.id,
            "parameters": len(run.scores),
            "weights": sum(math.prod(one.shape) for one in run.scored),
            "classes": len(data.class_names),
            "train": len(run.train_split),
            "validation": len(data.validation) if data.validation else 0,
            "test": len(data.test) if data.test else 0,
            "epochs": run.epochs,
            "steps": run.steps,
            "loss": float(loss.detach()),
        }


def finished(backbone: Backbone, data: Data, parts: Parts, base: Fingerprint, record: dict[str, Any]) -> TrainResult:
    """Return the result of a run with this training record; `base` is the fingerprint of the whole body."""
    headless = parts.head is None
    about = About(
        FEATURES[data.task] if headless else data.task,
        None if headless else tuple(data.class_names),
        preprocess_to_json(backbone.preprocess),
        record,
    )
    masked = Fingerprint(**{**asdict(base), "tensors": {name: base.tensors[name] for name in parts.masks}})
    return TrainResult(parts, masked, about, record["metrics"])
