"""Random weights that a seed stands for, the same on every machine: of heads, and of whole models."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BackboneError
from ..mask import PackedMask, masked_weight

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # weights per hash, which bounds the memory beside the result
MAX_WEIGHTS = 1 << 27
MAX_SEED = (1 << 32) - 1
KINDS = ("kaiming", "signed-constant")
PREFIX = "random:"  # of the revision of a random base


def _hashed(label: str, shape: tuple[int, ...], value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return float32 values of odd numbers from 1 - 2**24 to 2**24 - 1, float64, that follow from the label."""
    import torch

    whole = torch.empty(math.prod(shape))
    for block, part in enumerate(torch.split(whole, BLOCK)):
        digest = hashlib.shake_128(f"{label} {block}".encode()).digest(4 * len(part))
        words = torch.frombuffer(bytearray(digest), dtype=torch.int32) >> 8 & 0xFFFFFF
        part.copy_(value((2 * words + 1 - (1 << 24)).to(torch.float64)))
    return whole.reshape(shape)


def random_weight(seed: int, classes: int, features: int) -> Tensor:
    """Return a random head (docs/format.md section 4.1), (classes, features) float32 on the CPU.

    Values are uniform between -1 / sqrt(features) and 1 / sqrt(features), as those of a new `nn.Linear`; none is 0.
    """
    return _hashed(f"maskpack head {seed}", (classes, features), lambda odd: odd / (1 << 24) / math.sqrt(features))


@dataclass(frozen=True, slots=True, eq=False)
class RandomWeight:
    """Stored form of a masked random head: seed, and mask of shape (classes, features), with alpha if it is scaled."""

    seed: int
    mask: PackedMask

    def dense(self) -> Tensor:
        """Return the masked weight, (classes, features) float32 on the CPU."""
        import torch

        classes, features = self.mask.shape
        alpha = None if self.mask.alpha is None else torch.tensor(self.mask.alpha, dtype=torch.float32)
        return masked_weight(random_weight(self.seed, classes, features), self.mask.tensor(), alpha)


def parse_random(text: str) -> tuple[str, int]:
    """Return kind and seed of "KIND:SEED", or "" and the seed of "SEED", which the model's library draws from."""
    kind, _, seed = text.rpartition(":")
    if kind not in ("", *KINDS) or text.startswith(":") or not seed.isdecimal() or int(seed) > MAX_SEED:
        raise BackboneError(
            f"random weights must be SEED or KIND:SEED, from 0 to {MAX_SEED} and of {', '.join(KINDS)}; got {text!r}"
        )
    return kind, int(seed)


def random_values(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """Return one weight, float32: uniform of standard deviation d = sqrt(2 / fan-in), or d with random signs.

    The fan-in is the number of weights of one output (He et al., 2015, and Ramanujan et al., 2020).
    """
    fan_in = math.prod(shape[1:])

    def value(odd: Tensor) -> Tensor:
        if kind == "kaiming":
            return odd / (1 << 24) * math.sqrt(6 / fan_in)
        return odd.sign() * math.sqrt(2 / fan_in)

    return _hashed(f"maskpack weight {seed} {name}", shape, value)
