"""Choose the adapter of a bank that fits an input, by the entropy of outputs or by features of the base."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter.content import Parts
from ..adapter.values import Steps
from ..backbone.classifier import Classifier, Inputs, batch_of, classifier_from, embed_batch, example_count, modes_kept
from ..backbone.model import Embedding, find_head, unwrap
from ..errors import ConfigError, check_argument, short_repr
from ..mask import PackedMask
from .apply import at_places, exchange, places, rewritten, tensors_of, values_at
from .bank import MaskBank

OWN = 0.99  # share of a task's own examples that lie within its limit


@dataclass(frozen=True, slots=True)
class Identified:
    """Which adapter a batch is for, by name; None: none of them. `likeliest` is the best one in any case.

    The confidence is from 0 to 1. Scores are greater where likelier; their unit depends on how they were found. A
    backward pass counts as two forward passes.
    """

    name: str | None
    likeliest: str
    confidence: float
    scores: Mapping[str, float]
    passes: int


@dataclass(frozen=True, slots=True, eq=False)
class Profiles:
    """Features of the base on examples of k tasks: means (k, D), deviation within a task (D,), limits (k,).

    A limit is the distance within which OWN of a task's own examples lie.
    """

    names: tuple[str, ...]
    means: Tensor
    deviation: Tensor
    limits: Tensor
    embedding: Embedding

    __repr__ = short_repr

    def nearest(self, inputs: Inputs, model: nn.Module, least: float) -> Identified:
        """Return the task that most of a batch is nearest to; none if the batch lies outside of its limit."""
        features = embed_batch(model, self.embedding, inputs)
        distances = _distances(features, self.means, self.deviation)
        votes = torch.bincount(distances.argmin(1), minlength=len(self.names)) / len(features)
        best = int(votes.argmax())
        confidence = float(votes[best])
        far = float(distances[:, best].median()) > float(self.limits[best])
        name = None if far or confidence < least else self.names[best]
        scores = dict(zip(self.names, (-distances.mean(0)).tolist(), strict=True))
        return Identified(name, self.names[best], confidence, scores, 1)


def profiles(bank: MaskBank, examples: Mapping[str, Tensor | Mapping[str, Tensor]]) -> Profiles:
    """Return the profiles of tasks for `identify`, by two or more preprocessed examples for each adapter's name."""
    if not examples:
        raise ConfigError("there are no examples of any task; give some by the names of adapters")
    heads = [bank.parts(name).head for name in examples]
    embedding = Embedding(find_head(bank.model)) if heads[0] is None else heads[0].embedding
    with bank.disabled():
        found = {name: embed_batch(bank.model, embedding, batch_of(inputs)) for name, inputs in examples.items()}
    for name, features in found.items():
        if len(features) < 2:
            raise ConfigError(f"a profile needs two examples at least, and {name!r} has {len(features)}")
    means = torch.stack([features.mean(0) for features in found.values()])
    tasks = list(zip(found.values(), means, strict=True))
    deviation = torch.cat([features - mean for features, mean in tasks]).std(0).clamp(min=1e-6)
    limits = [_distances(features, mean[None], deviation)[:, 0].quantile(OWN) for features, mean in tasks]
    return Profiles(tuple(found), means, deviation, torch.stack(limits), embedding)


def _distances(features: Tensor, means: Tensor, deviation: Tensor) -> Tensor:
    """Return root mean squares of (features - mean) / deviation, (B, k)."""
    return torch.cdist(features / deviation, means / deviation) / math.sqrt(len(deviation))


@dataclass(frozen=True, slots=True, eq=False)
class Superposition:
    """The networks theta(a) = sum of a_i theta_i, after "Supermasks in Superposition" (Wortsman et al., 2020).

    theta_i are all tensors as adapter i leaves them: masked weights, statistics, parameters, head. Nothing is written
    into the model, which has its base's bits.

    Attributes:
        module: what computes: the model, or an encoder with a head behind it.
        base: the tensors of `module` that some adapter changes, by name.
        changes: for each adapter, by the same names, a mask or what stands in the place of the tensor.
        values: for each adapter, what masks with op "replace" put in.
    """

    module: nn.Module
    base: Mapping[str, Tensor]
    changes: Sequence[Mapping[str, PackedMask | Tensor]]
    values: Sequence[Mapping[str, Tensor | Steps]]

    __repr__ = short_repr

    def theta(self, index: int, name: str) -> Tensor:
        """Return a tensor as one adapter leaves it: a new one, in the base's dtype."""
        base, change = self.base[name], self.changes[index].get(name)
        if isinstance(change, Tensor):
            return change.to(base)
        if change is not None and not at_places(change):
            return rewritten(base.detach(), change)
        result = base.detach().clone()
        if change is not None:
            at = places(change.bits, result.device)
            exchange(result, change, at, values_at(self.values[index].get(name), result, at), [])
        return result

    def added(self, weights: Tensor) -> dict[str, Tensor]:
        """Return theta(a) by name, for a of shape (k,); added up in float32, one tensor at a time."""
        found = {}
        for name, base in self.base.items():
            parts = [self.theta(i, name).float() * weight for i, weight in enumerate(weights.tolist()) if weight]
            found[name] = torch.stack(parts).sum(0).to(base.dtype)
        return found

    def slopes(self, inputs: Inputs, weights: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        """Return the loss of the logits at a, and its gradient for a, (k,): sum of dL/dtheta * theta_i.

        One forward and one backward pass, whatever k is. Statistics are added up as all else is, and count as
        constants: PyTorch's BatchNorm has no gradient for them.
        """
        point = self.added(weights)
        learned = [name for name in point if isinstance(self.base[name], nn.Parameter)]
        with torch.enable_grad():
            inner = [point[name].requires_grad_() for name in learned]
            value = loss(self.logits(inputs, point))
            slopes = torch.autograd.grad(value, inner, allow_unused=True)
        found = torch.zeros(len(self.changes))
        for name, slope in zip(learned, slopes, strict=True):
            if slope is not None:
                products = [(slope.float() * self.theta(i, name).float()).sum() for i in range(len(found))]
                found += torch.stack(products).cpu()
        return float(value.detach()), found

    def logits(self, inputs: Inputs, tensors: Mapping[str, Tensor]) -> Tensor:
        named = isinstance(inputs, dict) and not isinstance(self.module, Classifier)
        arguments: tuple[Any, ...] = () if named else (inputs,)
        output = functional_call(self.module, dict(tensors), arguments, dict(inputs) if named else None)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def superposition(model: nn.Module, parts: Mapping[str, Parts]) -> Superposition:
    """Return the superposition of adapters, whose heads have one shape, on a model that has its base's bits."""
    module, prefix = unwrap(model), ""
    first = next(iter(parts.values())).head
    if first is not None and first.module is None:  # behind an encoder
        module, prefix = classifier_from(module, first).eval(), "model."
    shapes, changes, values = set(), list[dict[str, PackedMask | Tensor]](), []
    for own in parts.values():
        own = own.resolved(tensors_of(unwrap(model)))
        head = {} if own.head is None else own.head.named_tensors("linear")
        shapes.add(tuple((name, tensor.shape) for name, tensor in head.items()))
        body: dict[str, PackedMask | Tensor] = {**own.masks, **own.dense}
        changes.append({**{prefix + name: change for name, change in body.items()}, **head})
        values.append({prefix + name: tensor for name, tensor in own.values.items()})
    if len(shapes) != 1:
        raise ConfigError(
            f"masks are added up with their heads, and those of {', '.join(map(repr, parts))} have not one shape; "
            "choose others, or how='each', which asks one mask after the other"
        )
    state = tensors_of(module)
    return Superposition(module, {name: state[name] for name in sorted(set().union(*changes))}, changes, values)


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of each row, in nats, (B,)."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


How = Literal["one-shot", "binary", "each"]
HOWS: tuple[How, ...] = get_args(How)
LEAST = 0.5  # confidence below which it is none of them


def identify(
    bank: MaskBank,
    inputs: Tensor | Mapping[str, Tensor],
    how: "How | Profiles" = "one-shot",
    *,
    names: Sequence[str] | None = None,
    least: float = LEAST,
) -> Identified:
    """Return which adapter of a bank fits a batch of one unknown task; the model computes afterwards as before.

    By entropy, after "Supermasks in Superposition" (Wortsman et al., 2020): weights are the mean over all adapters, and
    the right adapter is the one whose share lowers the entropy of the outputs most.

    - "one-shot": the least slope of the entropy, by one forward and one backward pass.
    - "binary": the half with the lesser slopes goes on, until one is left.
    - "each": the least entropy of all, one forward pass for each adapter; heads may have any shape.
    - `Profiles`: the nearest task by features of the base, one forward pass.

    By entropy, the confidence is 1 - mean entropy / log(classes) of the adapter's own outputs; by profiles, the share
    of the examples that are nearest to the task. With less than `least` it is none of them.

    Example:
        bank = MaskBank(model)
        for name in ("my-mask", "other-mask"):
            bank.add(f"./{name}")
        print(identify(bank, images, "each").likeliest)
    """
    check_argument("the bank", bank, MaskBank, "a MaskBank", "make one: MaskBank(model), and add the adapters")
    batch = batch_of(inputs)
    if isinstance(how, Profiles):
        with bank.disabled():
            return how.nearest(batch, bank.model, least)
    if how not in HOWS:
        raise ConfigError(f"how must be {', '.join(HOWS)}, or the Profiles of tasks; got {how!r}")
    known = _candidates(bank, names)
    with torch.no_grad(), modes_kept(bank.model):
        bank.model.eval()
        if how == "each":
            found = {name: _entropy(bank, name, batch) for name in known}
            scores, passes = {name: -entropy for name, (entropy, _) in found.items()}, len(known)
            best = max(known, key=lambda name: scores[name])
            confidence = found[best][1]
        else:
            with bank.disabled():
                one = superposition(bank.model, {name: bank.parts(name) for name in known})
                scores, passes = _slopes(one, known, batch, how)
            best, passes = max(known, key=lambda name: scores[name]), passes + 1
            _, confidence = _entropy(bank, best, batch)
    return Identified(best if confidence >= least else None, best, confidence, scores, passes)


def _candidates(bank: MaskBank, names: Sequence[str] | None) -> list[str]:
    known = list(bank.names if names is None else names)
    if len(known) < 2:
        raise ConfigError(f"there must be two adapters at least to choose from or to combine, got {len(known)}")
    return known


def mixture(
    bank: MaskBank,
    inputs: Tensor | Mapping[str, Tensor],
    labels: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    steps: int = 20,
    lr: float = 0.5,
) -> tuple[dict[str, float], Callable[[Tensor | Mapping[str, Tensor]], Tensor]]:
    """Combine adapters for a task that none of them was made for: a point of their simplex, fitted to a batch.

    The mean entropy of the outputs is minimised, or their cross-entropy where labels, (B,), are given, by gradient
    descent on the logits of the shares, from equal shares.

    Returns:
        The shares by name, which add up to 1, and a function from a batch to its logits by the combined network.
    """
    known, batch = _candidates(bank, names), batch_of(inputs)
    with bank.disabled(), torch.no_grad(), modes_kept(bank.model):
        bank.model.eval()
        one = superposition(bank.model, {name: bank.parts(name) for name in known})
        point = torch.zeros(len(known))
        for _ in range(steps):
            shares = point.softmax(0)
            _, slopes = one.slopes(batch, shares, _loss(labels))
            point -= lr * shares * (slopes - (shares * slopes).sum())
        shares = point.softmax(0)
        tensors = one.added(shares)

    def outputs(inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
        with bank.disabled():
            return one.logits(batch_of(inputs), tensors)

    return dict(zip(known, shares.tolist(), strict=True)), outputs


def _slopes(one: Superposition, names: Sequence[str], batch: Inputs, how: How) -> tuple[dict[str, float], int]:
    """Return minus the slopes of the entropy, and for those that a search dropped, less the later the better."""
    alive = list(range(len(names)))
    scores: dict[str, float] = {}
    passes = 0
    while True:
        weights = torch.zeros(len(names))
        weights[alive] = 1 / len(alive)
        _, slopes = one.slopes(batch, weights, _loss(None))
        passes += 3
        alive.sort(key=lambda index: float(slopes[index]))
        if how == "one-shot":
            return {names[index]: -float(slopes[index]) for index in alive}, passes
        kept = (len(alive) + 1) // 2
        for index in alive[kept:]:
            scores[names[index]] = float(passes)
        alive = alive[:kept]
        if len(alive) == 1:
            return {**scores, names[alive[0]]: passes + 1.0}, passes


def _entropy(bank: MaskBank, name: str, batch: Inputs) -> tuple[float, float]:
    """Return the mean entropy of an adapter's outputs, and how sure that is: 1 - entropy / log(classes)."""
    logits = torch.stack(bank(batch, masks=[name] * example_count(batch)))
    mean = float(entropies(logits).mean())
    return mean, 1 - mean / math.log(max(logits.shape[-1], 2))


def _loss(labels: Tensor | None) -> Callable[[Tensor], Tensor]:
    if labels is None:
        return lambda logits: entropies(logits).mean()
    return lambda logits: nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
