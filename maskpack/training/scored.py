"""Scores on any module: attached as parametrizations, read off as masks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..backbone.parameters import unwrap
from ..backbone.select import select_parameters
from ..errors import ConfigError, StateError
from ..mask import MaskSet
from ..methods.base import Method, build_method
from .parametrized import all_names, owner, put_on, take_off
from .scored_weight import ScoredModel, ScoredWeight

SCORES = ".0.scores"  # how a checkpoint's names of scores end


def attach_scores(
    model: nn.Module,
    method: Method | str = "threshold",
    select: Iterable[str] | None = None,
    *,
    scale: bool = False,
) -> dict[str, nn.Parameter]:
    """Freeze a model and attach trainable scores to some of its weights.

    For users who keep their own training loop: train the returned scores (and a head, if it is to learn) with any
    optimiser, then call `extract_masks`, which leaves the model as it was.

    Args:
        method: a method or its name (`maskpack list methods`).
        select: globs on dotted parameter names; default: every convolution and linear weight.
        scale: divide the kept weights by sqrt(density).

    Returns:
        The scores by parameter name, float32, the only parameters of the model that require a gradient.

    Raises:
        StateError: if scores are attached already.
        SelectionError: if nothing matches, or a match cannot be masked.
        ConfigError: if the method is not for such weights, or has no scale.
    """
    if isinstance(method, str):
        method = build_method(method)
    model = unwrap(model)
    if any(isinstance(m, ScoredWeight) for m in model.modules()):
        raise StateError("this model has scores already; call extract_masks(model) first")
    names = select_parameters(model, select or ())
    return attach(model, method, names, scale)


def attach(model: nn.Module, method: Method, names: Sequence[str], scale: bool) -> dict[str, nn.Parameter]:
    """Freeze a model and attach scores to exactly these parameters."""
    if scale and method.op != "zero":
        raise ConfigError(f"the method {method.id!r} removes no weights, so that there is no scale; leave it out")
    together = ScoredModel(method)
    tied = all_names(model)
    model.requires_grad_(False)
    scores = {}
    for name in names:
        place, leaf = owner(model, name)
        # one ScoredWeight for all names of a tied weight: it has one set of scores
        try:
            scored = ScoredWeight(getattr(place, leaf), scale, together)
        except ConfigError as error:
            detach_scores(model)
            raise ConfigError(f"{name}: {error}") from None
        together.members.append(scored)
        put_on(model, tied[name], scored, together.orders)
        scores[name] = scored.scores
    together.recompute.watch(model)
    return scores


def scored_weights(model: nn.Module) -> dict[str, ScoredWeight]:
    """Return the attached ScoredWeight modules by parameter name, sorted, each under its first name."""
    found: dict[str, ScoredWeight] = {}
    seen: set[int] = set()
    for raw, module in sorted(unwrap(model).named_modules(remove_duplicate=False)):
        if isinstance(module, parametrize.ParametrizationList):
            scored = module[0]
            if isinstance(scored, ScoredWeight) and id(scored) not in seen:
                seen.add(id(scored))
                found[raw.replace("parametrizations.", "").replace("_orig_mod.", "")] = scored
    return dict(sorted(found.items()))


def scores_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores among the tensors of a checkpoint, by parameter name."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(SCORES):
            # what is trained holds the backbone as `model`, itself or in its classifier
            own = name.partition("model.")[2].removesuffix(SCORES)
            found[own.replace("parametrizations.", "").replace("_orig_mod.", "")] = tensor
    return found


def scored_models(model: nn.Module) -> list[ScoredModel]:
    """Return what the scores of a model share: one for each time that some were attached, as to body and head."""
    return list(dict.fromkeys(one.model for one in scored_weights(model).values()))


@contextmanager
def without_scores(model: nn.Module) -> Iterator[None]:
    """Compute with the weights as they are, as long as this lasts."""
    models = scored_models(model)
    for one in models:
        one.off = True
    try:
        yield
    finally:
        for one in models:
            one.off = False


def set_progress(model: nn.Module, progress: float, batch_size: int = 1) -> None:
    """Tell the scores of a model where training stands, for methods that change on the way.

    Args:
        progress: share of the training steps that are done, 0 at the first step and 1 at the last. Scores that nobody
            tells are treated as finished.
        batch_size: examples of an optimiser step.
    """
    for one in scored_models(model):
        one.progress, one.batch_size = progress, batch_size


def density(scored: Iterable[ScoredWeight]) -> float:
    """Return the share of weights kept under the current scores."""
    kept = total = 0
    for one in scored:
        mask = one.binary()
        kept, total = kept + int(mask.count_nonzero()), total + mask.numel()
    return kept / total if total else 1.0


def replaced_values(model: nn.Module) -> dict[str, Tensor]:
    """Return what masks with op "replace" put in place of weights, as `Parts.values`; empty for other methods."""
    found = {}
    for name, one in scored_weights(model).items():
        if one.method.op == "replace":
            place, leaf = owner(unwrap(model), name)
            chains: Any = place.parametrizations
            weight = chains[leaf].original.detach()
            found[name] = one.method.values(weight, one.scores.detach())[~one.binary()].cpu()
    return found


def extract_masks(model: nn.Module) -> MaskSet:
    """Read the masks off a model's scores and detach the scores: the model is as before `attach_scores`.

    Its weights keep their bits, and stay frozen; the masks are not applied.

    Raises:
        StateError: if the model has no scores.
    """
    scored = scored_weights(model)
    if not scored:
        raise StateError("this model has no scores; call attach_scores(model) first")
    masks = MaskSet({name: one.mask() for name, one in scored.items()})
    detach_scores(model)
    return masks


def detach_scores(model: nn.Module) -> None:
    """Remove the scores from a model; its weights keep their bits."""
    models = scored_models(model)
    for one in models:
        one.recompute.stop()
    take_off(model, ScoredWeight, [one.orders for one in models])
