"""The adapter's header: typed values <-> canonical JSON (docs/format.md section 2). Read without torch."""

import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from ..backbone.model import CASTS, POOLINGS, Embedding, Fingerprint, Pooling
from ..backbone.random_weights import MAX_SEED
from ..backbone.random_weights import MAX_WEIGHTS as MAX_HEAD_WEIGHTS
from ..errors import AdapterError, ConfigError, CorruptAdapterError, UnsupportedVersionError
from ..mask import OPS, Op
from ..preprocess import KINDS, preprocess_from_json
from ..safetensors_io import strict_json
from .content import COMBINES, About, Cascade, Combine
from .fields import PATH, SET_NAME, Fields, plain

FORMAT_VERSION = 1
MAX_WEIGHTS = 1 << 34  # of a parameter
MAX_SET_WEIGHTS = 1 << 48
MAX_DIMENSIONS = 16
OWN_KEYS = frozenset({"codec", "op", "reference", "table"})


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values: sorted keys, no white space, ASCII, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class Coding:
    """How payloads are coded: codec id, what a zero bit does, the codec's settings, reference set.

    `table` is the index of a table that payloads share; such files are read and no longer written.
    """

    codec: str
    op: Op
    config: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None
    table: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the coding as JSON values."""
        reference = {} if self.reference is None else {"reference": self.reference}
        return {"codec": self.codec, "op": self.op, **reference, **self.config}

    @classmethod
    def parse(cls, fields: Fields, tables: int) -> "Coding":
        """Parse and check a coding of a set with so many tables."""
        table = fields.get("table")
        if table is not None and (type(table) is not int or not 0 <= table < tables):
            raise fields.refuse("table", f"the index of one of the {tables} tables")
        config = {key: member for key, member in fields.members.items() if key not in OWN_KEYS}
        op = cast(Op, fields.one_of("op", OPS))
        return cls(fields.text("codec"), op, config, fields.optional_text("reference"), table)


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


class RandomSpec(NamedTuple):
    """A head's random weight without its mask: seed, (classes, features), whether kept weights are scaled."""

    seed: int
    shape: tuple[int, int]
    scale: bool


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A head without its tensors: where it is, and the random weight that it is made of, if it is."""

    embedding: Embedding
    random: RandomSpec | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the head as JSON values."""
        own = embedding_to_json(self.embedding)
        return (
            own if self.random is None else {**own, "random": {**self.random._asdict(), "shape": [*self.random.shape]}}
        )

    @classmethod
    def parse(cls, fields: Fields) -> "HeadSpec":
        """Parse and check the head in the header of a set."""
        return cls(parse_embedding(fields), _random(fields.object("random")) if "random" in fields.members else None)


def _random(fields: Fields) -> RandomSpec:
    seed = fields.get("seed")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise fields.refuse("seed", f"an integer from 0 to {MAX_SEED}")
    classes, features = fields.integers("shape", MAX_HEAD_WEIGHTS + 1, 2)
    if not 1 <= classes * features <= MAX_HEAD_WEIGHTS:
        raise fields.refuse("shape", f"two sizes of at least 1, at most {MAX_HEAD_WEIGHTS} weights")
    return RandomSpec(seed, (classes, features), fields.boolean("scale"))


def embedding_to_json(one: Embedding) -> dict[str, Any]:
    """Return where an embedding is taken, as JSON values."""
    if one.module is not None:
        return {"kind": "linear", "module": one.module}
    return {"kind": "pooled-linear", "normalize": one.normalize, "pooling": one.pooling}


def parse_embedding(fields: Fields) -> Embedding:
    """Parse and check where an embedding is taken."""
    if fields.one_of("kind", ("linear", "pooled-linear")) == "linear":
        return Embedding(fields.text("module"))
    return Embedding(None, cast(Pooling, fields.one_of("pooling", POOLINGS)), fields.boolean("normalize"))


@dataclass(frozen=True, slots=True)
class CascadeSpec:
    """A cascade without its tensors; the attributes are those of `content.Cascade`."""

    dispatcher: str
    experts: tuple[str, ...]
    embedding: Embedding
    combine: Combine

    @classmethod
    def of(cls, cascade: Cascade) -> "CascadeSpec":
        """Return what the header says of a cascade."""
        return cls(cascade.dispatcher, cascade.experts, cascade.embedding, cascade.combine)

    def to_json(self) -> dict[str, Any]:
        """Return the cascade as JSON values."""
        return {
            "combine": self.combine,
            "dispatcher": self.dispatcher,
            "embedding": embedding_to_json(self.embedding),
            "experts": list(self.experts),
        }

    @classmethod
    def parse(cls, fields: Fields, sets: Collection[str]) -> "CascadeSpec":
        """Parse and check a cascade; every set of the file has one place in it."""
        dispatcher, experts = fields.text("dispatcher"), fields.texts("experts")
        if not experts or sorted([dispatcher, *experts]) != sorted(sets):
            known = ", ".join(sorted(sets)[:9])
            raise fields.refuse(
                "experts", f"to name, with the dispatcher {dispatcher!r}, each of the sets once: {known}"
            )
        embedding = parse_embedding(fields.object("embedding"))
        return cls(dispatcher, experts, embedding, cast(Combine, fields.one_of("combine", COMBINES)))


@dataclass(frozen=True, slots=True)
class SetHeader:
    """One mask set: its payloads sorted by (name, op), its head, the sizes of shared tables (of older files)."""

    payloads: tuple[Payload, ...]
    head: HeadSpec | None = None
    tables: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the set as JSON values."""
        shapes = {shape: i for i, shape in enumerate(dict.fromkeys(payload.shape for payload in self.payloads))}
        texts = [canonical_json(payload.coding.to_json()) for payload in self.payloads]
        codings = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        value: dict[str, Any] = {
            "names": "\n".join(payload.name for payload in self.payloads),
            "shapes": [list(shape) for shape in shapes],
            "codings": [json.loads(text) for text in codings],
            "shape": [shapes[payload.shape] for payload in self.payloads],
            "coding": [codings[text] for text in texts],
            "kept": [payload.kept for payload in self.payloads],
            "size": [payload.size for payload in self.payloads],
        }
        return value if self.head is None else {**value, "head": self.head.to_json()}

    @classmethod
    def parse(cls, fields: Fields) -> "SetHeader":
        """Parse and check a set."""
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
        codings = [
            Coding.parse(Fields.of(coding, f"{fields.where}.codings[{i}]"), len(tables))
            for i, coding in enumerate(fields.array("codings"))
        ]
        payloads = tuple(
            Payload(name, shapes[shape], codings[coding], kept, size)
            for name, shape, coding, kept, size in zip(
                names,
                fields.integers("shape", len(shapes), count),
                fields.integers("coding", len(codings), count),
                fields.integers("kept", MAX_WEIGHTS + 1, count),
                fields.integers("size", MAX_SET_WEIGHTS, count),
                strict=True,
            )
        )
        _check_payloads(payloads, fields)
        head = HeadSpec.parse(fields.object("head")) if "head" in fields.members else None
        return cls(payloads, head, tuple(tables))


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
        ops = before.coding.op, payload.coding.op
        if (before.name, ops[0]) >= (payload.name, ops[1]):
            raise fields.refuse(
                "names", f"names sorted and once for each op, not {payload.name!r} after {before.name!r}"
            )
        if before.name == payload.name and (ops != ("flip", "zero") or before.shape != payload.shape):
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


def base_to_json(base: Fingerprint) -> dict[str, Any]:
    """Return the base as the header keeps it, without the digests of single tensors."""
    return {
        "id": base.id,
        "revision": base.revision,
        "dtype": base.dtype,
        "head": list(base.head),
        "digests": dict(base.digests),
    }


def _base(fields: Fields) -> Fingerprint:
    id_ = fields.text("id")
    if PATH.match(id_):
        raise fields.refuse("id", "a name as in 'timm/resnet18.a1_in1k', never a local path")
    digests = fields.object("digests")
    revision, dtype, head = fields.optional_text("revision"), fields.text("dtype"), fields.texts("head")
    return Fingerprint(id_, revision, dtype, head, {dtype: digests.digest(dtype) for dtype in CASTS}, {})


@dataclass(frozen=True, slots=True)
class Header:
    """What the file says beside its tensors. `base.tensors` is empty here: it is stored as a tensor."""

    producer: str
    mask_id: str
    data_digest: str
    base: Fingerprint
    sets: Mapping[str, SetHeader]
    about: About
    cascade: CascadeSpec | None = None

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
            if (member := getattr(self.about, key)) is not None:
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
        named = fields.object("sets")
        if not named.members:
            raise CorruptAdapterError(f"{named.where} of the adapter header has no set, expected at least one")
        for name in sorted(named.members):
            if not SET_NAME.fullmatch(name):
                raise CorruptAdapterError(
                    f"the adapter header has a set named {name[:80]!r}, expected {SET_NAME.pattern}"
                )
        about = _about(fields)
        sets = {name: SetHeader.parse(named.object(name)) for name in sorted(named.members)}
        _check_references(sets)
        return cls(
            producer=fields.text("producer"),
            mask_id=fields.digest("mask_id"),
            data_digest=fields.digest("data_blake3"),
            base=_base(fields.object("base")),
            sets=sets,
            about=about,
            cascade=CascadeSpec.parse(fields.object("cascade"), sets) if "cascade" in fields.members else None,
        )


def _about(fields: Fields) -> About:
    about = About(
        fields.optional_text("task"),
        fields.texts("class_names") if "class_names" in fields.members else None,
        fields.optional_object("preprocess"),
        fields.optional_object("training"),
    )
    if about.preprocess is not None and fields.object("preprocess").text("kind") in KINDS:
        try:
            preprocess_from_json(about.preprocess)
        except ConfigError as error:
            raise CorruptAdapterError(f"$.{error}; fetch the file again") from None
    return about
