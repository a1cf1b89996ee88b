"""Baselines that put something onto the layers that masks are for: LoRA, (IA)3, LoRA-XS, VeRA."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...backbone.load import Backbone
from ...backbone.model import all_names, named_parameters
from ...backbone.select import select_parameters
from ...errors import ConfigError, require
from ...training.config import TrainConfig
from ...training.scores import owner, put_on
from .base import BASELINES, Rates
from .dense import Dense

# from the rows of a weight, one for each output, and what is learned, to the rows of the changed weight
Effect = Callable[..., Tensor]
LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
START = 0.1  # of the factors between VeRA's matrices; those of the outputs start at 0


class Layers(Dense):
    """Changes linear layers and convolutions.

    Attributes:
        grouped: whether convolutions in groups, as depthwise ones, change too; a low rank is of no use for them.
        usual: rank without an argument.
    """

    grouped: ClassVar[bool] = False
    usual: ClassVar[int] = 8

    def rank(self) -> int:
        """Return the rank that the argument asks for."""
        return self.number(self.usual, least=1)

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        self.rank()  # a wrong one is seen here
        if not self.weights(backbone, config)[0]:
            raise ConfigError(
                f"all layers chosen of the backbone {backbone.id} are convolutions in groups, so there is no baseline "
                f"{self.id!r}; leave it out"
            )

    def note(self, backbone: Backbone, config: TrainConfig) -> str:
        apart = len(self.weights(backbone, config)[1])
        return f"without {apart} convolution{'s' * (apart > 1)} in groups" if apart else ""

    def weights(self, backbone: Backbone, config: TrainConfig) -> tuple[list[str], list[str]]:
        """Return the names of the weights that change, and of those in groups, which do not."""
        names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
        places = {name: owner(backbone.model, name) for name in names}
        foreign = [
            name
            for name, (layer, leaf) in places.items()
            if leaf != "weight" or not (isinstance(layer, LINEAR) or type(layer).__name__ == "Conv1D")  # of GPT-2
        ]
        if foreign:
            raise ConfigError(
                f"the baseline {self.id!r} is for weights of linear and convolution layers, and {len(foreign)} of the "
                f"{len(names)} chosen are others, first {foreign[0]!r}; leave them out with exclude, or the baseline"
            )
        apart = [] if self.grouped else [name for name in names if getattr(places[name][0], "groups", 1) > 1]
        return [name for name in names if name not in apart], apart


class Reweighted(Layers):
    """Layers whose weights follow from the frozen ones and a few learned numbers."""

    @abstractmethod
    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        """Return first values of the numbers learned for a weight, (outputs, inputs), by name, and their effect."""

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        model, learned = backbone.model, dict[str, nn.Parameter]()
        tied, weights = all_names(model), named_parameters(model)
        for name in self.weights(backbone, config)[0]:
            transposed = type(owner(model, name)[0]).__name__ == "Conv1D"
            with torch.no_grad():
                changed = Changed(*self.change(_rows(weights[name], transposed)), transposed)
            put_on(model, tied[name], changed, {})
            learned |= {f"{name}.{own}": one for own, one in changed.learned.items()}
        return learned


class Changed(nn.Module):
    """Parametrization of a weight by what is learned of it."""

    def __init__(self, first: Mapping[str, Tensor], effect: Effect, transposed: bool):
        super().__init__()
        self.learned = nn.ParameterDict(first)
        self.effect, self.transposed = effect, transposed

    def forward(self, weight: Tensor) -> Tensor:
        changed = self.effect(_rows(weight, self.transposed), **self.learned)
        return (changed.T if self.transposed else changed).reshape(weight.shape).to(weight.dtype)


def _rows(weight: Tensor, transposed: bool) -> Tensor:
    return (weight.T if transposed else weight.flatten(1)).float()


@BASELINES.register
class Lora(Layers):
    """LoRA of a rank on the layers that masks are for, alpha twice the rank, not merged; and a head."""

    id = "lora"
    reference = "https://arxiv.org/abs/2106.09685"
    argument = "rank"
    rates: ClassVar[Rates] = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (0.01, 0.03, 0.1)}
    bits = (8, 4, 2, 1)
    relative = False

    def check(self, backbone: Backbone, config: TrainConfig) -> None:
        require("peft", "lab", "the baseline 'lora'")
        super().check(backbone, config)

    def learn(self, backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
        rank, peft = self.rank(), require("peft", "lab", "the baseline 'lora'")
        names, _ = self.weights(backbone, config)
        layers = "|".join(re.escape(name.removesuffix(".weight")) for name in names)
        # a pattern that is matched as a whole: as a list, names would match the ends of others
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"(?:{layers})")
        peft.inject_adapter_in_model(settings, backbone.model)
        return {name: one for name, one in backbone.model.named_parameters() if ".lora_" in name}

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        matrix = tensor.flatten(1)
        return matrix if ".lora_A." in name else matrix.T  # one row for each of the rank


@BASELINES.register
class IA3(Reweighted):
    """(IA)3: one factor for each output of the layers that masks are for, and a head."""

    id = "ia3"
    reference = "https://arxiv.org/abs/2205.05638"
    grouped = True
    rates: ClassVar[Rates] = {"adam": (3e-3, 1e-2, 3e-2), "sgd": (0.1, 0.3, 1.0)}

    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        factors = torch.ones(len(rows), 1, device=rows.device)
        return {"factors": factors}, lambda rows, factors: rows * factors


@BASELINES.register
class LoraXs(Reweighted):
    """LoRA-XS: a square matrix for each layer between its weight's greatest singular vectors, and a head.

    The vectors follow from the base, so that only the squares are stored. They start at zero.
    """

    id = "lora-xs"
    reference = "https://arxiv.org/abs/2405.17604"
    argument = "rank"
    rates: ClassVar[Rates] = {"adam": (1e-3, 3e-3, 1e-2), "sgd": (0.03, 0.1, 0.3)}

    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        rank = min(self.rank(), *rows.shape)
        left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
        left, right = (left * sizes)[:, :rank], right[:rank]
        square = torch.zeros(rank, rank, device=rows.device)
        return {"square": square}, lambda rows, square: rows + left @ square @ right


@BASELINES.register
class Vera(Reweighted):
    """VeRA: factors of the rows of two random matrices for each layer, and a head.

    The matrices are drawn from a seed, the same for all layers of one shape, so that only the factors are stored.
    """

    id = "vera"
    reference = "https://arxiv.org/abs/2310.11454"
    argument = "rank"
    usual = 256
    rates: ClassVar[Rates] = {"adam": (3e-3, 1e-2, 3e-2), "sgd": (0.1, 0.3, 1.0)}

    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        rank, (outputs, inputs) = self.rank(), rows.shape
        random = torch.Generator().manual_seed(0)
        # as He's initialisation
        left, right = (
            ((2 * torch.rand(shape, generator=random) - 1) * math.sqrt(6 / shape[1])).to(rows.device)
            for shape in ((outputs, rank), (rank, inputs))
        )
        first = {
            "outer": torch.zeros(outputs, 1, device=rows.device),
            "inner": torch.full((rank, 1), START, device=rows.device),
        }
        return first, lambda rows, outer, inner: rows + (outer * left) @ (inner * right)
