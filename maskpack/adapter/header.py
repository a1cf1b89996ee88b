"""The adapter's header: typed values <-> canonical JSON (docs/format.md section 2)."""

import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..backbone.fingerprint import CASTS, PREFIX, Fingerprint
from ..errors import AdapterError, ConfigError, CorruptAdapterError, UnsupportedVersionError
from ..mask import OPS, Op
from ..preprocess import KINDS, preprocess_from_json
from ..safetensors_io import NAMES, Blob, Span, strict_json
from .content import CascadeParts, Parts
from .fields import PATH, SET_NAME, Fields, plain
from .tensors import (
    CascadeHeader,
    HeadSpec,
    cascade_shapes,
    cascade_tensors,
    head_tensors,
    mask_blob,
    parse_cascade,
    parse_head,
)

MAX_WEIGHTS = 1 << 34  # of a parameter
MAX_SET_WEIGHTS = 1 << 48
MAX_DIMENSIONS = 16
OWN_KEYS = frozenset({"codec", "op", "reference", "table"})


@dataclass(frozen=True, slots=True)
class Coding:
    """How payloads are coded: codec id, what a zero bit does, the codec's settings, reference set, table index."""

    codec: str
    op: Op
    config: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    table: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the coding as JSON values."""
        own = {"reference": self.reference, "table": self.table}
        used = {key: value for key, value in own.items() if value is not None}
        return {"codec": self.codec, "op": self.op, **used, **self.config}


@dataclass(frozen=True, slots=True)
class Payload:
    """One payload: parameter name and shape, coding, number of true bits, bytes."""

    name: str
    shape: tuple[int, ...]
    coding: Coding
    kept: int
    size: int

    @property
    def weights(self) -> int:
        """Number of mask bits."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SetHeader:
    """One mask set: its payloads sorted by (name, op), the sizes of its shared tables, its head."""

    payloads: tuple[Payload, ...]
    tables: tuple[int, ...] = ()
    head: HeadSpec | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the set as JSON values."""
        shapes = list(dict.fromkeys(payload.shape for payload in self.payloads))
        texts = [canonical_json(payload.coding.to_json()) for payload in self.payloads]
        codings = list(dict.fromkeys(texts))
        where = (
            {shape: index for index, shape in enumerate(shapes)},
            {text: index for index, text in enumerate(codings)},
        )
        value: dict[str, Any] = {
            "names": "\n".join(payload.name for payload in self.payloads),
            "shapes": [list(shape) for shape in shapes],
            "codings": [json.loads(text) for text in codings],
            "shape": [where[0][payload.shape] for payload in self.payloads],
            "coding": [where[1][text] for text in texts],
            "kept": [payload.kept for payload in self.payloads],
            "size": [payload.size for payload in self.payloads],
        }
        if self.tables:
            value["tables"] = list(self.tables)
        if self.head is not None:
            value["head"] = self.head.to_json()
        return value


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values: sorted keys, no white space, ASCII, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _coding(value: object, where: str, tables: int) -> Coding:
    fields = Fields.of(value, where)
    table = fields.get("table")
    if table is not None and (type(table) is not int or not 0 <= table < tables):
        raise fields.refuse("table", f"the index of one of the {tables} tables")
    config = {key: member for key, member in fields.members.items() if key not in OWN_KEYS}
    op = cast(Op, fields.one_of("op", OPS))
    return Coding(fields.text("codec"), op, config, fields.optional_text("reference"), table)


def parse_sets(fields: Fields) -> dict[str, SetHeader]:
    """Parse and check the sets of a header, sorted by name.

    Raises:
        CorruptAdapterError: if anything in them is not what the format allows.
    """
    sets = {name: _set(name, fields) for name in sorted(fields.members)}
    if not sets:
        raise CorruptAdapterError(f"{fields.where} of the adapter header has no set, expected at least one")
    _check_references(sets)
    return sets


def _set(name: str, sets: Fields) -> SetHeader:
    if not SET_NAME.fullmatch(name):
        raise CorruptAdapterError(f"the adapter header has a set named {name[:80]!r}, expected {SET_NAME.pattern}")
    fields = sets.object(name)
    count = len(fields.array("kept"))
    joined = fields.get("names")
    # counted before they are split: a short file must not become millions of strings
    if not isinstance(joined, str) or not count or joined.count("\n") != count - 1:
        raise fields.refuse(
            "names", f"as many names, separated by line ends, as there are `kept` ({count}), at least 1"
        )
    names = joined.split("\n")
    if not all(plain(one) for one in names):
        raise fields.refuse("names", "non-empty names without control characters")
    tables = fields.integers("tables", MAX_SET_WEIGHTS) if "tables" in fields.members else []
    shapes = [_shape(shape, fields) for shape in fields.array("shapes")]
    rows = [
        _coding(coding, f"{fields.where}.codings[{i}]", len(tables)) for i, coding in enumerate(fields.array("codings"))
    ]
    payloads = tuple(
        Payload(name, shapes[shape], rows[coding], kept, size)
        for name, shape, coding, kept, size in zip(
            names,
            fields.integers("shape", len(shapes), count),
            fields.integers("coding", len(rows), count),
            fields.integers("kept", MAX_WEIGHTS + 1, count),
            fields.integers("size", MAX_SET_WEIGHTS, count),
            strict=True,
        )
    )
    _check_payloads(payloads, fields)
    head = parse_head(fields.object("head")) if "head" in fields.members else None
    return SetHeader(payloads, tuple(tables), head)


def _shape(value: object, fields: Fields) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= MAX_WEIGHTS for size in value)
        or math.prod(value) > MAX_WEIGHTS
    ):
        raise fields.refuse("shapes", f"arrays of at most {MAX_DIMENSIONS} sizes, at most {MAX_WEIGHTS} weights each")
    return tuple(value)


def _check_payloads(payloads: tuple[Payload, ...], fields: Fields) -> None:
    if sum(payload.weights for payload in payloads) > MAX_SET_WEIGHTS:
        raise fields.refuse("shape", f"at most {MAX_SET_WEIGHTS} weights in all")
    for payload in payloads:
        if payload.kept > payload.weights:
            raise fields.refuse("kept", f"at most {payload.weights} for {payload.name!r}, not {payload.kept}")
    for before, payload in itertools.pairwise(payloads):
        if (before.name, before.coding.op) >= (payload.name, payload.coding.op):
            raise fields.refuse(
                "names", f"names sorted and once for each op, not {payload.name!r} after {before.name!r}"
            )
        if before.name == payload.name and (
            (before.coding.op, payload.coding.op) != ("flip", "zero") or before.shape != payload.shape
        ):
            raise fields.refuse("coding", f"ops flip and zero of one shape where a name comes twice ({payload.name!r})")


def _check_references(sets: Mapping[str, SetHeader]) -> None:
    # one set for the whole file: many sets that refer to many others must not take the product of their sizes
    referenced = {payload.coding.reference for one in sets.values() for payload in one.payloads}
    known = {
        (name, payload.name, payload.coding.op, payload.shape)
        for name in sets.keys() & referenced
        for payload in sets[name].payloads
        if payload.coding.reference is None
    }
    for name, one in sets.items():
        for payload in one.payloads:
            reference = payload.coding.reference
            if reference is not None and (reference, payload.name, payload.coding.op, payload.shape) not in known:
                raise CorruptAdapterError(
                    f"$.sets.{name} of the adapter header codes {payload.name!r} against the set {reference!r}, which "
                    f"has no such mask coded on its own; fetch the file again"
                )


FORMAT_VERSION = 1
BASE_DTYPES = ("float32", "bfloat16", "float16")


def base_to_json(base: Fingerprint) -> dict[str, Any]:
    """Return the base as the header keeps it, without the digests of single tensors."""
    return {
        "id": base.id,
        "revision": base.revision,
        "dtype": base.dtype,
        "head": list(base.head),
        "digests": dict(base.digests),
    }


@dataclass(frozen=True, slots=True)
class Header:
    """What the file says beside its tensors. `base.tensors` is empty here: it is stored as a tensor."""

    producer: str
    mask_id: str
    data_digest: str
    base: Fingerprint
    sets: Mapping[str, SetHeader]
    task: str | None = None
    class_names: tuple[str, ...] | None = None
    preprocess: Mapping[str, Any] | None = None
    training: Mapping[str, Any] | None = None
    cascade: CascadeHeader | None = None

    def to_json(self) -> str:
        """Return canonical JSON.

        Raises:
            AdapterError: if `preprocess` or `training` hold what JSON cannot, such as NaN or a tensor.
        """
        value: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "producer": self.producer,
            "mask_id": self.mask_id,
            "data_blake3": self.data_digest,
            "base": base_to_json(self.base),
            "sets": {name: one.to_json() for name, one in self.sets.items()},
        }
        if self.cascade is not None:
            value["cascade"] = self.cascade.to_json()
        for key in ("task", "class_names", "preprocess", "training"):
            if (member := getattr(self, key)) is not None:
                try:
                    value[key] = json.loads(canonical_json(member))
                except (TypeError, ValueError, RecursionError) as error:
                    raise AdapterError(
                        f"{key} cannot be stored as JSON: {error}; give finite numbers, texts, lists and mappings"
                    ) from None
        return canonical_json(value)

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """Parse and check a header.

        Raises:
            UnsupportedVersionError: if a newer format version wrote it.
            CorruptAdapterError: if anything in it is not what the format allows; the message says what and where.
        """
        fields = Fields.of(strict_json(text, "the adapter header"), "$")
        version = fields.get("format_version")
        if type(version) is not int or version < 1:
            raise fields.refuse("format_version", f"an integer from 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"the adapter has format version {version}, this release reads up to {FORMAT_VERSION}; "
                f"upgrade with: pip install --upgrade maskpack"
            )
        preprocess = fields.optional_object("preprocess")
        if preprocess is not None and fields.object("preprocess").text("kind") in KINDS:
            try:
                preprocess_from_json(preprocess)
            except ConfigError as error:
                raise CorruptAdapterError(f"$.{error}; fetch the file again") from None
        sets = parse_sets(fields.object("sets"))
        return cls(
            producer=fields.text("producer"),
            mask_id=fields.digest("mask_id"),
            data_digest=fields.digest("data_blake3"),
            base=_base(fields.object("base")),
            sets=sets,
            task=fields.optional_text("task"),
            class_names=fields.texts("class_names") if "class_names" in fields.members else None,
            preprocess=preprocess,
            training=fields.optional_object("training"),
            cascade=parse_cascade(fields.object("cascade"), sets) if "cascade" in fields.members else None,
        )


def _base(fields: Fields) -> Fingerprint:
    id_ = fields.text("id")
    if PATH.match(id_):
        raise fields.refuse("id", "a name as in 'timm/resnet18.a1_in1k', never a local path")
    digests = fields.object("digests")
    return Fingerprint(
        id_,
        fields.optional_text("revision"),
        fields.text("dtype"),
        fields.texts("head"),
        {dtype: digests.digest(dtype) for dtype in BASE_DTYPES},
        {},
    )


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
