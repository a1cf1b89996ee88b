"""The loop of every run, seeded and resumable, on Accelerate: optimiser, learning rates, checkpoints, stop."""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.classifier import Batch
from ..backbone.load import Backbone
from ..errors import ConfigError, StateError, StoppedError, TrainingError, require
from .config import TrainConfig, learning_rate
from .data.base import Data, Examples
from .learn import base_of
from .run_folder import RunFolder, check_like, damaged, differing, load_checkpoint, on_signal, restore, save_checkpoint

LOG_EVERY = 10  # optimiser steps between two step events: counting the mask's bits takes a moment
SECONDS = 5.0  # after which the progress of slower steps is reported as well
LENGTH = ("epochs", "steps")  # settings that may be greater when a run goes on
INTERRUPTED = "interrupted; ends after this step or evaluation, with a checkpoint; once more ends at once, without one"
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Position:
    """The position of a run: steps and epochs that are made, and sums over the epoch."""

    steps: int  # of the optimiser, to make
    step: int = 0  # made so far
    epoch: int = 0  # epochs that are over
    batches: dict[str, list[int]] = field(
        default_factory=dict
    )  # of each stream: its pass, and batches read in this epoch
    loss: float = 0.0  # sum of the losses in this epoch
    count: int = 0  # and their number
    done: bool = False  # masks and statistics are those that are stored
    metrics: dict[str, float] = field(default_factory=dict)  # of the last epoch that was over
    extended: list[str] = field(default_factory=list)  # what is to be said of steps that were added

    def event(self, kind: str, **numbers: Any) -> dict[str, Any]:
        """Return an event of this moment."""
        return {"event": kind, "epoch": self.epoch + 1, "step": self.step, "steps": self.steps, **numbers}


class Run(ABC):
    """A run: the loop over its steps, and checkpoints; a subclass says what learns and where steps come from.

    Attributes:
        facts: JSON values that must be equal for a run to go on, with "config", the settings.
        module: the network, as Accelerate prepared it.
        base: fingerprint of the backbone before the run.
        steps, epochs: optimiser steps and epochs to make.
    """

    facts: dict[str, Any]
    module: nn.Module

    def __init__(self, backbone: Backbone, data: Mapping[str, Data], config: TrainConfig):
        self.backbone, self.data, self.config, self.base = backbone, data, config, base_of(backbone)
        self.folder, self.asked = RunFolder({}), list[int]()
        accelerate = require("accelerate", "train", "training")
        # precision is ours: Accelerate's is the same for all runs of a process
        self.accelerator: Any = accelerate.Accelerator(
            mixed_precision="no",
            gradient_accumulation_steps=config.accumulate,
            dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=False),
        )
        self.device: torch.device = self.accelerator.device
        lacking = config.precision == "fp16" and self.device.type == "cpu"
        if lacking or (config.precision == "bf16" and not accelerate.utils.is_bf16_available(True)):
            raise ConfigError(f"precision {config.precision!r} is not possible on the device {self.device}; take 'no'")
        if config.precision == "fp16":
            self.accelerator.scaler = torch.amp.GradScaler(self.device.type)
        torch.manual_seed(config.seed)

    def prepare(
        self, groups: Mapping[str, tuple[list[nn.Parameter], float]], steps_per_epoch: int, steps: int | None
    ) -> None:
        """Make the optimiser of groups (what learns, its peak rate), and count the steps: `steps`, or the epochs'."""
        self.groups = groups
        self.trained = [parameter for parameters, _ in groups.values() for parameter in parameters]
        for parameter in self.trained:
            parameter.requires_grad_(True)
        own = [{"params": parameters, "lr": rate} for parameters, rate in groups.values()]
        sgd = self.config.optimizer == "sgd"
        optimizer = torch.optim.SGD(own, momentum=0.9) if sgd else torch.optim.Adam(own)
        self.optimizer: Any = self.accelerator.prepare(optimizer)
        self.steps_per_epoch = steps_per_epoch
        self.steps = steps or self.config.epochs * steps_per_epoch
        self.epochs = math.ceil(self.steps / steps_per_epoch)

    @abstractmethod
    def start(self) -> None:
        """Prepare for the first step of a new run."""

    @abstractmethod
    def batches(self, at: Position) -> Iterator[tuple[str, list[int], Batch]]:
        """Yield the batches left of an epoch, with their stream and [pass over it, batches of this pass so far].

        Whatever is drawn for a batch follows from its place, so that a run may go on at any.
        """

    @abstractmethod
    def loss(self, stream: str, batch: Batch, progress: float) -> Tensor:
        """Return the loss of a batch, a scalar; `progress` is the share of the steps that are done."""

    def after_backward(self, step: int) -> None:  # noqa: B027
        """Look at the gradients of a step before it is made."""

    def follow(self) -> None:  # noqa: B027
        """Called after each step of the optimiser."""

    def step_metrics(self) -> dict[str, float]:
        """Return metrics for a step event, beside loss and rate."""
        return {}

    @abstractmethod
    def end_epoch(self, at: Position) -> dict[str, float]:
        """Return the metrics of an epoch; the last one if `at.done`."""

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Return a warning that these metrics give reason for, or None."""
        return None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the run changes, by their names in a checkpoint."""

    def state(self) -> dict[str, Any]:
        """Return the rest of the run's state, as JSON values."""
        return {"unreadable": {name: sorted(examples.unreadable) for name, examples in self._splits()}}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` and `tensors` gave; tensors of the run itself are in place already."""
        for name, examples in self._splits():
            if not set(state["unreadable"][name]) <= set(range(len(examples.rows))):
                raise ValueError(f"unreadable rows of {name!r} beyond {len(examples.rows)}")
            examples.unreadable.update(state["unreadable"][name])

    def _splits(self) -> Iterator[tuple[str, Examples]]:
        for name, one in self.data.items():
            for split, examples in one.splits.items():
                yield f"{name}/{split}", examples

    def autocast(self) -> Any:
        """Return the context of a forward pass in the precision of the settings."""
        dtype = DTYPES[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def train(self, folder: RunFolder, longer: bool = False) -> Position:
        """Make the steps that are left; return where the run ended. `longer`: there may be more of them than before.

        The folder is opened; without a path nothing is kept, and signals are left alone.
        """

        def asked(number: int) -> None:
            self.asked.append(number)
            if number == signal.SIGINT:
                folder.tell(at.event("warning", warning=INTERRUPTED))

        self.folder, self.written = folder, time.monotonic()
        if folder.resume:
            at = self.resume(longer)
        else:
            at = Position(self.steps)
            self.start()
        folder.tell(at.event("begin"))  # something is seen at once
        with nullcontext() if folder.path is None else on_signal(asked, signal.SIGINT):
            while not at.done:
                over = self._epoch(at)
                at.done = not over or at.epoch + 1 == self.epochs
                at.metrics = {"train_loss": at.loss / at.count, **self.end_epoch(at)}
                folder.write(at.event("epoch", **at.metrics))
                warning = self.warning(at.metrics)
                if warning is not None:
                    folder.write(at.event("warning", warning=warning))
                if over:  # one that the last step cut short goes on where a longer run does
                    at.epoch, at.batches, at.loss, at.count = at.epoch + 1, {}, 0.0, 0
                self._checkpoint(at, at.done or (folder.seconds is None and folder.steps is None))
        return at

    def _epoch(self, at: Position) -> bool:
        """Make the steps of an epoch that are left; return False if the last step of the run cut it short."""
        accelerator, optimizer, config = self.accelerator, self.optimizer, self.config
        accelerator.step = 0  # of a batch that was left over nothing is kept
        for parameter in self.trained:
            parameter.grad = None
        started, before = time.monotonic(), at.step
        told = started
        for stream, place, batch in self.batches(at):
            if at.step == self.steps:
                return False
            for group, (_, peak) in zip(optimizer.param_groups, self.groups.values(), strict=True):
                group["lr"] = peak * learning_rate(config, at.step, self.steps)
            with accelerator.accumulate(self.module):
                with self.autocast():
                    loss = self.loss(stream, batch, at.step / max(self.steps - 1, 1))
                value = float(loss.detach())
                if not math.isfinite(value):
                    rates = ", ".join(f"{name} {rate}" for name, (_, rate) in self.groups.items())
                    raise TrainingError(
                        f"the loss{f' of {stream!r}' if len(self.data) > 1 else ''} is {value} at step {at.step + 1} "
                        f"of {self.steps}; lower the learning rates ({rates}), or clip gradients; the last checkpoint "
                        f"is kept"
                    )
                accelerator.backward(loss)  # divides by `accumulate`
                self.after_backward(at.step)
                if config.clip is not None and accelerator.sync_gradients:
                    if accelerator.scaler is not None:
                        accelerator.scaler.unscale_(optimizer.optimizer)
                    accelerator.clip_grad_norm_(self.trained, config.clip)
                optimizer.step()
                optimizer.zero_grad()
            at.loss, at.count, at.batches[stream] = at.loss + value, at.count + 1, place
            if accelerator.sync_gradients:
                at.step += 1
                self.follow()
                if at.step % LOG_EVERY == 0 or at.step == self.steps:
                    left = (time.monotonic() - started) / (at.step - before) * (self.steps - at.step)
                    rate = float(optimizer.param_groups[0]["lr"])
                    self.folder.write(at.event("step", loss=value, lr=rate, **self.step_metrics(), seconds_left=left))
                    told = time.monotonic()
                elif time.monotonic() - told >= SECONDS:
                    self.folder.tell(at.event("step", loss=value))
                    told = time.monotonic()
                self.after_step(at)
        if at.count == 0:
            raise TrainingError(f"no example of the training split could be read in epoch {at.epoch + 1}")
        return True

    def after_step(self, at: Position) -> None:
        """Write a checkpoint if one is due."""
        seconds, every = self.folder.seconds, self.folder.steps
        due = every is not None and at.step % every == 0
        self._checkpoint(at, due or (seconds is not None and time.monotonic() - self.written >= seconds))

    def _checkpoint(self, at: Position, due: bool) -> None:
        """Write a checkpoint if it is due, or a signal asked for the end; in that case raise StoppedError.

        After Ctrl-C that is KeyboardInterrupt.
        """
        stop, accelerator, path = bool(self.asked), self.accelerator, self.folder.checkpoint
        if accelerator.num_processes > 1:  # all stop at the same step
            if stop:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
        if (due or stop) and path is not None and accelerator.is_main_process:
            save_checkpoint(path, self.tensors(), self.optimizer, self._facts(at))
            self.written = time.monotonic()
        if stop:
            accelerator.wait_for_everyone()  # nobody ends the others while one writes
            number = self.asked[0] if self.asked else signal.SIGTERM
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise StoppedError(
                f"{signal.Signals(number).name} stopped the training at step {at.step} of {at.steps}; train again with "
                f"resume (--resume) to go on from the checkpoint in {self.folder.path}",
                number,
            )

    def _facts(self, at: Position) -> dict[str, Any]:
        """Return the facts of a checkpoint, beside its tensors."""
        scaler = self.accelerator.scaler
        run = {**self.facts, "base": self.base.digest}
        scaled = None if scaler is None else scaler.state_dict()
        return {**asdict(at), "run": run, "more": self.state(), "scaler": scaled, "log": self.folder.size()}

    def resume(self, longer: bool = False) -> Position:
        """Put the run where its checkpoint left off; all of that is compared with what the run would write itself."""
        path = self.folder.checkpoint
        assert path is not None
        tensors, facts = load_checkpoint(path)
        example = self._facts(Position(0, batches={"": [0, 0]}, metrics={"": 0.0}, extended=[""]))
        ours, there = example["run"], facts.get("run")
        settings = {name: one for name, one in ours.pop("config").items() if not longer or name not in LENGTH}
        other = differing(ours, there) + differing(settings, there.get("config") if isinstance(there, dict) else None)
        if other:
            raise StateError(
                f"the checkpoint in {path.parent} belongs to another run: {', '.join(other)} differ; resume with the "
                f"same settings, data and backbone, or choose another folder"
            )
        check_like(path, "facts", {**facts, "run": None}, {**example, "run": None, "optimizer": [0]})
        at = Position(**{one.name: facts[one.name] for one in fields(Position)})
        if self.steps < at.steps:
            raise StateError(
                f"the run in {path.parent} has made {at.step} of {at.steps} steps, and {self.steps} are asked for "
                f"now; give at least as many, or choose another folder"
            )
        restore(path, tensors, self.tensors(), self.optimizer, facts["optimizer"])
        try:
            self.restore(facts["more"], tensors)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, f"its budget, objective or unreadable rows do not fit: {error}") from None
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.folder.rewind(facts["log"], at.step)
        if self.steps > at.steps:
            said = f"resumed at step {at.step} of {at.steps} with {self.steps} steps"
            at.extended, at.steps, at.done = [*at.extended, said], self.steps, False
            self.folder.write(at.event("resumed", resumed=said))
        return at
