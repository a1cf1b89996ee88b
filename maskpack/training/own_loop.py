"""Support of custom training loops: scores on any model, and all that it learned as parts of an adapter."""

import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.content import LEARNING, Learned, Parts
from ..backbone.fingerprint import fingerprint_of
from ..backbone.model import (
    Embedding,
    Head,
    aliases,
    body_of,
    canonical,
    inside,
    named_buffers,
    named_parameters,
    source_of,
    tied_outputs,
    unusable,
    unwrap,
)
from ..backbone.select import select_parameters
from ..backbone.shards import any_shared, first_process, is_managed, whole
from ..errors import SelectionError, StateError
from ..mask import MaskSet
from . import stored
from .config import Store
from .learn import trained_themselves
from .methods.base import Method, build_method
from .scores import (
    SCORES,
    ScoredWeight,
    attach,
    beside_scores,
    detach_scores,
    plain_names,
    replaced_values,
    scored_models,
    scored_weights,
)
from .stored import batchnorm_statistics

LOG = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"checkpoint-\d+")  # what a Trainer calls the folders from which it goes on
PLACES = ".0.places"


def attach_scores(
    model: nn.Module,
    method: Method | str = "threshold",
    select: Iterable[str] | None = None,
    *,
    top: float | None = None,
    dtype: torch.dtype | None = None,
    train: Iterable[str] = (),
    head: str | Iterable[str] | None = None,
    experts: bool = True,
    scale: bool = False,
) -> dict[str, nn.Parameter]:
    """Freeze a model and attach trainable scores to some of its weights.

    For users who keep their own training loop: train every parameter that requires a gradient with any optimiser,
    without weight decay for scores, then call `save_adapter(path, model)`, and `extract_parts(model)`, which leaves the
    model as it was. `fully_shard` may be called before or after; then every process calls these functions.

    Args:
        method: a method or its name (`maskpack list methods`).
        select: globs on dotted parameter names; default: every convolution and linear weight of the body.
        top: share of each parameter's weights that have scores, those with the greatest absolute values; default: all.
            The others are kept, and take no memory.
        dtype: of the scores: float32 (default), or bfloat16, to which every optimiser's steps are rounded at random.
        train: what learns itself: "norms", "biases", or globs of parameters.
        head: names of modules that learn themselves and do not belong to the base; default: those that are new beside
            the checkpoint of a model of transformers or timm. Name those that you made anew elsewhere. `()`: none.
        experts: weights of experts that are fused into one parameter are selected by default too.
        scale: divide the kept weights by sqrt(density).

    Returns:
        The scores by parameter name. They, and what `train` and `head` name, require a gradient, nothing else does.

    Raises:
        StateError: if scores are attached already.
        SelectionError: if nothing matches, or a match cannot be masked.
        ConfigError: if the method is not for such weights, or has no scale or no `top`.

    Example:
        scores = attach_scores(model, train=["norms"], head="fc")
        optimizer = torch.optim.Adam(one for one in model.parameters() if one.requires_grad)
        model(images).sum().backward()
        optimizer.step()
        save_adapter("./mine", model, "my-network")
    """
    if isinstance(method, str):
        method = build_method(method)
    model = unwrap(model)
    if any(isinstance(m, ScoredWeight) for m in model.modules()):
        raise StateError("this model has scores already; call extract_parts(model) first")
    heads = new_modules(model) if head is None else [head] if isinstance(head, str) else sorted(head)
    if unknown := sorted(set(heads) - {canonical(name) for name, _ in model.named_modules()}):
        raise SelectionError(f"the model has no module {unknown[0]!r} to be its head; name one of named_modules()")
    patterns = [select] if isinstance(select, str) else select or ()
    first = aliases(model)
    own = {first[name] for name in first if inside(name, heads)}
    names = [n for n in select_parameters(model, patterns, head=heads, experts=experts) if n not in own]
    if not names:
        raise SelectionError(f"nothing is left to mask beside the head {', '.join(heads)}; select other parameters")
    learning = trained_themselves(model, train, names)
    learning |= {name: one for name, one in named_parameters(model).items() if name in own and one.is_floating_point()}
    if any_shared(named_parameters(model)) and not is_managed(model):
        raise StateError(
            "parameters of this model are shared by tensor parallelism, under which scores cannot be trained; shard it "
            "by fully_shard instead, or load it whole"
        )
    scores = attach(model, method, names, scale, top, dtype=dtype or torch.float32, beside=learning)
    scored_models(model)[0].head = tuple(heads)
    LEARNING[model] = learned
    for module in model.modules():
        if callable(getattr(module, "save_pretrained", None)):
            module.save_pretrained = MethodType(save_pretrained, module)  # type: ignore[assignment]
    return scores


def new_modules(model: nn.Module) -> list[str]:
    """Return the outermost modules that are new beside a checkpoint, of a model of transformers or timm.

    transformers marks every parameter that was read. Embeddings and parameters without data lose the mark where they
    are made larger or put elsewhere, so they count as read. In timm a classifier is new that has other classes than the
    checkpoint.
    """
    stated: Any = getattr(model, "pretrained_cfg", None) or {}
    if stated.get("num_classes") and getattr(model, "num_classes", 0) not in (0, stated["num_classes"]):
        classifier = stated.get("classifier") or ()
        return [classifier] if isinstance(classifier, str) else sorted(classifier)
    parameters = named_parameters(model)
    modules = {canonical(name): one for name, one in model.named_modules(remove_duplicate=False)}
    old = {
        name
        for name, one in parameters.items()
        if getattr(one, "_is_hf_initialized", False)
        or unusable(one)
        or isinstance(modules[name.rpartition(".")[0]], nn.Embedding)
    }
    if not any(getattr(one, "_is_hf_initialized", False) for one in parameters.values()):
        return []  # nothing was read
    holding = (name for name, one in modules.items() if name and next(one.parameters(), None) is not None)
    whole = [place for place in holding if not any(inside(name, [place]) for name in old)]
    return sorted(one for one in whole if not any(inside(one, [other]) for other in whole if other != one))


@torch.no_grad()
def settle(model: nn.Module, store: Store = "coded") -> None:
    """Put the values that are stored in few bytes into a model that has learned: then evaluate it, and save it.

    Norms and statistics become steps from the base's, a head that is one linear layer steps, all else that learned
    beside scores float16. `save_adapter(path, model)` stores what the model has, to the bit: without this, float32.

    Args:
        store: see `TrainConfig`.

    Raises:
        StateError: if the model has no scores.

    Example:
        attach_scores(model)
        settle(model)  # after training
        save_adapter("my-adapter", model)
    """
    if any_shared(named_parameters(model)):
        raise StateError("a sharded model cannot be settled; save_adapter(path, model) saves it as it is")
    models = scored_models(model)
    if not models:
        raise StateError("this model has no scores; call attach_scores(model) first")
    before, linear = _before(model), _linear_head(model)
    own = [] if linear is None else [id(one) for one in linear.parameters()]
    parameters = named_parameters(model)
    found = {name: one.detach().clone() for name, one in parameters.items()}
    learned = {name: one for name, one in beside_scores(model).items() if id(one) not in own}
    stored.settle(model, before, learned, store)
    if linear is not None:
        stored.settle_head(linear, store)
    for name, tensor in before.items():  # norms whose statistics went into weight and bias
        if name in parameters and not torch.equal(parameters[name], found[name]):
            models[0].before.setdefault(name, tensor)


def _before(model: nn.Module) -> dict[str, Tensor]:
    """Return norms and buffers from before the model learned, on their present devices."""
    now = {**named_parameters(model), **named_buffers(model)}
    was = {name: tensor.to(now[name].device) for one in scored_models(model) for name, tensor in one.before.items()}
    return {**stored.beside_masks(model), **was}


def _heads(model: nn.Module) -> list[str]:
    """Return the modules that the base has not."""
    return [name for one in scored_models(model) for name in one.head]


def _linear_head(model: nn.Module) -> nn.Linear | None:
    """Return the head if there is one and it is one linear layer."""
    heads = _heads(model)
    linear = unwrap(model).get_submodule(heads[0]) if len(heads) == 1 else None
    return linear if isinstance(linear, nn.Linear) else None


@torch.no_grad()
def learned_parts(model: nn.Module) -> Parts:
    """Return all that a model learned since scores were attached; it goes on learning.

    A head of another kind than one linear layer is among the parameters. Statistics are there if any changed.
    """
    scored, models = scored_weights(model), scored_models(model)
    if not scored:
        raise StateError("this model has no scores; call attach_scores(model) first")
    masks = MaskSet({name: one.mask() for name, one in scored.items()})
    buffers = named_buffers(model)
    heads = _heads(model)
    before = {name: tensor for one in models for name, tensor in one.before.items()}
    dense: dict[str, Tensor] = {**beside_scores(model)}
    statistics = {canonical(name): tensor for name, tensor in batchnorm_statistics(unwrap(model)).items()}
    changed = {n for n, t in buffers.items() if n in before and t.is_floating_point() and not torch.equal(t, before[n])}
    dense |= {name: buffers[name] for name in changed - statistics.keys()}
    head = None
    if (linear := _linear_head(model)) is not None:
        dense = {name: tensor for name, tensor in dense.items() if not inside(name, heads)}
        head = Head(Embedding(heads[0]), *(None if p is None else _copy(p) for p in (linear.weight, linear.bias)))  # type: ignore[arg-type]
    whole = {name: _copy(tensor) for name, tensor in dense.items()}
    return Parts(masks, head, statistics if changed & statistics.keys() else {}, whole, replaced_values(model))


@torch.no_grad()
def _short_parts(model: nn.Module) -> Parts:
    """Return all that a model learned, each tensor as short as it comes back to the bit."""
    parts = learned_parts(model)
    head = None if parts.head is None else stored.kept_head(parts.head)
    return replace(stored.shortened(parts, model, _before(model), _heads(model)), head=head)


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().clone()


def learned(model: nn.Module, name: str | None) -> Learned:
    """Return the parts that a model learned, with fingerprint and tensors of its base, whose id is `name`."""
    parts, models = _short_parts(model), scored_models(model)
    known = {**named_parameters(model), **named_buffers(model)}
    was = {id(known[key]): tensor for one in models for key, tensor in one.before.items()}
    with plain_names(model, lambda _, weight: weight):
        now = unwrap(model).state_dict(keep_vars=True)
    state = {canonical(key): was.get(id(tensor), tensor) for key, tensor in now.items()}
    heads = {*(head for one in models for head in one.head), *tied_outputs(model, [*parts.masks, *parts.parameters])}
    base, (stated, revision) = body_of(state, heads), source_of(model)
    own = fingerprint_of(base, name or stated, revision, tuple(sorted(heads)))
    return Learned(parts, own, base, first_process(known.values()))


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Make `state_dict` return the weights with masks applied, under the model's own names, within the context."""
    made: dict[ScoredWeight, Tensor] = {}  # of tied weights one

    @torch.no_grad()
    def effective(one: ScoredWeight, weight: Tensor) -> Tensor:
        if one not in made:
            made[one] = one.effective(weight, one.scores, one.state()).detach()
        return made[one]

    with plain_names(model, effective):
        yield


def learning_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters that learn, scores among them, and buffers."""
    state = model.state_dict(keep_vars=True)
    buffers = {n for n, tensor in state.items() if not isinstance(tensor, nn.Parameter) and not n.endswith(PLACES)}
    return {n: one.detach() for n, one in state.items() if one.requires_grad or n.endswith(SCORES) or n in buffers}


def stop_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set the weight decay of an optimiser's groups that hold scores to 0, and say so in the log."""
    scores = {id(one.scores) for one in scored_weights(model).values()}
    for group in optimizer.param_groups:
        mine = [id(one) in scores for one in group["params"]]
        if any(mine) and group.get("weight_decay"):
            LOG.warning(
                "scores must not decay: the weight decay %s of %d scores' tensors, and of %d others in their group, is "
                "0 now",
                group["weight_decay"],
                sum(mine),
                len(mine) - sum(mine),
            )
            group["weight_decay"] = 0.0


def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **options: Any) -> Any:
    """Write the merged model; replaces `save_pretrained` of a model that has scores.

    A trainer's checkpoint, a folder "checkpoint-NUMBER", has the scores beside that, from which training goes on; or,
    with `ScoredModel.sparse`, only what learns.
    """
    write, given = type(self).save_pretrained, options.get("state_dict")
    if any_shared(named_parameters(self)):
        raise StateError(
            "a sharded model with scores is saved by save_adapter(path, model), and its training by "
            "torch.distributed.checkpoint; the merged model is written by one process that loads the adapter"
        )
    if not CHECKPOINT.fullmatch(Path(save_directory).name):
        with merged(self):
            return write(self, save_directory, *args, **{**options, **({"state_dict": None} if given else {})})
    if all(one.sparse for one in scored_models(self)):
        return write(self, save_directory, *args, **{**options, "state_dict": learning_state(self)})
    scores = {name: tensor for name, tensor in self.state_dict().items() if name.endswith(SCORES)}
    with merged(self):
        return write(self, save_directory, *args, **{**options, "state_dict": {**self.state_dict(), **scores}})


@dataclass(frozen=True, slots=True)
class Trainable:
    """Numbers of scores, of masked weights, of parameters that learn themselves, and of all parameters."""

    scores: int
    masked: int
    dense: int
    total: int

    def __str__(self) -> str:
        share = 100 * (self.scores + self.dense) / max(self.total, 1)
        return (
            f"{self.scores:,} scores on {self.masked:,} masked weights, {self.dense:,} parameters learn themselves: "
            f"{share:.2f} % of {self.total:,}"
        )


def count_trainable(model: nn.Module) -> Trainable:
    """Count the parameters that learn in a model; `print` shows them in a line.

    Example:
        attach_scores(model)
        print(count_trainable(model))
    """
    scored = scored_weights(model).values()
    known = {id(one.scores) for one in scored}
    parameters = [one for one in unwrap(model).parameters() if id(one) not in known]
    return Trainable(
        sum(one.scores.numel() for one in scored if one.scores.requires_grad),
        sum(math.prod(one.shape) for one in scored),
        sum(one.numel() for one in parameters if one.requires_grad),
        sum(one.numel() for one in parameters),
    )


def extract_masks(model: nn.Module) -> MaskSet:
    """Read the masks off a model's scores and detach the scores: the model is as before `attach_scores`.

    Its weights keep their bits, and stay frozen; the masks are not applied.

    Raises:
        StateError: if the model has no scores.

    Example:
        attach_scores(model)
        print(extract_masks(model).density)
    """
    return extract_parts(model).masks


def extract_parts(model: nn.Module) -> Parts:
    """Read all that a model learned since `attach_scores`, as parts of an adapter, and put the model back as it was.

    Returns:
        The masks, values of masks that replace weights, the head, the parameters of `train`, and the BatchNorm
        statistics if any of them changed.

    Raises:
        StateError: if the model has no scores.

    Example:
        attach_scores(model)
        parts = extract_parts(model)  # the model is as it was
    """
    parts = _short_parts(model)
    detach_scores(model)
    return parts
