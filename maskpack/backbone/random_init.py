"""Random weights of a backbone that a kind and a seed stand for, so that a mask on them is all there is to store."""

import math

import torch
from torch import Tensor, nn

from ..errors import BackboneError
from .parameters import aliases, named_buffers, named_parameters
from .random_weight import BLOCK, MAX_SEED, random_words

KINDS = ("kaiming", "signed-constant")
PREFIX = "random:"  # of the revision of such a base


def parse_random(text: str) -> tuple[str, int]:
    """Return kind and seed of "SEED", whose kind is "" (as the library draws them), or of "KIND:SEED".

    Raises:
        BackboneError: if it is neither.
    """
    kind, _, seed = text.rpartition(":")
    if kind not in ("", *KINDS) or text.startswith(":") or not seed.isdecimal() or int(seed) > MAX_SEED:
        raise BackboneError(
            f"random weights must be SEED or KIND:SEED, with a seed from 0 to {MAX_SEED} and a kind of "
            f"{', '.join(KINDS)}; got {text!r}"
        )
    return kind, int(seed)


@torch.no_grad()
def randomize(model: nn.Module, kind: str, seed: int) -> None:
    """Set the weights of a model to those that a kind and a seed stand for (docs/format.md section 3.1).

    Weights of two dimensions and more become random, those of one dimension (norms) 1, biases 0, BatchNorm statistics
    0 and 1. What has another name stays as its constructor left it.
    """
    parameters = named_parameters(model)
    for name in sorted(set(aliases(model).values())):
        parameter, leaf = parameters[name], name.rpartition(".")[2]
        if leaf.endswith("bias"):
            parameter.zero_()
        elif leaf.endswith("weight") and parameter.ndim > 1:
            parameter.copy_(random_values(name, tuple(parameter.shape), kind, seed))
        elif leaf.endswith("weight"):
            parameter.fill_(1.0)
    for name, buffer in named_buffers(model).items():
        if name.endswith(("running_mean", "running_var")):
            buffer.fill_(float(name.endswith("running_var")))


def random_values(name: str, shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """Return the values of one weight, float32: uniform of standard deviation sqrt(2 / fan-in), or plus and minus that.

    The fan-in is the number of weights of one output, the product of all sizes but the first (He et al., 2015, and
    Ramanujan et al., 2020).
    """
    fan_in = math.prod(shape[1:])
    whole = torch.empty(math.prod(shape))
    for block, part in enumerate(torch.split(whole, BLOCK)):
        words = random_words(f"maskpack weight {seed} {name} {block}", len(part))
        # odd numbers of 25 bits: exact in binary64 up to the square root, and never 0
        odd = (2 * words + 1 - (1 << 24)).to(torch.float64)
        if kind == "kaiming":
            part.copy_(odd / (1 << 24) * math.sqrt(6 / fan_in))
        else:
            part.copy_(odd.sign() * math.sqrt(2 / fan_in))
    return whole.reshape(shape)
