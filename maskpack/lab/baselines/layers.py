"""Baselines that put something onto the layers that masks are for."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...backbone.load import Backbone
from ...backbone.model import named_parameters
from ...backbone.select import select_parameters
from ...errors import ConfigError
from ...training.config import TrainConfig
from ...training.scores import all_names, owner, put_on
from .dense import Dense

# from the rows of a weight, one for each output, and what is learned, to the rows of the changed weight
Effect = Callable[..., Tensor]


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
        foreign = [name for name, (layer, leaf) in places.items() if leaf != "weight" or not is_linear(layer)]
        if foreign:
            raise ConfigError(
                f"the baseline {self.id!r} is for weights of linear and convolution layers, and {len(foreign)} of the "
                f"{len(names)} chosen are others, first {foreign[0]!r}; leave them out with exclude, or the baseline"
            )
        apart = [] if self.grouped else [name for name in names if getattr(places[name][0], "groups", 1) > 1]
        return [name for name in names if name not in apart], apart


class Reweighted(Layers):
    """Computes each weight anew from the frozen one and few learned numbers."""

    @abstractmethod
    def change(self, rows: Tensor) -> tuple[dict[str, Tensor], Effect]:
        """Return the first values of what is learned of a weight, by name, and the effect, which gets them by name.

        Args:
            rows: the weight as a matrix, (outputs, inputs) float32.
        """

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


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is linear or a convolution, that of transformers' GPT-2 included."""
    return isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or type(layer).__name__ == "Conv1D"


def _rows(weight: Tensor, transposed: bool) -> Tensor:
    return (weight.T if transposed else weight.flatten(1)).float()
