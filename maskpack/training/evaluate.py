"""Evaluation of adapters: accuracy in all and by class, tables of transfers and of cascades."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.content import Parts
from ..adapter.describe import inspect_adapter
from ..adapter.read import Adapter
from ..backbone.classifier import Classifier, accuracy
from ..backbone.load import Backbone
from ..backbone.model import Embedding, Head
from ..errors import escape
from ..mask import MaskSet
from ..preprocess import preprocess_from_json
from ..runtime.apply import masked
from ..runtime.cascade import load_cascade
from ..runtime.load import Mode, load_mask, removing
from .cascade import fit_whitening
from .data.base import Data, Examples, loader, readable
from .features import MEASURES, Measure, disjoint, embed, embed_all, measure_features, measured, routed
from .objectives.base import find_objective
from .objectives.language import exact_answers
from .objectives.supervised import Supervised
from .transfer import TransferResult

COLUMNS = ("network", "source", "target")
RAW = "raw"  # embeddings of the backbone without a mask


def as_loaded(backbone: Backbone, adapter: Adapter) -> Backbone:
    """Return a backbone that has the adapter loaded, with the adapter's preprocessing and place of the head."""
    head, stored = adapter.parts(stream=True).head, adapter.about.preprocess
    if stored is not None:
        backbone = replace(backbone, preprocess=preprocess_from_json(stored))
    if head is not None:
        return replace(backbone, embedding=head.embedding)
    if set(adapter.base.head) <= set(backbone.outside):
        return backbone
    return replace(backbone, embedding=Embedding(adapter.base.head[0]))


def figures(
    backbone: Backbone,
    adapter: Adapter | None,
    data: Data,
    *,
    mode: Mode = "target",
    split: str = "test",
    measures: Sequence[Measure] = (),
    shares: Sequence[float] = (),
    answers: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Return the figures of an adapter on data, which it then stays loaded for, or of a backbone alone.

    Args:
        split: of which an adapter's accuracy, or the figure of its task, is measured, if it has a head.
        measures: of features. shares: of the training rows, for these.
        answers: prompts that a language model answers, as in `exact_answers`.
    """
    result: dict[str, Any] = {
        "adapter": None if adapter is None else adapter.pinned,
        "backbone": backbone.id,
        "data": data.id,
        "split": split,
        "class_names": list(data.class_names),
    }
    head = None
    if adapter is not None:
        load_mask(backbone.model, adapter, mode=mode)
        backbone = as_loaded(backbone, adapter)
        head = adapter.parts(stream=True).head if adapter.about.preprocess is not None else None
    if adapter is not None and (head is not None or not measures):  # without one this is the error that says so
        rows = data.split(split)
        result |= find_objective("supervised", backbone.task).measured(backbone, rows, head, batch_size)
        result |= {"examples": len(rows) - len(rows.unreadable), "unreadable": len(rows.unreadable)}
        if answers is not None:
            result["exact_answers"] = exact_answers(backbone, rows, answers, batch_size)
    if measures:
        result["features"] = measure_features(backbone, data, measures, shares or [1.0], batch_size=batch_size)
        result.setdefault("unreadable", len(data.split(split).unreadable))
    return result


def adapter_logits(
    backbone: Backbone, adapter: Adapter, examples: Examples, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Return logits and labels of the examples that can be read; the adapter is loaded, but a cascade is not."""
    stored = adapter.about.preprocess
    backbone = backbone if stored is None else replace(backbone, preprocess=preprocess_from_json(stored))
    if adapter.cascade is not None:
        together = load_cascade(backbone.model, adapter)
        batches = readable(loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size))
        outputs, labels = zip(*((together.logits(inputs), y) for inputs, y in batches), strict=True)
        return torch.cat(outputs), torch.cat(labels)
    head = None if stored is None else adapter.parts(stream=True).head
    return Supervised.outputs(backbone, examples, head, batch_size)


def held_out_accuracy(backbone: Backbone, data: Data, batch_size: int = 64) -> float | None:
    """Return a model's accuracy, with its own head, on the test split, else on the validation split, else None."""
    examples, linear = data.validation if data.test is None else data.test, backbone.linear
    if examples is None:
        return None
    assert linear is not None
    batches = loader(examples, backbone.preprocess, backbone.tokenizer, batch_size=batch_size)
    return accuracy(Classifier(backbone.model, linear, backbone.embedding), readable(batches))[0]


@contextmanager
def applied_parts(model: nn.Module, parts: Parts, mode: Mode, head: Head | None = None) -> Iterator[None]:
    """Apply parts to a model within the context, as `load_mask` does in this mode; the head stays without `head`."""
    if mode == "source":
        parts = Parts(MaskSet(dict(removing(parts.masks.items()))))
    with masked(model, replace(parts, head=head)):
        yield


def transfer_table(result: TransferResult, source: Data, target: Data, *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Return accuracies of the networks of a transfer on the source, with its head, and on the target.

    They are {"network", "source", "target"}, None where there is nothing to measure: see `held_out_accuracy`.
    """
    backbone, parts = result.backbone, result.parts

    def on(data: Data, parts: Parts, mode: Mode = "target", head: Head | None = None) -> float | None:
        with applied_parts(backbone.model, parts, mode, head):
            return held_out_accuracy(backbone, data, batch_size)

    rows = [
        ("source", held_out_accuracy(backbone, source, batch_size), None),
        ("source through its mask", on(source, parts, "source"), None),
        ("transferred", on(source, parts), on(target, parts, head=parts.head)),
    ]
    if (plain := result.baseline) is not None:
        rows.append(("plain fine-tuning", on(source, plain), on(target, plain, head=plain.head)))
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def source_classes(adapter: Adapter) -> tuple[str, ...] | None:
    """Return the class names of the source of a transfer, as its training record has them, or None."""
    found: Any = adapter.about.training
    for name in ("transfer", "source", "class_names"):
        found = found.get(name) if isinstance(found, Mapping) else None
    named = isinstance(found, list) and found and all(isinstance(one, str) for one in found)
    return tuple(found) if named else None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of `transfer_table` as a Markdown table, in per cent."""
    return table(COLUMNS, [[row["network"], *(percent(row[name]) for name in COLUMNS[1:])] for row in rows])


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of names, which are escaped, and figures."""
    lines = [columns, ["---", *(["---:"] * (len(columns) - 1))]]
    lines += [[escape(name, "markdown"), *cells] for name, *cells in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cascade_table(
    backbone: Backbone, adapter: Adapter, data: Data, *, whiten: int | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """Compare a cascade with its dispatcher and with no mask at all, by nearest neighbours and linear probes.

    Rows are the backbone's raw embeddings, the dispatcher's, the conditional and the unconditional ones, each as they
    are and whitened: reduced to at most `whiten` principal components of the training rows (default: as many as one
    set's embedding has numbers), divided by their standard deviations. Whitening alone changes what neighbours and
    probes see, so that a whitened cascade is to be compared with the whitened raw embeddings and dispatcher.

    Returns:
        {"rows": [{"embedding", "whitened", "dimensions", "knn", "probe", "passes", and the names of `costs`}], "train",
        "test", "classes"}. Heads and whitening matrices are those of the row, whether the adapter stores them or not.
    """
    train_split, test_split = disjoint(data)
    cascade = load_cascade(backbone.model, adapter)
    parts, classes = cascade.parts, len(data.class_names)
    x, y = embed_all(backbone, cascade, train_split, batch_size)
    test_x, test_y = embed_all(backbone, cascade, test_split, batch_size)
    raw = replace(backbone, embedding=parts.embedding)
    kinds: dict[str, tuple[Tensor, Tensor, int]] = {
        RAW: (embed(raw, train_split, batch_size=batch_size)[0], embed(raw, test_split, batch_size=batch_size)[0], 1),
        "dispatcher": (x[:, : cascade.features], test_x[:, : cascade.features], 1),
        "conditional": (routed(x, parts), routed(test_x, parts), 2),
        "unconditional": (x, test_x, len(parts.experts) + 1),
    }
    rows = []
    for kind, (train, test, passes) in kinds.items():
        for row in plain_and_whitened(train, y, test, test_y, classes, whiten or cascade.features):
            reduced = row["dimensions"] if row["whitened"] else 0
            own = {**row, "passes": passes, **costs(adapter, kind, train.shape[1], reduced, classes)}
            rows.append({"embedding": kind, **own})
    return {"rows": rows, "train": len(y), "test": len(test_y), "classes": classes}


def plain_and_whitened(
    x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, classes: int, whiten: int
) -> Iterator[dict[str, Any]]:
    """Yield k-NN and probe accuracies of embeddings as they are, and reduced to `whiten` numbers and whitened."""
    for whitening in (None, fit_whitening(x, whiten)):
        one, other = (x, test_x) if whitening is None else (whitening(x), whitening(test_x))
        row: dict[str, Any] = {"whitened": whitening is not None, "dimensions": one.shape[1]}
        for measure in MEASURES:
            row[measure] = measured(measure, one, y, other, test_y, classes)["accuracy"]
        yield row


def costs(adapter: Adapter, kind: str, width: int, reduced: int, classes: int) -> dict[str, int | None]:
    """Return training steps (None if unknown) and bytes for embeddings of a kind of `cascade_table`, with a head.

    An embedding has `width` numbers, whitened to `reduced` if that is not 0.
    """
    about = inspect_adapter(adapter)
    names = {RAW: [], "dispatcher": [about["cascade"]["dispatcher"]]}.get(kind, list(about["sets"]))
    sets = [about["sets"][name] for name in names]
    record = (adapter.about.training or {}).get("cascade")
    steps: Any = record.get("steps") if isinstance(record, dict) else None
    known = not names or (isinstance(steps, dict) and all(type(steps.get(name)) is int for name in names))
    sizes = {
        "mask_bytes": sum(one["payload_bytes"] for one in sets),
        "statistics_bytes": sum(size for one in sets for role, size in one["dense_bytes"].items() if role != "head"),
        "router_bytes": about["cascade"]["bytes"]["router"] if kind == "conditional" else 0,
        "reduction_bytes": 4 * (width + reduced * width + reduced) if reduced else 0,
        "head_bytes": 4 * classes * ((reduced or width) + 1),
    }
    return {"steps": sum(steps[name] for name in names) if known else None, **sizes, "bytes": sum(sizes.values())}
