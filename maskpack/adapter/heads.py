"""Heads in the file: what the header says of one, and its tensors (docs/format.md sections 2 and 4.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ..backbone.head import POOLINGS, Head, Pooling
from ..backbone.random_weight import MAX_SEED, MAX_WEIGHTS, RandomWeight
from ..errors import AdapterError, CorruptAdapterError
from ..mask import PackedMask, packed_bits
from ..tensorfile import Blob
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
    """A head without its tensors; the attributes are those of `backbone.head.Head`."""

    kind: Literal["linear", "pooled-linear"]
    module: str | None = None
    pooling: Pooling | None = None
    normalize: bool = False
    random: RandomSpec | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the head as JSON values."""
        random = {} if self.random is None else {"random": self.random.to_json()}
        if self.kind == "linear":
            return {"kind": self.kind, "module": self.module, **random}
        return {"kind": self.kind, "normalize": self.normalize, "pooling": self.pooling, **random}


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
    return HeadSpec(head.kind, head.module, head.pooling, head.normalize, random)


def parse_head(fields: Fields) -> HeadSpec:
    """Parse and check the head in the header of a set.

    Raises:
        CorruptAdapterError: if anything in it is not what the format allows.
    """
    random = _random(fields.object("random")) if "random" in fields.members else None
    if fields.one_of("kind", ("linear", "pooled-linear")) == "linear":
        return HeadSpec("linear", module=fields.text("module"), random=random)
    pooling = cast(Pooling, fields.one_of("pooling", POOLINGS))
    return HeadSpec("pooled-linear", pooling=pooling, normalize=fields.boolean("normalize"), random=random)


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
        return Head(spec.kind, tensors["weight"], tensors.get("bias"), spec.module, spec.pooling, spec.normalize)
    packed = tensors["mask"].numpy()
    mask = PackedMask.from_bytes(packed, spec.random.shape)
    if not np.array_equal(packed_bits(mask.bits), packed):
        raise CorruptAdapterError(f"{where}: the mask of the head has set bits behind its end; fetch the file again")
    random = RandomWeight(spec.random.seed, mask.scaled() if spec.random.scale else mask)
    return Head(spec.kind, random.dense(), None, spec.module, spec.pooling, spec.normalize, random)
