"""Which tensors a file holds beside its header, and which it may hold (docs/format.md section 4)."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..backbone.fingerprint import CASTS, PREFIX
from ..errors import AdapterError, CorruptAdapterError
from ..parts import CascadeParts, Parts
from ..tensorfile import Blob
from ..tensorheader import NAMES, Span
from .cascade import cascade_shapes, cascade_tensors
from .header import Header
from .heads import head_tensors, mask_blob
from .sets import SetHeader

DIGESTS, BASE = "maskpack.digests", "maskpack.base"
DIGEST_BYTES, BASE_BYTES = 16, PREFIX * len(CASTS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = tuple(NAMES[dtype] for dtype in FLOATS)
ROLES = ("statistics", "parameters", "values")
STATISTICS = ("running_mean", "running_var")


def dense_blobs(name: str, parts: Parts) -> list[Blob]:
    """Return the tensors of a set that are stored as they are given.

    Raises:
        AdapterError: if one has a dtype that the format does not allow.
    """
    found = {f"{name}/{role}/{key}": tensor for role in ROLES for key, tensor in getattr(parts, role).items()}
    if parts.head is not None:
        found.update({f"{name}/head/{role}": tensor for role, tensor in head_tensors(parts.head).items()})
    _check_floats(found)
    blobs = [Blob.of(key, t.float() if key.startswith(f"{name}/statistics/") else t) for key, t in found.items()]
    mask = mask_blob(name, parts.head)
    return blobs if mask is None else [*blobs, mask]


def cascade_blobs(cascade: CascadeParts | None) -> list[Blob]:
    """Return the tensors of a cascade; none if there is none. Raises as `dense_blobs`."""
    tensors = {} if cascade is None else cascade_tensors(cascade)
    _check_floats(tensors)
    return [Blob.of(name, tensor) for name, tensor in tensors.items()]


def _check_floats(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterError(f"{key} is {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}; convert it")


def scale_blob(name: str, alphas: Sequence[float | None]) -> Blob | None:
    """Return the tensor of the scales of a set's payloads, or None if all are off."""
    if all(alpha is None for alpha in alphas):
        return None
    return Blob.of(f"{name}/scale", torch.tensor([alpha or 0.0 for alpha in alphas], dtype=torch.float32))


def masked_names(header: Header) -> list[str]:
    """Return the names of the masked parameters over all sets, sorted."""
    return sorted({payload.name for one in header.sets.values() for payload in one.payloads})


def dense_names(spans: Mapping[str, Span]) -> list[str]:
    """Return the tensors that are neither payloads nor the format's own, sorted."""
    return sorted(n for n in spans if n not in (DIGESTS, BASE) and not (n.endswith("/payloads") and n.count("/") == 1))


def beginning(names: Sequence[str], prefix: str) -> Sequence[str]:
    """Return those of some sorted names that begin with a prefix, without looking at the others."""
    return names[bisect_left(names, prefix) : bisect_left(names, prefix[:-1] + chr(ord(prefix[-1]) + 1))]


def check_layout(header: Header, spans: Mapping[str, Span]) -> None:
    """Check that a file has the tensors that its header asks for and no others, with their dtypes and shapes.

    Raises:
        CorruptAdapterError: if it does not; the message names the first tensor that is wrong.
    """
    expected = dict(_required(header, spans))
    expected[DIGESTS] = ("U8", (digest_count(header, spans), DIGEST_BYTES))
    for name in sorted(expected.keys() | spans.keys()):
        if name not in spans:
            raise CorruptAdapterError(f"the file has no tensor {name!r}, which its header asks for; fetch it again")
        span = spans[name]
        if name in expected:
            dtype, shape = expected[name]
            allowed = (dtype,) if dtype else FLOAT_NAMES
            fits = span.dtype in allowed and (shape is None or span.shape == shape)
        else:
            allowed, shape, fits = _optional(name, span, header, spans)
        if not fits:
            wanted = " or ".join(allowed) or "no such tensor"
            raise CorruptAdapterError(
                f"tensor {name[:200]!r} is {span.dtype} of shape {span.shape}, expected {wanted}"
                f"{'' if shape is None else f' of shape {shape}'}; fetch the file again"
            )


def digest_count(header: Header, spans: Mapping[str, Span]) -> int:
    """Return how many digests the file has: one per table, payload and dense tensor."""
    return sum(len(one.tables) + len(one.payloads) for one in header.sets.values()) + len(dense_names(spans))


def _required(header: Header, spans: Mapping[str, Span]) -> Iterator[tuple[str, tuple[str, tuple[int, ...] | None]]]:
    if header.cascade is not None:
        yield from cascade_shapes(header.cascade, spans, header.class_names)
    yield BASE, ("U8", (len(masked_names(header)), BASE_BYTES))
    for name, one in header.sets.items():
        yield f"{name}/payloads", ("U8", (sum(one.tables) + sum(payload.size for payload in one.payloads),))
        if one.head is not None and one.head.random is not None:
            yield f"{name}/head/mask", ("U8", (one.head.random.mask_bytes,))
        elif one.head is not None:
            yield f"{name}/head/weight", ("", None)
        for payload in one.payloads:
            if payload.coding.op == "replace":
                yield f"{name}/values/{payload.name}", ("", (payload.weights - payload.kept,))


def _optional(
    name: str, span: Span, header: Header, spans: Mapping[str, Span]
) -> tuple[tuple[str, ...], tuple[int, ...] | None, bool]:
    """Return the dtypes and shape that a tensor may have, and whether it does."""
    set_name, _, rest = name.partition("/")
    one: SetHeader | None = header.sets.get(set_name)
    role, _, key = rest.partition("/")
    if one is not None and rest == "scale":
        return ("F32",), (len(one.payloads),), span.dtype == "F32" and span.shape == (len(one.payloads),)
    if one is not None and rest == "head/bias" and one.head is not None and one.head.random is None:
        weight = spans.get(f"{set_name}/head/weight")
        rows = weight.shape[:1] if weight is not None else ()
        return FLOAT_NAMES, rows, span.dtype in FLOAT_NAMES and span.shape == rows
    if one is not None and role == "statistics" and key.rpartition(".")[2] in STATISTICS:
        return ("F32",), None, span.dtype == "F32"
    if one is not None and role == "parameters" and key:
        return FLOAT_NAMES, None, span.dtype in FLOAT_NAMES
    return (), None, False
