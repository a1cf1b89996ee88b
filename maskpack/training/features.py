"""Features of a backbone, cached by content, their k-NN and linear-probe accuracy, and what a mask is worth beside."""

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from blake3 import blake3
from torch import Tensor, nn

from ..adapter.content import FIGURES, Cascade
from ..backbone.classifier import embeddings
from ..backbone.fingerprint import cache_folder, model_digest
from ..backbone.load import Backbone
from ..errors import DataError, MaskpackError, as_text, escape
from ..preprocess import preprocess_to_json
from ..runtime.cascade import LoadedCascade
from .data.base import Data, Examples, few_labels, loader, readable
from .run_folder import read_sealed, write_sealed

Measure = Literal["knn", "probe"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
CHUNK = 1 << 24  # similarities in memory at one time
PENALTY = 0.01  # times 1 / n: see docs/methods.md, evaluation
ABSENT = -1e30  # the logit of a class without a training row: below all others, and finite
STEPS = 2000  # at most; some hundred are enough
VERSION = 2  # of the key and of the files; raise it when the same inputs are to give other features
LIMIT = 5_000_000_000  # bytes that the folder may have
OWN_FILE = re.compile(r"\.?[0-9a-f]{64}\.safetensors(\.[0-9a-f]+\.tmp)?")


class FeatureCacheWarning(UserWarning):
    """Warned when a file of the feature cache is damaged or cannot be written; the features are right all the same."""


def embed(
    backbone: Backbone, examples: Examples, *, batch_size: int = 64, cache: bool = True, key: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the features of the examples that can be read, (N, D) float32, and their labels, (N,).

    Features are the inputs of the head, of the model as it is now (a mask loaded or not), in evaluation mode, without
    augmentation. With `cache` they are kept in `cache_folder()`, but of data without a digest and of models with
    scores, unless their `features_key` from before they had scores is given.
    """
    # made first, so that data of the wrong kind are an error on a hit as well
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
    key = key or (features_key(backbone, examples) if cache else None)
    found = None if key is None else kept_features(key, len(examples))
    if found is None:
        x, y = embeddings(backbone, readable(batches))
        if not torch.isfinite(x).all():
            raise DataError(f"the features of {backbone.id} are not finite; compute them in a wider dtype than its own")
        if key is not None:
            keep_features(key, x, examples)
        return x, y
    x, rows = found
    examples.unreadable.update(set(examples.indices) - set(rows))
    return x, torch.tensor([examples.labels[row] for row in rows])


def embed_all(
    backbone: Backbone, cascade: LoadedCascade, examples: Examples, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Return the embeddings by every set of a cascade side by side, (N, D (K + 1)), dispatcher first, and labels."""
    backbone = replace(backbone, embedding=cascade.parts.embedding)
    blocks, labels = [], torch.empty(0)
    for name in (cascade.parts.dispatcher, *cascade.parts.experts):
        with cascade.loaded(name):
            x, labels = embed(backbone, examples, batch_size=batch_size)
        blocks.append(x)
    return torch.cat(blocks, dim=1), labels


def routed(x: Tensor, parts: Cascade) -> Tensor:
    """Return embeddings by every set with those by experts other than the routed one as zeros: the conditional ones."""
    blocks = x.reshape(len(x), len(parts.experts) + 1, -1)
    chosen = parts.router.route(blocks[:, 0])
    kept = nn.functional.pad(nn.functional.one_hot(chosen, len(parts.experts)), (1, 0), value=1)
    return torch.where(kept.bool()[:, :, None], blocks, 0).reshape(x.shape)


# --- the cache -------------------------------------------------------------------------------------------------------


def features_key(backbone: Backbone, examples: Examples) -> str | None:
    """Return the name of features in the cache; None if model, tokenizer or rows have no digest."""
    model = model_digest(backbone.model, backbone.outside)
    inputs = inputs_content(backbone, examples)
    if model is None or inputs is None:
        return None
    device = next(backbone.model.parameters()).device.type
    return digest_of([VERSION, model, device, list(astuple(backbone.embedding)), *inputs])


def inputs_content(backbone: Backbone, examples: Examples) -> list[Any] | None:
    """Return preprocessing, tokenizer and rows as JSON values, for a digest; None if one of them has no digest."""
    tokenizer = _tokenizer_digest(backbone.tokenizer)
    if tokenizer is None or not examples.digest:
        return None
    rows = [examples.digest, examples.column, list(examples.indices)]
    return [preprocess_to_json(backbone.preprocess), tokenizer, rows]


def digest_of(content: Any) -> str:
    """Return the hex BLAKE3 of JSON values."""
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str | None:
    """Return a digest of a tokenizer of transformers, "" without one; None for another object."""
    if tokenizer is None:
        return ""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):
        # these follow from the last call, and preprocessing says what they will be
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    return digest_of([type(tokenizer).__qualname__, repr(tokenizer), rules])


def kept_features(key: str, most: int) -> tuple[Tensor, list[int]] | None:
    """Return the features cached under a digest, and their rows, `most` at most; None if there are none undamaged."""
    path = cache_folder() / "features" / f"{key}.safetensors"
    if not path.exists():
        return None
    try:
        found, about = read_sealed(path, "")
        features, rows = found["features"], list(about["rows"])
        if len(features) != len(rows) or len(rows) > most:
            raise DataError(f"{len(rows)} rows and {len(features)} features, of at most {most}")
    except (MaskpackError, KeyError, TypeError) as error:
        if path.exists():  # another process may have removed it meanwhile
            _warn(f"the cached features in {path} cannot be used and are computed anew: {error}")
        return None
    with suppress(OSError):
        os.utime(path)  # the files that nobody asks for are the oldest
    return features, rows


def keep_features(key: str, features: Tensor, examples: Examples) -> None:
    """Cache the features of the examples that could be read under a digest of all that they follow from."""
    path = cache_folder() / "features" / f"{key}.safetensors"
    rows = [row for row in examples.indices if row not in examples.unreadable]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, {"features": features}, {"rows": rows})
        _shrink(path)
    except (MaskpackError, OSError) as error:
        _warn(f"the features are not cached: {error}; another folder can be named with the variable MASKPACK_CACHE")


def _shrink(newest: Path) -> None:
    """Remove the files that were used longest ago until the folder keeps its limit; never the newest, never others'."""
    files = []
    for file in newest.parent.iterdir():
        if OWN_FILE.fullmatch(file.name):
            with suppress(OSError):
                about = file.stat()
                files.append((about.st_mtime_ns, about.st_size, file))
    size = sum(size for _, size, _ in files)
    for _, freed, file in sorted(files):
        if size > LIMIT and file != newest:
            with suppress(OSError):
                file.unlink()
                size -= freed


def _warn(text: str) -> None:
    warnings.warn(escape(text), FeatureCacheWarning, stacklevel=4)


# --- what features are worth -----------------------------------------------------------------------------------------


def knn_scores(
    bank: Tensor, bank_labels: Tensor, x: Tensor, classes: int, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Return each class's share of the vote of the k bank rows with the greatest cosine, (N, classes) float32.

    A neighbour votes for its class with the weight exp(cosine / temperature). Where the bank, (M, D), has fewer than k
    rows, all vote. Of rows with equal cosines at the edge of the k, which of them vote is not defined.
    """
    # divided out of the products: a bank of many gigabytes is not copied
    lengths = bank.norm(dim=1).clamp(min=torch.finfo(bank.dtype).tiny)
    scores = []
    for rows in torch.split(x, max(1, CHUNK // len(bank))):
        cosines, neighbours = (nn.functional.normalize(rows, dim=1) @ bank.T / lengths).topk(min(k, len(bank)))
        # relative to the greatest: a low temperature overflows otherwise, and shares are the same
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes).scatter_add_(1, bank_labels[neighbours], weights)
        scores.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(scores)


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of features: weight (classes, D) and bias (classes,), float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of features (N, D), (N, classes)."""
        return x @ self.weight.T + self.bias


def fit_probe(x: Tensor, y: Tensor, classes: int) -> Probe:
    """Return the linear classifier of least mean cross-entropy + PENALTY / (2 n) * sum of squared weights.

    A convex solve, so there is no learning rate and no seed. L-BFGS in float64, on features (n, D) that are centred and
    made nearly white: another basis of the same problem, in which it takes a hundred steps where it takes thousands in
    the features' own. A class without a row is left out, and gets weights of 0 and the logit `ABSENT`.
    """
    if len(x) == 0 or not torch.isfinite(x).all():
        raise DataError(f"a linear probe needs finite features of at least one row, got {len(x)} rows")
    present, target = torch.unique(y, return_inverse=True)
    n, penalty = len(x), PENALTY / len(x)
    mean = x.double().mean(0)
    z = x.double() - mean
    basis: Tensor | None = None
    if n < z.shape[1]:  # the minimum lies in the span of the rows
        basis, rotated = torch.linalg.qr(z.T)
        z = rotated.T
    # about the Hessian, where a confident classifier leaves a hundredth of it to the penalty; its scale does not matter
    hessian = z.T @ z / n
    hessian.diagonal().add_(100 * len(present) * penalty + 1e-10 * hessian.diagonal().mean())
    root = torch.linalg.cholesky(hessian)
    white = torch.linalg.solve_triangular(root, z.T, upper=False).T.contiguous()
    del z, hessian
    v = torch.zeros(len(present), white.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(len(present), dtype=torch.float64, requires_grad=True)

    def weights() -> Tensor:
        w: Tensor = torch.linalg.solve_triangular(root, v, upper=False, left=False)
        return w

    optimizer = torch.optim.LBFGS(
        [v, b], max_iter=STEPS, max_eval=2 * STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(white @ v.T + b, target) + penalty / 2 * weights().square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        w = weights() if basis is None else weights() @ basis.T
        weight = torch.zeros(classes, x.shape[1])
        bias = torch.full((classes,), ABSENT)
        weight[present] = w.float()
        bias[present] = (b - w @ mean).float()
    return Probe(weight, bias)


def by_class(logits: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the accuracy of logits (N, classes), in all and by class, and the confusion, as rows [true][predicted].

    A class without a row has None.
    """
    classes = logits.shape[1]
    counts = (y * classes + logits.argmax(1)).bincount(minlength=classes**2).reshape(classes, classes)
    correct, rows = counts.diagonal().tolist(), counts.sum(1).tolist()
    return {
        "accuracy": sum(correct) / sum(rows),
        "per_class": [right / of if of else None for right, of in zip(correct, rows, strict=True)],
        "confusion": counts.tolist(),
    }


def measured(measure: Measure, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classes: int) -> dict[str, Any]:
    """Return accuracies as `by_class` on test features, of a measure that learns from training features."""
    found = knn_scores(x, y, test_x, classes) if measure == "knn" else fit_probe(x, y, classes).logits(test_x)
    return by_class(found, test_y)


def measure_features(
    backbone: Backbone,
    data: Data,
    measures: Sequence[Measure],
    fractions: Sequence[float] = (1.0,),
    *,
    batch_size: int = 64,
    cache: bool = True,
) -> list[dict[str, Any]]:
    """Return the k-NN and probe accuracies of a backbone, a mask loaded or not, by share of the training labels.

    They are measured on the test split, always. For each share, of the rows that `few_labels` draws, and each measure
    there is what `by_class` gives, with {"measure", "labels_fraction", "labels", "examples": numbers of rows that could
    be read}.
    """
    train, test = disjoint(data)
    few = [few_labels(train, fraction) for fraction in fractions]
    classes = len(data.class_names)
    test_x, test_y = embed(backbone, test, batch_size=batch_size, cache=cache)
    rows = []
    for fraction, examples in zip(fractions, few, strict=True):
        x, y = embed(backbone, examples, batch_size=batch_size, cache=cache)
        for measure in measures:
            about = {"measure": measure, "labels_fraction": fraction, "labels": len(y), "examples": len(test_y)}
            rows.append({**about, **measured(measure, x, y, test_x, test_y, classes)})
    return rows


def disjoint(data: Data) -> tuple[Examples, Examples]:
    """Return the training and the test split, which have labels and no row in common."""
    train, test = (data.labelled(split, "a measurement by k-NN or probe") for split in ("train", "test"))
    if train.rows is test.rows or (train.digest and train.digest == test.digest):
        both = len(set(train.indices) & set(test.indices))
        if both:
            raise DataError(
                f"{both} rows of {data.id!r} are in the training and in the test split; measured on them, k-NN and "
                f"probe would know the answers"
            )
    return train, test


BITS = 4  # of a number of LoRA's matrices
SPLITS = ("test", "validation")


def probe_accuracies(backbone: Backbone, data: Data, batch_size: int) -> dict[str, float]:
    """Return the accuracy of the linear probe of a raw backbone, "SPLIT_probe_accuracy", of the splits held out."""
    if data.train is None or not data.class_names or len(data.splits) < 2:
        return {}
    features = {name: embed(backbone, examples, batch_size=batch_size) for name, examples in data.splits.items()}
    probe = fit_probe(*features.pop("train"), len(data.class_names))
    return {f"{name}_probe_accuracy": by_class(probe.logits(x), y)["accuracy"] for name, (x, y) in features.items()}


def beside_baseline(metrics: Mapping[str, float], found: Mapping[str, float]) -> dict[str, float]:
    """Return metrics with the figures of their baseline, and how much better they are, "SPLIT_over_BASELINE"."""
    over = {
        f"{split}_over_{one.baseline}": one.sign
        * (metrics[f"{split}_{name}"] - found[f"{split}_{one.baseline}_{name}"])
        for name, one in FIGURES.items()
        for split in SPLITS
        if f"{split}_{name}" in metrics and f"{split}_{one.baseline}_{name}" in found
    }
    return {**metrics, **found, **over}


def worth(metrics: Mapping[str, float], shapes: Iterable[Sequence[int]], masks: bool = True) -> dict[str, Any]:
    """Return the bytes of LoRA for weights of these shapes, and warnings if there are any, for the training record.

    `masks` says whether masks were to learn.
    """
    shapes = list(shapes)
    found: dict[str, Any] = {"lora_bytes": {f"rank_{rank}_4bit": lora_bytes(shapes, rank) for rank in (1, 8)}}
    warnings = worth_warnings(metrics, masks)
    return {**found, "warnings": warnings} if warnings else found


def lora_bytes(shapes: Iterable[Sequence[int]], rank: int) -> int:
    """Return the bytes of LoRA matrices of a rank on weights of these shapes, at 4 bits a number; vectors have none."""
    return sum(rank * (shape[0] + math.prod(shape[1:])) * BITS // 8 for shape in shapes if len(shape) > 1)


def worth_warnings(metrics: Mapping[str, float], masks: bool = True) -> list[str]:
    """Return warnings at the end of a training: masks without a zero, or no better than the raw backbone."""
    found = []
    if masks and metrics.get("density") == 1.0:
        found.append(
            "the masks keep every weight, so the adapter is a head and what else was trained; raise distance or lr, or "
            "take more steps"
        )
    known = ((split, name, one) for split in SPLITS for name, one in FIGURES.items())
    first = next((one for one in known if f"{one[0]}_{one[2].baseline}_{one[1]}" in metrics), None)
    if first is None:
        return found
    split, name, one = first
    if metrics.get(f"{split}_over_{one.baseline}", 1.0) <= 0:
        found.append(
            f"the {split} {name} is {as_text(metrics, f'{split}_{name}')}, and {one.words} has "
            f"{as_text(metrics, f'{split}_{one.baseline}_{name}')}: the mask was not worth it; "
            f"take more steps, or do without it"
        )
    return found
