"""Contract of a training objective.

An objective is a class in a file of this folder. Its constructor makes `self.module`, which holds the backbone and all
that is trained or remembered beside it. `loss` maps a batch to a scalar. Everything else has a default. One with
`supervised` is a task: it says too how rows become inputs and targets, and how well a network does on them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ...backbone.load import Backbone
from ...backbone.model import Head
from ...errors import ConfigError, DataError, UnknownNameError
from ...registry import Options, Registry, make_options
from ..config import TrainConfig
from ..data.base import Data, EpochSampler, Examples, find_input, find_label, loader, read_labels, readable
from ..stored import recalibrate

SELF_SUPERVISED = "self-supervised"  # stands for the objective without labels for the backbone's task
SUPERVISED = "supervised"  # stands for the one with labels


class Objective(ABC):
    """A training objective: a loss, and the data that it is for.

    Attributes:
        tasks: of backbones that it is for. needs_labels: reads labels, or other targets.
        supervised: is meant by the name "supervised" for its tasks.
        least_classes: that the data must have, if it needs labels. trains_head: which settings of a head are for.
        figure: name, of `FIGURES`, of what `evaluate` measures of a split; what runs are compared by.
        options_class: of its options; `self.options` is made of `config.objective_options`.
        augments: training images are augmented by the settings; False if it makes its own views.
        self_supervised: is meant by the name "self-supervised" for its tasks.
        other_inputs: training sees other inputs than whole images, so BatchNorm statistics are always taken anew.
        fresh: tensors of `module`, by name, that a run started from another one's end does not take over.
        module: the backbone and all that is trained or remembered beside it. Its trained tensors and buffers are in
            checkpoints.
    """

    id: ClassVar[str]
    reference: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    needs_labels: ClassVar[bool]
    supervised: ClassVar[bool] = False
    least_classes: ClassVar[int] = 2
    trains_head: ClassVar[bool] = False
    figure: ClassVar[str] = "accuracy"
    options_class: ClassVar[type[Any]] = Options
    augments: ClassVar[bool] = True
    self_supervised: ClassVar[bool] = False
    other_inputs: ClassVar[bool] = False
    fresh: ClassVar[tuple[str, ...]] = ()
    module: nn.Module
    options: Any

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        self.backbone, self.data, self.config = backbone, data, config
        assert data.train is not None  # as `check_data` found
        self.rows = data.train
        self.options = make_options(self.options_class, f"the objective {self.id!r}", config.objective_options)

    @classmethod
    def columns(
        cls, features: Mapping[str, Any], column: str | None, label: str | None, task: str | None
    ) -> tuple[str, str | None]:
        """Return the columns of inputs and of targets, None if there are none: those given, or those found."""
        label = label or find_label(features)
        return column or find_input(features, label, "words" if task == "token-classification" else "text"), label

    @classmethod
    def targets(
        cls, rows: Any, column: str | None, names: Sequence[str] | None, split: str
    ) -> tuple[list[Any], tuple[str, ...]]:
        """Return the target of each row, and the class names: `names`, or those of these rows."""
        return read_labels(rows, column, names, split)

    @classmethod
    def prepared(cls, backbone: Backbone, data: Data) -> tuple[Backbone, Data]:
        """Return backbone and data as the objective takes them, as with texts cut into blocks."""
        return backbone, data

    @classmethod
    def measured(cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int) -> dict[str, Any]:
        """Return the figure of a backbone that has an adapter loaded; `head` is the adapter's."""
        raise ConfigError(f"the objective {cls.id!r} is no task, and measures nothing")

    def start(self) -> None:  # noqa: B027
        """Prepare for the first epoch of a new run; the scores are attached."""

    def batches(self, examples: Examples, sampler: EpochSampler | None = None) -> Any:
        """Return a loader: for training augmented and in the sampler's order, else all examples as they are."""
        return self.load(examples, sampler=sampler, augment=self.config.augment if sampler is not None else "none")

    def load(self, examples: Examples, **options: Any) -> Any:
        """Return a loader with the backbone's preprocessing; `options` are those of `data.base.loader`."""
        own = {"batch_size": self.config.batch_size, "workers": self.config.workers, **options}
        return loader(examples, self.backbone.preprocess, self.backbone.tokenizer, **own)

    def scores(self) -> list[nn.Parameter]:
        """Return scores outside of the body; they learn at the rate of the body's."""
        return []

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters trained beside the scores."""
        return []

    def begin_epoch(self, epoch: int, epochs: int) -> None:  # noqa: B027
        """Called before each epoch, 0 to epochs - 1."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Return the loss of one batch (inputs, labels), a scalar. `module` is `self.module`, perhaps wrapped."""

    def after_backward(self, step: int) -> None:  # noqa: B027
        """Called between the backward pass and the optimiser step, from 0."""

    @property
    def network(self) -> nn.Module:
        """The part of `module` that computes from a batch as it is loaded."""
        return self.module

    def recalibrate(self) -> None:
        """Take BatchNorm statistics anew, of whole training inputs in the network that will be stored."""
        recalibrate(self.network, readable(self.load(self.rows)))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors gathered for `metrics`, for checkpoints within an epoch."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Continue from a `state`."""

    def metrics(self) -> Mapping[str, float]:
        """Return measures of the epoch that ends, beside its loss."""
        return {}

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Return a warning that these metrics give reason for, or None."""
        return None

    def evaluate(self, examples: Examples) -> Mapping[str, float]:
        """Return measures of a held-out split under the current masks."""
        return {}

    def baseline(self) -> Mapping[str, float]:
        """Return the figures to beat on the splits held out, "SPLIT_BASELINE_FIGURE"; the backbone is as it was."""
        return {}

    def settle(self) -> bool:
        """Put the values of a head that will be stored into it; return True if that changed any."""
        return False

    def head(self) -> Head | None:
        """Return the trained head to store beside the mask, or None."""
        return None


OBJECTIVES: Registry[Objective] = Registry("objective", "maskpack.training.objectives")


def find_objective(name: str, task: str) -> type[Objective]:
    """Return the objective with this id; "supervised" and "self-supervised": that with or without labels for a task."""
    if name == SELF_SUPERVISED:
        without = [cls for cls in OBJECTIVES.all() if cls.self_supervised and task in cls.tasks]
        if not without:
            raise ConfigError(f"there is no objective without labels for {task}; leave it out")
        return without[0]
    if name == SUPERVISED:
        return next(cls for cls in OBJECTIVES.all() if cls.supervised and task in cls.tasks)
    try:
        cls = OBJECTIVES[name]
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; {SELF_SUPERVISED!r} is the one without labels for the backbone") from None
    if task not in cls.tasks:
        raise ConfigError(f"the objective {name!r} is for {' and '.join(cls.tasks)}, the backbone for {task}")
    return cls


def check_data(data: Data, backbone: Backbone, cls: type[Objective]) -> Examples:
    """Return the training split, or raise DataError if it does not suit the backbone or the objective."""
    if data.train is None:
        raise DataError(f"the data {data.id!r} have no training split")
    if data.task != backbone.task:
        raise DataError(f"the data {data.id!r} are for {data.task}, the backbone {backbone.id} for {backbone.task}")
    classes = len(data.class_names)
    if cls.needs_labels and classes < min(1, cls.least_classes):
        raise DataError(
            f"the data {data.id!r} have no labels, which the objective {cls.id!r} needs; name their column, or take "
            f"the objective {SELF_SUPERVISED!r}"
        )
    if cls.needs_labels and classes < cls.least_classes:
        raise DataError(f"the data {data.id!r} have one class, {data.class_names[0]!r}; at least two are needed")
    return data.train
