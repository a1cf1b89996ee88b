"""The tensors of an adapter: their names, dtypes and shapes, to blobs and back (docs/format.md sections 4 and 7)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backbone.model import CASTS, PREFIX, Head
from ..backbone.random_weights import RandomWeight
from ..errors import AdapterError, CorruptAdapterError
from ..mask import PackedMask, packed_bits
from ..safetensors_io import NAMES, Blob, Span
from .content import MIXTURE, WHITENING, Cascade, Parts, Router, Whitening
from .header import CascadeSpec, Header, HeadSpec, RandomSpec, SetHeader

if TYPE_CHECKING:
    from torch import Tensor

DIGESTS, BASE = "maskpack.digests", "maskpack.base"
CASCADE = "maskpack.cascade/"  # a set's name has no dot
DIGEST_BYTES, BASE_BYTES = 16, PREFIX * len(CASTS)
FLOATS = ("F32", "BF16", "F16")
ROLES = ("statistics", "parameters", "values")
STATISTICS = ("running_mean", "running_var")


def masked_names(header: Header) -> list[str]:
    """Return the names of the masked parameters over all sets, sorted."""
    return sorted({payload.name for one in header.sets.values() for payload in one.payloads})


def dense_names(spans: Mapping[str, Span]) -> list[str]:
    """Return the tensors that are neither payloads nor the format's own, sorted."""
    return sorted(n for n in spans if n not in (DIGESTS, BASE) and not (n.endswith("/payloads") and n.count("/") == 1))


def beginning(names: Sequence[str], prefix: str) -> Sequence[str]:
    """Return those of some sorted names that begin with a prefix, without looking at the others."""
    return names[bisect_left(names, prefix) : bisect_left(names, prefix[:-1] + chr(ord(prefix[-1]) + 1))]


# writing


def head_spec(head: Head | None) -> HeadSpec | None:
    """Return what the header says about a head, or None if there is none.

    Raises:
        AdapterError: if the head has a random weight that readers would rebuild differently.
    """
    if head is None:
        return None
    if head.random is None:
        return HeadSpec(head.embedding)
    mask = head.random.mask
    plain = mask.op == "zero" and mask.signs is None and mask.alpha in (None, mask.scaled().alpha)
    if not plain or head.bias is not None or not head.weight.cpu().float().equal(head.random.dense()):
        raise AdapterError(
            "readers would not get this random head back, expected no bias, a mask of op 'zero' without signs, "
            "with the alpha of its density or none, and the weight random.dense(); or leave out `random` to store "
            "the head whole"
        )
    classes, features = mask.shape
    return HeadSpec(head.embedding, RandomSpec(head.random.seed, (classes, features), mask.alpha is not None))


def set_blobs(name: str, parts: Parts) -> list[Blob]:
    """Return the tensors of a set that are stored as they are given.

    Raises:
        AdapterError: if one has a dtype that the format does not allow.
    """
    found = {f"{name}/{role}/{key}": tensor for role in ROLES for key, tensor in getattr(parts, role).items()}
    head = parts.head
    if head is not None and head.random is None:
        found |= {f"{name}/head/{role}": t for role in ("weight", "bias") if (t := getattr(head, role)) is not None}
    blobs = _float_blobs(found)
    if head is not None and head.random is not None:
        packed = packed_bits(head.random.mask.bits)
        blobs.append(Blob(f"{name}/head/mask", "U8", (len(packed),), [packed.data]))
    return blobs


def scale_blob(name: str, alphas: Sequence[float | None]) -> Blob | None:
    """Return the tensor of the scales of a set's payloads, or None if all are off."""
    if all(alpha is None for alpha in alphas):
        return None
    values = np.array([alpha or 0.0 for alpha in alphas], dtype="<f4")
    return Blob(f"{name}/scale", "F32", values.shape, [values.tobytes()])


def cascade_blobs(cascade: Cascade | None) -> list[Blob]:
    """Return the tensors of a cascade; none if there is none. Raises as `set_blobs`."""
    return [] if cascade is None else _float_blobs(cascade_tensors(cascade))


def cascade_tensors(cascade: Cascade) -> dict[str, Tensor]:
    """Return the tensors to store, by their names in the file; the router's and the reduction's as float32."""
    found = {f"router/{name}": getattr(cascade.router.whitening, name) for name in WHITENING}
    found |= {f"router/{name}": getattr(cascade.router, name) for name in MIXTURE}
    if cascade.reduction is not None:
        found |= {f"reduction/{name}": getattr(cascade.reduction, name) for name in WHITENING}
    found = {name: tensor.float() for name, tensor in found.items()}
    head = {"head/weight": cascade.weight, "head/bias": cascade.bias}
    found |= {name: tensor for name, tensor in head.items() if tensor is not None}
    return {CASCADE + name: tensor for name, tensor in found.items()}


def _float_blobs(tensors: Mapping[str, Tensor]) -> list[Blob]:
    for key, tensor in tensors.items():
        if NAMES.get(str(tensor.dtype)) not in FLOATS:
            raise AdapterError(f"{key} is {tensor.dtype}, expected one of float32, bfloat16, float16; convert it")
    return [Blob.of(key, t.float() if key.split("/")[1] == "statistics" else t) for key, t in tensors.items()]


# reading

Layout = tuple[str, tuple[int, ...] | None]  # dtype ("" for any float), shape (None for any)


def check_layout(header: Header, spans: Mapping[str, Span]) -> None:
    """Check that a file has the tensors that its header asks for and no others, with their dtypes and shapes.

    Raises:
        CorruptAdapterError: if it does not; the message names the first tensor that is wrong.
    """
    expected = dict(_required(header, spans))
    for name in sorted(expected.keys() | spans.keys()):
        if name not in spans:
            raise CorruptAdapterError(f"the file has no tensor {name!r}, which its header asks for; fetch it again")
        span = spans[name]
        dtype, shape = found if (found := expected.get(name) or _optional(name, header, spans)) else (None, None)
        allowed = () if dtype is None else (dtype,) if dtype else FLOATS
        if span.dtype not in allowed or shape not in (None, span.shape):
            wanted = " or ".join(allowed) or "no such tensor"
            raise CorruptAdapterError(
                f"tensor {name[:200]!r} is {span.dtype} of shape {span.shape}, expected {wanted}"
                f"{'' if shape is None else f' of shape {shape}'}; fetch the file again"
            )


def _required(header: Header, spans: Mapping[str, Span]) -> Iterator[tuple[str, Layout]]:
    if header.cascade is not None:
        yield from _cascade_layout(header.cascade, spans, header.about.class_names)
    yield BASE, ("U8", (len(masked_names(header)), BASE_BYTES))
    pieces = sum(len(one.tables) + len(one.payloads) for one in header.sets.values())
    yield DIGESTS, ("U8", (pieces + len(dense_names(spans)), DIGEST_BYTES))
    for name, one in header.sets.items():
        yield f"{name}/payloads", ("U8", (sum(one.tables) + sum(payload.size for payload in one.payloads),))
        if one.head is not None and one.head.random is not None:
            yield f"{name}/head/mask", ("U8", ((math.prod(one.head.random.shape) + 7) // 8,))
        elif one.head is not None:
            yield f"{name}/head/weight", ("", None)
        for payload in one.payloads:
            if payload.coding.op == "replace":
                yield f"{name}/values/{payload.name}", ("", (payload.weights - payload.kept,))


def _optional(name: str, header: Header, spans: Mapping[str, Span]) -> Layout | None:
    """Return what a tensor that nothing asks for must be; None if there may be no such tensor."""
    set_name, _, rest = name.partition("/")
    one: SetHeader | None = header.sets.get(set_name)
    role, _, key = rest.partition("/")
    if one is None:
        return None
    if rest == "scale":
        return "F32", (len(one.payloads),)
    if rest == "head/bias" and one.head is not None and one.head.random is None:
        weight = spans.get(f"{set_name}/head/weight")
        return "", weight.shape[:1] if weight is not None else ()
    if role == "statistics" and key.rpartition(".")[2] in STATISTICS:
        return "F32", None
    return ("", None) if role == "parameters" and key else None


def _cascade_layout(
    cascade: CascadeSpec, spans: Mapping[str, Span], classes: Sequence[str] | None
) -> Iterator[tuple[str, Layout]]:
    """Yield what the tensors of a cascade must be, given which of them a file has.

    Sizes that the header does not state are those of the first tensor that shows them; all others must agree.
    """

    def size(name: str, dimensions: int) -> int:
        """First size of a tensor; 1 if that cannot be, so that the tensor is refused."""
        shape = spans[CASCADE + name].shape if CASCADE + name in spans else ()
        return max(shape[0], 1) if len(shape) == dimensions else 1

    def whitening(role: str, inputs: int, outputs: int) -> Iterator[tuple[str, Layout]]:
        for name, shape in zip(WHITENING, ((inputs,), (outputs, inputs), (outputs,)), strict=True):
            yield f"{CASCADE}{role}/{name}", ("F32", shape)

    features, coordinates = size("router/mean", 1), size("router/scale", 1)
    components, width = len(cascade.experts), features * (len(cascade.experts) + 1)
    yield from whitening("router", features, coordinates)
    shapes = ((components,), (components, coordinates), (components, coordinates, coordinates))
    for name, shape in zip(MIXTURE, shapes, strict=True):
        yield f"{CASCADE}router/{name}", ("F32", shape)
    if any(name.startswith(f"{CASCADE}reduction/") for name in spans):
        reduced = size("reduction/scale", 1)
        yield from whitening("reduction", width, reduced)
        width = reduced
    if any(name.startswith(f"{CASCADE}head/") for name in spans):
        rows = size("head/weight", 2) if classes is None else len(classes)
        yield f"{CASCADE}head/weight", ("", (rows, width))
        yield f"{CASCADE}head/bias", ("", (rows,))


def head_mask(spec: RandomSpec, raw: memoryview) -> PackedMask:
    """Return the mask of a random head.

    Raises:
        CorruptAdapterError: if bits of its padding are set.
    """
    packed = np.frombuffer(raw, dtype=np.uint8)
    mask = PackedMask.from_bytes(packed, spec.shape)
    if not np.array_equal(packed_bits(mask.bits), packed):
        raise CorruptAdapterError("the mask of the head has set bits behind its end; fetch the file again")
    return mask.scaled() if spec.scale else mask


def head_of(spec: HeadSpec, tensors: Mapping[str, Tensor]) -> Head:
    """Return a head from its tensors, by role; a random weight is rebuilt. Raises as `head_mask`."""
    if spec.random is None:
        return Head(spec.embedding, tensors["weight"], tensors.get("bias"))
    random = RandomWeight(spec.random.seed, head_mask(spec.random, tensors["mask"].numpy().data))
    return Head(spec.embedding, random.dense(), None, random)


def cascade_of(spec: CascadeSpec, tensors: Mapping[str, Tensor]) -> Cascade:
    """Return a cascade with its tensors, given without their prefix."""

    def whitening(role: str) -> Whitening:
        return Whitening(*(tensors[f"{role}/{name}"] for name in WHITENING))

    router = Router(whitening("router"), *(tensors[f"router/{name}"] for name in MIXTURE))
    reduction = whitening("reduction") if "reduction/mean" in tensors else None
    head = tensors.get("head/weight"), tensors.get("head/bias")
    return Cascade(spec.dispatcher, spec.experts, spec.embedding, router, spec.combine, reduction, *head)


def check_cascade(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check the values of a cascade's tensors, given without their prefix.

    Raises:
        CorruptAdapterError: if one cannot be: none computes, or two readers would not agree.
    """

    def refuse(name: str, found: str, expected: str) -> CorruptAdapterError:
        return CorruptAdapterError(f"tensor '{CASCADE}{name}' has {found}, expected {expected}; fetch the file again")

    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise refuse(name, "values that are not finite", "finite numbers")
        if name.endswith(("/scale", "/weights")) and not (values > 0).all():
            raise refuse(name, f"the value {float(values.min())}", "numbers above 0")
    total = float(arrays["router/weights"].sum(dtype=np.float64))
    if not math.isclose(total, 1, abs_tol=1e-3):
        raise refuse("router/weights", f"the sum {total:.6f}", "shares that sum to 1")
    precisions = arrays["router/precisions"]
    if not np.array_equal(precisions, np.triu(precisions)) or not (precisions.diagonal(axis1=1, axis2=2) > 0).all():
        raise refuse("router/precisions", "others", "upper triangular matrices with a diagonal above 0")


def float_array(raw: memoryview, span: Span) -> NDArray[Any]:
    """Return the values of a float tensor without torch; bfloat16 as float32."""
    if span.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(span.shape)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[span.dtype]).reshape(span.shape)
