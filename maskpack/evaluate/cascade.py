"""What a cascade is worth: its head, and the table of it beside its dispatcher alone."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.describe import describe
from ..apply.cascade import Cascade, load_cascade
from ..backbone.load import Backbone
from ..data.base import Data, Examples
from ..errors import DataError
from ..parts import CascadeParts, Combine
from ..training.cascade import CascadeResult
from ..training.router import fit_whitening
from .features import embed
from .frozen import disjoint
from .knn import knn_accuracy
from .linear_probe import fit_probe


def embed_all(backbone: Backbone, cascade: Cascade, examples: Examples, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the embeddings by every set side by side, (N, D (K + 1)), dispatcher first, and the labels, (N,).

    Args:
        backbone: of the cascade's model, with its preprocessing.
    """
    one = cascade.parts.embedding
    backbone = replace(backbone, head=one.module, pooling=one.pooling, normalize=one.normalize)
    blocks, labels = [], torch.empty(0)
    for name in (cascade.parts.dispatcher, *cascade.parts.experts):
        with cascade.loaded(name):
            x, labels = embed(backbone, examples, batch_size=batch_size)
        blocks.append(x)
    return torch.cat(blocks, dim=1), labels


def routed(x: Tensor, parts: CascadeParts) -> Tensor:
    """Return embeddings by every set with those by experts other than the routed one as zeros: the conditional ones."""
    blocks = x.reshape(len(x), len(parts.experts) + 1, -1)
    chosen = parts.router.route(blocks[:, 0])
    kept = torch.nn.functional.pad(torch.nn.functional.one_hot(chosen, len(parts.experts)), (1, 0), value=1)
    return torch.where(kept.bool()[:, :, None], blocks, 0).reshape(x.shape)


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

    Args:
        backbone: that the cascade was trained on, with no mask loaded.
        combine: "conditional" (two passes for each input) or "unconditional" (one more than there are experts).
        reduce: most numbers that a combined embedding is reduced to, by principal components divided by their standard
            deviation; the matrix is stored, in 4 bytes for each of D (K + 1) times `reduce` numbers.

    Raises:
        DataError: if the data have no training split. TrainingError: if all embeddings are alike.
    """
    if data.train is None:
        raise DataError(f"the data {data.id!r} have no training split, which the head of a cascade is fitted to")
    parts: CascadeParts = result.about["cascade"]
    if not data.class_names and reduce is None:
        return replace(result, about={**result.about, "cascade": replace(parts, combine=combine)})
    x, y = embed_all(backbone, Cascade(backbone.model, result.parts, parts), data.train, batch_size)
    x = routed(x, parts) if combine == "conditional" else x
    reduction = None if reduce is None else fit_whitening(x, reduce)
    about, weight, bias = result.about, None, None
    if data.class_names:
        probe = fit_probe(x if reduction is None else reduction(x), y, len(data.class_names))
        about = {**about, "task": data.task, "class_names": list(data.class_names)}
        weight, bias = probe.weight, probe.bias
    whole = replace(parts, combine=combine, reduction=reduction, weight=weight, bias=bias)
    return replace(result, about={**about, "cascade": whole})


def cascade_table(
    backbone: Backbone, adapter: Adapter, data: Data, *, whiten: int | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """Compare a cascade with its dispatcher alone, by nearest neighbours and linear probes.

    Rows are the dispatcher's embeddings, the conditional and the unconditional ones, each as they are and whitened:
    reduced to principal components of the training rows, divided by their standard deviations. Whitening alone changes
    what neighbours and probes see, so that a whitened cascade is to be compared with the whitened dispatcher. The
    variance of whitened coordinates is 1, so that the probes' penalty of 0.01 / n is for them what it is for others.

    Args:
        backbone: the base of the adapter.
        whiten: most whitened numbers; default: as many as an embedding by one set has.

    Returns:
        {"rows": [{"embedding", "whitened", "dimensions", "knn", "probe", "passes", "steps", "mask_bytes",
        "statistics_bytes", "router_bytes", "reduction_bytes", "head_bytes", "bytes"}], "train", "test", "classes"}.
        "steps" are of all training that the row needs, None if the adapter does not tell. Heads and whitening matrices
        are those of the row, whether the adapter stores them or not.

    Raises:
        DataError: as `disjoint`. Others: as `load_cascade`.
    """
    train_split, test_split = disjoint(data)
    cascade = load_cascade(backbone.model, adapter)
    parts, classes = cascade.parts, len(data.class_names)
    x, y = embed_all(backbone, cascade, train_split, batch_size)
    test_x, test_y = embed_all(backbone, cascade, test_split, batch_size)
    kinds: dict[str, tuple[Tensor, Tensor, int]] = {
        "dispatcher": (x[:, : cascade.features], test_x[:, : cascade.features], 1),
        "conditional": (routed(x, parts), routed(test_x, parts), 2),
        "unconditional": (x, test_x, len(parts.experts) + 1),
    }
    rows = []
    for kind, (train, test, passes) in kinds.items():
        for whitened in (False, True):
            whitening = fit_whitening(train, whiten or cascade.features) if whitened else None
            one, other = (train, test) if whitening is None else (whitening(train), whitening(test))
            probe = fit_probe(one, y, classes)
            rows.append(
                {
                    "embedding": kind,
                    "whitened": whitened,
                    "dimensions": one.shape[1],
                    "knn": knn_accuracy(one, y, other, test_y, classes),
                    "probe": probe.accuracy(other, test_y),
                    "passes": passes,
                    **costs(adapter, kind, train.shape[1], one.shape[1] if whitened else 0, classes),
                }
            )
    return {"rows": rows, "train": len(y), "test": len(test_y), "classes": classes}


def costs(adapter: Adapter, kind: str, width: int, reduced: int, classes: int) -> dict[str, int | None]:
    """Return the training steps and bytes that embeddings of a kind need, with a head.

    Args:
        kind: "dispatcher", "conditional" or "unconditional".
        width: numbers of an embedding. reduced: numbers that it is whitened to, or 0.
    """
    about = describe(adapter)
    names = [about["cascade"]["dispatcher"]] if kind == "dispatcher" else list(about["sets"])
    sets = [about["sets"][name] for name in names]
    record = (adapter.training or {}).get("cascade")
    steps: Any = record.get("steps") if isinstance(record, dict) else None
    known = isinstance(steps, dict) and all(type(steps.get(name)) is int for name in names)
    sizes = {
        "mask_bytes": sum(one["payload_bytes"] + one["table_bytes"] for one in sets),
        "statistics_bytes": sum(size for one in sets for role, size in one["dense_bytes"].items() if role != "head"),
        "router_bytes": about["cascade"]["bytes"]["router"] if kind == "conditional" else 0,
        "reduction_bytes": 4 * (width + reduced * width + reduced) if reduced else 0,
        "head_bytes": 4 * classes * ((reduced or width) + 1),
    }
    return {"steps": sum(steps[name] for name in names) if known else None, **sizes, "bytes": sum(sizes.values())}
