"""The adapter's header: typed values <-> canonical JSON (docs/format.md section 2). Read without torch."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backbone.model import CASTS, MAX_SEED, POOLINGS, Embedding, Fingerprint
from ..backbone.model import MAX_WEIGHTS as MAX_HEAD_WEIGHTS
from ..errors import AdapterError, ConfigError, CorruptAdapterError, UnsupportedVersionError, short_repr
from ..mask import OPS, Op
from ..preprocess import KINDS, preprocess_from_json
from ..safetensors_io import DTYPES, MAX_DIMENSION, strict_json
from . import fields
from .content import COMBINES, About, Cascade
from .fields import BOOLEAN, DIGEST, TEXT, TEXTS, Check, check, integers, one_of, record, refuse

FORMAT_VERSION = 1
MAX_WEIGHTS = 1 << 34  # of a parameter
MAX_SET_WEIGHTS = 1 << 48
MAX_DIMENSIONS = 16
MAX_CHANNELS = 1 << 24  # of the norms of a set
SET_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,63}")
OWN_KEYS = frozenset({"codec", "op", "reference"})
# the index is compressed as if it stood behind this text, a part of the format; line ends are none of it
DICTIONARY = rb"""
encoder.layer.0.attention.output.dense.weight\nintermediate.dense.weight\nself.query.weight\nlayers.1.mlp.down_proj.we
ight\nblocks.3.0.conv_pwl.weight\nlayer2.1.conv1.weight\ndownsample.0.weight\nbn2\n"reference":"default","pooled-linea
r","normalize":true,"pooling":"mean"text-classificationfeature-extraction{"kind":"text","max_length":128}"warnings":["
the test accuracy is 0., and a linear probe of the raw backbone has 0.: the mask was not worth it; take more steps, o
r keep the probe"]0,1,1,2,2,3,3,4,4,5,5,0,0,0,0,0,0,0,0,{"base":{"digests":{"bfloat16":"","float16":"","float32":""},"
dtype":"float32","head":["fc"],"id":"timm/tf_","revision":null},"class_names":["],"format_version":1,"mask_id":"","pre
process":{"interpolation":"bicubic","kind":"image","mean":[0.485,0.456,0.406],"resize":256,"size":224,"std":[0.229,0.2
24,0.225]},"producer":"maskpack/0.1.0","sets":{"default":{"coding":[],"codings":[{"codec":"logit-base","op":"zero"}],"
head":{"kind":"linear","module":"classifier"},"kept":[],"names":"","norms":{"channels":[],"names":""},"shape":[],"shap
es":[],"size":[]}},"task":"image-classification","tensors":{"default/head/bias":["F16",10],"default/head/integers":["U
8",],"default/head/steps":["F32",10],"default/norms":["U8",],"default/parameters/":["F32",]},"training":{"data":{"dige
st":"","empty_classes":[],"id":"","rows":{"test":1000,"train":2700,"validation":300},"source":"parquet","unreadable":0
},"lora_bytes":{"rank_1_4bit":,"rank_8_4bit":},"metrics":{"density":0.99,"test_accuracy":0.9,"test_accuracy_without_ma
sks":0.,"test_over_probe":-0.0,"test_probe_accuracy":0.9,"train_loss":0.,"validation_accuracy":0.9,"validation_over_pr
obe":0.0,"validation_probe_accuracy":0.9},"processes":1,"rates":{"head":0.01,"scores":0.05,"train":0.01},"scores":,"se
ttings":{"accumulate":1,"augment":"crop-flip","batch_size":64,"bn":"freeze","bytes_budget":null,"clip":null,"distance"
:2.0,"epochs":10,"exclude":[],"head_kind":"linear","head_lr":0.01,"head_start":"plain","head_template":"This is a phot
o of a {label}","include":[],"label_smoothing":0.0,"lr":null,"method":"threshold","method_options":{},"objective":"sup
ervised","objective_options":{},"optimizer":"adam","precision":"no","rate":null,"scale":false,"schedule":"cosine","see
d":0,"selective":"all","steps":null,"store":"coded","top":null,"train":["norms"],"train_lr":0.01,"warmup":0.1,"workers
":0},"steps":200,"versions":{"maskpack":"0.1.0","python":"3.11.7","torch":"2.14.1+cu130"}}}
""".replace(b"\n", b"")


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values: sorted keys, no white space, ASCII, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _are_shapes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= MAX_WEIGHTS for size in shape)
        and math.prod(shape) <= MAX_WEIGHTS
        for shape in value
    )


def _is_head_shape(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(type(size) is int and size >= 1 for size in value)
    return pair and math.prod(value) <= MAX_HEAD_WEIGHTS


def _is_tensor(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_DIMENSIONS + 1
        and isinstance(value[0], str)
        and value[0] in DTYPES
        and all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in value[1:])
    )


def _base_id(value: Any, where: str) -> str:
    if fields.PATH.match(TEXT(value, where)):
        raise refuse(where, value, "a name as in 'timm/resnet18.a1_in1k', never a local path")
    return str(value)


EMBEDDINGS: Mapping[str, Mapping[str, Check]] = {
    "linear": {"kind": TEXT, "module": TEXT},
    "pooled-linear": {"kind": TEXT, "normalize": BOOLEAN, "pooling": one_of(*POOLINGS)},
}


def _embedding(more: Mapping[str, Check]) -> Check:
    """Make a check of where an embedding is taken, with more members beside it."""

    def checked(value: Any, where: str) -> Any:
        kind = record({"kind": one_of(*EMBEDDINGS)})(value, where)["kind"]
        return record({**EMBEDDINGS[kind], **more})(value, where)

    return checked


RANDOM = {
    "seed": fields.integer(0, MAX_SEED),
    "shape": check(_is_head_shape, f"two sizes of at least 1, at most {MAX_HEAD_WEIGHTS} weights"),
    "scale": BOOLEAN,
}
SET = {
    "names": fields.STRING,
    "shapes": check(_are_shapes, f"arrays of at most {MAX_DIMENSIONS} sizes, at most {MAX_WEIGHTS} weights each"),
    "codings": fields.items(record({"codec": TEXT, "op": one_of(*OPS), "reference?": fields.TEXT_OR_NULL})),
    "kept": fields.ARRAY,
    "head?": _embedding({"random?": record(RANDOM), "features?": fields.integer(1, MAX_HEAD_WEIGHTS)}),
    "norms?": record({"names": fields.STRING, "channels": fields.ARRAY, "shifts?": fields.ARRAY}),
}
BASE = {
    "id": _base_id,
    "revision?": fields.TEXT_OR_NULL,
    "dtype": TEXT,
    "head": TEXTS,
    "digests": record(dict.fromkeys(CASTS, DIGEST)),
}
CASCADE = {"combine": one_of(*COMBINES), "dispatcher": TEXT, "embedding": _embedding({}), "experts": TEXTS}
HEADER = {
    "producer": TEXT,
    "mask_id": DIGEST,
    "base": record(BASE),
    "sets": fields.OBJECT,
    "tensors?": fields.values(check(_is_tensor, f"a dtype and at most {MAX_DIMENSIONS} sizes")),
    "task?": fields.TEXT_OR_NULL,
    "class_names?": TEXTS,
    "preprocess?": fields.OBJECT,
    "training?": fields.OBJECT,
    "cascade?": record(CASCADE),
    "result?": record(dict.fromkeys(CASTS, DIGEST)),
}


@dataclass(frozen=True, slots=True)
class Coding:
    """How payloads are coded: codec id, what a zero bit does, the codec's settings, reference set."""

    codec: str
    op: Op
    config: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the coding as JSON values."""
        reference = {} if self.reference is None else {"reference": self.reference}
        return {"codec": self.codec, "op": self.op, **reference, **self.config}


@dataclass(frozen=True, slots=True)
class Payload:
    """One payload: set, parameter, shape, coding, number of true bits, bytes, where they start among the set's."""

    set: str
    name: str
    shape: tuple[int, ...]
    coding: Coding
    kept: int
    size: int
    start: int = 0

    @property
    def weights(self) -> int:
        """Number of mask bits."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SetHeader:
    """A mask set in the index: payloads by (name, op), the head's JSON object, channels and shifts of its norms."""

    payloads: tuple[Payload, ...]
    head: Mapping[str, Any] | None = None
    norms: Mapping[str, tuple[int, bool]] = field(default_factory=dict)

    __repr__ = short_repr

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
        if self.head is not None:
            value["head"] = self.head
        if self.norms:
            channels, shifts = zip(*self.norms.values(), strict=True)
            value["norms"] = {"names": "\n".join(self.norms), "channels": channels}
            value["norms"] |= {} if all(shifts) else {"shifts": list(map(int, shifts))}
        return value

    @classmethod
    def parse(cls, name: str, value: Any) -> "SetHeader":
        """Check the set of a name and return it."""
        where = f"$.sets.{name}"
        one = record(SET)(value, where)
        count, joined = len(one["kept"]), one["names"]
        names = _names(joined, count, "kept", f"{where}.names")
        shapes = [tuple(shape) for shape in one["shapes"]]
        codings = []
        for coding in value["codings"]:  # checked; what is not ours belongs to the codec
            config = {key: own for key, own in coding.items() if key not in OWN_KEYS}
            codings.append(Coding(coding["codec"], coding["op"], config, coding.get("reference")))
        columns = {
            "shape": integers(len(shapes), count),
            "coding": integers(len(codings), count),
            "kept": integers(MAX_WEIGHTS + 1, count),
            "size": integers(MAX_SET_WEIGHTS, count),
        }
        found = record(columns)(value, where)
        rows = zip(names, *found.values(), itertools.accumulate(found["size"], initial=0), strict=False)
        payloads = tuple(Payload(name, key, shapes[i], codings[j], *rest) for key, i, j, *rest in rows)
        _check_payloads(payloads, where)
        return cls(payloads, one.get("head"), _norms(one["norms"], f"{where}.norms") if "norms" in one else {})


def _names(joined: str, count: int, of: str, where: str) -> list[str]:
    # counted before they are split: a short file must not become millions of strings
    names = joined.split("\n") if joined.count("\n") == count - 1 else []
    if not names or not all(map(fields.plain, names)):
        expected = f"as many plain names, separated by line ends, as there are `{of}` ({count}), at least 1"
        raise refuse(where, joined, expected)
    return names


def _norms(value: Any, where: str) -> dict[str, tuple[int, bool]]:
    count = len(value["channels"])
    names = _names(value["names"], count, "channels", f"{where}.names")
    if any(before >= name for before, name in itertools.pairwise(names)):
        raise refuse(f"{where}.names", value["names"], "names sorted and once each")
    columns = {"channels": integers(MAX_CHANNELS + 1, count), "shifts?": integers(2, count)}
    found = record(columns)(value, where)
    if 0 in found["channels"] or sum(found["channels"]) > MAX_CHANNELS:
        raise refuse(f"{where}.channels", 0, f"numbers from 1, at most {MAX_CHANNELS} in all")
    shifts = map(bool, found.get("shifts", [1] * count))
    return dict(zip(names, zip(found["channels"], shifts, strict=True), strict=True))


def _check_payloads(payloads: Sequence[Payload], where: str) -> None:
    if sum(payload.weights for payload in payloads) > MAX_SET_WEIGHTS:
        raise refuse(f"{where}.shape", [], f"at most {MAX_SET_WEIGHTS} weights in all")
    for payload in payloads:
        if payload.kept > payload.weights:
            raise refuse(f"{where}.kept", payload.kept, f"at most {payload.weights} for {payload.name!r}")
    for before, payload in itertools.pairwise(payloads):
        ops = before.coding.op, payload.coding.op
        if (before.name, ops[0]) >= (payload.name, ops[1]):
            expected = f"names sorted and once for each op, not {payload.name!r} after {before.name!r}"
            raise refuse(f"{where}.names", payload.name, expected)
        if before.name == payload.name and (ops != ("flip", "zero") or before.shape != payload.shape):
            expected = f"ops flip and zero of one shape where a name comes twice ({payload.name!r})"
            raise refuse(f"{where}.coding", list(ops), expected)


def _check_references(sets: Mapping[str, SetHeader]) -> None:
    # one set for the whole file: many sets that refer to many others must not take the product of their sizes
    payloads = [payload for one in sets.values() for payload in one.payloads]
    alone = {(one.set, one.name, one.coding.op, one.shape) for one in payloads if one.coding.reference is None}
    for one in payloads:
        reference = one.coding.reference
        if reference is not None and (reference, one.name, one.coding.op, one.shape) not in alone:
            raise CorruptAdapterError(
                f"$.sets.{one.set} of the adapter header codes {one.name!r} against the set {reference!r}, which "
                f"has no such mask coded on its own; fetch the file again"
            )


def embedding_to_json(one: Embedding) -> dict[str, Any]:
    """Return where an embedding is taken, as JSON values."""
    if one.module is not None:
        return {"kind": "linear", "module": one.module}
    return {"kind": "pooled-linear", "normalize": one.normalize, "pooling": one.pooling}


def cascade_to_json(cascade: Cascade) -> dict[str, Any]:
    """Return a cascade without its tensors, as JSON values."""
    own = {"combine": cascade.combine, "dispatcher": cascade.dispatcher, "experts": list(cascade.experts)}
    return {**own, "embedding": embedding_to_json(cascade.embedding)}


def embedding_of(value: Mapping[str, Any]) -> Embedding:
    """Return the embedding of a checked JSON object."""
    return Embedding(value.get("module"), value.get("pooling"), value.get("normalize", False))


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
    """The index of an adapter file: its mask sets, its base and what is known about it.

    `cascade` is a JSON object. `tensors` has dtype and shape, by name, of those that do not follow from the masks;
    `base.tensors` is empty, since those digests are a tensor of the file.
    """

    producer: str
    mask_id: str
    base: Fingerprint
    sets: Mapping[str, SetHeader]
    about: About
    cascade: Mapping[str, Any] | None = None
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    __repr__ = short_repr

    def to_json(self) -> str:
        """Return canonical JSON, or raise AdapterError if `about` holds what JSON cannot, such as NaN or a tensor."""
        value: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "producer": self.producer,
            "mask_id": self.mask_id,
            "base": base_to_json(self.base),
            "sets": {name: one.to_json() for name, one in self.sets.items()},
        }
        if self.cascade is not None:
            value["cascade"] = self.cascade
        if self.tensors:
            value["tensors"] = {name: [dtype, *shape] for name, (dtype, shape) in self.tensors.items()}
        for key in ("task", "class_names", "preprocess", "training", "result"):
            if (member := getattr(self.about, key)) is not None:
                try:
                    value[key] = json.loads(canonical_json(member))
                except (TypeError, ValueError, RecursionError) as error:
                    raise AdapterError(
                        f"{key} cannot be stored as JSON: {error}; give finite numbers, texts, lists and mappings"
                    ) from None
        return canonical_json(value)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Header":
        """Parse and check a header; UnsupportedVersionError if a newer format version wrote it."""
        value = strict_json(text, "the adapter header")
        is_version = check(lambda one: type(one) is int and one >= 1, f"an integer from 1 to {FORMAT_VERSION}")
        version = record({"format_version": is_version})(value, "$")["format_version"]
        if version > FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"the adapter has format version {version}, this release reads up to {FORMAT_VERSION}; "
                f"upgrade with: pip install --upgrade maskpack"
            )
        found = record(HEADER)(value, "$")
        for name in sorted(found["sets"]) or [""]:
            if not SET_NAME.fullmatch(name):
                raise refuse("the name of a mask set in the adapter header", name, SET_NAME.pattern)
        sets = {name: SetHeader.parse(name, found["sets"][name]) for name in sorted(found["sets"])}
        _check_references(sets)
        if (cascade := found.get("cascade")) is not None:
            named = [cascade["dispatcher"], *cascade["experts"]]
            if len(named) < 2 or sorted(named) != sorted(sets):
                expected = f"to name, with the dispatcher {named[0]!r}, each of the sets once: {', '.join([*sets][:9])}"
                raise refuse("$.cascade.experts", named[1:], expected)
        base = Fingerprint(**{"revision": None, **found["base"], "head": tuple(found["base"]["head"])}, tensors={})
        tensors = {name: (one[0], tuple(one[1:])) for name, one in sorted(found.get("tensors", {}).items())}
        return cls(found["producer"], found["mask_id"], base, sets, _about(found), cascade, tensors)


def _about(found: Mapping[str, Any]) -> About:
    names, preprocess = found.get("class_names"), found.get("preprocess")
    if preprocess is not None and record({"kind": TEXT})(preprocess, "$.preprocess")["kind"] in KINDS:
        try:
            preprocess_from_json(preprocess)
        except ConfigError as error:
            raise CorruptAdapterError(f"$.{error}; fetch the file again") from None
    names = None if names is None else tuple(names)
    return About(found.get("task"), names, preprocess, found.get("training"), found.get("result"))
