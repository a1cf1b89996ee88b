"""train_cascade: a dispatcher, a router over its embeddings, an expert for each cluster, and a head."""

import math
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..adapter.content import MIXTURE, WHITENING, About, Cascade, Combine, Parts, Router, Whitening
from ..backbone.classifier import embeddings
from ..backbone.load import Backbone
from ..backbone.model import Fingerprint
from ..errors import ConfigError, DataError, StateError, TrainingError, require, short_repr
from ..mask import MaskSet
from ..runtime.cascade import LoadedCascade
from .config import TrainConfig
from .data.base import Data, Examples, readable
from .features import Probe, beside_baseline, by_class, embed_all, fit_probe, probe_accuracies, routed, worth
from .learn import borrowed
from .progress import shown
from .run_folder import (
    FILE,
    RunOptions,
    check_parts,
    checkpoint_digest,
    damaged,
    differing,
    is_main_process,
    locked,
    part_options,
    read_sealed,
    write_json,
    write_sealed,
)
from .stored import halved, shortest
from .trainer import ObjectiveRun, as_backbone, train_mask

COORDINATES = 20  # of the router at most: see docs/methods.md, cascades
STARTS = 5  # of the mixture's optimisation, the best of which is kept
LEAST = 1e-5  # standard deviations below this share of the first are rounding errors
WIDEST = 4096  # features up to which components are computed exactly


def fit_whitening(x: Tensor, most: int, seed: int = 0) -> Whitening:
    """Return the principal components of embeddings (N, D) with unit variance along each, at most `most` of them.

    Fewer where N or the rank of the embeddings are less. The variance is 1 and not 1 / N, so that constants of other
    methods (the covariance that a mixture adds, the penalty of a probe) mean what they mean for raw features.
    """
    decomposition = require("sklearn.decomposition", "train", "principal components")
    size, spread = float(x.double().square().mean().sqrt()), float(x.double().var(0).mean().sqrt())
    if len(x) < 2 or not spread > LEAST * size:
        raise TrainingError(
            f"the embeddings of {len(x)} training rows are all alike (root mean square {size:.1e}, standard deviation "
            f"{spread:.1e}): the masks have collapsed; lower the learning rate, or change the objective's options"
        )
    count = min(most, x.shape[1], len(x) - 1)
    exact = x.shape[1] <= WIDEST or count >= 0.8 * min(x.shape)
    options = {"svd_solver": "covariance_eigh"} if exact else {"svd_solver": "randomized", "iterated_power": 10}
    found = decomposition.PCA(count, random_state=seed, **options).fit(x.double().numpy())
    scale = torch.from_numpy(found.explained_variance_).clamp(min=0).sqrt()
    kept = scale > LEAST * scale[0]
    mean, components = torch.from_numpy(found.mean_), torch.from_numpy(found.components_)
    return Whitening(mean.float(), components[kept].float(), scale[kept].float())


def fit_router(x: Tensor, experts: int, seed: int) -> tuple[Router, dict[str, Any]]:
    """Fit the router of a cascade to embeddings (N, D), a Gaussian mixture; return it with what the fit shows.

    There are at most sqrt(N / experts) coordinates: a covariance has about q² / 2 numbers, which a cluster must tell.
    """
    sklearn = require("sklearn.mixture", "train", "the router of a cascade")
    unit = nn.functional.normalize(x.double(), dim=1)
    whitening = fit_whitening(unit, max(1, min(COORDINATES, math.isqrt(len(x) // experts))), seed)
    z = whitening(unit)
    mixture = sklearn.GaussianMixture(experts, n_init=STARTS, max_iter=500, random_state=seed)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # `converged_` says it
        mixture.fit(z.numpy())
    values = (mixture.weights_, mixture.means_, mixture.precisions_cholesky_)
    weights, means, precisions = (torch.from_numpy(value).float() for value in values)
    return Router(whitening, weights, means, precisions.triu()), {
        "coordinates": z.shape[1],
        "explained_variance": min(1.0, float(whitening.scale.double().square().sum() / unit.var(0).sum())),
        "log_likelihood": float(mixture.score(z.numpy())),
        "converged": bool(mixture.converged_),
    }


DISPATCHER = "dispatcher"
ROUTER, CLUSTERS = "router.safetensors", "clusters.json"  # in the run's folder


@dataclass(frozen=True, slots=True, eq=False)
class CascadeResult:
    """A trained cascade, ready for `save_adapter(path, result.parts, result.base, result.about, cascade=…)`."""

    parts: dict[str, Parts]  # without heads, by set name: "dispatcher", "expert-0", "expert-1", …
    base: Fingerprint
    about: About
    cascade: Cascade
    metrics: dict[str, float]  # of the dispatcher, named so; the mean density of the experts; with a head, of the whole

    __repr__ = short_repr


@shown
def train_cascade(
    model: Backbone | nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    experts: int = 5,
    **options: Unpack[RunOptions],
) -> CascadeResult:
    """Train a cascade on a frozen backbone: Self-Masking Networks, section 3.4.

    The dispatcher is trained on all training rows, its embeddings of them (not augmented, of unit length) are clustered
    by principal components and a Gaussian mixture, and an expert that starts as the dispatcher is trained on the rows
    of each cluster. An expert of n_k of n rows trains round(n / n_k * epochs) epochs: as many steps as the dispatcher.

    Args:
        config: of the dispatcher and of every expert.
        experts: number of clusters, at least 2.
        options: as in `train_mask`. `output` gets the folders `dispatcher` and `expert-0`, … of the runs,
            `router.safetensors`, and `clusters.json` with the first two coordinates and the expert of every training
            row. On resume what is finished is read back.

    Raises:
        ConfigError: if there are too few experts or rows.
        TrainingError: if the embeddings are all alike, or a cluster has fewer rows than a batch.
        StateError: if `output` belongs to another run. Others: as `train_mask`.

    Example:
        result = train_cascade(backbone, data, TrainConfig(epochs=1), experts=2)
        save_adapter("./experts", result.parts, result.base, result.about, cascade=result.cascade)
    """
    config = TrainConfig() if config is None else config
    backbone = as_backbone(model, config, data)
    check_cascade(data, config, experts)
    output = options.get("output")
    check_parts(None if output is None else Path(output), options.get("resume", False))
    with nullcontext(output) if output is not None else tempfile.TemporaryDirectory(prefix="maskpack-") as place:
        folder = Path(place)
        with locked(folder):
            return _train(backbone, data, config, experts, folder, options)


def check_cascade(data: Data, config: TrainConfig, experts: int) -> None:
    """Raise ConfigError if there are too few experts or rows."""
    rows = 0 if data.train is None else len(data.train)
    if experts < 2 or (data.train is not None and rows < experts * config.batch_size):
        raise ConfigError(
            f"a cascade needs at least 2 experts and a batch of rows for each; got {experts} experts, {rows} training "
            f"rows and a batch size of {config.batch_size}"
        )


def _train(
    backbone: Backbone, data: Data, config: TrainConfig, experts: int, folder: Path, options: RunOptions
) -> CascadeResult:
    main, run = is_main_process(), partial(part_options, options, folder)
    first = train_mask(backbone, data, config, longer=False, **run(DISPATCHER))
    assert data.train is not None
    with borrowed(backbone, norms=True):  # as the finished run left the model
        trained = ObjectiveRun(backbone, data, config)
        trained.take_over(folder / DISPATCHER / FILE)
        trained.settle()
        x, _ = embeddings(backbone, readable(trained.objective.load(data.train)))
    rows = [row for row in data.train.indices if row not in data.train.unreadable]
    facts = {"dispatcher": checkpoint_digest(folder / DISPATCHER / FILE), "experts": experts}
    again = options.get("resume", False) and (folder / ROUTER).exists()
    router, fit = _read_router(folder / ROUTER, facts) if again else fit_router(x, experts, config.seed)
    chosen = router.route(x)
    sizes = torch.bincount(chosen, minlength=experts).tolist()
    if main:
        # where every training row lies, in its first two coordinates, and its expert
        flat = nn.functional.pad(router.coordinates(x), (0, 2))[:, :2]
        points = [[round(x, 4), round(y, 4)] for x, y in flat.tolist()]
        write_json(folder / CLUSTERS, {"expert": chosen.tolist(), "points": points}, None)
    if min(sizes) < config.batch_size:
        raise TrainingError(
            f"the clusters have {', '.join(map(str, sizes))} rows, each expert needs a batch of {config.batch_size}; "
            f"resume with fewer experts than {experts}, or take a smaller batch size or another seed in another folder"
        )
    if main:
        tensors = {name: getattr(router.whitening, name) for name in WHITENING}
        tensors |= {name: getattr(router, name) for name in MIXTURE}
        write_sealed(folder / ROUTER, tensors, {"run": facts, "about": fit})
    results, names = {DISPATCHER: first}, tuple(f"expert-{k}" for k in range(experts))
    for k, name in enumerate(names):
        mine = [row for row, expert in zip(rows, chosen.tolist(), strict=True) if expert == k]
        own = replace(data, train=replace(data.train, indices=mine), validation=None, test=None)
        settings = replace(config, epochs=max(1, round(len(rows) / sizes[k] * config.epochs)))
        start = folder / DISPATCHER
        results[name] = train_mask(backbone, own, settings, start_from=start, longer=False, **run(name))
    fit |= {"rows": sizes, "steps": {name: (one.about.training or {})["steps"] for name, one in results.items()}}
    # not of the cascade: the dispatcher's accuracy, for one, is that of a head which is not in it
    metrics = {f"{DISPATCHER}_{name}": value for name, value in first.metrics.items()}
    metrics["expert_density"] = sum(results[name].metrics["density"] for name in names) / experts
    record = {**(first.about.training or {}), "metrics": metrics, "cascade": fit}
    about = replace(first.about, class_names=None, training=record)
    parts = {name: replace(one.parts, head=None) for name, one in results.items()}
    cascade = Cascade(DISPATCHER, names, backbone.embedding, router)
    return CascadeResult(parts, first.base, about, cascade, metrics)


def _read_router(path: Path, facts: Mapping[str, Any]) -> tuple[Router, dict[str, Any]]:
    """Read back the router that an interrupted run has fitted, and what that fit showed."""
    remedy = "delete it and resume: it is fitted again"
    found, stored = read_sealed(path, remedy)
    missing = {*WHITENING, *MIXTURE} - found.keys() | {"run", "about"} - stored.keys()
    if missing:
        raise damaged(path, f"{min(missing)!r} is missing", remedy)
    other = differing(facts, stored["run"])
    if other:
        raise StateError(
            f"the router in {path.parent} belongs to another run: {', '.join(other)} differ; resume with the same "
            f"settings, or choose another folder"
        )
    whitening = Whitening(*(found[name] for name in WHITENING))
    return Router(whitening, *(found[name] for name in MIXTURE)), stored["about"]


def fit_cascade_head(
    backbone: Backbone,
    data: Data,
    result: CascadeResult,
    *,
    combine: Combine = "conditional",
    reduce: int | None = None,
    batch_size: int = 64,
) -> CascadeResult:
    """Return a cascade with how its embeddings are combined and, if the data have labels, a linear probe on them.

    With labels the metrics have its accuracy on the splits held out, on the test split also that of the same head
    without the masks, and the accuracy of the linear probe of the raw backbone.

    Args:
        backbone: that the cascade was trained on, with no mask loaded.
        combine: "conditional" (two passes for each input) or "unconditional" (one more than there are experts).
        reduce: most numbers that a combined embedding is reduced to, by principal components divided by their standard
            deviation; the matrix is stored, in 4 bytes for each of D (K + 1) times `reduce` numbers.
    """
    if data.train is None:
        raise DataError(f"the data {data.id!r} have no training split, which the head of a cascade is fitted to")
    parts = result.cascade
    if not data.class_names and reduce is None:
        return replace(result, cascade=replace(parts, combine=combine))
    reduction: Whitening | None = None

    def combined(sets: Mapping[str, Parts], examples: Examples) -> tuple[Tensor, Tensor]:
        x, y = embed_all(backbone, LoadedCascade(backbone.model, sets, parts), examples, batch_size)
        x = routed(x, parts) if combine == "conditional" else x
        return x if reduction is None else reduction(x), y

    x, y = combined(result.parts, data.train)
    if reduce is not None:
        reduction = fit_whitening(x, reduce)
        x = reduction(x)
    whole = replace(parts, combine=combine, reduction=reduction)
    if not data.class_names:
        return replace(result, cascade=whole)
    probe = fit_probe(x, y, len(data.class_names))
    if ((result.about.training or {}).get("settings") or {}).get("store") != "float32":
        probe = Probe(halved(probe.weight), halved(probe.bias))
    held = {f"{name}_accuracy": (result.parts, split) for name, split in data.splits.items() if name != "train"}
    if data.test is not None:
        held["test_accuracy_without_masks"] = {name: unmasked(one) for name, one in result.parts.items()}, data.test
    found = {"density": mean(one.masks.density for one in result.parts.values())}
    for name, where in held.items():
        x, y = combined(*where)
        found[name] = by_class(probe.logits(x), y)["accuracy"]
    found = beside_baseline(found, probe_accuracies(backbone, data, batch_size))
    shapes = [mask.shape for mask in result.parts[parts.dispatcher].masks.values()]
    record = {name: value for name, value in (result.about.training or {}).items() if name != "warnings"}
    record |= {"metrics": {**result.metrics, **found}, **worth(found, shapes)}
    about = replace(result.about, task=data.task, class_names=tuple(data.class_names), training=record)
    whole = replace(whole, weight=shortest(probe.weight), bias=shortest(probe.bias))
    return replace(result, about=about, cascade=whole, metrics=record["metrics"])


def unmasked(parts: Parts) -> Parts:
    """Return parts whose masks keep every weight."""
    ones = {name: torch.ones(mask.shape, dtype=torch.bool) for name, mask in parts.masks.items()}
    return replace(parts, masks=MaskSet.from_tensors(ones), values={})
