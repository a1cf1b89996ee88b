"""Objectives with labels: classes, a teacher's outputs, numbers; and heads that are whole, masked, or of texts."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, accuracy, classifier_from, linear_from, predictions
from ...backbone.load import Backbone, export_state, load_tensors, text_head
from ...backbone.model import MAX_WEIGHTS, Head, RandomWeight, random_weight
from ...errors import AdapterError, ConfigError, DataError
from ...registry import Options, Positive, Share
from ...safetensors_io import read_tensors
from ..config import WEIGHT_LR, TrainConfig
from ..data.base import LABEL_NAMES, Data, Examples, find_input, loader, no_column, readable
from ..features import SPLITS, Probe, by_class, embed, features_key, fit_probe, probe_accuracies
from ..methods.base import build_method
from ..own_loop import extract_masks
from ..run_folder import PartOptions, is_main_process, part_options
from ..scores import attach, scored_weights, without_scores
from ..stored import kept_head, settle_head
from .base import OBJECTIVES, Objective

LEAST_BIAS = -100.0  # of a class without a row: finite in any precision and under label smoothing
CENTROID_SCALE = 10.0  # logits of unit embeddings against unit centroids, as sharp as a trained head's


@OBJECTIVES.register
class Supervised(Objective):
    """Cross-entropy on labels, with a linear head trained beside the scores.

    The backbone's head is replaced by one for the data's classes until training ends.
    """

    id: ClassVar[str] = "supervised"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "text-classification", "token-classification")
    needs_labels: ClassVar[bool] = True
    supervised: ClassVar[bool] = True
    trains_head: ClassVar[bool] = True
    module: Classifier

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        super().__init__(backbone, data, config)
        self.probe: Probe | None = None
        self.key = features_key(backbone, self.rows) if backbone.embedding.normalize else None
        if config.head_kind == "linear" and config.head_start == "probe":
            self.probe = fit_probe(*embed(backbone, self.rows, batch_size=config.batch_size), len(data.class_names))
        self.module = new_classifier(backbone, data.class_names, config)
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def start(self) -> None:
        """Give a linear head its first values: the probe, or class centroids of an encoder's frozen embeddings."""
        linear = self.module.linear
        with torch.no_grad():
            if self.probe is not None:
                linear.weight.copy_(self.probe.weight)
                linear.bias.copy_(self.probe.bias.clamp(min=LEAST_BIAS))
            elif self.config.head_kind == "linear" and self.backbone.embedding.normalize:
                x, y = self.frozen_features()
                centroids = torch.zeros(linear.weight.shape).index_add_(0, y, x)
                linear.weight.copy_(nn.functional.normalize(centroids, dim=-1) * CENTROID_SCALE)
                linear.bias.zero_()

    def frozen_features(self) -> tuple[Tensor, Tensor]:
        """Return the features of the training rows by the network without its scores, and their labels."""
        with without_scores(self.backbone.model):
            return embed(self.backbone, self.rows, batch_size=self.config.batch_size, key=self.key)

    def trained(self) -> list[nn.Parameter]:
        return list(self.module.linear.parameters()) if self.config.head_kind == "linear" else []

    def scores(self) -> list[nn.Parameter]:
        """Return the scores of a masked head."""
        return [one.scores for one in scored_weights(self.module.linear).values()]

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, labels = batch
        loss: Tensor = self.loss_function(module(inputs).float().flatten(0, -2), labels.flatten())
        return loss

    def evaluate(self, examples: Examples) -> dict[str, float]:
        return {"accuracy": accuracy(self.module, readable(self.batches(examples)))[0]}

    def baseline(self) -> Mapping[str, float]:
        return probe_accuracies(self.backbone, self.data, self.config.batch_size)

    @classmethod
    def measured(cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int) -> dict[str, Any]:
        """Return accuracies as `by_class` over the examples that can be read."""
        return by_class(*cls.outputs(backbone, examples, head, batch_size))

    @classmethod
    def outputs(
        cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Return outputs of a backbone that has an adapter with a head loaded, and targets."""
        if head is None:
            raise AdapterError(
                "this adapter has no head or no preprocessing, so it has no accuracy of its own; measure its features "
                "by k-NN or a linear probe (--knn, --probe)"
            )
        batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
        found, y = predictions(classifier_from(backbone.model, head), readable(batches))
        if not y.is_floating_point() and int(y.max()) >= found.shape[1]:
            raise DataError(
                f"the adapter's head has {found.shape[1]} classes and no names for them, and the data have a class "
                f"{int(y.max())} (counted from 0); measure it on the data that it was made for"
            )
        return found, y

    def settle(self) -> bool:
        return self.config.head_kind in ("linear", "text") and settle_head(self.module.linear, self.config.store)

    def head(self) -> Head:
        """Return the head to store; scores that it has are detached."""
        head = self.module.head()
        if self.config.head_kind != "masked":
            return kept_head(head)
        random = RandomWeight(self.config.seed, extract_masks(self.module.linear)["weight"])
        # not the layer's own values: those may be in another dtype than float32
        return replace(head, weight=random.dense(), random=random)


def new_classifier(backbone: Backbone, class_names: Sequence[str], config: TrainConfig) -> Classifier:
    """Return a backbone with the head that `config.head_kind` asks for; a masked one has scores attached."""
    masked, classes, features = config.head_kind == "masked", len(class_names), backbone.features
    if masked and classes * features > MAX_WEIGHTS:
        raise ConfigError(
            f"a masked head for {classes} classes would have {classes * features} weights, at most {MAX_WEIGHTS} are "
            f"allowed; take a linear head"
        )
    if config.head_kind == "own":
        own = backbone.head_for(classes, "head_kind 'own' keeps the model's head", "take a linear head")
        return Classifier(backbone.model, own, backbone.embedding)
    if config.head_kind == "text":
        linear = linear_from(text_head(backbone, class_names, config.head_template))
    else:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(config.seed)
            linear = nn.Linear(features, classes, bias=not masked)
            if masked:
                linear.weight.copy_(random_weight(config.seed, classes, features))
    example = next(backbone.model.parameters())
    linear.to(example.device, example.dtype)
    if masked:
        method = build_method(config.method, dict(config.method_options))
        try:
            attach(linear, method, ["weight"], config.scale)
        except ConfigError as error:
            raise ConfigError(f"the masked head's {error}, or take a linear head") from None
        if method.op != "zero" or scored_weights(linear)["weight"].mask().signs is not None:
            raise ConfigError(
                f"head_kind 'masked' stores a mask whose zeros remove weights, and the method {config.method!r} makes "
                f"others; take another method or a linear head"
            )
    # random weights give embeddings of length 1 nearly equal logits
    embedding = replace(backbone.embedding, normalize=backbone.embedding.normalize and not masked)
    return Classifier(backbone.model, linear, embedding)


TEACHER = "teacher"  # run and file that `train_teacher` leaves in a folder
HEAD = "classification_head"  # in the teacher's file, behind an encoder that has no head inside


@dataclass(frozen=True)
class DistillOptions(Options):
    """Options of the objective: the teacher's file, its share of the loss, temperature of both softmaxes."""

    teacher: str = ""
    strength: Share = 0.5
    temperature: Positive = 2.0


@OBJECTIVES.register
class Distill(Supervised):
    """Cross-entropy on labels and on the outputs of a teacher, a network that was fine-tuned whole.

    The loss is (1 - strength) * cross-entropy + strength * temperature^2 * KL(teacher || network), both at the
    temperature. The teacher sees the same augmented inputs, in evaluation mode.
    """

    id: ClassVar[str] = "distill"
    reference: ClassVar[str] = "https://arxiv.org/abs/1503.02531"
    supervised: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "text-classification")
    options_class = DistillOptions
    options: DistillOptions

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        model = copy.deepcopy(backbone.model)  # before the head of the classes comes
        super().__init__(backbone, data, config)
        self.teacher = teacher(backbone, model, self.options.teacher, len(data.class_names))

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, labels = batch
        logits, temperature = module(inputs).float(), self.options.temperature
        with torch.no_grad():
            wanted = (self.teacher(inputs).float() / temperature).log_softmax(-1)
        found = (logits / temperature).log_softmax(-1)
        divergence = nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2
        loss: Tensor = self.loss_function(logits, labels).lerp(divergence, self.options.strength)
        return loss


def teacher(backbone: Backbone, model: nn.Module, path: str, classes: int) -> Classifier:
    """Return the network in a safetensors file, in evaluation mode and frozen; `model` gets its weights."""
    if not path:
        raise ConfigError(
            "the objective 'distill' needs a teacher, a safetensors file of the backbone's architecture with a head "
            "for the classes; give it as the option teacher=FILE, or make one by train_teacher"
        )
    state, linear = read_tensors(path), None
    if backbone.head is None:
        weight, bias = (state.pop(f"{HEAD}.{leaf}", None) for leaf in ("weight", "bias"))
        linear = None if weight is None else linear_from(Head(backbone.embedding, weight, bias))
    load_tensors(model, state, path, backbone.head)
    if backbone.head is not None:
        own = model.get_submodule(backbone.head)
        linear = own if isinstance(own, nn.Linear) else None
    if linear is None or linear.out_features != classes:
        found = "no head" if linear is None else f"a head for {linear.out_features} classes"
        raise ConfigError(f"the teacher in {path} has {found}, and the data have {classes} classes; give another")
    example = next(model.parameters())
    classifier = Classifier(model, linear.to(example.device, example.dtype), backbone.embedding)
    return classifier.eval().requires_grad_(False)


def train_teacher(
    backbone: Backbone, data: Data, config: TrainConfig, folder: str | Path, **options: Unpack[PartOptions]
) -> Path:
    """Fine-tune a copy of a backbone whole, with a linear head, and return the file that has it, in the folder.

    Weights learn at 0.001 under Adam and 0.05 under SGD. On resume a file that is there is not made again.
    """
    from ..learn import body_parameters
    from ..trainer import train_dense  # plug-ins are imported by it

    path = Path(folder) / f"{TEACHER}.safetensors"
    if path.exists() and options.get("resume", False):
        return path
    own = replace(backbone, model=copy.deepcopy(backbone.model))
    settings = replace(config, objective="supervised", objective_options={}, head_kind="linear")
    settings = replace(settings, lr=WEIGHT_LR[config.optimizer])
    run = train_dense(
        own, data, settings, lambda own, _: body_parameters(own), **part_options(options, Path(folder), TEACHER)
    )
    if backbone.head is None:
        assert isinstance(run.objective.module, Classifier)
        own.model.add_module(HEAD, run.objective.module.linear)
    if is_main_process():
        export_state(path, own.model)
    return path


NUMBER_NAMES = ("score", "value", "rating", "stars", *LABEL_NAMES)
RIDGE = 1e-3  # times the mean variance of the features


@OBJECTIVES.register
class Regression(Supervised):
    """Squared error of a number, given by a linear head that is trained beside the scores.

    While it learns, numbers are less their mean and divided by their standard deviation, over the training rows.
    """

    id: ClassVar[str] = "regression"
    reference: ClassVar[str] = "https://arxiv.org/abs/1801.06519"
    tasks: ClassVar[tuple[str, ...]] = ("regression",)
    least_classes: ClassVar[int] = 1
    figure: ClassVar[str] = "r2"

    def __init__(self, backbone: Backbone, data: Data, config: TrainConfig):
        if config.head_kind != "linear" or config.head_start != "plain":
            raise ConfigError("a regression has a linear head with a plain start; leave head_kind and head_start out")
        super().__init__(backbone, data, config)
        self.key = features_key(backbone, self.rows)
        numbers = torch.tensor([self.rows.labels[row] for row in self.rows.indices])
        self.mean, self.deviation = float(numbers.mean()), float(numbers.std(correction=0)) or 1.0

    @classmethod
    def columns(
        cls, features: Mapping[str, Any], column: str | None, label: str | None, task: str | None
    ) -> tuple[str, str | None]:
        label = label or next((name for name in NUMBER_NAMES if name in features), None)
        if label is None:
            raise no_column("numbers", features, "name it with --label-column")
        return column or find_input(features, label), label

    @classmethod
    def targets(
        cls, rows: Any, column: str | None, names: Sequence[str] | None, split: str
    ) -> tuple[list[Any], tuple[str, ...]]:
        """Return the number of each row, and the column's name."""
        assert column is not None
        values = rows[column][:]
        wrong = [
            one for one in values if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one)
        ]
        if wrong:
            raise DataError(
                f"the {split} split has {wrong[0]!r} in column {column!r}, expected numbers; correct such rows, or "
                f"remove them"
            )
        return [float(one) for one in values], (column,)

    def start(self) -> None:
        """Give the head its first values: the linear fit to the frozen embeddings."""
        x, y = self.frozen_features()
        weight, bias = least_squares(x, (y - self.mean) / self.deviation)
        with torch.no_grad():
            self.module.linear.weight.copy_(weight)
            self.module.linear.bias.fill_(float(bias))

    def loss(self, module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs, numbers = batch
        found = module(inputs).float().squeeze(-1)
        return nn.functional.mse_loss(found, (numbers - self.mean) / self.deviation)

    def evaluate(self, examples: Examples) -> dict[str, float]:
        outputs, numbers = predictions(self.module, readable(self.batches(examples)))
        return {"r2": explained(outputs[:, 0] * self.deviation + self.mean, numbers)}

    def baseline(self) -> Mapping[str, float]:
        size, held = self.config.batch_size, {name: one for name, one in self.data.splits.items() if name in SPLITS}
        if not held:
            return {}
        x, y = embed(self.backbone, self.rows, batch_size=size)
        weight, bias = least_squares(x, y)
        found = {name: embed(self.backbone, one, batch_size=size) for name, one in held.items()}
        return {f"{name}_probe_r2": explained(x.double() @ weight + bias, y) for name, (x, y) in found.items()}

    @classmethod
    def measured(cls, backbone: Backbone, examples: Examples, head: Head | None, batch_size: int) -> dict[str, Any]:
        outputs, numbers = cls.outputs(backbone, examples, head, batch_size)
        return {"r2": explained(outputs[:, 0], numbers)}

    def settle(self) -> bool:
        """Make the head give the numbers as they are, as it is stored."""
        with torch.no_grad():
            self.module.linear.weight.mul_(self.deviation)
            self.module.linear.bias.mul_(self.deviation).add_(self.mean)
        self.mean, self.deviation = 0.0, 1.0
        super().settle()
        return True


def explained(found: Tensor, numbers: Tensor) -> float:
    """Return the share of the numbers' variance that is explained: 1 of exact ones, 0 of the mean."""
    error = (found.double() - numbers.double()).square().sum()
    whole = (numbers.double() - numbers.double().mean()).square().sum()
    return float(1 - error / whole) if whole > 0 else float(error == 0)


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the linear fit of numbers to features, with a little ridge."""
    x, y = x.double(), y.double()
    centre = x - x.mean(0)
    gram = centre.T @ centre
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centre.T @ (y - y.mean()))
    return weight, y.mean() - x.mean(0) @ weight
