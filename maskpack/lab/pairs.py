"""Measurements: barriers, mistakes, distances, CKA, criticality (arXiv 2008.11687, 1905.00414, 1912.00528)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import overlaps
from ..backbone.classifier import Classifier, Inputs, predictions
from ..backbone.model import canonical
from ..errors import ConfigError
from ..mask import MaskSet, PackedMask
from ..training.features import digest_of, keep_features, kept_features
from .networks import Evaluations, Network, Progress, State, T, body_of, counted, kept

LEAST = 512  # examples, below which a note on CKA is due


def each_pair(
    networks: Sequence[Network], values: Sequence[T], compare: Callable[[T, T], Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return {"first", "second", "kinds", …} of every pair of networks, with what `compare` gives for their values."""
    if len(networks) < 2:
        raise ConfigError(f"networks are compared in pairs; give at least two, got {len(networks)}")
    pairs = []
    for (one, first), (other, second) in combinations(zip(networks, values, strict=True), 2):
        kinds = " - ".join(sorted((one.kind, other.kind)))
        pairs.append({"first": one.name, "second": other.name, "kinds": kinds, **compare(first, second)})
    return pairs


# --- barriers and mistakes -------------------------------------------------------------------------------------------


def interpolated(first: State, second: State, t: float) -> dict[str, Tensor]:
    """Return (1 - t) first + t second, entry by entry; the ends keep their bits, integers are those of the first."""
    if t in (0, 1):
        return dict(second if t else first)
    found = dict(first)
    for name, one in first.items():
        if one.is_floating_point():  # an adapter's may be float16
            dtype = torch.promote_types(one.dtype, second[name].dtype)
            found[name] = torch.lerp(one.to(dtype), second[name].to(dtype), t)
    return found


def barrier(
    evaluations: Evaluations, first: State, second: State, points: int = 11, report: Progress | None = None
) -> dict[str, Any]:
    """Measure the networks at evenly spaced `points` from one state (t = 0) to another (t = 1).

    Return {"points": {"t", "accuracy", "loss"} of each, "barrier": the most that accuracy lies below the straight line
    between those of the ends, 0 or more, "loss_barrier": the same of the loss, above that line}.

    Example:
        found = barrier(evaluations, networks[0].state, networks[1].state, points=3)
        print(found["barrier"], found["points"][1]["accuracy"])
    """
    if points < 3:
        raise ConfigError(f"a barrier needs at least 3 points, the ends and one between them; got {points}")
    if first.keys() != second.keys():
        differing = sorted(first.keys() ^ second.keys())
        raise ConfigError(f"the two networks have other entries, first {differing[0]!r}; give two of one architecture")
    found: list[dict[str, float]] = []
    with kept(evaluations.module):
        for at in counted(range(points), report):
            t = at / (points - 1)
            one = evaluations.of(interpolated(first, second, t))
            found.append({"t": t, "accuracy": one["accuracy"], "loss": one["loss"]})

    def height(key: str, sign: int) -> float:
        first, last = found[0][key], found[-1][key]
        return max(sign * ((1 - one["t"]) * first + one["t"] * last - one[key]) for one in found)

    return {"points": found, "barrier": height("accuracy", 1), "loss_barrier": height("loss", -1)}


def barriers(
    evaluations: Evaluations, networks: Sequence[Network], points: int = 11, report: Progress | None = None
) -> dict[str, Any]:
    """Measure the barrier of every pair of networks.

    Return {"networks": {"network", "kind", "accuracy", "loss"}, "pairs": as of `each_pair`, with what `barrier` gives,
    "deviations": sample deviation of the accuracies of each kind with several networks}.

    Example:
        barrier_figure(barriers(evaluations, networks, points=3)["pairs"])
    """
    done, of = count(1), math.comb(len(networks), 2) * points

    def step(*_: int) -> None:
        if report is not None:
            report(next(done), of)

    states = [one.state for one in networks]
    pairs = each_pair(networks, states, lambda first, second: barrier(evaluations, first, second, points, step))
    ends = {pair["second"]: pair["points"][-1] for pair in pairs} | {pair["first"]: pair["points"][0] for pair in pairs}
    rows: list[dict[str, Any]] = []
    kinds: dict[str, list[float]] = {}
    for one in networks:
        measured = {key: ends[one.name][key] for key in ("accuracy", "loss")}
        rows.append({"network": one.name, "kind": one.kind, **measured})
        kinds.setdefault(one.kind, []).append(measured["accuracy"])
    deviations = {kind: stdev(values) for kind, values in kinds.items() if len(values) > 1}
    return {"networks": rows, "pairs": pairs, "deviations": deviations, "examples": len(evaluations.examples)}


def common_mistakes(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Compare what two networks get right: for each example whether its class was given, (N,) bool.

    Return {"both", "only_first", "only_second": numbers of errors, "overlap": errors of both / errors of any (None if
    there are none), "kappa": Cohen's kappa of being right (None where chance explains all)}.
    """
    if first.shape != second.shape or not len(first):
        raise ConfigError(f"mistakes are compared on the same examples, got {len(first)} and {len(second)}")
    one, other = (MaskSet.from_tensors({"": right.bool()}) for right in (first, second))
    found = dict(overlaps(one, other))[""]
    return {
        "both": found.neither,
        "only_first": found.second_only,
        "only_second": found.first_only,
        "overlap": found.jaccard,
        "kappa": found.kappa,
    }


def mistakes(evaluations: Evaluations, networks: Sequence[Network], report: Progress | None = None) -> dict[str, Any]:
    """Compare the mistakes of every pair of networks.

    Return {"networks": {"network", "kind", "accuracy"}, "pairs": as of `each_pair`, with what `common_mistakes` gives,
    "examples"}.

    Example:
        found = mistakes(evaluations, networks)
        mistakes_figure([one.name for one in networks], found["pairs"])
    """
    with kept(evaluations.module):
        found = [evaluations.of(one.state, rows=True) for one in counted(networks, report)]
    right = [torch.tensor(one["right"], dtype=torch.bool) for one in found]
    pairs = each_pair(networks, right, common_mistakes)
    rows = [
        {"network": one.name, "kind": one.kind, "accuracy": row["accuracy"]}
        for one, row in zip(networks, found, strict=True)
    ]
    return {"networks": rows, "pairs": pairs, "examples": found[0]["examples"]}


# --- distances -------------------------------------------------------------------------------------------------------


def distances(networks: Sequence[Network], groups: Mapping[str, Sequence[str]], base: State) -> list[dict[str, Any]]:
    """Return the distances of every pair of networks; `base` are the parameters of the backbone.

    Each is {"first", "second", "kinds", "parameters": as `parameter_distance`} and, if both are masks, "masks": as
    `mask_distance`.

    Example:
        pairs = distances(networks, grouped(classifier), networks[0].initial)
        print(pairs[0]["parameters"])
    """

    def apart(first: Network, second: Network) -> dict[str, Any]:
        found = {"parameters": parameter_distance(first.state, second.state, groups, base)}
        if first.masks is not None and second.masks is not None:
            found["masks"] = mask_distance(first.masks, second.masks, base)
        return found

    return each_pair(networks, networks, apart)


def parameter_distance(
    first: State, second: State, groups: Mapping[str, Sequence[str]], initial: State
) -> dict[str, Any]:
    """Return {"distance", "relative": to the norm of the initial parameters, or None, "modules": the same by group}."""
    every = [name for names in groups.values() for name in names]
    square = {name: float((first[name].double() - second[name].double()).square().sum()) for name in every}
    size = {name: float(initial[name].double().square().sum()) for name in every if name in initial}

    def of(names: Sequence[str]) -> dict[str, Any]:
        known = [name for name in names if name in size]
        whole = sum(size[name] for name in known)
        relative = math.sqrt(sum(square[name] for name in known) / whole) if whole else None
        return {"distance": math.sqrt(sum(square[name] for name in names)), "relative": relative}

    return {**of(every), "modules": {group: of(names) for group, names in groups.items()}}


def mask_distance(first: MaskSet, second: MaskSet, weights: State) -> dict[str, Any]:
    """Return distances of two masks of one base, by parameter and in all.

    A parameter that one of them does not mask counts as kept whole there. "hamming" is the share of the weights that
    are treated differently, "weighted" the norm of W * (M1 - M2), where M is 0 for a weight that is removed and -1 for
    one whose sign is inverted, "relative" the same by the norm of W.
    """
    sums: dict[str, list[float]] = {}
    for name in sorted(first.keys() | second.keys()):
        known = [one[name] for one in (first, second) if name in one]
        if name not in weights or any(one.shape != tuple(weights[name].shape) for one in known):
            raise ConfigError(f"the masks of {name!r} are not for the weights given; give masks of one base, and it")
        difference = _multiplier(first.get(name), known[0].shape) - _multiplier(second.get(name), known[0].shape)
        weight = weights[name].double()
        differ, square = (difference != 0).sum(), (weight * difference).square().sum()
        sums[name] = [float(one) for one in (differ, square, weight.square().sum(), weight.numel())]
    if not sums:
        raise ConfigError("there is no mask to compare; give adapters that have masks")

    def of(differ: float, square: float, whole: float, weights: float) -> dict[str, Any]:
        relative = math.sqrt(square / whole) if whole else None
        return {"hamming": differ / max(weights, 1), "weighted": math.sqrt(square), "relative": relative}

    parameters = {name: of(*found) for name, found in sums.items()}
    return {**of(*map(sum, zip(*sums.values(), strict=True))), "parameters": parameters}


def _multiplier(mask: PackedMask | None, shape: tuple[int, ...]) -> Tensor:
    """Return the factors of a mask without its scale: 1, 0 or -1; op "replace" counts as 0."""
    if mask is None:
        return torch.ones(shape, dtype=torch.float64)
    bits = mask.tensor().double()
    if mask.op == "flip":
        return 2 * bits - 1
    if mask.signs is not None:
        bits *= 2 * PackedMask(mask.signs, mask.shape).tensor().double() - 1
    return bits


# --- similarity of layers --------------------------------------------------------------------------------------------


def linear_cka(x: Tensor, y: Tensor) -> float | None:
    """Return ||Yc'Xc||² / (||Xc'Xc|| ||Yc'Yc||) of features of the same examples, (examples, features), centred.

    From 0 to 1; 1 if they are equal up to a rotation, a shift and one scale. None where one has no variance.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ConfigError(f"CKA compares rows of the same examples, got shapes {tuple(x.shape)}, {tuple(y.shape)}")
    x, y = (one.double() - one.double().mean(0) for one in (x, y))
    if max(x.shape[1], y.shape[1]) > len(x):
        # the same numbers by products of examples, where those are fewer than features
        x, y = x @ x.T, y @ y.T
        shared, own = (x * y).sum(), x.norm() * y.norm()
    else:
        shared, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float((shared / own).clamp(0, 1)) if own > 0 else None


def similarities(
    evaluations: Evaluations, networks: Sequence[Network], names: Iterable[str], report: Progress | None = None
) -> dict[str, Any]:
    """Measure linear CKA between the same layer of every pair of networks.

    `names` are as of `grouped`; those without an output, and the head, are left out. Return {"layers": names in order,
    "pairs": [{"first", "second", "kinds", "cka": of each layer}], "examples"}.

    Example:
        found = similarities(evaluations, networks, grouped(classifier))
        similarity_figure(found["layers"], found["pairs"])
    """
    module = evaluations.module
    head = module.embedding.module if isinstance(module, Classifier) else None
    known = {canonical(name) for name, _ in body_of(module).named_modules()} - {"", head}
    layers = [name for name in names if name in known]
    with kept(module):
        features = [layer_features(evaluations, one.state, layers) for one in counted(networks, report)]
    pairs = each_pair(networks, features, lambda x, y: {"cka": [linear_cka(x[name], y[name]) for name in layers]})
    return {"layers": layers, "pairs": pairs, "examples": len(evaluations.examples)}


def layer_features(evaluations: Evaluations, state: State, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the outputs of modules for a state, (examples, features) float32 for each, cached as features are.

    Maps are averaged over their positions, tokens over those that are no padding.
    """
    content = evaluations.content(state)
    keys = {} if content is None else {name: digest_of(["layer", name, content]) for name in layers}
    there = {name: kept_features(key, len(evaluations.examples)) for name, key in keys.items()}
    found = {name: one[0] for name, one in there.items() if one is not None}
    if len(found) < len(layers):
        found = _computed(evaluations, state, layers)
        for name, key in keys.items():
            keep_features(key, found[name], evaluations.examples)
    return found


def _computed(evaluations: Evaluations, state: State, layers: Sequence[str]) -> dict[str, Tensor]:
    module = evaluations.module
    collected: dict[str, list[Tensor]] = {name: [] for name in layers}
    attention: list[Tensor | None] = [None]

    def entering(_: nn.Module, inputs: tuple[Inputs]) -> None:
        attention[0] = inputs[0].get("attention_mask") if isinstance(inputs[0], dict) else None

    def seen(name: str) -> Any:
        return lambda _, __, output: collected[name].append(_pooled(output, attention[0]).float().cpu())

    evaluations.put(state)
    named = {canonical(name): one for name, one in body_of(module).named_modules()}
    hooks = [named[name].register_forward_hook(seen(name)) for name in layers]
    hooks.append(module.register_forward_pre_hook(entering))
    try:
        predictions(module, evaluations.batches)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in collected.items()}


def _pooled(output: Any, attention: Tensor | None) -> Tensor:
    """Return one vector for each example from a module's output: a tensor, or a collection that starts with one."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    if output.ndim == 4:
        return output.mean((2, 3))
    if output.ndim == 3 and attention is not None and attention.shape == output.shape[:2]:
        weights = attention.unsqueeze(-1).to(output)
        return (output * weights).sum(1) / weights.sum(1).clamp(min=1)
    return output.mean(1) if output.ndim == 3 else output.flatten(1)


@dataclass(frozen=True)
class Noise:
    """Settings of the search for noise radii and the formal measure.

    Attributes:
        draws: Gaussian draws that a loss is the mean of; `seed` and the draw's number decide them.
        excess: the loss that is tolerated, in nats above that of the network.
        scales: standard deviations to try, relative to the root mean square of the module's trained parameters.
    """

    draws: int = 3
    excess: float = 0.1
    scales: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.excess <= 0 or not self.scales or not all(one > 0 for one in self.scales):
            raise ConfigError(f"noise needs at least one draw, an excess above 0 and scales above 0; got {self}")

    def borne(
        self, evaluations: Evaluations, state: State, names: Sequence[str], unit: float, limit: float
    ) -> float | None:
        """Return the largest scale, in units of `unit`, with which the loss stays within a limit; None if none does."""
        for scale in sorted(self.scales, reverse=True):
            losses = []
            for draw in range(self.draws):
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw)
                noisy = dict(state)
                for name in names:
                    drawn = torch.randn(state[name].shape, generator=generator).to(state[name])
                    noisy[name] = state[name] + scale * unit * drawn
                losses.append(evaluations.of(noisy)["loss"])
            if sum(losses) / len(losses) <= limit:
                return scale
        return None


def rewound(state: State, initial: State, names: Iterable[str], share: float = 0.0) -> dict[str, Tensor]:
    """Return a state in which these tensors are (1 - share) initial + share trained; share 0 gives the initial bits."""
    changed = {name: initial[name] if share == 0 else torch.lerp(initial[name], state[name], share) for name in names}
    return {**state, **changed}


def criticality(
    evaluations: Evaluations,
    state: State,
    initial: State,
    groups: Mapping[str, Sequence[str]],
    *,
    points: int = 1,
    noise: Noise | None = None,
    report: Progress | None = None,
) -> dict[str, Any]:
    """Rewind one module at a time, and measure what is lost.

    Args:
        state, initial: the network after and before training.
        groups: names of parameters by module or block, all of them in `initial`: see `grouped`.
        points: steps of the direct path a = 0, 1 / points, …, 1 from initial (0) to trained (1).
        noise: look for noise radii and the formal measure; None: do not.

    Returns:
        {"accuracy", "loss", "examples", "rows"}: a row for each module, by falling "drop": {"module",
        "parameters", "distance": Frobenius norm of trained - initial, "accuracy", "loss": rewound, "drop": of accuracy,
        "path": {"a", "accuracy", "loss"} of each point}. With noise also "radius": the largest standard deviation that
        the trained module bears, as one of the scales, None if none of them, and "criticality": the least
        a² distance² / sigma² over the points and scales that are borne, None if none is; beside the rows "criticality"
        is their sum, None if one is None.

    Example:
        network = networks[0]
        modules = grouped(classifier, names=network.initial)
        found = criticality(evaluations, network.state, network.initial, modules)
        criticality_figure(found["rows"])
    """
    if points < 1:
        raise ConfigError(f"points must be at least 1, got {points}")
    if not groups:
        raise ConfigError("there is no module to rewind: the network has no parameter whose initial value is known")
    rows = []
    with kept(evaluations.module):
        own = evaluations.of(state)
        for name, names in counted(groups.items(), report):
            mixed = [rewound(state, initial, names, at / points) for at in range(points)] + [state]
            path = [
                {"a": at / points, "accuracy": found["accuracy"], "loss": found["loss"]}
                for at, found in enumerate([*map(evaluations.of, mixed[:-1]), own])
            ]
            moved = float(_flat(state, names).sub(_flat(initial, names)).norm())
            row = {
                "module": name,
                "parameters": sum(state[one].numel() for one in names),
                "distance": moved,
                "accuracy": path[0]["accuracy"],
                "loss": path[0]["loss"],
                "drop": own["accuracy"] - path[0]["accuracy"],
                "path": path,
            }
            if noise is not None:
                limit, unit = own["loss"] + noise.excess, float(_flat(state, names).square().mean().sqrt()) or 1.0
                borne = [
                    (point["a"], noise.borne(evaluations, at, names, unit, limit))
                    for point, at in zip(path, mixed, strict=True)
                    if point["loss"] <= limit
                ]
                found = [(a * moved / (scale * unit)) ** 2 for a, scale in borne if scale is not None]
                row |= {"radius": borne[-1][1], "criticality": min(found, default=None)}
            rows.append(row)
    rows.sort(key=lambda row: (-row["drop"], -row["loss"]))
    if noise is None:
        return {**own, "rows": rows}
    each = [row["criticality"] for row in rows]
    return {**own, "rows": rows, "criticality": None if None in each else sum(each)}


def _flat(state: State, names: Iterable[str]) -> Tensor:
    return torch.cat([state[name].double().flatten() for name in names])
