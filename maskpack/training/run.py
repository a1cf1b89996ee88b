"""One run: its objects, its epochs, its record. Seeded and resumable, on Accelerate."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.fingerprint import Fingerprint
from ..backbone.load import Backbone
from ..data.base import Data, Examples
from ..data.batches import EpochSampler, epoch_seed, readable
from ..errors import ConfigError, StateError, TrainingError, require
from .batchnorm import set_train_mode
from .checkpoint import (
    FILE,
    check_same_run,
    checkpoint_digest,
    load_checkpoint,
    restore,
    save_checkpoint,
    take_over,
    trained_tensors,
)
from .config import TrainConfig, learning_rate
from .learn import Learn, learn_scores, learn_whole
from .log import RunLog
from .objectives.base import check_data, find_objective
from .rate import rate_control
from .record import training_record
from .scored import density, scored_models, scored_weights

LOG_EVERY = 10  # optimiser steps between two step events: counting the mask's bits takes a moment


def new_accelerator(config: TrainConfig) -> Any:
    """Return the Accelerator of a run.

    Raises:
        ConfigError: if the precision is not possible on this device.
    """
    accelerate = require("accelerate", "train", "training")
    # Accelerate keeps one precision per process; a second run of ours may have another
    accelerate.state.AcceleratorState._reset_state()
    try:
        return accelerate.Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=False),
        )
    except ValueError as error:
        raise ConfigError(f"precision {config.precision!r} is not possible on this device: {error}") from error


class Run:
    """The objects of one run, and its progress.

    Args:
        learn: returns what learns at the rate of scores, by name; it may put modules into the frozen backbone.

    Attributes:
        whole: parameters that learn themselves beside scores, by name.
        control: keeps the masks within a budget of bytes, or None.
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
        self, base: Fingerprint, folder: Path | None, resume: bool, start_from: Path | None, log: RunLog
    ) -> dict[str, float]:
        """Run the epochs that are left; return the metrics."""
        ours = self.facts(base, start_from)
        module: nn.Module = self.objective.module
        first, step, metrics = 0, 0, {}
        if resume:
            if folder is None:
                raise StateError("resume needs the folder of the run in `output`")
            tensors, state, facts = load_checkpoint(folder / FILE)
            check_same_run(folder, ours, facts["run"])
            restore(trained_tensors(module), self.optimizer, tensors, state)
            first, step, metrics = facts["epoch"], facts["step"], facts["metrics"]
            if self.accelerator.scaler is not None and facts["scaler"]:
                self.accelerator.scaler.load_state_dict(facts["scaler"])
            if self.control is not None:
                self.control.restore(facts["control"])
        else:
            self.objective.start()
            if start_from is not None:
                take_over(trained_tensors(module), start_from / FILE, ours["base"], self.objective.fresh)
        for epoch in range(first, self.epochs):
            step, loss = self._epoch(epoch, step, log)
            last = epoch + 1 == self.epochs
            size = {} if self.control is None else {"mask_bytes": self.control.end_epoch(last)}
            if last and self.config.bn == "adapt" and self._stores_another():
                self.objective.recalibrate()
            metrics = {"train_loss": loss, **self._density(), **size, **self.objective.metrics()}
            if self.data.validation is not None:
                metrics |= self._held_out("validation", self.data.validation)
            log.write({"event": "epoch", "epoch": epoch + 1, "step": step, "steps": self.steps, **metrics})
            warning = self.objective.warning(metrics)
            if warning is not None:
                log.write({"event": "warning", "step": step, "steps": self.steps, "warning": warning})
            if folder is not None and self.accelerator.is_main_process:
                scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
                facts = {
                    "run": ours,
                    "epoch": epoch + 1,
                    "step": step,
                    "metrics": metrics,
                    "scaler": scaler,
                    "control": None if self.control is None else self.control.state(),
                }
                save_checkpoint(folder / FILE, trained_tensors(module), self.optimizer, facts)
        self._progress(1.0)
        if self.data.test is not None:
            metrics |= self._held_out("test", self.data.test)
        log.write({"event": "end", "step": step, "steps": self.steps, **metrics})
        return metrics

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

    def _epoch(self, epoch: int, step: int, log: RunLog) -> tuple[int, float]:
        """Run one epoch; return the number of steps made so far, and the epoch's mean loss."""
        # everything random in an epoch follows from its seed: a resumed run needs no generator states
        self.sampler.epoch = epoch
        torch.manual_seed(epoch_seed(self.config.seed, epoch) + self.accelerator.process_index)
        set_train_mode(self.module, self.config.bn == "adapt")
        self.objective.begin_epoch(epoch, self.epochs)
        total, count, started, steps_before = 0.0, 0, time.monotonic(), step
        for batch in readable(self.loader):
            if step == self.steps:
                break
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * learning_rate(self.config, step, self.steps)
            self._progress(step / max(self.steps - 1, 1))
            with self.accelerator.accumulate(self.module):
                with self.accelerator.autocast():
                    loss = self.objective.loss(self.module, batch) + self._penalty()
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value} at step {step + 1} of {self.steps}; lower the learning rates (scores "
                        f"{self.config.score_lr}, head {self.config.linear_lr}), or clip gradients; the checkpoint of "
                        f"the last whole epoch is kept"
                    )
                self.accelerator.backward(loss)
                self.objective.after_backward(step)
                if self.config.clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trained, self.config.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total, count = total + value, count + 1
            if self.accelerator.sync_gradients:
                step += 1
                if self.control is not None:
                    self.control.follow()
                if step % LOG_EVERY == 0 or step == self.steps:
                    pace = (time.monotonic() - started) / (step - steps_before)
                    log.write(
                        {
                            "event": "step",
                            "epoch": epoch + 1,
                            "step": step,
                            "steps": self.steps,
                            "loss": value,
                            "lr": float(self.optimizer.param_groups[0]["lr"]),
                            **self._density(),
                            "seconds_left": pace * (self.steps - step),
                        }
                    )
        if count == 0:
            raise TrainingError(f"no example of the training split could be read in epoch {epoch + 1}")
        return step, total / count

    def record(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return the training record that travels with the adapter."""
        return training_record(self.config, self.data, self.steps, self.accelerator.num_processes, metrics)
