"""The supervised objective beside a teacher: a network of the same architecture that was trained whole."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from ...backbone.classifier import Classifier, linear_from
from ...backbone.load import Backbone, export_state, load_tensors
from ...backbone.model import Head
from ...errors import ConfigError
from ...registry import Options, Positive, Share
from ...safetensors_io import read_tensors
from ..config import WEIGHT_LR, TrainConfig
from ..data.base import Data
from ..run_folder import PartOptions, is_main_process, part_options
from .base import OBJECTIVES
from .supervised import Supervised

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
