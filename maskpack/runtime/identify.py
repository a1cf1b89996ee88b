"""Choose the adapter of a bank that fits an input, by the entropy of outputs or by features of the base."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter.content import Parts
from ..backbone.classifier import Classifier, Inputs, classifier_from, embeddings, example_count, modes_kept
from ..backbone.load import Backbone
from ..backbone.model import Embedding, Head, find_head, unwrap
from ..errors import ConfigError
from ..mask import PackedMask
from .apply import at_places, exchange, head_tensors, places, rewritten, tensors_of
from .bank import MaskBank

OWN = 0.99  # share of a task's own examples that lie within its limit


@dataclass(frozen=True, slots=True)
class Identified:
    """Which adapter a batch is for.

    Attributes:
        name: of the adapter; None: none of them. likeliest: of the best one in any case.
        confidence: 0 to 1. scores: of each adapter, greater is likelier; their unit depends on how they were found.
        passes: forward passes of the batch, a backward pass counted as two.
    """

    name: str | None
    likeliest: str
    confidence: float
    scores: Mapping[str, float]
    passes: int


@dataclass(frozen=True, slots=True, eq=False)
class Profiles:
    """Means and spread of the base's features on examples of each task.

    Attributes:
        names: of the tasks. means: (k, D). deviation: of features within a task, (D,). limits: distance within which
            OWN of a task's own examples lie, (k,).
        embedding: where the features are taken.
    """

    names: tuple[str, ...]
    means: Tensor
    deviation: Tensor
    limits: Tensor
    embedding: Embedding

    def nearest(self, inputs: Inputs, model: nn.Module, least: float) -> Identified:
        """Return the task that most of a batch is nearest to; none if the batch lies outside of its limit."""
        features = _features(model, self.embedding, inputs)
        distances = _distances(features, self.means, self.deviation)
        votes = torch.bincount(distances.argmin(1), minlength=len(self.names)) / len(features)
        best = int(votes.argmax())
        confidence = float(votes[best])
        far = float(distances[:, best].median()) > float(self.limits[best])
        name = None if far or confidence < least else self.names[best]
        scores = dict(zip(self.names, (-distances.mean(0)).tolist(), strict=True))
        return Identified(name, self.names[best], confidence, scores, 1)


def profiles(bank: MaskBank, examples: Mapping[str, Tensor | Mapping[str, Tensor]]) -> Profiles:
    """Return the profiles of tasks, by features of the base on some examples of each, for `identify`.

    Args:
        examples: by the name of a task's adapter, preprocessed, two or more of each.

    Raises:
        UnknownNameError: if the bank has no adapter of a name. ConfigError: if a task has less than two examples.
    """
    if not examples:
        raise ConfigError("there are no examples of any task; give some by the names of adapters")
    head = bank.parts(next(iter(examples))).head
    embedding = Embedding(find_head(bank.model)) if head is None else head.embedding
    found = {}
    for name, inputs in examples.items():
        bank.parts(name)
        batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
        with bank.disabled():
            found[name] = _features(bank.model, embedding, batch)
        if len(found[name]) < 2:
            raise ConfigError(f"a profile needs two examples at least, and {name!r} has {len(found[name])}")
    means = torch.stack([one.mean(0) for one in found.values()])
    within = torch.cat([one - mean for one, mean in zip(found.values(), means, strict=True)])
    deviation = within.std(0).clamp(min=1e-6)
    limits = [
        _distances(one, mean[None], deviation)[:, 0].quantile(OWN)
        for one, mean in zip(found.values(), means, strict=True)
    ]
    return Profiles(tuple(found), means, deviation, torch.stack(limits), embedding)


def _features(model: nn.Module, embedding: Embedding, inputs: Inputs) -> Tensor:
    backbone = Backbone(model, "the model", embedding=embedding)
    return embeddings(backbone, [(inputs, torch.zeros(example_count(inputs), dtype=torch.long))])[0]


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
    values: Sequence[Mapping[str, Tensor]]

    def theta(self, index: int, name: str) -> Tensor:
        """Return a tensor as one adapter leaves it: a new one, in the base's dtype."""
        base, change = self.base[name], self.changes[index].get(name)
        if isinstance(change, Tensor):
            return change.to(base)
        if change is not None and not at_places(change):
            return rewritten(base.detach(), change)
        result = base.detach().clone()
        if change is not None:
            exchange(result, change, places(change.bits, result.device), self.values[index].get(name), [])
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
        """Return the outputs with these tensors, (B, classes)."""
        named = isinstance(inputs, dict) and not isinstance(self.module, Classifier)
        arguments: tuple[Any, ...] = () if named else (inputs,)
        output = functional_call(self.module, dict(tensors), arguments, dict(inputs) if named else None)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def superposition(model: nn.Module, parts: Mapping[str, Parts]) -> Superposition:
    """Return the superposition of some adapters on a model that has its base's bits.

    Raises:
        ConfigError: if their heads have not one shape, so that they cannot be added up.
    """
    heads = {name: _head(own.head) for name, own in parts.items()}
    if len({tuple((key, tensor.shape) for key, tensor in head.items()) for head in heads.values()}) != 1:
        raise ConfigError(
            f"masks are added up with their heads, and those of {', '.join(map(repr, parts))} have not one shape; "
            f"choose others, or how='each', which asks one mask after the other"
        )
    first, module, prefix = next(iter(parts.values())).head, unwrap(model), ""
    if first is not None and first.module is None:  # behind an encoder
        module, prefix = classifier_from(module, first).eval(), "model."
    changes, values = [], []
    for name, own in parts.items():
        body: dict[str, PackedMask | Tensor] = {**own.masks, **own.dense}
        changes.append({**{prefix + key: change for key, change in body.items()}, **heads[name]})
        values.append({prefix + key: tensor for key, tensor in own.values.items()})
    state = tensors_of(module)
    base = {name: state[name] for name in sorted({name for own in changes for name in own})}
    return Superposition(module, base, changes, values)


def _head(head: Head | None) -> dict[str, Tensor]:
    """Return the tensors of a head by their names in what computes."""
    if head is None or head.module is not None:
        return head_tensors(head)
    named = {"linear.weight": head.weight, "linear.bias": head.bias}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


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
    of the examples that are nearest to the task.

    Args:
        inputs: preprocessed: (B, …), or a tokenizer's tensors by name.
        names: of the adapters in question; default: all.
        least: confidence below which the answer is that it is none of them.

    Raises:
        ConfigError: if there are not two adapters, `how` is unknown, or heads cannot be added up.
        UnknownNameError: if the bank has no adapter of a name.
    """
    batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
    if isinstance(how, Profiles):
        with bank.disabled():
            return how.nearest(batch, bank.model, least)
    if how not in HOWS:
        raise ConfigError(f"how must be {', '.join(HOWS)}, or the Profiles of tasks; got {how!r}")
    known = list(bank.names if names is None else names)
    if len(known) < 2:
        raise ConfigError(f"there must be two adapters at least to choose from, got {len(known)}")
    with torch.no_grad(), modes_kept(bank.model):
        bank.model.eval()
        if how == "each":
            found = {name: _entropy(bank, name, batch) for name in known}
            scores, passes = {name: -entropy for name, (entropy, _) in found.items()}, len(known)
        else:
            with bank.disabled():
                one = superposition(bank.model, {name: bank.parts(name) for name in known})
                scores, passes = _slopes(one, known, batch, how)
        best = max(known, key=lambda name: scores[name])
        if how != "each":
            found, passes = {best: _entropy(bank, best, batch)}, passes + 1
        confidence = found[best][1]
        return Identified(best if confidence >= least else None, best, confidence, scores, passes)


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

    The mean entropy of the outputs is minimised, or their cross-entropy where labels are given, by gradient descent on
    the logits of the shares, from equal shares.

    Args:
        labels: (B,). names: of the adapters in question; default: all. steps, lr: of the descent.

    Returns:
        The shares by name, which add up to 1, and a function from a batch to its logits by the combined network.

    Raises:
        ConfigError: as `identify`.
    """
    known = list(bank.names if names is None else names)
    if len(known) < 2:
        raise ConfigError(f"there must be two adapters at least to combine, got {len(known)}")
    batch: Inputs = inputs if isinstance(inputs, Tensor) else dict(inputs)
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
            return one.logits(inputs if isinstance(inputs, Tensor) else dict(inputs), tensors)

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
