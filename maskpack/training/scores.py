"""Scores on any module: attached as parametrizations, read off as masks."""

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize

from ..adapter.content import Parts
from ..backbone.model import aliases, named_parameters, unwrap
from ..backbone.select import match_parameters, select_parameters
from ..errors import ConfigError, StateError, TrainingError
from ..mask import MaskSet, PackedMask
from .batchnorm import batchnorm_statistics
from .methods.base import Method, State, build_method, rising_methods
from .methods.topk import greatest


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to make an effective weight again, in place of what an operation saved for its backward pass.

    Attributes:
        make: gives the weight, without gradients. sources: what it follows from; versions: theirs when it was made.
        shape, stride: of what the operation saved.
    """

    make: Callable[[], Tensor]
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


@dataclass(eq=False)
class Recompute:
    """Replaces effective weights among what autograd saves in the forward passes of a model.

    Compiled code decides for itself what it makes again.

    Attributes:
        made: in this forward pass, by address.
    """

    made: dict[int, tuple["weakref.ref[Tensor]", Recipe]] = field(default_factory=dict)
    _open: list[saved_tensors_hooks] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def watch(self, model: nn.Module) -> None:
        """Begin: in every forward pass of the model from now on."""
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def stop(self) -> None:
        """End: the model has no hooks of ours any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def note(self, result: Tensor, make: Callable[[], Tensor], *sources: Tensor) -> None:
        """Note an effective weight that is about to be used; outside of a forward pass nothing is noted."""
        if self._open:
            recipe = Recipe(make, sources, tuple(source._version for source in sources))
            self.made[result.data_ptr()] = weakref.ref(result), recipe

    def _begin(self, *_: object) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            hooks = saved_tensors_hooks(self._pack, unpack)
            hooks.__enter__()
            self._open.append(hooks)

    def _end(self, *_: object) -> None:
        if self._open:
            self._open.pop().__exit__()
            self.made.clear()

    def _pack(self, tensor: Tensor) -> Tensor | Recipe:
        noted = self.made.get(tensor.data_ptr())
        # an address may be another tensor's by now
        if noted is None or noted[0]() is None or tensor.numel() != noted[0]().numel():  # type: ignore[union-attr]
            return tensor.detach()  # the tensor itself would be a cycle of references where it is an output
        return replace(noted[1], shape=tuple(tensor.shape), stride=tensor.stride())


def unpack(saved: Tensor | Recipe) -> Tensor:
    """Return what was saved.

    Raises:
        TrainingError: if what a weight follows from was changed since.
    """
    if isinstance(saved, Tensor):
        return saved
    if any(source._version != version for source, version in zip(saved.sources, saved.versions, strict=True)):
        raise TrainingError(
            "scores or weights were changed between the forward pass and its backward pass, which makes the masked "
            "weight from them again; call backward() before optimizer.step()"
        )
    with torch.no_grad():
        return saved.make().as_strided(saved.shape, saved.stride)


Orders = dict[nn.Module, list[str]]  # names of the parameters of a module, in their order before one was parametrized


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a parameter, and the parameter's name there."""
    parent, _, leaf = name.rpartition(".")
    module = model
    for part in parent.split(".") if parent else ():
        module = getattr(module, part)
        module = unwrap(module)
    return module, leaf


def original(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter that is parametrized."""
    module, leaf = owner(model, name)
    chains: Any = module.parametrizations
    weight: nn.Parameter = chains[leaf].original
    return weight


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each parameter by its first one; a tied parameter has several."""
    found: dict[str, list[str]] = {}
    for name, first in aliases(model).items():
        found.setdefault(first, []).append(name)
    return found


def put_on(model: nn.Module, names: Iterable[str], made: nn.Module, orders: Orders) -> None:
    """Parametrize one parameter under all its names, and note in `orders` what `take_off` needs."""
    for name in names:
        module, leaf = owner(model, name)
        orders.setdefault(module, list(module._parameters))
        # unsafe: the parametrization keeps shape and dtype by contract, and must not be run to find that out
        parametrize.register_parametrization(module, leaf, made, unsafe=True)


def take_off(model: nn.Module, kind: type[nn.Module], orders: Iterable[Orders]) -> None:
    """Remove the parametrizations of one kind; the parameters themselves are put back, not copies."""
    for module in list(unwrap(model).modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for leaf in [leaf for leaf, chain in lists.items() if isinstance(chain[0], kind)]:  # type: ignore[index]
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    # removing a parametrization puts its parameter behind the others of its module
    for module, names in ((module, names) for one in orders for module, names in one.items()):
        if module._parameters.keys() == set(names):
            module._parameters = {name: module._parameters[name] for name in names}


class ScoredWeight(nn.Module):
    """Parametrization that computes the effective weight from the frozen weight and its scores.

    Attributes:
        scores: float32, of a shape that the method chose.
        shape: of the weight.
        places: flat positions of the weights that have scores, ascending; None: all have. The others are kept.
        model: what the scores of one model share.
    """

    places: Tensor | None

    def __init__(self, weight: Tensor, scale: bool, model: "ScoredModel", top: float | None = None):
        super().__init__()
        self.method, self.scale, self.model = model.method, scale, model
        self.shape = tuple(weight.shape)
        scored = weight.detach()
        self.register_buffer("places", None)
        if top is not None:
            flat = scored.flatten()
            count = max(1, round(top * flat.numel())) if top else 0
            self.places = greatest(flat.abs(), count).nonzero().flatten()
            scored = flat[self.places]
        learns = self.method.learns and scored.numel() > 0
        self.scores = nn.Parameter(self.method.init_scores(scored), requires_grad=learns)

    def forward(self, weight: Tensor) -> Tensor:
        if self.model.off or not self.scores.numel():
            return weight
        state = self.state(self.training)
        result = self.effective(weight, self.scores, state)
        if not (self.method.draws and state.training):
            scores = self.scores
            self.model.recompute.note(result, lambda: self.effective(weight, scores, state), weight, scores)
        return result

    def effective(self, weight: Tensor, scores: Tensor, state: State) -> Tensor:
        """Return the weight to compute with, differentiable in the scores."""
        if self.places is None:
            return self.method.effective(weight, scores, self.scale, state)
        flat = weight.flatten()
        some = self.method.effective(flat[self.places], scores, self.scale, state)
        return flat.index_copy(0, self.places, some).reshape(self.shape)

    def whole(self, kept: Tensor) -> Tensor:
        """Return a mask of the whole weight, of any dtype, from that of the weights that have scores."""
        if self.places is None:
            return kept
        ones = torch.ones(math.prod(self.shape), dtype=kept.dtype, device=kept.device)
        return ones.index_copy(0, self.places, kept).reshape(self.shape)

    def state(self, training: bool = False) -> State:
        """Return what the method is told beside the scores."""
        model, shape = self.model, self.shape if self.places is None else tuple(self.places.shape)
        return State(model.progress, training, model.shared(self), shape, model.batch_size)

    def binary(self, shift: float = 0.0) -> Tensor:
        """Return the mask that the scores stand for, bool; `shift` is added to them."""
        return self.whole(self.method.binarize(self.scores.detach() + shift, self.state()))

    def mask(self) -> PackedMask:
        """Return the mask that the scores stand for, packed."""
        if self.places is not None:
            return PackedMask.from_tensor(self.binary(), self.method.op, self.scale)
        return self.method.packed(self.scores.detach(), self.scale, self.state())

    def penalty(self) -> Tensor | None:
        """Return what the method adds to the loss of a step."""
        return self.method.penalty(self.scores, self.state(training=True))


@dataclass(eq=False)
class ScoredModel:
    """What the scores of one model have in common.

    Attributes:
        members: in the order of their names.
        progress: share of the training steps that are done. batch_size: examples of an optimiser step.
        off: compute with the weights as they are.
        orders: what taking the scores off needs. recompute: makes effective weights again for backward passes.
        before: buffers and parameters that learn themselves, as they were when the scores were attached, by name.
    """

    method: Method
    members: list[ScoredWeight] = field(default_factory=list)
    orders: Orders = field(default_factory=dict)
    progress: float = 1.0
    batch_size: int = 1
    off: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    before: dict[str, Tensor] = field(default_factory=dict)
    _made: tuple[object, dict[ScoredWeight, Tensor]] | None = (None, {})

    def shared(self, one: ScoredWeight) -> Tensor | None:
        """Return what the method tells a member of all scores, made anew when these have changed."""
        if self._made is None:
            return None
        now = self.progress, [(id(member.scores), member.scores._version) for member in self.members]
        if self._made[0] != now:
            found = self.method.shared([member.scores for member in self.members], self.progress)
            if found is None:
                self._made = None
                return None
            self._made = now, dict(zip(self.members, found, strict=True))
        return self._made[1][one]


WORDS = frozenset(("norms", "biases", "none"))  # that stand for parameters that learn themselves
SCORES = ".0.scores"  # how a checkpoint's names of scores end


def attach_scores(
    model: nn.Module,
    method: Method | str = "threshold",
    select: Iterable[str] | None = None,
    *,
    top: float | None = None,
    train: Iterable[str] = (),
    scale: bool = False,
) -> dict[str, nn.Parameter]:
    """Freeze a model and attach trainable scores to some of its weights.

    For users who keep their own training loop: train every parameter that requires a gradient with any optimiser, then
    call `extract_parts` or `extract_masks`, which leave the model as it was.

    Args:
        method: a method or its name (`maskpack list methods`).
        select: globs on dotted parameter names; default: every convolution and linear weight.
        top: share of each parameter's weights that have scores, those with the greatest absolute values; default: all.
        train: what learns itself: "norms", "biases", or globs of parameters.
        scale: divide the kept weights by sqrt(density).

    Returns:
        The scores by parameter name, float32. They and the parameters of `train` require a gradient, nothing else does.

    Raises:
        StateError: if scores are attached already.
        SelectionError: if nothing matches, or a match cannot be masked.
        ConfigError: if the method is not for such weights, or has no scale or no `top`.
    """
    if isinstance(method, str):
        method = build_method(method)
    model = unwrap(model)
    if any(isinstance(m, ScoredWeight) for m in model.modules()):
        raise StateError("this model has scores already; call extract_masks(model) first")
    names = select_parameters(model, select or ())
    learning = trained_themselves(model, train, names)
    before = {**learning, **dict(model.named_buffers())}
    scores = attach(model, method, names, scale, top)
    for parameter in learning.values():
        parameter.requires_grad_(True)
    scored_models(model)[0].before = {name: tensor.detach().clone() for name, tensor in before.items()}
    return scores


def trained_themselves(
    model: nn.Module, train: Iterable[str], masked: Collection[str], head: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the parameters that learn themselves beside scores, by name; to be asked before scores are attached.

    Args:
        train: as of `learning_names`; words leave masked parameters out. masked: names of parameters with a mask.
        head: modules that are not part of the body.

    Raises:
        SelectionError: if a pattern matches nothing. ConfigError: if a parameter would be masked as well.
    """
    globs = [one for one in train if one not in WORDS]
    both = [name for name in match_parameters(model, globs, "train", head) if name in masked]
    if both:
        raise ConfigError(
            f"train would train {len(both)} parameters that are masked, first {both[0]!r}; a mask needs frozen "
            f"weights: leave them out of train, or out of the mask"
        )
    parameters = named_parameters(model)
    return {name: parameters[name] for name in learning_names(model, train, head) if name not in masked}


def learning_names(model: nn.Module, train: Iterable[str], head: Sequence[str] = ()) -> list[str]:
    """Return the names of the body's parameters that `train` means, sorted.

    Args:
        train: globs, or words: "norms" (scales and shifts of all normalisation layers) and "biases" (of all layers),
            of which a model may have none, and "none".

    Raises:
        SelectionError: if a glob matches nothing.
    """
    words = set(train)
    found = set(match_parameters(model, sorted(words - WORDS), "train", head))
    norms = [n for n, module in unwrap(model).named_modules() if "norm" in type(module).__name__.lower()]
    for name in match_parameters(model, ["*"], "train", head):
        place, _, leaf = name.rpartition(".")
        if ("norms" in words and place in norms) or ("biases" in words and leaf.endswith("bias")):
            found.add(name)
    return sorted(found)


def attach(
    model: nn.Module, method: Method, names: Sequence[str], scale: bool, top: float | None = None
) -> dict[str, nn.Parameter]:
    """Freeze a model and attach scores to exactly these parameters."""
    if top is not None and (scale or not method.rising):
        raise ConfigError(
            f"top {top} gives scores to some weights only, which goes with the methods {rising_methods()} without "
            f"scale; got {method.id!r}{' with scale' if scale else ''}"
        )
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
            scored = ScoredWeight(getattr(place, leaf), scale, together, top)
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
            weight = original(unwrap(model), name).detach()
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


@torch.no_grad()
def extract_parts(model: nn.Module) -> Parts:
    """Read all that a model learned since `attach_scores`, as parts of an adapter, and put the model back as it was.

    Returns:
        The masks, values of masks that replace weights, the parameters of `train`, and the BatchNorm statistics if any
        of them changed. A head that learned is the caller's to add.

    Raises:
        StateError: if the model has no scores.
    """
    before = {name: tensor for one in scored_models(model) for name, tensor in one.before.items()}
    values, masks = replaced_values(model), extract_masks(model)
    now = {**dict(unwrap(model).named_parameters()), **dict(unwrap(model).named_buffers())}
    parameters = {name: now[name].detach().cpu().clone() for name in before if isinstance(now[name], nn.Parameter)}
    statistics = batchnorm_statistics(unwrap(model))
    changed = any(not torch.equal(now[name], before[name]) for name in statistics if name in before)
    for name, tensor in before.items():
        now[name].copy_(tensor)
        now[name].requires_grad_(False)
    return Parts(masks, None, statistics if changed else {}, parameters, values)


def detach_scores(model: nn.Module) -> None:
    """Remove the scores from a model; its weights keep their bits."""
    models = scored_models(model)
    for one in models:
        one.recompute.stop()
    take_off(model, ScoredWeight, [one.orders for one in models])
