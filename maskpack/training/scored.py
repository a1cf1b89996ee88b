"""Scores on any module: attached as parametrizations, read off as masks."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..backbone.parameters import aliases, unwrap
from ..backbone.select import select_parameters
from ..errors import StateError
from ..mask import MaskSet, PackedMask
from ..methods.base import Method, build_method

SCORES = ".0.scores"  # how a checkpoint's names of scores end


class ScoredWeight(nn.Module):
    """Parametrization that computes the effective weight from the frozen weight and its scores.

    Attributes:
        scores: trained, float32, of the weight's shape.
    """

    def __init__(self, weight: Tensor, method: Method, scale: bool):
        super().__init__()
        self.method = method
        self.scale = scale
        self.scores = nn.Parameter(method.init_scores(weight.detach()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.method.effective(weight, self.scores, self.scale)

    def mask(self) -> PackedMask:
        """Return the mask that the scores stand for."""
        return PackedMask.from_tensor(self.method.binarize(self.scores.detach()), scale=self.scale)


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
    tied: dict[str, list[str]] = {}
    for name, first in aliases(model).items():
        tied.setdefault(first, []).append(name)
    model.requires_grad_(False)
    scores = {}
    for name in names:
        owner, leaf = _owner(model, name)
        # one ScoredWeight for all names of a tied weight: it has one set of scores
        scored = ScoredWeight(getattr(owner, leaf), method, scale)
        for alias in tied[name]:
            # unsafe: the parametrization keeps shape and dtype by contract, and must not be run to find that out
            parametrize.register_parametrization(*_owner(model, alias), scored, unsafe=True)
        scores[name] = scored.scores
    return scores


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, leaf = name.rpartition(".")
    module = model
    for part in parent.split(".") if parent else ():
        module = getattr(module, part)
        module = unwrap(module)
    return module, leaf


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


def density(scored: Iterable[ScoredWeight]) -> float:
    """Return the share of weights kept under the current scores."""
    kept = total = 0
    for one in scored:
        kept += int(one.method.binarize(one.scores.detach()).count_nonzero())
        total += one.scores.numel()
    return kept / total if total else 1.0


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
    for module in list(unwrap(model).modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for leaf in [leaf for leaf, chain in lists.items() if isinstance(chain[0], ScoredWeight)]:  # type: ignore[index]
            # the frozen weight itself is put back, not a copy
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
