"""A run on one data set, train_mask, and train_dense."""

import math
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import FEATURES, About, Parts
from ..adapter.notebook import summary
from ..backbone.classifier import Batch
from ..backbone.load import Backbone
from ..backbone.model import Embedding, Fingerprint, find_head
from ..errors import ConfigError, TrainingError, check_argument
from ..preprocess import preprocess_to_json
from .budget import coded_bytes, rate_control
from .config import TrainConfig
from .data.base import Data, EpochSampler, Examples, draw_seed, empty_classes, numbered, readable
from .features import beside_baseline, worth
from .learn import Learn, base_of, borrowed, convolutions, lay_out, learn_scores, masked_sizes
from .loop import Position, Run
from .objectives.base import check_data, find_objective
from .own_loop import learned_parts
from .progress import shown
from .run_folder import FILE, MODEL, OBJECTIVE, RunFolder, RunOptions, checkpoint_digest, take_over
from .scores import beside_scores, density, detach_scores, scored_models, scored_weights, without_scores
from .stored import beside_masks, set_train_mode, settle, shortened

STREAM = "train"  # of batches


class ObjectiveRun(Run):
    """A run of an objective on one data set.

    `learn` returns what learns at the rate of scores, by name, and may put modules into the frozen backbone.
    `start_from` is the folder of a finished run, with whose tensors this one starts.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Data,
        config: TrainConfig,
        learn: Learn = learn_scores,
        start_from: str | Path | None = None,
    ):
        sizes = masked_sizes(config, backbone)
        config = config.resolved(*sizes, backbone.task)
        objective = find_objective(config.objective, backbone.task)
        check_data(data, backbone, objective)
        backbone, data = objective.prepared(backbone, data)
        super().__init__(backbone, {"data": data}, config)
        self.train_split: Examples = check_data(data, backbone, objective)
        if config.head_kind != "linear" and not objective.trains_head:
            raise ConfigError(
                f"head_kind {config.head_kind!r} is for a head, and the objective {config.objective!r} trains none; "
                f"leave it out"
            )
        self.start_from = None if start_from is None else Path(start_from) / FILE
        self.facts = {
            "start": None if self.start_from is None else checkpoint_digest(self.start_from),
            "config": config.to_json(),
            "data": [data.digest, len(self.train_split), len(data.class_names)],
            "tokens": getattr(backbone.preprocess, "max_length", None),
            "processes": self.accelerator.num_processes,
        }
        model = backbone.model.to(self.device)
        self.before = beside_masks(model)
        # those of a model that has another layout keep it
        self.contiguous = all(one.is_contiguous() for one in convolutions(model))
        if self.contiguous:
            lay_out(model, torch.channels_last)
        self.objective = objective(backbone, data, config)
        model.requires_grad_(False)
        self.scores = learn(backbone, config)
        self.scored = [one for name, one in scored_weights(model).items() if name in self.scores]
        self.control = rate_control(config, self.scored)
        learns = all(one.method.learns for one in self.scored)
        learned = [one for one in self.scores.values() if learns and one.numel()]
        scores = [*learned, *self.objective.scores()]
        head, beside = self.objective.trained(), list(beside_scores(model).values())
        if not scores and not head and not beside:
            raise ConfigError(
                f"nothing would learn: the method {config.method!r} follows from the weights, and no head is trained "
                f"beside it; take another method, or head_kind 'linear' with labels"
            )
        self.sampler = EpochSampler(len(self.train_split), config.seed)
        batches = self.objective.batches(self.train_split, self.sampler)
        for parameter in (*scores, *head, *beside):
            parameter.requires_grad_(True)  # before DistributedDataParallel looks
        self.module, self.loader = self.accelerator.prepare(self.objective.module, batches)
        per_epoch = math.ceil(len(self.loader) / config.accumulate)
        lr = config.score_lr(config.steps or config.epochs * per_epoch, sizes[0], backbone.task)
        rates = {"scores": (scores, lr), "head": (head, config.linear_lr), "train": (beside, config.beside_lr)}
        self.prepare(rates, per_epoch, config.steps)
        self.models = scored_models(self.objective.module)
        for one in self.models:
            one.batch_size = config.batch_size * config.accumulate * self.accelerator.num_processes

    def start(self) -> None:
        self.objective.start()
        if self.start_from is not None:
            self.take_over(self.start_from, self.objective.fresh)

    def take_over(self, checkpoint: Path, fresh: tuple[str, ...] = ()) -> None:
        """Begin with the state that another run ended with, except for the tensors called `fresh`."""
        take_over(self.tensors(), checkpoint, self.base.digest, fresh)

    def batches(self, at: Position) -> Iterator[tuple[str, list[int], Batch]]:
        self.sampler.epoch = at.epoch
        set_train_mode(self.module, self.config.bn == "adapt")
        self.objective.begin_epoch(at.epoch, self.epochs)
        read = at.batches.get(STREAM, [0, 0])[1]
        loader = self.accelerator.skip_first_batches(self.loader, read) if read else self.loader
        for number, batch in numbered(loader):
            place = read + number
            torch.manual_seed(draw_seed(self.config.seed, at.epoch, place, self.accelerator.process_index))
            yield STREAM, [0, place], batch

    def loss(self, stream: str, batch: Batch, progress: float) -> Tensor:
        self._tell(progress)
        loss = self.objective.loss(self.module, batch)
        found = [penalty for model in self.models for one in model.members if (penalty := one.penalty()) is not None]
        found += [] if self.control is None else [self.control.penalty()]
        return loss + torch.stack(found).sum() if found else loss

    def _tell(self, share: float) -> None:
        """Tell the scores which share of the steps is done."""
        for model in self.models:
            model.progress = share

    def after_backward(self, step: int) -> None:
        self.objective.after_backward(step)

    def follow(self) -> None:
        if self.control is not None:
            self.control.follow()

    def step_metrics(self) -> dict[str, float]:
        return {"density": density(self.scored)} if self.scored else {}

    def end_epoch(self, at: Position) -> dict[str, float]:
        size = dict[str, float]()
        if self.control is not None:  # the last epoch ends within the budget
            size = {"mask_bytes": self.control.fit() if at.done else self.control.compare()}
        if at.done and self.scored:
            masks = [one.mask() for one in self.scored]
            changed = sum(math.prod(one.shape) - one.kept for one in masks)
            size["bits_per_changed_weight"] = 8 * coded_bytes(masks) / max(changed, 1)
        hardens = any(one.method.hardens for one in self.scored)
        if at.done and self.config.bn == "adapt" and (self.objective.other_inputs or hardens or self.control):
            # BatchNorm saw other inputs or another network than it will
            with self.autocast():
                self.objective.recalibrate()
        return {**self.step_metrics(), **size, **self.objective.metrics(), **self.held_out("validation")}

    def held_out(self, split: str) -> dict[str, float]:
        """Return the objective's figures on a split, if there is one."""
        examples = self.data["data"].splits.get(split)
        if examples is None:
            return {}
        with self.autocast():
            return {f"{split}_{name}": value for name, value in self.objective.evaluate(examples).items()}

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        return self.objective.warning(metrics)

    def tensors(self) -> dict[str, Tensor]:
        module = self.objective.module
        found = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        found |= dict(module.named_buffers())
        kept = {OBJECTIVE + name: tensor for name, tensor in self.objective.state().items()}
        return {MODEL + name: tensor for name, tensor in sorted(found.items())} | kept

    def state(self) -> dict[str, Any]:
        return {**super().state(), "control": None if self.control is None else self.control.state()}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().restore(state, tensors)
        if self.control is not None:
            self.control.restore(state["control"])
        kept = {name.removeprefix(OBJECTIVE): one for name, one in tensors.items() if name.startswith(OBJECTIVE)}
        self.objective.restore(kept)

    def settle(self) -> bool:
        """Put the values that will be stored into the network; return True if that changed any.

        That comes behind the last checkpoint: a longer run goes on from what was learned.
        """
        self._tell(1.0)
        model = self.backbone.model
        changed = settle(model, self.before, beside_scores(model), self.config.store)
        return self.objective.settle() or changed

    def finish(self, at: Position) -> dict[str, float]:
        """Measure the test split; log the end, and return all metrics."""
        self._tell(1.0)
        if self.contiguous:
            lay_out(self.backbone.model, torch.contiguous_format)  # as who loads the adapter computes
        metrics = {**at.metrics, **self.held_out("test")}
        if self.scored:
            with without_scores(self.module):
                test = self.held_out("test")
            metrics |= {f"{name}_without_masks": value for name, value in test.items()}
        self.folder.write({"event": "end", "step": at.step, "steps": self.steps, **metrics})
        return metrics

    def parts(self) -> Parts:
        """Return the trained parts, and detach the scores."""
        model = self.backbone.model
        head, parts = self.objective.head(), shortened(learned_parts(model), model, self.before)
        detach_scores(model)
        return replace(parts, head=head)


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """The result of a training, ready for `save_adapter(path, result.parts, result.base, result.about)`.

    `metrics` are train_loss, density, and what the objective measures of the splits that exist; of the test split also
    without the masks; and the figures that the raw backbone has, as the accuracy of its linear probe.

    Example:
        result = train_mask(backbone, data, TrainConfig(steps=10))
        print(result.metrics["test_accuracy"], result.parts)
    """

    parts: Parts
    base: Fingerprint
    about: About
    metrics: dict[str, float]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{type(self).__name__}({self.parts!r}, base {self.base.id!r}, {shown})"

    def _repr_html_(self) -> str:
        masks = self.parts.masks
        return summary(type(self).__name__, asdict(self.base), asdict(self.about), {"": (masks.total, masks.kept)})


def result_of(
    run: Run,
    data: Data,
    config: TrainConfig,
    parts: Parts,
    base: Fingerprint,
    metrics: Mapping[str, float],
    more: Mapping[str, Any],
) -> TrainResult:
    """Return the result of a run on these data; `base` is of the whole body, `more` is for the training record."""
    assert data.train is not None
    record = {
        "settings": config.to_json(),
        "processes": run.accelerator.num_processes,
        "steps": run.steps,
        **more,
        "data": {
            "id": data.id,
            "source": data.source,
            "digest": data.digest,
            "rows": {name: len(split) for name, split in data.splits.items()},
            "unreadable": sum(len(split.unreadable) for split in data.splits.values()),
            "empty_classes": empty_classes(data.train, data.class_names),
        },
        "versions": {"maskpack": version("maskpack"), "torch": torch.__version__, "python": platform.python_version()},
        "metrics": dict(metrics),
    }
    alone = FEATURES.get(data.task, data.task)  # without a head
    task, class_names = (data.task, data.class_names) if parts.head is not None else (alone, None)
    about = About(task, class_names, preprocess_to_json(run.backbone.preprocess), record)
    masked = Fingerprint(**{**asdict(base), "tensors": {name: base.tensors[name] for name in parts.masks}})
    return TrainResult(parts, masked, about, dict(metrics))


def as_backbone(model: Backbone | nn.Module, config: object, *data: object) -> Backbone:
    """Return a backbone, or any module that gives logits for images as one; ConfigError if an argument is wrong."""
    advice = f"load it: load_backbone({model!r})" if isinstance(model, str) else "it comes before the data"
    check_argument("the model", model, Backbone | nn.Module, "a Backbone or a torch.nn.Module", advice)
    for one in data:
        advice = f"load them: load_data({str(one)!r})" if isinstance(one, str | Path) else "load_data gives them"
        check_argument("the data", one, Data, "data from load_data", advice)
    check_argument("config", config, TrainConfig, "a TrainConfig", "make one: TrainConfig(steps=200)")
    if isinstance(model, Backbone):
        return model
    return Backbone(model, type(model).__name__, embedding=Embedding(find_head(model)))


@shown
def train_mask(
    model: Backbone | nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    start_from: str | Path | None = None,
    longer: bool = True,
    learn: Learn = learn_scores,
    **options: Unpack[RunOptions],
) -> TrainResult:
    """Train a mask on a frozen backbone.

    Args:
        model: from `load_backbone`, or any module that gives logits for images; its tensors have the same bits
            afterwards.
        data: from `load_data`. The test split is only read after the last step.
        start_from: `output` of a finished run on the same backbone, with whose scores, head and statistics this one
            starts; the optimiser starts afresh.
        longer: `epochs` or `steps` may be greater than those of the run that is resumed. False: that is an error.
        learn: attaches what is trained as scores, and returns it; the default does what `config` says.
        options: `output`, `resume`, `checkpoint_every` and `report`: see `run_folder.RunOptions`.

    Raises:
        TrainingError: if the loss is not finite, or no example of an epoch can be read.
        StateError: if the checkpoint is damaged or belongs to another run, `output` has one and `resume` is not asked
            for, or another run writes into it.
        StoppedError: after SIGTERM or SIGUSR1, at the next optimiser step, when the checkpoint is written; so does
            KeyboardInterrupt after Ctrl-C. Only with `output`, in the main thread; a second signal is not waited for.
        SelectionError, DataError: if patterns or data do not fit the backbone.

    Example:
        result = train_mask(backbone, load_data("digits:0-1"), TrainConfig(steps=10))
        save_adapter("./digits", result.parts, result.base, result.about)
    """
    config, folder = TrainConfig() if config is None else config, RunFolder(options)
    backbone = as_backbone(model, config, data)
    with folder.opened():
        with borrowed(backbone, norms=True):
            run = ObjectiveRun(backbone, data, config, learn, start_from)
            at = run.train(folder, longer)
            if run.settle():
                at.metrics = {**at.metrics, **run.held_out("validation")}
            metrics = run.finish(at)
            parts = run.parts()
        with borrowed(backbone):
            backbone.model.to(run.device)
            metrics = beside_baseline(metrics, run.objective.baseline())
        scores = sum(one.numel() for one in run.scores.values())
        record = worth(metrics, [mask.shape for mask in parts.masks.values()], scores > 0)
        for one in record.get("warnings", ()):
            folder.write(at.event("warning", warning=one))
    if base_of(backbone).digests != run.base.digests:
        raise TrainingError(
            "the backbone's tensors changed during training: its forward pass changes them, or this is a defect of "
            "maskpack; report it"
        )
    rates = {name: lr for name, (learning, lr) in run.groups.items() if learning}
    more = {"scores": scores, "rates": rates, **record, **({"extended": at.extended} if at.extended else {})}
    return result_of(run, data, run.config, parts, run.base, metrics, more)


def train_dense(
    backbone: Backbone, data: Data, config: TrainConfig, learn: Learn, **options: Unpack[RunOptions]
) -> ObjectiveRun:
    """Train a head and what `learn` names of a backbone, at the rate of scores. The backbone is changed.

    Args:
        learn: gets the frozen backbone with its new head, and the settings; returns the parameters that learn. It may
            put modules into the model, as LoRA does.

    Returns:
        The run, whose `objective.module` is the network, in evaluation mode.
    """
    folder = RunFolder(options)
    with folder.opened():
        run = ObjectiveRun(backbone, data, config, learn)
        run.finish(run.train(folder))
    run.objective.module.eval()
    return run


def process_memory() -> tuple[int, int]:
    """Return the process's resident bytes, now and at most; on a system without /proc, at most and at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage: a process that was started from a great one inherits that one's peak there
        kilobytes = dict(line.split(":") for line in status.read_text().splitlines() if line.startswith("Vm"))
        return int(kilobytes["VmRSS"].split()[0]) << 10, int(kilobytes["VmHWM"].split()[0]) << 10
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def plan_training(backbone: Backbone, data: Data, config: TrainConfig) -> dict[str, Any]:
    """Check a run without training: build everything, run one batch forward and backward; return its plan."""
    with borrowed(backbone):
        run = ObjectiveRun(backbone, data, replace(config, head_start="plain"))  # no pass over all rows
        batch = next(readable(run.loader), None)
        if batch is None:
            raise TrainingError("no example of the training split can be read")
        loss = run.objective.loss(run.module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        how = backbone.preprocess
        return {
            "backbone": backbone.id,
            "parameters": len(run.scores),
            "weights": sum(math.prod(one.shape) for one in run.scored),
            "classes": len(data.class_names),
            **{split: len(data.splits.get(split, ())) for split in ("train", "validation", "test")},
            "epochs": run.epochs,
            "steps": run.steps,
            "input": how.kind,
            "size": getattr(run.backbone.preprocess, "size", None)
            or getattr(run.backbone.preprocess, "max_length", None),
            "device": str(run.device),
            "precision": config.precision,
            "memory": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else process_memory()[1],
            "loss": float(loss.detach()),
        }
