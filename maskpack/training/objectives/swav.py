"""Multi-crop augmentation: several random views of an image, some large and some small (Caron et al., 2020)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from ...backbone.classifier import Classifier
from ...backbone.load import Backbone
from ...errors import ConfigError, require
from ...preprocess import ImagePreprocess
from ...registry import check_above_zero, make_options
from ..config import TrainConfig
from ..data.base import Data, EpochSampler, Examples
from .base import OBJECTIVES, CollapseWatch, Objective, collapse_warning

JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
BLUR = (0.1, 2.0)  # standard deviation in pixels


@dataclass(frozen=True)
class Crops:
    """Crops of one size.

    Attributes:
        count: views of each image. size: height and width in pixels.
        scale: least and greatest share of the image's area.
    """

    count: int
    size: int
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        if self.count < 0 or self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"{self.count} crops of {self.size} pixels and of {self.scale[0]} to {self.scale[1]} of the area are "
                f"not possible; expected a count of at least 0, a size of at least 1 and shares 0 < A <= B <= 1"
            )


def multi_crop(preprocess: ImagePreprocess, kinds: Sequence[Crops]) -> Callable[[Any], list[Tensor]]:
    """Return a function from a PIL image of any size and mode to its views, one tensor (count, 3, size, size) a kind.

    Every view on its own: a crop of random place, size and aspect, mirrored or not, with jittered colours (8 of 10),
    in grey (2 of 10), blurred (5 of 10); normalised as the backbone expects.
    """
    pillow = require("PIL.ImageFilter", "train", "reading images")  # first: torchvision needs it as well
    v2 = require("torchvision.transforms.v2", "train", "reading images")

    def blur(image: Any) -> Any:
        # Pillow's, as in the reference: torchvision's takes thirty times as long
        return image.filter(pillow.GaussianBlur(float(torch.empty(()).uniform_(*BLUR))))

    def augmented(kind: Crops) -> Any:
        return v2.Compose(
            [
                v2.RandomResizedCrop(kind.size, scale=kind.scale, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.Lambda(blur)], p=0.5),
                v2.ToImage(),
            ]
        )

    pipelines = [(kind.count, augmented(kind)) for kind in kinds if kind.count]
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)])

    def views(image: Any) -> list[Tensor]:
        image = image.convert("RGB")
        stacks = (
            torch.stack([torch.Tensor.as_subclass(one(image), Tensor) for _ in range(count)])
            for count, one in pipelines
        )
        return [finish(stack) for stack in stacks]

    return views


def stack_views(images: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the views of B images: for each kind (count * B, 3, size, size), the first view of all images first."""
    return [torch.stack(list(kind), dim=1).flatten(0, 1) for kind in zip(*images, strict=True)]


ASSIGNED = 2  # large views, from which targets are computed
LEAST_EPSILON = 0.005  # below, exponentials of float64 vanish


@dataclass(frozen=True)
class SwavOptions:
    """Options of the objective; the defaults are those of Self-Masking Networks, at 224 pixels.

    Attributes:
        prototypes: number of clusters. A few per class; too few collapse.
        dimension: of the projected features.
        temperature: of the predictions. epsilon, iterations: of the Sinkhorn algorithm that makes the targets.
        queue: features of earlier batches, per large view, that the targets are balanced over; 0 for none.
        queue_start: share of the epochs before the queue is filled.
        freeze_prototypes: optimiser steps in which the prototypes stay as they began.
        small_crops: views of each image beside the two large ones. small_size: their pixels; 0 for 3/7 of the large.
        large_least: least share of the image's area in a large view. small_least, small_most: of a small one.
    """

    prototypes: int = 500
    dimension: int = 128
    temperature: float = 0.1
    epsilon: float = 0.05
    iterations: int = 3
    queue: int = 512
    queue_start: float = 0.2
    freeze_prototypes: int = 313
    small_crops: int = 6
    small_size: int = 0
    large_least: float = 0.14
    small_least: float = 0.05
    small_most: float = 0.14

    def __post_init__(self) -> None:
        check_above_zero(self, "temperature", "epsilon")
        for name, least in (("prototypes", 2), ("dimension", 1), ("iterations", 1), ("queue", 0), ("small_size", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.epsilon < LEAST_EPSILON:
            raise ConfigError(f"epsilon must be at least {LEAST_EPSILON}, got {self.epsilon}")
        if not 0 <= self.queue_start <= 1 or self.freeze_prototypes < 0:
            raise ConfigError(
                f"queue_start must be from 0 to 1 and freeze_prototypes at least 0; got {self.queue_start} and "
                f"{self.freeze_prototypes}"
            )


class SwavNetwork(nn.Module):
    """Backbone -> linear projection -> unit sphere -> similarity to the prototypes, of several views.

    The queue holds earlier features of each large view, the newest first; rows of zeros are not filled yet.
    """

    queue: Tensor

    def __init__(self, classifier: Classifier, options: SwavOptions):
        super().__init__()
        self.classifier = classifier
        self.prototypes = nn.Linear(options.dimension, options.prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(ASSIGNED, options.queue, options.dimension))
        self.seen: Tensor | None = None
        classifier.linear.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0].detach()

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return projected features (N, dimension), prototype scores (N, prototypes), and what the backbone gave last.

        One forward pass for each size of view, as BatchNorm is to see them; N counts all views of all images.
        """
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))
        projected = torch.cat([self.classifier(one).float() for one in views])
        z = nn.functional.normalize(projected, dim=1)
        assert self.seen is not None
        return z, nn.functional.linear(z, self.prototypes.weight), self.seen


@OBJECTIVES.register
class Swav(Objective):
    """Predict the cluster of one view of an image from another view (SwAV); needs no labels.

    Args:
        backbone: its head is replaced by the projection until training ends; the adapter has neither.
    """

    id: ClassVar[str] = "swav"
    reference: ClassVar[str] = "https://arxiv.org/abs/2006.09882"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    needs_labels: ClassVar[bool] = False
    augments: ClassVar[bool] = False
    self_supervised: ClassVar[bool] = True
    other_inputs: ClassVar[bool] = True  # crops, the small ones foremost
    fresh: ClassVar[tuple[str, ...]] = ("queue",)
    module: SwavNetwork

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.options: SwavOptions = make_options(SwavOptions, "the objective 'swav'", config.objective_options)
        preprocess = backbone.preprocess
        assert isinstance(preprocess, ImagePreprocess)
        size = preprocess.size
        if self.options.small_size > size:
            raise ConfigError(
                f"small_size must be at most {size}, the pixels of the large crops, got {self.options.small_size}"
            )
        self.kinds = (
            Crops(ASSIGNED, size, (self.options.large_least, 1.0)),
            Crops(
                self.options.small_crops,
                self.options.small_size or max(1, round(size * 3 / 7)),
                (self.options.small_least, self.options.small_most),
            ),
        )
        example = next(backbone.model.parameters())
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            projection = nn.Linear(backbone.features, self.options.dimension)
            classifier = Classifier(backbone.model, projection, backbone.embedding)
            self.module = SwavNetwork(classifier, self.options).to(example.device, example.dtype)
        self.watch = CollapseWatch(self.options.prototypes)
        self.queue_on = False

    def batches(self, examples: Examples, sampler: EpochSampler | None = None) -> Any:
        assert isinstance(self.backbone.preprocess, ImagePreprocess)
        views = multi_crop(self.backbone.preprocess, self.kinds)
        return self.load(examples, sampler=sampler, transform=views, stack=stack_views)

    def trained(self) -> list[nn.Parameter]:
        return [*self.module.classifier.linear.parameters(), *self.module.prototypes.parameters()]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.queue_on = self.options.queue > 0 and epoch >= self.options.queue_start * epochs

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        """Return the mean cross-entropy of every view's prediction with the targets of the other large views."""
        views, _ = batch
        z, scores, seen = module(views)
        count = self.kinds[0].count + self.kinds[1].count
        each = len(z) // count
        z, scores = z.reshape(count, each, -1), scores.reshape(count, each, -1)
        self.watch.add(seen, scores[0])
        log_p = (scores / self.options.temperature).log_softmax(-1)
        total = scores.new_zeros(())
        for a in range(ASSIGNED):
            q = self._targets(a, z[a].detach(), scores[a].detach())
            crossed = -(q * log_p).sum(-1).mean(-1)
            total = total + (crossed.sum() - crossed[a]) / (count - 1)
        loss: Tensor = total / ASSIGNED
        return loss

    @torch.no_grad()
    def _targets(self, view: int, z: Tensor, scores: Tensor) -> Tensor:
        """Assignments (B, prototypes) of a large view, balanced over its batch and, once that is full, the queue."""
        queue = self.module.queue[view]
        together = scores
        if self.queue_on:
            if bool(queue[-1].any()):
                together = torch.cat([queue @ self.module.prototypes.weight.T, scores])
            queue.copy_(torch.cat([z, queue])[: len(queue)])
        return sinkhorn(together, self.options.epsilon, self.options.iterations)[-len(scores) :]

    def after_backward(self, step: int) -> None:
        if step < self.options.freeze_prototypes:
            self.module.prototypes.weight.grad = None

    @property
    def network(self) -> nn.Module:
        return self.module.classifier

    def state(self) -> dict[str, Tensor]:
        return self.watch.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.watch.restore(state)

    def metrics(self) -> dict[str, float]:
        return self.watch.metrics()

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        return collapse_warning(metrics)


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return soft assignments (N, K) in which every prototype gets the same share of the N rows, over all processes.

    Args:
        scores: (N, K), from -1 to 1. In float64: exp((z - 1) / epsilon) is above 0 for every epsilon that is allowed.
    """
    q = ((scores.double() - 1) / epsilon).exp().T
    rows = _over_processes(torch.tensor(float(q.shape[1]), dtype=q.dtype, device=q.device))
    q /= _over_processes(q.sum())
    for _ in range(iterations):
        q /= _over_processes(q.sum(1, keepdim=True)) * q.shape[0]
        q /= q.sum(0, keepdim=True) * rows
    return (q * rows).T.float()


def _over_processes(amount: Tensor) -> Tensor:
    """The sum of an amount over all processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(amount)
    return amount
