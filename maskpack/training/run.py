"""One run: its objects, its epochs, its record. Seeded and resumable, on Accelerate."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone.fingerprint import Fingerprint
from ..backbone.load import Backbone
from ..data.base import Data, Examples
from ..data.batches import EpochSampler, draw_seed, numbered
from ..errors import ConfigError, TrainingError
from .accelerator import new_accelerator
from .batchnorm import set_train_mode
from .checkpoint import FILE, OBJECTIVE, checkpoint_digest, take_over, trained_tensors
from .config import TrainConfig, learning_rate
from .keep import Keeper, Position, note_unreadable, unreadable_rows
from .learn import Learn, learn_scores, learn_whole
from .log import RunLog
from .objectives.base import check_data, find_objective
from .rate import rate_control
from .record import training_record
from .scored import density, scored_models, scored_weights

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
