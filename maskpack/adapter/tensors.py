"""The tensors of an adapter: their names, dtypes and shapes, to blobs and back (docs/format.md sections 4 and 7)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backbone.model import CASTS, PREFIX, STATISTICS, Head, RandomWeight
from ..errors import AdapterError, CorruptAdapterError
from ..mask import PackedMask, packed_bits
from ..safetensors_io import DTYPES, NAMES, Blob, Span
from .content import MIXTURE, WHITENING, Cascade, Parts, Router, Whitening
from .header import Header, embedding_of, embedding_to_json
from .steps import norms_to_frame, rows_from_frame, rows_to_frame

if TYPE_CHECKING:
    from torch import Tensor

BASE = "maskpack.base"
CASCADE = "maskpack.cascade/"  # a set's name has no dot
BASE_BYTES = PREFIX * len(CASTS)
FLOATS = ("F32", "BF16", "F16")
ROLES = ("statistics", "parameters")
# Shapes of a cascade's tensors, vectors first: D values of an embedding, Q coordinates, K experts, W values of a
# combined embedding, R of a reduced one, I into the head, C classes.
CASCADE_SHAPES = {
    "router/mean": "D",
    "router/scale": "Q",
    "router/components": "QD",
    "router/weights": "K",
    "router/means": "KQ",
    "router/precisions": "KQQ",
    "reduction/mean": "W",
    "reduction/scale": "R",
    "reduction/components": "RW",
    "head/weight": "CI",
    "head/bias": "C",
}


def masked_names(header: Header) -> list[str]:
    """Return the names of the masked parameters over all sets, sorted."""
    return sorted({payload.name for one in header.sets.values() for payload in one.payloads})


def spans_of(header: Header) -> dict[str, Span]:
    """Return where each tensor lies in the data, in order: digests of the base, payloads, those that are listed."""
    found, at = dict[str, Span](), 0
    listed: dict[str, tuple[str, tuple[int, ...]]] = {BASE: ("U8", (len(masked_names(header)), BASE_BYTES))}
    for name, one in header.sets.items():
        listed[f"{name}/payloads"] = "U8", (sum(payload.size for payload in one.payloads),)
    for name, (dtype, shape) in (*listed.items(), *header.tensors.items()):
        if name in found:
            raise CorruptAdapterError(f"$.tensors lists {name[:200]!r}, which follows from the masks; fetch it again")
        found[name] = Span(dtype, shape, at, at + math.prod(shape) * DTYPES[dtype][1])
        at = found[name].end
    return found


def beginning(names: Sequence[str], prefix: str) -> Sequence[str]:
    """Return those of some sorted names that begin with a prefix, without looking at the others."""
    return names[bisect_left(names, prefix) : bisect_left(names, prefix[:-1] + chr(ord(prefix[-1]) + 1))]


def head_to_json(head: Head) -> dict[str, Any]:
    """Return what the header says about a head; AdapterError if readers would make another of its random weight."""
    own = embedding_to_json(head.embedding)
    if head.random is None:
        return own if head.steps is None else {**own, "features": head.weight.shape[1]}
    mask = head.random.mask
    plain = mask.op == "zero" and mask.signs is None and mask.alpha in (None, mask.scaled().alpha)
    if not plain or head.bias is not None or not head.weight.cpu().float().equal(head.random.dense()):
        raise AdapterError(
            "readers would not get this random head back, expected no bias, a mask of op 'zero' without signs, "
            "with the alpha of its density or none, and the weight random.dense(); or leave out `random` to store "
            "the head whole"
        )
    return {**own, "random": {"seed": head.random.seed, "shape": [*mask.shape], "scale": mask.alpha is not None}}


def dense_blobs(sets: Mapping[str, Parts], cascade: Cascade | None) -> list[Blob]:
    """Return the tensors that are stored as they are given; AdapterError if the format does not allow a dtype."""
    found = {} if cascade is None else cascade_tensors(cascade)
    blobs = []
    for name, parts in sets.items():
        for role in ROLES:
            found |= {f"{name}/{role}/{key}": tensor for key, tensor in getattr(parts, role).items()}
        if parts.head is not None and parts.head.random is not None:
            packed = packed_bits(parts.head.random.mask.bits)
            blobs.append(Blob(f"{name}/head/mask", "U8", (len(packed),), [packed.data]))
        elif parts.head is not None:
            head = {"bias": parts.head.bias}
            if (steps := parts.head.steps) is None:
                head["weight"] = parts.head.weight
            else:
                head["steps"] = steps.float()
                rows = rows_to_frame(parts.head.weight, steps.cpu().float())
                blobs.append(Blob(f"{name}/head/integers", "U8", (len(rows),), [rows]))
            found |= {f"{name}/head/{role}": tensor for role, tensor in head.items() if tensor is not None}
        if parts.norms:
            frame = norms_to_frame(dict(sorted(parts.norms.items())))
            blobs.append(Blob(f"{name}/norms", "U8", (len(frame),), [frame]))
    for key, tensor in found.items():
        if NAMES.get(str(tensor.dtype)) not in FLOATS:
            raise not_float(key, tensor)
        blobs.append(Blob.of(key, tensor.float() if key.split("/")[1] == "statistics" else tensor))
    return blobs


def not_float(name: str, tensor: Tensor) -> AdapterError:
    """Return the error for a tensor of a dtype that the format does not allow."""
    return AdapterError(f"{name} is {tensor.dtype}, expected one of float32, bfloat16, float16; convert it")


def cascade_tensors(cascade: Cascade) -> dict[str, Tensor]:
    """Return the tensors to store, by their names in the file; the router's and the reduction's as float32."""
    router = {name: getattr(cascade.router.whitening, name) for name in WHITENING}
    router |= {name: getattr(cascade.router, name) for name in MIXTURE}
    reduction = {name: getattr(cascade.reduction, name) for name in WHITENING if cascade.reduction is not None}
    found = {f"router/{name}": tensor.float() for name, tensor in router.items()}
    found |= {f"reduction/{name}": tensor.float() for name, tensor in reduction.items()}
    found |= {"head/weight": cascade.weight, "head/bias": cascade.bias}
    return {CASCADE + name: tensor for name, tensor in found.items() if tensor is not None}


Layout = tuple[tuple[str, ...], tuple[int, ...] | None]  # dtypes, shape (None for any)


def check_layout(header: Header, spans: Mapping[str, Span]) -> None:
    """Check that a file has the tensors that its header asks for and no others, with their dtypes and shapes."""
    expected = dict(_layout(header, spans))
    for name in sorted(expected.keys() | spans.keys()):
        if name not in spans:
            raise CorruptAdapterError(f"the file has no tensor {name!r}, which its header asks for; fetch it again")
        span, (dtypes, shape) = spans[name], expected.get(name, ((), None))
        if span.dtype not in dtypes or shape not in (None, span.shape):
            wanted = " or ".join(dtypes) or "no such tensor"
            raise CorruptAdapterError(
                f"tensor {name[:200]!r} is {span.dtype} of shape {span.shape}, expected {wanted}"
                f"{'' if shape is None else f' of shape {shape}'}; fetch the file again"
            )


def _layout(header: Header, spans: Mapping[str, Span]) -> Iterator[tuple[str, Layout]]:
    """Yield what each tensor must be that a file must have, or has and may have."""
    if header.cascade is not None:
        yield from _cascade_layout(header, spans)
    yield BASE, (("U8",), None)
    names = sorted(spans)
    for set_name, one in header.sets.items():
        yield f"{set_name}/payloads", (("U8",), None)
        for payload in one.payloads:
            if payload.coding.op == "replace":
                name = f"{set_name}/values/{payload.name}"
                if name in spans and spans[name].dtype == "U8":
                    yield _flat(name, "U8", spans)
                else:
                    yield name, (FLOATS, (payload.weights - payload.kept,))
        if one.head is not None and "random" in one.head:
            yield f"{set_name}/head/mask", (("U8",), ((math.prod(one.head["random"]["shape"]) + 7) // 8,))
        elif one.head is not None:
            rows = f"{set_name}/head/{'steps' if 'features' in one.head else 'weight'}"
            if "features" in one.head:
                yield _flat(rows, "F32", spans)
                yield _flat(f"{set_name}/head/integers", "U8", spans)
            else:
                yield rows, (FLOATS, None)
            if (bias := f"{set_name}/head/bias") in spans:
                yield bias, (FLOATS, spans[rows].shape[:1] if rows in spans else ())
        if one.norms:
            yield _flat(f"{set_name}/norms", "U8", spans)
        for name in beginning(names, f"{set_name}/"):
            role, _, key = name.removeprefix(f"{set_name}/").partition("/")
            if name == f"{set_name}/scale":
                yield name, (("F32",), (len(one.payloads),))
            elif role == "statistics" and key.rpartition(".")[2] in STATISTICS:
                yield name, (("F32",), None)
            elif role == "parameters" and key and key.rpartition(".")[0] not in one.norms:
                yield name, (FLOATS, None)


def _flat(name: str, dtype: str, spans: Mapping[str, Span]) -> tuple[str, Layout]:
    """Return what a tensor must be that has one dimension of any size."""
    span = spans.get(name)
    return name, ((dtype,), (0 if span is None else (span.end - span.start) // DTYPES[dtype][1],))


def _cascade_layout(header: Header, spans: Mapping[str, Span]) -> Iterator[tuple[str, Layout]]:
    """Yield what a cascade's tensors must be; sizes that the header does not state are those of the first with them."""
    assert header.cascade is not None
    shapes = {name: spans[CASCADE + name].shape if CASCADE + name in spans else () for name in CASCADE_SHAPES}
    parts = {"router", *(name.removeprefix(CASCADE).split("/")[0] for name in spans if name.startswith(CASCADE))}
    sizes = {"K": len(header.cascade["experts"]), "D": max(math.prod(shapes["router/mean"]), 1)}
    sizes["W"] = sizes["D"] * (sizes["K"] + 1)
    if header.about.class_names is not None:
        sizes["C"] = len(header.about.class_names)
    for name, letters in CASCADE_SHAPES.items():
        if name.split("/")[0] in parts:
            for letter, size in zip(letters, shapes[name], strict=False):
                sizes.setdefault(letter, max(size, 1))
            if name == "head/weight":
                sizes["I"] = sizes.get("R", sizes["W"])
            dtypes = FLOATS if name.startswith("head/") else ("F32",)
            yield CASCADE + name, (dtypes, tuple(sizes.get(letter, 1) for letter in letters))


def head_mask(random: Mapping[str, Any], raw: memoryview) -> PackedMask:
    """Return the mask of a random head; CorruptAdapterError if bits of its padding are set."""
    packed = np.frombuffer(raw, dtype=np.uint8)
    mask = PackedMask.from_bytes(packed, tuple(random["shape"]))
    if not np.array_equal(packed_bits(mask.bits), packed):
        raise CorruptAdapterError("the mask of the head has set bits behind its end; fetch the file again")
    return mask.scaled() if random["scale"] else mask


def head_of(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
    """Return a head from its JSON object and its tensors by role; a random weight is rebuilt. Raises as `head_mask`."""
    if "features" in spec and "random" not in spec:
        import torch

        steps = tensors["steps"]
        weight = torch.from_numpy(rows_from_frame(tensors["integers"].numpy().data, steps.numpy(), spec["features"]))
        return Head(embedding_of(spec), weight, tensors.get("bias"), None, steps)
    if "random" not in spec:
        return Head(embedding_of(spec), tensors["weight"], tensors.get("bias"))
    random = RandomWeight(spec["random"]["seed"], head_mask(spec["random"], tensors["mask"].numpy().data))
    return Head(embedding_of(spec), random.dense(), None, random)


def cascade_of(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cascade:
    """Return a cascade from its JSON object and its tensors, given without their prefix."""

    def whitening(role: str) -> Whitening:
        return Whitening(*(tensors[f"{role}/{name}"] for name in WHITENING))

    router = Router(whitening("router"), *(tensors[f"router/{name}"] for name in MIXTURE))
    reduction = whitening("reduction") if "reduction/mean" in tensors else None
    head = tensors.get("head/weight"), tensors.get("head/bias")
    embedding = embedding_of(spec["embedding"])
    return Cascade(spec["dispatcher"], tuple(spec["experts"]), embedding, router, spec["combine"], reduction, *head)


def check_cascade(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that the values of a cascade's tensors, given without their prefix, compute the same for every reader."""

    def check(name: str, fits: bool, found: str, expected: str) -> None:
        if not fits:
            raise CorruptAdapterError(
                f"tensor '{CASCADE}{name}' has {found}, expected {expected}; fetch the file again"
            )

    for name, values in arrays.items():
        check(name, bool(np.isfinite(values).all()), "values that are not finite", "finite numbers")
        if name.endswith(("/scale", "/weights")):
            check(name, bool((values > 0).all()), f"the value {float(values.min())}", "numbers above 0")
    total = float(arrays["router/weights"].sum(dtype=np.float64))
    check("router/weights", math.isclose(total, 1, abs_tol=1e-3), f"the sum {total:.6f}", "shares that sum to 1")
    precisions = arrays["router/precisions"]
    triangular = np.array_equal(precisions, np.triu(precisions))
    fits = triangular and bool((precisions.diagonal(axis1=1, axis2=2) > 0).all())
    check("router/precisions", fits, "others", "upper triangular matrices with a diagonal above 0")


def float_array(raw: memoryview, span: Span) -> NDArray[Any]:
    """Return the values of a float tensor without torch; bfloat16 as float32."""
    if span.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(span.shape)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[span.dtype]).reshape(span.shape)
