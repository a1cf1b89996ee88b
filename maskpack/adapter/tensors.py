"""Heads and cascades in the file: header objects and tensors (docs/format.md sections 2, 4 and 7)."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..backbone.model import MAX_SEED, MAX_WEIGHTS, POOLINGS, Embedding, Head, Pooling, RandomWeight
from ..errors import AdapterError, CorruptAdapterError
from ..mask import PackedMask, packed_bits
from ..safetensors_io import Blob, Span
from .content import COMBINES, MIXTURE, WHITENING, CascadeParts, Combine, Router, Whitening
from .fields import Fields


@dataclass(frozen=True, slots=True)
class RandomSpec:
    """A head's random weight without its mask: seed, (classes, features), whether kept weights are scaled."""

    seed: int
    shape: tuple[int, int]
    scale: bool

    @property
    def mask_bytes(self) -> int:
        """Bytes of the packed mask."""
        return (math.prod(self.shape) + 7) // 8

    def to_json(self) -> dict[str, Any]:
        """Return the random weight as JSON values."""
        return {"scale": self.scale, "seed": self.seed, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """A head without its tensors; the attributes are those of `backbone.model.Head`."""

    embedding: Embedding
    random: RandomSpec | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the head as JSON values."""
        random = {} if self.random is None else {"random": self.random.to_json()}
        one = self.embedding
        if one.module is not None:
            return {"kind": "linear", "module": one.module, **random}
        return {"kind": "pooled-linear", "normalize": one.normalize, "pooling": one.pooling, **random}


def head_spec(head: Head | None) -> HeadSpec | None:
    """Return what the header says about a head, or None if there is none.

    Raises:
        AdapterError: if the head has a random weight that readers would rebuild differently.
    """
    if head is None:
        return None
    random = None
    if head.random is not None:
        mask = head.random.mask
        plain = mask.op == "zero" and mask.signs is None and mask.alpha in (None, mask.scaled().alpha)
        if not plain or head.bias is not None or not torch.equal(head.weight.cpu().float(), head.random.dense()):
            raise AdapterError(
                "readers would not get this random head back, expected no bias, a mask of op 'zero' without signs, "
                "with the alpha of its density or none, and the weight random.dense(); or leave out `random` to store "
                "the head whole"
            )
        classes, features = mask.shape
        random = RandomSpec(head.random.seed, (classes, features), mask.alpha is not None)
    return HeadSpec(head.embedding, random)


def parse_head(fields: Fields) -> HeadSpec:
    """Parse and check the head in the header of a set.

    Raises:
        CorruptAdapterError: if anything in it is not what the format allows.
    """
    random = _random(fields.object("random")) if "random" in fields.members else None
    if fields.one_of("kind", ("linear", "pooled-linear")) == "linear":
        return HeadSpec(Embedding(fields.text("module")), random)
    pooling = cast(Pooling, fields.one_of("pooling", POOLINGS))
    return HeadSpec(Embedding(None, pooling, fields.boolean("normalize")), random)


def _random(fields: Fields) -> RandomSpec:
    seed = fields.get("seed")
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise fields.refuse("seed", f"an integer from 0 to {MAX_SEED}")
    classes, features = fields.integers("shape", MAX_WEIGHTS + 1, 2)
    if not 1 <= classes * features <= MAX_WEIGHTS:
        raise fields.refuse("shape", f"two sizes of at least 1, at most {MAX_WEIGHTS} weights")
    return RandomSpec(seed, (classes, features), fields.boolean("scale"))


def head_tensors(head: Head) -> dict[str, Tensor]:
    """Return the floating-point tensors of a head that are stored, by role."""
    tensors = {} if head.random is not None else {"weight": head.weight, "bias": head.bias}
    return {role: tensor for role, tensor in tensors.items() if tensor is not None}


def mask_blob(name: str, head: Head | None) -> Blob | None:
    """Return the mask of the random head of a set, or None if there is none."""
    if head is None or head.random is None:
        return None
    packed = packed_bits(head.random.mask.bits)
    return Blob(f"{name}/head/mask", "U8", (len(packed),), [packed.data])


def stored_head(spec: HeadSpec, tensors: Mapping[str, Tensor], where: str) -> Head:
    """Return a head from its tensors, by role; a random weight is rebuilt.

    Raises:
        CorruptAdapterError: if bits of the mask's padding are set; `where` is the file's name.
    """
    if spec.random is None:
        return Head(spec.embedding, tensors["weight"], tensors.get("bias"))
    packed = tensors["mask"].numpy()
    mask = PackedMask.from_bytes(packed, spec.random.shape)
    if not np.array_equal(packed_bits(mask.bits), packed):
        raise CorruptAdapterError(f"{where}: the mask of the head has set bits behind its end; fetch the file again")
    random = RandomWeight(spec.random.seed, mask.scaled() if spec.random.scale else mask)
    return Head(spec.embedding, random.dense(), None, random)


PREFIX = "maskpack.cascade/"  # a set's name has no dot


@dataclass(frozen=True, slots=True)
class CascadeHeader:
    """A cascade without its tensors; the attributes are those of `parts.CascadeParts`."""

    dispatcher: str
    experts: tuple[str, ...]
    embedding: Embedding
    combine: Combine

    def to_json(self) -> dict[str, Any]:
        """Return the cascade as JSON values."""
        return {
            "combine": self.combine,
            "dispatcher": self.dispatcher,
            "embedding": HeadSpec(self.embedding).to_json(),
            "experts": list(self.experts),
        }


def cascade_header(cascade: CascadeParts) -> CascadeHeader:
    """Return what the header says of a cascade."""
    return CascadeHeader(cascade.dispatcher, cascade.experts, cascade.embedding, cascade.combine)


def parse_cascade(fields: Fields, sets: Collection[str]) -> CascadeHeader:
    """Parse and check the header's cascade; every set of the file has one place in it.

    Raises:
        CorruptAdapterError: if anything in it is not what the format allows.
    """
    dispatcher, experts = fields.text("dispatcher"), fields.texts("experts")
    if not experts or sorted([dispatcher, *experts]) != sorted(sets):
        known = ", ".join(sorted(sets)[:9])
        raise fields.refuse("experts", f"to name, with the dispatcher {dispatcher!r}, each of the sets once: {known}")
    embedding = parse_head(fields.object("embedding")).embedding
    return CascadeHeader(dispatcher, experts, embedding, cast(Combine, fields.one_of("combine", COMBINES)))


def cascade_tensors(cascade: CascadeParts) -> dict[str, Tensor]:
    """Return the tensors to store, by their names in the file; the router's and the reduction's as float32."""
    found = {f"router/{name}": getattr(cascade.router.whitening, name) for name in WHITENING}
    found |= {f"router/{name}": getattr(cascade.router, name) for name in MIXTURE}
    if cascade.reduction is not None:
        found |= {f"reduction/{name}": getattr(cascade.reduction, name) for name in WHITENING}
    found = {name: tensor.float() for name, tensor in found.items()}
    head = {"head/weight": cascade.weight, "head/bias": cascade.bias}
    found |= {name: tensor for name, tensor in head.items() if tensor is not None}
    return {PREFIX + name: tensor for name, tensor in found.items()}


def cascade_shapes(
    cascade: CascadeHeader, spans: Mapping[str, Span], classes: Sequence[str] | None
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield name, dtype ("" for any float) and shape of each tensor of a cascade, given which of them a file has.

    Sizes that the header does not state are those of the first tensor that shows them; all others must agree.
    """

    def size(name: str, dimensions: int) -> int:
        """First size of a tensor; 1 if that cannot be, so that the tensor is refused."""
        shape = spans[PREFIX + name].shape if PREFIX + name in spans else ()
        return max(shape[0], 1) if len(shape) == dimensions else 1

    def whitening(role: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        for name, shape in zip(WHITENING, ((inputs,), (outputs, inputs), (outputs,)), strict=True):
            yield f"{PREFIX}{role}/{name}", ("F32", shape)

    features, coordinates = size("router/mean", 1), size("router/scale", 1)
    components, width = len(cascade.experts), features * (len(cascade.experts) + 1)
    yield from whitening("router", features, coordinates)
    shapes = ((components,), (components, coordinates), (components, coordinates, coordinates))
    for name, shape in zip(MIXTURE, shapes, strict=True):
        yield f"{PREFIX}router/{name}", ("F32", shape)
    if any(name.startswith(f"{PREFIX}reduction/") for name in spans):
        reduced = size("reduction/scale", 1)
        yield from whitening("reduction", width, reduced)
        width = reduced
    if any(name.startswith(f"{PREFIX}head/") for name in spans):
        rows = size("head/weight", 2) if classes is None else len(classes)
        yield f"{PREFIX}head/weight", ("", (rows, width))
        yield f"{PREFIX}head/bias", ("", (rows,))


def cascade_parts(path: str, cascade: CascadeHeader, tensors: Mapping[str, Tensor]) -> CascadeParts:
    """Return a cascade with its tensors, given without their prefix; `path` is the file, for messages.

    Raises:
        CorruptAdapterError: if a value cannot be: none computes, or two readers would not agree.
    """

    def whitening(role: str) -> Whitening:
        return Whitening(*(tensors[f"{role}/{name}"] for name in WHITENING))

    def refuse(name: str, found: str, expected: str) -> CorruptAdapterError:
        what = f"tensor '{PREFIX}{name}' has {found}, expected {expected}"
        return CorruptAdapterError(f"{path}: {what}; fetch the file again")

    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise refuse(name, "values that are not finite", "finite numbers")
        if name.endswith(("/scale", "/weights")) and not bool((tensor > 0).all()):
            raise refuse(name, f"the value {float(tensor.min())}", "numbers above 0")
    total = float(tensors["router/weights"].double().sum())
    if not math.isclose(total, 1, abs_tol=1e-3):
        raise refuse("router/weights", f"the sum {total:.6f}", "shares that sum to 1")
    precisions = tensors["router/precisions"]
    if not torch.equal(precisions, precisions.triu()) or not bool((precisions.diagonal(dim1=1, dim2=2) > 0).all()):
        raise refuse("router/precisions", "others", "upper triangular matrices with a diagonal above 0")
    router = Router(whitening("router"), *(tensors[f"router/{name}"] for name in MIXTURE))
    reduction = whitening("reduction") if "reduction/mean" in tensors else None
    head = tensors.get("head/weight"), tensors.get("head/bias")
    return CascadeParts(
        cascade.dispatcher, cascade.experts, cascade.embedding, router, cascade.combine, reduction, *head
    )
