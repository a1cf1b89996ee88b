"""train_cascade: a dispatcher, a router over its embeddings, an expert for each cluster."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.classifier import embeddings
from ..backbone.embedding import Embedding
from ..backbone.fingerprint import Fingerprint
from ..backbone.head import find_head
from ..backbone.load import Backbone
from ..data.base import Data
from ..data.batches import readable
from ..errors import ConfigError, StateError, TrainingError
from ..parts import CascadeParts, Parts
from ..router import MIXTURE, WHITENING, Router, Whitening
from ..tensorfile import replacing
from .accelerator import is_main_process
from .borrow import borrowed
from .checkpoint import FILE, checkpoint_digest, take_over, trained_tensors
from .config import TrainConfig
from .folder import locked
from .log import Report, tagged
from .loop import TrainResult, train_mask
from .router import fit_router
from .run import Run
from .sealed import damaged, read_with_facts, write_with_facts

DISPATCHER = "dispatcher"
ROUTER, CLUSTERS = "router.safetensors", "clusters.json"  # in the run's folder


@dataclass(frozen=True, slots=True, eq=False)
class CascadeResult:
    """What a cascade learned, ready for `save_adapter(path, result.parts, result.base, **result.about)`.

    Attributes:
        parts: masks and BatchNorm statistics by set name: "dispatcher", "expert-0", "expert-1", …
        base: fingerprint of the backbone.
        about: task, class names, preprocessing, training record, and the cascade (`parts.CascadeParts`).
        metrics: of the dispatcher, named so, and the mean density of the experts.
    """

    parts: dict[str, Parts]
    base: Fingerprint
    about: dict[str, Any]
    metrics: dict[str, float]


def train_cascade(
    model: Backbone | nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    experts: int = 5,
    output: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: str | None = None,
    report: Report | None = None,
) -> CascadeResult:
    """Train a cascade on a frozen backbone: Self-Masking Networks, section 3.4.

    The dispatcher is trained on all training rows, its embeddings of them (not augmented, of unit length) are clustered
    by principal components and a Gaussian mixture, and an expert that starts as the dispatcher is trained on the rows
    of each cluster. An expert of n_k of n rows trains round(n / n_k * epochs) epochs: as many steps as the dispatcher.

    Args:
        model, data: as in `train_mask`.
        config: of the dispatcher and of every expert.
        experts: number of clusters, at least 2.
        output: folder: `dispatcher` and `expert-0`, … as of `train_mask`, `router.safetensors`, and `clusters.json`
            with the first two coordinates and the expert of every training row. None keeps nothing.
        resume: continue in `output`: what is finished is read back, what was interrupted continues.
        checkpoint_every: as in `train_mask`.
        report: as in `train_mask`; every event has also "part", the name of the set.

    Raises:
        ConfigError: if there are too few experts or rows.
        TrainingError: if the embeddings are all alike, or a cluster has fewer rows than a batch.
        StateError: if `output` belongs to another run. Others: as `train_mask`.
    """
    config = config or TrainConfig()
    backbone = model if isinstance(model, Backbone) else Backbone(model, type(model).__name__, head=find_head(model))
    check_cascade(data, config, experts)
    if resume and (output is None or not (Path(output) / DISPATCHER).exists()):
        raise StateError(
            f"resume needs the folder of an earlier run as `output`, got {output}; without resume a new one starts"
        )
    with nullcontext(output) if output is not None else tempfile.TemporaryDirectory(prefix="maskpack-") as place:
        folder = Path(place)
        with locked(folder):
            return _train(backbone, data, config, experts, folder, resume, checkpoint_every, report)


def check_cascade(data: Data, config: TrainConfig, experts: int) -> None:
    """Check that there can be so many experts.

    Raises:
        ConfigError: if there are too few experts or rows.
    """
    rows = 0 if data.train is None else len(data.train)
    if experts < 2 or (data.train is not None and rows < experts * config.batch_size):
        raise ConfigError(
            f"a cascade needs at least 2 experts and a batch of rows for each; got {experts} experts, {rows} training "
            f"rows and a batch size of {config.batch_size}"
        )


def _train(
    backbone: Backbone,
    data: Data,
    config: TrainConfig,
    experts: int,
    folder: Path,
    resume: bool,
    every: str | None,
    report: Report | None,
) -> CascadeResult:
    def run(name: str, own: Data, settings: TrainConfig, start: Path | None) -> TrainResult:
        return train_mask(
            backbone,
            own,
            settings,
            output=folder / name,
            resume=resume and (folder / name / FILE).exists(),
            start_from=start,
            checkpoint_every=every,
            longer=False,
            report=tagged(report, name),
        )

    main = is_main_process()
    first = run(DISPATCHER, data, config, None)
    assert data.train is not None
    x = _embeddings(backbone, data, config, folder / DISPATCHER, first.base)
    rows = [row for row in data.train.indices if row not in data.train.unreadable]
    facts = {"dispatcher": checkpoint_digest(folder / DISPATCHER / FILE), "experts": experts}
    path = folder / ROUTER
    router, about = _read_router(path, facts) if resume and path.exists() else fit_router(x, experts, config.seed)
    chosen = router.route(x)
    sizes = torch.bincount(chosen, minlength=experts).tolist()
    if main:
        _write_clusters(folder / CLUSTERS, router.coordinates(x), chosen)
    if min(sizes) < config.batch_size:
        raise TrainingError(
            f"the clusters have {', '.join(map(str, sizes))} rows, each expert needs a batch of {config.batch_size}; "
            f"resume with fewer experts than {experts}, or take a smaller batch size or another seed in another folder"
        )
    if main:
        _write_router(path, router, about, facts)
    names = [f"expert-{k}" for k in range(experts)]
    results = {DISPATCHER: first}
    for k, name in enumerate(names):
        mine = [row for row, expert in zip(rows, chosen.tolist(), strict=True) if expert == k]
        own = replace(data, train=replace(data.train, indices=mine), validation=None, test=None)
        settings = replace(config, epochs=max(1, round(len(rows) / sizes[k] * config.epochs)))
        results[name] = run(name, own, settings, folder / DISPATCHER)
    embedding = Embedding(backbone.head, backbone.pooling, backbone.normalize if backbone.pooling else False)
    about |= {"rows": sizes, "steps": {name: one.about["training"]["steps"] for name, one in results.items()}}
    # not of the cascade: the dispatcher's accuracy, for one, is that of a head which is not in it
    metrics = {f"{DISPATCHER}_{name}": value for name, value in first.metrics.items()}
    metrics["expert_density"] = sum(results[name].metrics["density"] for name in names) / experts
    return CascadeResult(
        {name: replace(one.parts, head=None) for name, one in results.items()},
        first.base,
        {
            **first.about,
            "class_names": None,
            "training": {**first.about["training"], "metrics": metrics, "cascade": about},
            "cascade": CascadeParts(DISPATCHER, tuple(names), embedding, router),
        },
        metrics,
    )


def _embeddings(backbone: Backbone, data: Data, config: TrainConfig, folder: Path, base: Fingerprint) -> Tensor:
    """Embed the training rows that can be read as a finished run left the model, (N, D) float32."""
    with borrowed(backbone, config.train):
        run = Run(backbone, data, config)
        take_over(trained_tensors(run.objective.module), folder / FILE, base.digests[base.dtype], ())
        return embeddings(backbone, readable(run.objective.load(run.train_split)))[0]


def _write_router(path: Path, router: Router, about: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    tensors = {name: getattr(router.whitening, name) for name in WHITENING}
    tensors |= {name: getattr(router, name) for name in MIXTURE}
    write_with_facts(path, tensors, {"run": facts, "about": about})


def _read_router(path: Path, facts: Mapping[str, Any]) -> tuple[Router, dict[str, Any]]:
    """Read back the router that an interrupted run has fitted, and what that fit showed."""
    remedy = "delete it and resume: it is fitted again"
    found, stored = read_with_facts(path, remedy)
    missing = {*WHITENING, *MIXTURE} - found.keys() | {"run", "about"} - stored.keys()
    if missing:
        raise damaged(path, remedy, f"{min(missing)!r} is missing")
    differing = [key for key in facts if stored["run"].get(key) != facts[key]]
    if differing:
        raise StateError(
            f"the router in {path.parent} belongs to another run: {', '.join(differing)} differ; resume with the same "
            f"settings, or choose another folder"
        )
    whitening = Whitening(*(found[name] for name in WHITENING))
    return Router(whitening, *(found[name] for name in MIXTURE)), stored["about"]


def _write_clusters(path: Path, z: Tensor, chosen: Tensor) -> None:
    """Write where every training row lies, in its first two coordinates, and its expert."""
    flat = torch.nn.functional.pad(z, (0, 2))[:, :2]
    points = [[round(x, 4), round(y, 4)] for x, y in flat.tolist()]
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps({"expert": chosen.tolist(), "points": points}))
