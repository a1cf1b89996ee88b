"""The contract of an objective, and measures of collapsing representations."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...backbone.load import Backbone
from ...backbone.model import Head
from ...errors import ConfigError, DataError, UnknownNameError
from ...registry import Registry
from ..batchnorm import recalibrate
from ..config import TrainConfig
from ..data.base import Data, EpochSampler, Examples, loader, readable

KEPT = 1024  # rows of features that the rank is taken of
LEAST_USAGE, LEAST_RANK = 0.5, 2.0


class CollapseWatch:
    """Collects an epoch's features, and which prototype each is nearest to.

    Args:
        prototypes: their number, or 0 if the objective has none.
    """

    def __init__(self, prototypes: int = 0):
        self.used = torch.zeros(prototypes, dtype=torch.int64)
        self.rows: deque[Tensor] = deque()

    def add(self, features: Tensor, scores: Tensor | None = None) -> None:
        """Note a batch: features (N, D) of the backbone, and prototype scores (N, K)."""
        self.rows.append(features.detach().float().cpu())
        while sum(len(rows) for rows in self.rows) - len(self.rows[0]) >= KEPT:
            self.rows.popleft()
        if scores is not None:
            self.used += torch.bincount(scores.detach().argmax(-1).cpu(), minlength=len(self.used))

    def state(self) -> dict[str, Tensor]:
        """Return what was noted since the last metrics."""
        lengths = torch.tensor([len(rows) for rows in self.rows], dtype=torch.int64)
        rows = torch.cat(list(self.rows)) if self.rows else torch.zeros(0, 0)
        return {"used": self.used.clone(), "lengths": lengths, "rows": rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.used.copy_(state["used"])
        self.rows = deque(torch.split(state["rows"], state["lengths"].tolist()))

    def metrics(self) -> dict[str, float]:
        """Return `feature_rank` and, with prototypes, `prototype_usage`, and begin again.

        `feature_rank` is the exponential of the entropy of the features' singular values (RankMe, arXiv 2210.02885):
        1 if all features are alike up to length, at most D. `prototype_usage` is the entropy of how often each
        prototype is the nearest, over its greatest value: 0 if one takes all, 1 if all are used alike, or, by fewer
        images than prototypes, no one twice.
        """
        found = {"feature_rank": _effective(torch.linalg.svdvals(torch.cat(list(self.rows)).double()))}
        if len(self.used):
            most = min(len(self.used), int(self.used.sum()))
            found["prototype_usage"] = math.log(_effective(self.used)) / math.log(most) if most > 1 else 1.0
        self.used.zero_()
        self.rows.clear()
        return found


def _effective(amounts: Tensor) -> float:
    """The exponential of the entropy of shares."""
    shares = amounts.double() / amounts.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


def collapse_warning(metrics: Mapping[str, float]) -> str | None:
    """Return what to say if the metrics show a collapse, or None."""
    usage, rank = metrics.get("prototype_usage", 1.0), metrics["feature_rank"]
    if usage >= LEAST_USAGE and rank >= LEAST_RANK:
        return None
    if "prototype_usage" not in metrics:
        return (
            f"the representation is collapsing (feature rank {rank:.1f}; healthy is over {LEAST_RANK:.0f}); lower the "
            f"learning rate of the scores"
        )
    return (
        f"the representation is collapsing (prototype usage {usage:.2f}, feature rank {rank:.1f}; healthy are over "
        f"{LEAST_USAGE} and {LEAST_RANK:.0f}); lower the learning rate of the scores, or use more prototypes"
    )


SELF_SUPERVISED = "self-supervised"  # the objective without labels for the backbone's task


class Objective(ABC):
    """What the scores are trained on.

    Attributes:
        module: what is trained: the backbone with what the objective needs beside it. Every trained tensor and every
            buffer of it is kept in checkpoints.
        augments: its training images are augmented as the settings say; False where it makes views of its own.
        self_supervised: it is what the name "self-supervised" stands for, for backbones of its tasks.
        other_inputs: training sees other inputs than whole images, so that BatchNorm statistics are always taken anew.
        fresh: names of tensors of `module` that a run which starts from another one's end does not take over.
    """

    id: ClassVar[str]
    reference: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    needs_labels: ClassVar[bool]
    augments: ClassVar[bool] = True
    self_supervised: ClassVar[bool] = False
    other_inputs: ClassVar[bool] = False
    fresh: ClassVar[tuple[str, ...]] = ()
    module: nn.Module

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        self.backbone, self.data, self.config = backbone, data, config

    def start(self) -> None:  # noqa: B027
        """Prepare for the first epoch of a new run; the scores are attached."""

    def batches(self, examples: Examples, sampler: EpochSampler | None = None) -> Any:
        """Return a loader: augmented and in the sampler's order for training, plain and whole without a sampler."""
        return self.load(examples, sampler=sampler, augment=self.config.augment if sampler is not None else "none")

    def load(self, examples: Examples, **options: Any) -> Any:
        """Return a loader with the backbone's preprocessing; `options` are those of `data.batches.loader`."""
        return loader(
            examples,
            self.backbone.preprocess,
            self.backbone.tokenizer,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            **options,
        )

    def scores(self) -> list[nn.Parameter]:
        """Return scores outside of the body, which learn at the rate of the body's."""
        return []

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Return the tensors trained beside the scores."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:  # noqa: B027
        """Note that an epoch begins, 0 to epochs - 1."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Return the loss of one batch, a scalar. `module` is `self.module`, perhaps wrapped."""

    def after_backward(self, step: int) -> None:  # noqa: B027
        """Look at the gradients of an optimiser step, the first of which is 0, before it is made."""

    @property
    def network(self) -> nn.Module:
        """What computes from a batch as it is loaded: the part of `module` with the backbone."""
        return self.module

    def recalibrate(self) -> None:
        """Take BatchNorm statistics anew, of whole training inputs in the network that will be stored.

        Called after the last epoch and before its metrics, where that is another one than was trained.
        """
        assert self.data.train is not None
        recalibrate(self.network, readable(self.load(self.data.train)))

    def state(self) -> dict[str, Tensor]:
        """Return what is kept for `metrics` so far, for checkpoints in the middle of an epoch."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on from what `state` gave."""

    def metrics(self) -> Mapping[str, float]:
        """Return what the epoch that ends shows beside its loss."""
        return {}

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        """Return what these metrics warn of, or None."""
        return None

    def evaluate(self, examples: Examples) -> Mapping[str, float]:
        """Return measures of a held-out split, with the masks as they are now."""
        return {}

    def head(self) -> Head | None:
        """Return the trained head that travels with the mask, or None."""
        return None


OBJECTIVES: Registry[Objective] = Registry("objective", "maskpack.training.objectives")


def find_objective(name: str, task: str) -> type[Objective]:
    """Return the objective called `name`, or for "self-supervised" the one without labels for this task.

    Raises:
        UnknownNameError: if there is no such objective. ConfigError: if it is not for this task.
    """
    if name == SELF_SUPERVISED:
        return next(cls for cls in OBJECTIVES.all() if cls.self_supervised and task in cls.tasks)
    try:
        cls = OBJECTIVES[name]
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; {SELF_SUPERVISED!r} is the one without labels for the backbone") from None
    if task not in cls.tasks:
        raise ConfigError(f"the objective {name!r} is for {' and '.join(cls.tasks)}, the backbone for {task}")
    return cls


def check_data(data: Data, backbone: Backbone, cls: type[Objective]) -> Examples:
    """Return the training split, if it suits the backbone and the objective.

    Raises:
        DataError: if it does not.
    """
    if data.train is None:
        raise DataError(f"the data {data.id!r} have no training split")
    if data.task != backbone.task:
        raise DataError(f"the data {data.id!r} are for {data.task}, the backbone {backbone.id} for {backbone.task}")
    if cls.needs_labels and not data.class_names:
        raise DataError(
            f"the data {data.id!r} have no labels, which the objective {cls.id!r} needs; name their column, or take "
            f"the objective {SELF_SUPERVISED!r}"
        )
    if cls.needs_labels and len(data.class_names) < 2:
        raise DataError(f"the data {data.id!r} have one class, {data.class_names[0]!r}; at least two are needed")
    return data.train
