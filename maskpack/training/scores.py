"""Scores on any module: attached as parametrizations, recomputed in backward, rounded, read off as masks."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..adapter.content import LEARNING
from ..backbone.load import encoder_of
from ..backbone.model import all_names, canonical, named_buffers, named_parameters, unwrap
from ..backbone.shards import gathered, local, moved, part_of, shared_like, whole
from ..errors import ConfigError, TrainingError
from ..mask import PackedMask
from .methods.base import Method, State, methods_that_are
from .methods.topk import greatest

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


def put_on(model: nn.Module, names: Iterable[str], made: nn.Module, orders: Orders) -> None:
    """Parametrize one parameter under all its names, and note in `orders` what `take_off` needs."""
    places = dict[tuple[nn.Module, str], tuple[nn.Module, str]]()
    for name in names:
        module, leaf = owner(model, name)
        orders.setdefault(module, list(module._parameters))
        # unsafe: the parametrization keeps shape and dtype by contract, and must not be run to find that out
        parametrize.register_parametrization(module, leaf, made, unsafe=True)
        chains: Any = module.parametrizations
        places[module, leaf] = chains[leaf], "original"
    moved(unwrap(model), places)


def take_off(model: nn.Module, kind: type[nn.Module], orders: Iterable[Orders]) -> None:
    """Remove the parametrizations of one kind; the parameters themselves are put back, not copies."""
    places, gone = dict[tuple[nn.Module, str], tuple[nn.Module, str]](), list[nn.Module]()
    for module in list(unwrap(model).modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        for leaf in [leaf for leaf, chain in lists.items() if isinstance(chain[0], kind)]:  # type: ignore[index]
            places[lists[leaf], "original"] = module, leaf
            gone.append(lists[leaf][0])  # type: ignore[index]
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    moved(unwrap(model), places, gone)
    # removing a parametrization puts its parameter behind the others of its module
    for module, names in ((module, names) for one in orders for module, names in one.items()):
        if module._parameters.keys() == set(names):
            module._parameters = {name: module._parameters[name] for name in names}


@dataclass(eq=False)
class Recompute:
    """Recomputes masked weights in backward passes, so that no second copy of the weights is in memory.

    They are replaced among what autograd saves in a forward pass; compiled code decides for itself what it recomputes.
    `made` are the weights of this forward pass, by address.
    """

    made: dict[int, tuple["weakref.ref[Tensor]", Callable[[], Tensor]]] = field(default_factory=dict)
    _open: list[saved_tensors_hooks] = field(default_factory=list)

    def watch(self, model: nn.Module) -> Iterator[Any]:
        """Put hooks around every forward pass of the model, or of its encoder alone, and yield their handles."""
        for one in dict.fromkeys((model, encoder_of(model))):
            yield one.register_forward_pre_hook(self._begin)
            yield one.register_forward_hook(self._end, always_call=True)

    def note(self, result: Tensor, make: Callable[[], Tensor], *sources: Tensor) -> None:
        """Remember how an effective weight was made from its sources, within a forward pass."""
        if not self._open:
            return
        versions = [source._version for source in sources]

        def again() -> Tensor:
            if [source._version for source in sources] != versions:
                raise TrainingError(
                    "scores or weights were changed between the forward pass and its backward pass, which makes the "
                    "masked weight from them again; call backward() before optimizer.step()"
                )
            with torch.no_grad():
                return make()

        self.made[result.data_ptr()] = weakref.ref(result), again

    def _begin(self, *_: object) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            hooks = saved_tensors_hooks(self._pack, lambda saved: saved())
            hooks.__enter__()
            self._open.append(hooks)

    def _end(self, *_: object) -> None:
        if self._open:
            self._open.pop().__exit__()
            self.made.clear()

    def _pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        made, again = self.made.get(tensor.data_ptr(), (None, None))
        weight = None if made is None else made()
        # an address may be another tensor's by now
        if again is None or weight is None or tensor.numel() != weight.numel():
            kept = tensor.detach()  # the tensor itself would be a cycle of references where it is an output
            return lambda: kept
        shape, stride = tuple(tensor.shape), tensor.stride()
        return lambda: again().as_strided(shape, stride)


def rounded(values: Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down at random, so that the mean is the value; what is exact stays."""
    bits = values.view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


@dataclass(eq=False)
class Rounding:
    """Rounds scores in bfloat16 at random, after an optimiser's updates were added to them in float32.

    Nearest rounding would lose every update below 1/512 of a score. While an optimiser steps, the scores are put aside
    and zero, so that what it leaves is its update alone. So such scores do not decay, and an optimiser that divides by
    their norm is not for them.
    """

    aside: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def watch(self, scores: Sequence[nn.Parameter]) -> tuple[Any, Any]:
        """Round these scores in the steps of every optimiser from now on; return the handles of the hooks."""
        me, known = weakref.ref(self), {id(one) for one in scores}

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            rounding = me()
            members = [one for group in optimizer.param_groups for one in group["params"] if id(one) in known]
            if rounding is None or not any(one.dtype == torch.bfloat16 for one in members):
                return None
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                rounding._put_aside(members)
                return None

            def behind() -> Any:  # the closure computes with the scores, so they are put aside behind it
                found = closure()
                rounding._put_aside(members)
                return found

            return args[:1], {**kwargs, "closure": behind}

        def after(*_: object) -> None:
            rounding = me()
            if rounding is not None:
                rounding.settle(stepped=True)

        return register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)

    @torch.no_grad()
    def settle(self, stepped: bool = False) -> None:
        """Put scores back that are aside: with the update of a step, or as they were because the step failed."""
        while self.aside:
            score, was = self.aside[-1]
            score.copy_(rounded(was.float() + score.float()) if stepped else was)
            self.aside.pop()

    @torch.no_grad()
    def _put_aside(self, members: Sequence[nn.Parameter]) -> None:
        self.settle()
        for one in members:
            if one.dtype == torch.bfloat16:
                self.aside.append((local(one.detach()), local(one.detach()).clone()))
                local(one.detach()).zero_()


class Placed(torch.autograd.Function):
    """A copy of a flat weight with other values at some places, which alone get a gradient; it keeps places only."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, flat: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)  # as it is shared
        return flat.clone().index_copy_(0, whole(places).long(), values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, whole(places)), None, None


class ScoredWeight(nn.Module):
    """Parametrization that computes the effective weight from the frozen weight and its scores.

    Attributes:
        scores: of a shape that the method chose. shape: of the weight.
        places: flat positions of the weights that have scores, ascending; None: all have. The others are kept. Of a
            model that was sharded already they are shared as the scores are.
    """

    places: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: bool,
        model: "ScoredModel",
        top: float | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.method, self.scale, self.model = model.method, scale, model
        self.shape = tuple(weight.shape)
        scored = whole(weight.detach())
        self.register_buffer("places", None)
        if top is not None:
            flat = scored.flatten()
            count = max(1, round(top * flat.numel())) if top else 0
            places = greatest(flat.abs(), count).nonzero().flatten()
            self.places = shared_like(places.int() if flat.numel() < 2**31 else places, weight)
            scored = flat[places]
        learns = self.method.learns and scored.numel() > 0
        scores = self.method.init_scores(scored).to(dtype)
        self.scores = nn.Parameter(shared_like(scores, weight) if learns else scores, requires_grad=learns)

    def forward(self, weight: Tensor) -> Tensor:
        if self.model.off or not self.scores.numel():
            return weight
        state = self.state(self.training)
        result = self.effective(weight, gathered(self.scores), state)
        if not (self.method.draws and state.training):
            scores = self.scores
            make = lambda: self.effective(weight, gathered(scores), state)  # noqa: E731
            self.model.recompute.note(result, make, weight, local(scores))
        return result

    def effective(self, weight: Tensor, scores: Tensor, state: State) -> Tensor:
        """Return the weight to compute with, differentiable in the scores."""
        if self.places is None:
            return self.method.effective(weight, scores, self.scale, state)
        flat = weight.flatten()
        some = self.method.effective(flat.index_select(0, whole(self.places)), scores, self.scale, state)
        placed: Tensor = Placed.apply(some, flat, self.places)
        return placed.reshape(self.shape)

    def whole(self, kept: Tensor) -> Tensor:
        """Return a mask of the whole weight, of any dtype, from that of the weights that have scores."""
        if self.places is None:
            return kept
        ones = torch.ones(math.prod(self.shape), dtype=kept.dtype, device=kept.device)
        return ones.index_copy(0, whole(self.places).long(), kept).reshape(self.shape)

    def state(self, training: bool = False) -> State:
        """Return the state of training that the method gets beside the scores."""
        model, shape = self.model, self.shape if self.places is None else tuple(self.places.shape)
        model.rounding.settle()
        return State(model.progress, training, model.shared(self), shape, model.batch_size)

    def binary(self, shift: float = 0.0) -> Tensor:
        """Return the mask that the scores stand for, bool; `shift` is added to them."""
        return self.whole(self.method.binarize(whole(self.scores.detach()) + shift, self.state()))

    def straight(self) -> Tensor:
        """Return the mask as floats, with the gradient straight through to the scores."""
        scores = gathered(self.scores)
        kept = self.method.binarize(scores.detach(), self.state()).float()
        return self.whole(kept + scores - scores.detach())

    def mask(self) -> PackedMask:
        """Return the mask that the scores stand for, packed."""
        if self.places is not None:
            return PackedMask.from_tensor(self.binary(), self.method.op, self.scale)
        return self.method.packed(whole(self.scores.detach()), self.scale, self.state())

    def penalty(self) -> Tensor | None:
        """Return the method's penalty for the loss of a step, or None."""
        return self.method.penalty(gathered(self.scores), self.state(training=True))


Plain = Callable[[ScoredWeight, Tensor], Tensor]


@dataclass(eq=False)
class ScoredModel:
    """The state that all scores of one model share.

    Attributes:
        members: in the order of their names.
        progress: share of the training steps that are done. batch_size: examples of an optimiser step.
        off: compute with the weights as they are.
        orders, hooks: what taking the scores off needs. recompute: makes effective weights again for backward passes.
        rounding: of scores in bfloat16, in the steps of optimisers.
        head: names of modules that learn themselves and do not belong to the body.
        before: buffers and parameters that learn themselves, as they were when the scores were attached, by name.
        sparse: the checkpoints of a Trainer hold what learns, and not the base.
        plain: makes what `state_dict` gives for a masked weight, under its own name and without scores, of this and
            the frozen weight; None: `state_dict` gives weight and scores.
    """

    method: Method
    members: list[ScoredWeight] = field(default_factory=list)
    orders: Orders = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    progress: float = 1.0
    batch_size: int = 1
    off: bool = False
    recompute: Recompute = field(default_factory=Recompute)
    rounding: Rounding = field(default_factory=Rounding)
    head: tuple[str, ...] = ()
    before: dict[str, Tensor] = field(default_factory=dict)
    sparse: bool = False
    plain: Plain | None = None
    _made: tuple[object, dict[ScoredWeight, Tensor]] | None = (None, {})

    def shared(self, one: ScoredWeight) -> Tensor | None:
        """Return a member's part of `Method.shared`, computed anew when scores have changed."""
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


SCORES = ".0.scores"  # how a checkpoint's names of scores end


def attach(
    model: nn.Module,
    method: Method,
    names: Sequence[str],
    scale: bool,
    top: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, nn.Parameter]:
    """Freeze a model and attach scores to exactly these parameters; `beside` are other parameters that will learn."""
    if top is not None and not 0 <= top <= 1:
        raise ConfigError(f"top must be a share from 0 to 1, got {top}")
    if top is not None and (scale or not method.partial):
        raise ConfigError(
            f"top {top} gives scores to some weights only, which goes with the methods {methods_that_are('partial')} "
            f"without scale; got {method.id!r}{' with scale' if scale else ''}"
        )
    if scale and method.op != "zero":
        raise ConfigError(f"the method {method.id!r} removes no weights, so that there is no scale; leave it out")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"scores are float32 or bfloat16, got {dtype}; give one of these as dtype")
    together = ScoredModel(method)
    for name, tensor in {**beside, **named_buffers(model)}.items():
        together.before[name] = tensor.detach().clone()
    tied = all_names(model)
    model.requires_grad_(False)
    scores = {}
    for name in names:
        place, leaf = owner(model, name)
        # one ScoredWeight for all names of a tied weight: it has one set of scores
        try:
            scored = ScoredWeight(getattr(place, leaf), scale, together, top, dtype)
        except ConfigError as error:
            detach_scores(model)
            raise ConfigError(f"{name}: {error}") from None
        together.members.append(scored)
        put_on(model, tied[name], scored, together.orders)
        for own in tied[name]:
            hook = owner(model, own)[0].register_state_dict_post_hook(_plainly)  # type: ignore[no-untyped-call]
            together.hooks.append(hook)
        scores[name] = scored.scores
    together.hooks += [*together.recompute.watch(model), *together.rounding.watch(list(scores.values()))]
    for parameter in beside.values():
        parameter.requires_grad_(True)
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
                found[canonical(raw.replace("parametrizations.", ""))] = scored
    return dict(sorted(found.items()))


def beside_scores(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn themselves beside the scores of a model, by name."""
    before, parameters = {name for one in scored_models(model) for name in one.before}, named_parameters(model)
    return {name: parameter for name, parameter in parameters.items() if name in before}


def scores_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores among the tensors of a checkpoint, by parameter name."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(SCORES):
            # what is trained holds the backbone as `model`, itself or in its classifier
            own = name.partition("model.")[2].removesuffix(SCORES)
            found[canonical(own.replace("parametrizations.", ""))] = tensor
    return found


def scored_models(model: nn.Module) -> list[ScoredModel]:
    """Return the `ScoredModel`s of a model: one for each time that scores were attached, as to body and head."""
    return list(dict.fromkeys(one.model for one in scored_weights(model).values()))


@contextmanager
def _changed(model: nn.Module, **state: Any) -> Iterator[None]:
    """Change attributes of the shared state of a model's scores within the context."""
    models = scored_models(model)
    before = [{name: getattr(one, name) for name in state} for one in models]
    for one in models:
        vars(one).update(state)
    try:
        yield
    finally:
        for one, was in zip(models, before, strict=True):
            vars(one).update(was)


def plain_names(model: nn.Module, make: Plain) -> AbstractContextManager[None]:
    """Make `state_dict` use the model's own names, with `make` applied to masked weights, within the context."""
    return _changed(model, plain=make)


def without_scores(model: nn.Module) -> AbstractContextManager[None]:
    """Compute with the weights as they are, within the context."""
    return _changed(model, off=True)


def _plainly(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for leaf, chain in module.parametrizations.items() if parametrize.is_parametrized(module) else ():  # type: ignore[operator, union-attr]
        scored = chain[0]
        own = f"{prefix}parametrizations.{leaf}."
        if isinstance(scored, ScoredWeight) and scored.model.plain is not None and f"{own}original" in state:
            state[prefix + leaf] = scored.model.plain(scored, state[f"{own}original"])
            for name in [name for name in state if name.startswith(own)]:
                del state[name]


def set_progress(model: nn.Module, progress: float, batch_size: int = 1) -> None:
    """Tell the scores of a model which share of the training steps is done, and how many examples a step has.

    It is for methods that change on the way. Scores that nobody tells are treated as finished.
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
    """Return the values of masks with op "replace", as `Parts.values`; empty for other methods."""
    found = {}
    for name, one in scored_weights(model).items():
        if one.method.op == "replace":
            weight, scores = whole(original(unwrap(model), name).detach()), whole(one.scores.detach())
            found[name] = one.method.values(weight, scores)[~one.binary()].cpu()
    return found


@torch.no_grad()
def detach_scores(model: nn.Module) -> None:
    """Remove the scores from a model: weights, buffers, and what learned beside them have their earlier bits."""
    models, tensors = scored_models(model), {**named_parameters(model), **named_buffers(model)}
    for one in models:
        one.rounding.settle()
        for hook in one.hooks:
            hook.remove()
        for name, tensor in one.before.items():
            local(tensors[name]).copy_(part_of(tensor, tensors[name]))
            tensors[name].requires_grad_(False)
    take_off(model, ScoredWeight, [one.orders for one in models])
    LEARNING.pop(unwrap(model), None)
    for module in unwrap(model).modules():
        if isinstance(own := vars(module).get("save_pretrained"), MethodType) and own.__self__ is module:
            del module.save_pretrained
