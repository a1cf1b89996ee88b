"""Objectives without labels: clusters of image views (SwAV), dropout views of texts (SimCSE), unchanged outputs."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from ...backbone.classifier import Classifier, Inputs, encode, modes_kept, to_device
from ...backbone.load import Backbone
from ...backbone.model import Embedding
from ...errors import ConfigError, require
from ...preprocess import ImagePreprocess
from ...registry import Count, NonNegative, Number, Options, Positive, Range, Share
from ..config import TrainConfig
from ..data.base import Data, EpochSampler, Examples, readable
from ..methods.base import METHODS, methods_that_are
from ..scores import scored_weights, without_scores
from ..stored import batchnorm_statistics
from .base import OBJECTIVES, Objective

KEPT = 1024  # newest rows of features that the rank is measured on
LEAST_USAGE, LEAST_RANK = 0.5, 2.0
JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
BLUR = tuple(pixels / 224 for pixels in (0.1, 2.0))  # standard deviation, as a share of the side of a large view
LARGE = 2  # large views of each image, from which targets are computed

Area = Annotated[float, Range(above=0, most=1)]


class CollapseWatch:
    """Measures of collapse, over the batches of an epoch; `prototypes`: their number, 0 if the objective has none."""

    def __init__(self, prototypes: int = 0):
        self.used = torch.zeros(prototypes, dtype=torch.int64)  # how often each prototype was the nearest
        self.rows: deque[Tensor] = deque()

    def add(self, features: Tensor, scores: Tensor | None = None) -> None:
        """Add a batch: features (N, D) of the backbone, and prototype scores (N, K)."""
        self.rows.append(features.detach().float().cpu())
        while sum(len(rows) for rows in self.rows) - len(self.rows[0]) >= KEPT:
            self.rows.popleft()
        if scores is not None:
            self.used += torch.bincount(scores.detach().argmax(-1).cpu(), minlength=len(self.used))

    def state(self) -> dict[str, Tensor]:
        """Return the counts and features since the last `metrics`."""
        lengths = torch.tensor([len(rows) for rows in self.rows], dtype=torch.int64)
        rows = torch.cat(list(self.rows)) if self.rows else torch.zeros(0, 0)
        return {"used": self.used.clone(), "lengths": lengths, "rows": rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`."""
        self.used.copy_(state["used"])
        self.rows = deque(torch.split(state["rows"], state["lengths"].tolist()))

    def metrics(self) -> dict[str, float]:
        """Return `feature_rank` and, with prototypes, `prototype_usage`, and start anew.

        `feature_rank` is the exponential of the entropy of the features' singular values (RankMe, arXiv 2210.02885),
        1 (all features are multiples of one) to D. `prototype_usage` is the entropy of the counts of nearest prototypes
        over its maximum, 0 (always the same one) to 1 (all equally often, or none twice).
        """
        found = {"feature_rank": _effective_number(torch.linalg.svdvals(torch.cat(list(self.rows)).double()))}
        if len(self.used):
            most = min(len(self.used), int(self.used.sum()))
            found["prototype_usage"] = math.log(_effective_number(self.used)) / math.log(most) if most > 1 else 1.0
        self.used.zero_()
        self.rows.clear()
        return found


def _effective_number(amounts: Tensor) -> float:
    """Return the exponential of the entropy of the amounts' shares."""
    shares = amounts.double() / amounts.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


def collapse_warning(metrics: Mapping[str, float]) -> str | None:
    """Return a warning if the metrics of `CollapseWatch` show a collapse, else None."""
    usage, rank = metrics.get("prototype_usage", 1.0), metrics["feature_rank"]
    if usage >= LEAST_USAGE and rank >= LEAST_RANK:
        return None
    found, healthy, remedy = f"feature rank {rank:.1f}", f"is over {LEAST_RANK:.0f}", ""
    if "prototype_usage" in metrics:
        found = f"prototype usage {usage:.2f}, {found}"
        healthy, remedy = f"are over {LEAST_USAGE} and {LEAST_RANK:.0f}", ", or use more prototypes"
    return (
        f"the representation is collapsing ({found}; healthy {healthy}); lower the learning rate of the scores{remedy}"
    )


class SelfSupervised(Objective):
    """An objective without labels, which adds batches to measures of a collapse, `watch`."""

    needs_labels: ClassVar[bool] = False
    augments: ClassVar[bool] = False
    self_supervised: ClassVar[bool] = True
    watch: CollapseWatch

    def state(self) -> dict[str, Tensor]:
        return self.watch.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.watch.restore(state)

    def metrics(self) -> Mapping[str, float]:
        return self.watch.metrics()

    def warning(self, metrics: Mapping[str, float]) -> str | None:
        return collapse_warning(metrics)


@dataclass(frozen=True)
class SwavOptions(Options):
    """Options of the objective; the defaults are those of Self-Masking Networks at 224 pixels."""

    prototypes: Annotated[int, Range(least=2)] = 500  # clusters: a few per class; too few collapse
    dimension: Count = 128  # of the projected features
    temperature: Positive = 0.1  # of the predictions
    epsilon: Annotated[float, Range(least=0.005)] = 0.05  # of Sinkhorn's targets; below, float64 exponentials vanish
    iterations: Count = 3  # of the Sinkhorn algorithm
    queue: Number = 512  # features of earlier batches, per large view, that targets are balanced over
    queue_start: Share = 0.2  # of the epochs, before the queue is filled
    freeze_prototypes: Number = 313  # first optimiser steps that leave the prototypes as they are
    small_crops: Number = 6  # views of each image
    small_size: Number = 0  # pixels; 0: 3/7 of the large ones
    large_least: Area = 0.14  # share of the image's area in a large view
    small_least: Area = 0.05
    small_most: Area = 0.14


@dataclass(frozen=True)
class Crops:
    """Views of each image: number, height and width in pixels, least and greatest share of the image's area."""

    count: int
    size: int
    scale: tuple[float, float]


def multi_crop(preprocess: ImagePreprocess, kinds: Sequence[Crops]) -> Callable[[Any], list[Tensor]]:
    """Return a function from a PIL image to its views, one tensor (count, 3, size, size) per kind.

    Each view: a crop of random place, size and aspect, randomly mirrored, with jittered colours (8 of 10), in grey
    (2 of 10), blurred (5 of 10, by up to 2 pixels where large views have 224), normalised as the backbone expects.
    """
    pillow = require("PIL.ImageFilter", "train", "reading images")  # first: torchvision needs it as well
    v2 = require("torchvision.transforms.v2", "train", "reading images")

    def blur(image: Any) -> Any:
        # Pillow's, as in the reference: torchvision's takes thirty times as long
        return image.filter(pillow.GaussianBlur(preprocess.size * float(torch.empty(()).uniform_(*BLUR))))

    changes = [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*JITTER)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.Lambda(blur)], p=0.5),
        v2.ToImage(),
    ]
    crops = [(k.count, v2.RandomResizedCrop(k.size, scale=k.scale, antialias=True)) for k in kinds if k.count]
    pipelines = [(count, v2.Compose([crop, *changes])) for count, crop in crops]
    finish = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)])

    def views(image: Any) -> list[Tensor]:
        image = image.convert("RGB")
        drawn = ([one(image).as_subclass(Tensor) for _ in range(count)] for count, one in pipelines)
        return [finish(torch.stack(stack)) for stack in drawn]

    return views


def stack_views(images: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the views of B images: per kind (count * B, 3, size, size), the first view of all images first."""
    return [torch.stack(list(kind), dim=1).flatten(0, 1) for kind in zip(*images, strict=True)]


class SwavNetwork(nn.Module):
    """Backbone -> linear projection -> unit sphere -> similarity to the prototypes, of several views."""

    queue: Tensor  # (2, N, dimension), earlier features of each large view, the newest first; zeros are unfilled

    def __init__(self, classifier: Classifier, options: SwavOptions):
        super().__init__()
        self.classifier = classifier
        self.prototypes = nn.Linear(options.dimension, options.prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(LARGE, options.queue, options.dimension))
        self.seen: Tensor | None = None  # features of the last backbone pass
        classifier.linear.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0].detach()

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return projected features (N, dimension) and prototype scores (N, prototypes) of N views, and `seen`.

        Each size of view has a forward pass of its own, as BatchNorm is to see them.
        """
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))
        projected = torch.cat([self.classifier(one).float() for one in views])
        z = nn.functional.normalize(projected, dim=1)
        assert self.seen is not None
        return z, nn.functional.linear(z, self.prototypes.weight).float(), self.seen


@OBJECTIVES.register
class Swav(SelfSupervised):
    """Predict the cluster of one view of an image from another view (SwAV); needs no labels.

    The backbone's head is replaced by the projection until training ends; neither is in the adapter.
    """

    id: ClassVar[str] = "swav"
    reference: ClassVar[str] = "https://arxiv.org/abs/2006.09882"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    options_class = SwavOptions
    other_inputs: ClassVar[bool] = True  # crops, the small ones foremost
    fresh: ClassVar[tuple[str, ...]] = ("queue",)
    options: SwavOptions
    module: SwavNetwork

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        assert isinstance(backbone.preprocess, ImagePreprocess)
        options, size = self.options, backbone.preprocess.size
        least, most = options.small_least, options.small_most
        if options.small_size > size:
            raise ConfigError(f"small_size must be at most {size}, the size of large crops, got {options.small_size}")
        if least > most:
            raise ConfigError(f"small_least must be at most small_most, got {least} and {most}")
        small = options.small_size or max(1, round(size * 3 / 7))
        large = Crops(LARGE, size, (options.large_least, 1.0))
        self.kinds = (large, Crops(options.small_crops, small, (least, most)))
        example = next(backbone.model.parameters())
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            projection = nn.Linear(backbone.features, options.dimension)
            classifier = Classifier(backbone.model, projection, backbone.embedding)
            self.module = SwavNetwork(classifier, options).to(example.device, example.dtype)
        self.watch = CollapseWatch(options.prototypes)
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
        """Return the mean cross-entropy of each view's prediction with the targets of the other large views."""
        views, _ = batch
        z, scores, seen = module(views)
        count = self.kinds[0].count + self.kinds[1].count
        each = len(z) // count
        z, scores = z.reshape(count, each, -1), scores.reshape(count, each, -1)
        self.watch.add(seen, scores[0])
        log_p = (scores / self.options.temperature).log_softmax(-1)
        total: Tensor = scores.new_zeros(())
        for a in range(LARGE):
            q = self._targets(a, z[a].detach(), scores[a].detach())
            crossed = -(q * log_p).sum(-1).mean(-1)
            total = total + (crossed.sum() - crossed[a]) / (count - 1)
        return total / LARGE

    @torch.no_grad()
    def _targets(self, view: int, z: Tensor, scores: Tensor) -> Tensor:
        """Return assignments (B, prototypes) of a large view, balanced over its batch and, once full, the queue."""
        queue, together = self.module.queue[view], scores
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


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return soft assignments (N, K) that give each prototype the same share of the N rows of all processes.

    Scores are from -1 to 1.
    """
    q = ((scores.double() - 1) / epsilon).exp().T
    rows = _over_processes(torch.tensor(float(q.shape[1]), dtype=q.dtype, device=q.device))
    q /= _over_processes(q.sum())
    for _ in range(iterations):
        q /= _over_processes(q.sum(1, keepdim=True)) * q.shape[0]
        q /= q.sum(0, keepdim=True) * rows
    return (q * rows).T.float()


def _over_processes(amount: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(amount)
    return amount


VIEWS = 2


@dataclass(frozen=True)
class SimcseOptions(Options):
    """Options of the objective: divisor of the cosine similarities; the default is the paper's."""

    temperature: Positive = 0.05


class SimcseNetwork(nn.Module):
    """Embeddings (2 B, D) of B texts, the first view of all texts first; dropout makes the views differ."""

    def __init__(self, model: nn.Module, embedding: Embedding):
        super().__init__()
        self.model, self.embedding = model, embedding

    def forward(self, inputs: Inputs) -> Tensor:
        assert isinstance(inputs, dict)
        doubled: Inputs = {name: torch.cat([one] * VIEWS) for name, one in inputs.items()}
        return encode(self.model, doubled, self.embedding).float()


@OBJECTIVES.register
class Simcse(SelfSupervised):
    """Contrast two dropout views of each text with the batch's other texts (SimCSE); needs no labels."""

    id: ClassVar[str] = "simcse"
    reference: ClassVar[str] = "https://arxiv.org/abs/2104.08821"
    tasks: ClassVar[tuple[str, ...]] = ("text-classification",)
    options_class = SimcseOptions
    options: SimcseOptions
    module: SimcseNetwork

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        if backbone.embedding.pooling is None:
            raise ConfigError(
                f"the objective 'simcse' is for encoders with a pooled embedding; {backbone.id} has the head "
                f"{backbone.head!r}"
            )
        if not any(isinstance(m, nn.Dropout) and m.p > 0 for m in backbone.model.modules()):
            raise ConfigError(
                f"the objective 'simcse' needs dropout, and {backbone.id} has none; set it in the model's configuration"
            )
        self.module = SimcseNetwork(backbone.model, backbone.embedding)
        self.watch = CollapseWatch()

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        first, second = module(batch[0]).chunk(VIEWS)
        self.watch.add(first)
        similar = nn.functional.normalize(first, dim=1) @ nn.functional.normalize(second, dim=1).T
        own = torch.arange(len(first), device=first.device)
        return nn.functional.cross_entropy(similar / self.options.temperature, own)


@dataclass(frozen=True)
class DistributionOptions(Options):
    """Options of the objective: strength of the density penalty, temperature of both softmaxes."""

    strength: NonNegative = 1.0
    temperature: Positive = 1.0


class MaskedAndWhole(nn.Module):
    """Logits (B, classes) with the masks, and without them in evaluation mode."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), without_scores(self.classifier), modes_kept(self.classifier):
            whole = self.classifier.eval()(inputs)
        return self.classifier(inputs).float(), whole.float()


@OBJECTIVES.register
class Distribution(Objective):
    """Sparsest mask under an output-KL penalty; needs no labels.

    The loss is KL(unmasked || masked) + strength * density, with the network's own head. The gradient of the density is
    1 / weights for every score (straight through).
    """

    id: ClassVar[str] = "distribution"
    reference: ClassVar[str] = "https://arxiv.org/abs/2308.13957"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    needs_labels: ClassVar[bool] = False
    options_class = DistributionOptions
    options: DistributionOptions
    module: MaskedAndWhole

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        if backbone.linear is None:
            raise ConfigError(
                f"the objective 'distribution' compares logits, and {backbone.id} has no head; take a backbone with "
                f"its head"
            )
        if self.options.strength and not METHODS[config.method].rising:
            raise ConfigError(
                f"the objective 'distribution' lowers all scores to remove weights, and higher scores of the method "
                f"{config.method!r} do not keep more weights; take {methods_that_are('rising')}, or the option "
                f"strength=0"
            )
        changed = f"train would change {', '.join(config.beside)}; leave out train" if config.beside else None
        if config.bn == "adapt" and batchnorm_statistics(backbone.model):
            changed = changed or "bn 'adapt' would change its BatchNorm statistics; take bn 'freeze'"
        if changed is not None:
            raise ConfigError(f"the objective 'distribution' compares with the unchanged network, and {changed}")
        self.module = MaskedAndWhole(Classifier(backbone.model, backbone.linear, backbone.embedding))
        self.sums = torch.zeros(3, dtype=torch.float64)  # divergence, equal classes, examples

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        every = list(scored_weights(self.backbone.model).values())
        kept = torch.stack([one.straight().sum() for one in every]).sum()
        density = kept / sum(math.prod(one.shape) for one in every)
        return self._divergence(*module(batch[0])) + self.options.strength * density

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums.clone()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])

    def metrics(self) -> dict[str, float]:
        """Return the mean divergence in nats, and the share of examples whose class stayed, and start anew."""
        divergence, agreed, count = self.sums.tolist()
        self.sums.zero_()
        return {"divergence": divergence / max(count, 1), "agreement": agreed / max(count, 1)}

    @torch.no_grad()
    def evaluate(self, examples: Examples) -> dict[str, float]:
        device = next(self.module.parameters()).device
        with modes_kept(self.module):
            self.module.eval()
            for inputs, _ in readable(self.batches(examples)):
                self._divergence(*self.module(to_device(inputs, device)))
        return self.metrics()

    def _divergence(self, masked: Tensor, whole: Tensor) -> Tensor:
        """Return the mean divergence of a batch, and add it to `sums`."""
        log_p, log_q = ((one / self.options.temperature).log_softmax(-1) for one in (whole, masked))
        divergence = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        agreed = float((masked.argmax(1) == whole.argmax(1)).sum())
        self.sums += torch.tensor([float(divergence.detach()) * len(masked), agreed, len(masked)], dtype=torch.float64)
        return divergence
