"""The mask sets in the adapter's header: what each payload is, not its bytes (docs/format.md section 2)."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import CorruptAdapterError
from ..mask import OPS, Op
from .fields import SET_NAME, Fields, plain
from .heads import HeadSpec, parse_head

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
