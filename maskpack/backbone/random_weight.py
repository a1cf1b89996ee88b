"""Random weights: the same in every release and on every machine, so that a seed stands for those of a masked head."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mask import PackedMask, masked_weight

BLOCK = 1 << 16  # weights that one hash stands for, so that memory beside the result is bounded
MAX_WEIGHTS = 1 << 27
MAX_SEED = (1 << 32) - 1


def random_weight(seed: int, classes: int, features: int) -> Tensor:
    """Return the values that a seed stands for (docs/format.md section 4.1), (classes, features) float32 on the CPU.

    They are uniform between -1 / sqrt(features) and 1 / sqrt(features), as those of a new `nn.Linear`; no value is 0.
    """
    whole = torch.empty(classes * features)
    for block, part in enumerate(torch.split(whole, BLOCK)):
        words = random_words(f"maskpack head {seed} {block}", len(part))
        # exact up to the last division: 24 bits and a half
        part.copy_((2 * words + 1 - (1 << 24)).to(torch.float64) / (1 << 24) / math.sqrt(features))
    return whole.reshape(classes, features)


def random_words(label: str, count: int) -> Tensor:
    """Return `count` numbers from 0 to 2**24 - 1, int32: the upper three bytes of the words of SHAKE-128 of a text."""
    words = hashlib.shake_128(label.encode()).digest(4 * count)
    return torch.frombuffer(bytearray(words), dtype=torch.int32) >> 8 & 0xFFFFFF


@dataclass(frozen=True, slots=True, eq=False)
class RandomWeight:
    """What a masked head is stored as.

    Attributes:
        seed: 0 to 2**32 - 1.
        mask: (classes, features), with alpha where the scale is on.
    """

    seed: int
    mask: PackedMask

    def dense(self) -> Tensor:
        """Return the masked weight, (classes, features) float32 on the CPU."""
        classes, features = self.mask.shape
        alpha = None if self.mask.alpha is None else torch.tensor(self.mask.alpha, dtype=torch.float32)
        return masked_weight(random_weight(self.seed, classes, features), self.mask.tensor(), alpha)
