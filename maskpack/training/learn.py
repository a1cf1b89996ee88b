"""What of a frozen backbone learns: scores, some of them, and parameters that are stored whole."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..backbone.load import Backbone
from ..backbone.parameters import named_parameters
from ..backbone.select import match_parameters, select_parameters
from ..errors import ConfigError
from ..methods.base import build_method
from .config import TrainConfig
from .scored import attach, scored_weights
from .selective import ALL, learning_weights

Learn = Callable[[Backbone, TrainConfig], Mapping[str, nn.Parameter]]


def learn_scores(backbone: Backbone, config: TrainConfig) -> Mapping[str, nn.Parameter]:
    """Attach scores to the weights that the settings select; return the scores by name.

    Raises:
        SelectionError: if the settings select nothing, or what cannot be masked.
        ConfigError: if `config.selective` is not for the method, or there are fewer stages than it says.
    """
    names = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    order = [name for name, _ in backbone.model.named_parameters() if name in names]
    weights = named_parameters(backbone.model)
    learning = learning_weights(config.selective, {name: weights[name] for name in order}, config.seed)
    scores = attach(backbone.model, build_method(config.method, dict(config.method_options)), names, config.scale)
    if config.selective != ALL:
        for name, one in scored_weights(backbone.model).items():
            if one.scores.shape != learning[name].shape or not one.binary().all():
                raise ConfigError(
                    f"selective {config.selective!r} leaves the other scores as they begin, and those of the method "
                    f"{config.method!r} do not begin with every weight kept; take the method threshold, gumbel or flip"
                )
            _only(one.scores, learning[name])
    return scores


def _only(scores: nn.Parameter, learning: Tensor) -> None:
    """Let these scores learn alone: the others' gradients are zero, so that no optimiser here moves them."""
    learning = learning.to(scores.device)
    scores.register_hook(lambda gradient: torch.where(learning, gradient, 0.0))  # type: ignore[no-untyped-call]


def learn_whole(backbone: Backbone, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Return the parameters that learn themselves beside scores, by name; to be asked before scores are attached.

    Raises:
        SelectionError: if a pattern matches nothing. ConfigError: if one of them is to be masked.
    """
    names = match_parameters(backbone.model, config.train, "train", backbone.outside)
    scored = select_parameters(backbone.model, config.include, config.exclude, backbone.outside)
    masked = [name for name in names if name in scored]
    if masked:
        raise ConfigError(
            f"train would train {len(masked)} parameters that are masked, first {masked[0]!r}; a mask needs frozen "
            f"weights: leave them out of train, or out of the mask with exclude"
        )
    parameters = named_parameters(backbone.model)
    return {name: parameters[name] for name in names}
