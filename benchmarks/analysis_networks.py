"""The networks of `benchmarks.analysis`: made when they are asked for, read back when they are there."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from maskpack import load_backbone, save_adapter
from maskpack.backbone.classifier import Classifier
from maskpack.backbone.load import Backbone
from maskpack.lab.analysis.evaluation import Evaluations
from maskpack.lab.analysis.network import Network, read_networks, state_of, write_network
from maskpack.safetensors_io import read_tensors
from maskpack.training import load_data, train_mask
from maskpack.training.checkpoint import FILE
from maskpack.training.dense import body_parameters, train_dense
from maskpack.training.heads import new_classifier

from .comparisons import DATA, IMAGES, TEXTS, minilm, resnet, some_mnist


@dataclass(frozen=True)
class Kind:
    """How networks come about: the start, and the peak rate of weights or scores."""

    random: bool = False
    lr: float = 0.03
    mask: bool = False


# the rate with which fine-tuning is best at this budget, and a third of it
KINDS = {"pretrained": Kind(lr=0.03), "pretrained, rate 0.09": Kind(lr=0.09), "random": Kind(True, 0.09)}
MASK = Kind(lr=60.0, mask=True)
TEXT_KINDS = {"masked": Kind(lr=0.02, mask=True), "fine-tuned": Kind(lr=3e-4)}
SUPERVISED = replace(IMAGES, objective_options={})
TARGETS = {"sketch": replace(SUPERVISED, augment="flip"), "mnist": replace(SUPERVISED, augment="none")}


class Study:
    """The networks of one target: made when they are asked for, read back when they are there.

    Args:
        name: a target of `TARGETS`, or "banking77".
    """

    def __init__(self, name: str, output: Path):
        self.name, self.output, self.texts = name, output, name == "banking77"
        places = {"sketch": DATA / "data/pacs/sketch", "banking77": DATA / "data/banking77"}
        self.data = load_data(str(some_mnist(output.parent) if name == "mnist" else places[name]))
        self.config = TEXTS if self.texts else TARGETS[name]
        self.training = replace(self.data, test=None)
        self.given = minilm(output.parent) if self.texts else resnet(20)

    def backbone(self, random: int | None = None) -> Backbone:
        """Return the backbone, pretrained or drawn from a seed."""
        start = {} if random is None else {"weights": None, "random_weights": random}
        return load_backbone(**{**self.given, **start})

    def started(self, kind: Kind, seed: int) -> Classifier:
        """Return a network before its training, with the head that the seed draws."""
        return new_classifier(
            self.backbone(seed if kind.random else None), self.data.class_names, replace(self.config, seed=seed)
        )

    def network(self, name: str, kind: Kind, seed: int) -> Network:
        """Return a network that was trained now or earlier."""
        folder = self.output / "networks"
        path = folder / f"{self.name}-{name}-{seed}.safetensors"
        if not path.exists():
            run = folder / "training" / path.stem
            run.mkdir(parents=True, exist_ok=True)
            options: dict[str, Any] = {"output": run, "resume": (run / FILE).exists()}
            config = replace(self.config, lr=kind.lr, seed=seed)
            backbone = self.backbone(seed if kind.random else None)
            if kind.mask:
                result = train_mask(backbone, self.training, config, **options)
                save_adapter(path, result.parts, result.base, result.about, weights=backbone.model)
            else:
                dense = train_dense(backbone, self.training, config, lambda own, _: body_parameters(own), **options)
                write_network(path, state_of(dense.classifier))
            print(path.stem, flush=True)
        if kind.mask:
            _, _, (found,) = read_networks(self.backbone(), [(f"{name} {seed}", str(path))])
            return replace(found, kind=name)
        return Network(f"{name} {seed}", name, read_tensors(path), state_of(self.started(kind, seed)))

    def evaluations(self, **options: Any) -> Evaluations:
        """Return what measures networks of this target."""
        classifier = self.started(Kind(), 0)
        backbone = replace(self.backbone(), model=classifier.model)
        return Evaluations(classifier, backbone, self.data, folder=self.output / "evaluations", **options)


@cache
def study(name: str, output: Path) -> Study:
    return Study(name, output)
