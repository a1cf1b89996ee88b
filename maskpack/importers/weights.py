"""Weights that another tool stored beside its masks: those that a mask keeps must be the base's."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbone.parameters import same_size_int
from ..errors import BackboneMismatchError, DataError
from ..mask import PackedMask
from ..tensorfile import TensorFile
from .base import Found

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STEP = 1 << 24  # weights compared at a time


def read_weights(tensors: TensorFile, stored: str, name: str, base: Mapping[str, Tensor]) -> Tensor:
    """Read the weights of a parameter, of the base's shape.

    Args:
        stored: the tensor's name in the file. name: the parameter's in the base.

    Raises:
        BackboneMismatchError: if they have another shape. DataError: if they are no floating-point numbers.
    """
    check_shape(tensors, stored, tuple(base[name].shape))
    return check_float(tensors.path, stored, tensors[stored])


def check_shape(tensors: TensorFile, stored: str, expected: tuple[int, ...]) -> None:
    """Raise BackboneMismatchError if a tensor of the file has not the expected shape; nothing is read for it."""
    if tensors.shapes[stored] != expected:
        raise BackboneMismatchError(
            f"{tensors.path}: {stored!r} has shape {tensors.shapes[stored]}, the backbone's parameter asks for "
            f"{expected}; give the backbone that was pruned"
        )


def check_float(path: Path, stored: str, found: Tensor) -> Tensor:
    """Return the tensor, or raise DataError if weights of its dtype cannot be compared with a base's."""
    if found.dtype not in FLOATS:
        raise DataError(
            f"{path}: {stored!r} is {found.dtype}, expected one of {', '.join(map(str, FLOATS))}; import the masks "
            f"before the weights are quantised"
        )
    return found


def compare(found: Tensor, base: Tensor, kept: Tensor) -> tuple[int, int]:
    """Compare weights with the base's, cast to their dtype, bit by bit.

    Returns:
        How many kept weights differ, and how many of those that are not kept the base has other than zero.
    """
    differing = removed = 0
    flat, own, chosen = found.reshape(-1), base.detach().reshape(-1), kept.reshape(-1)
    for at in range(0, flat.numel(), STEP):
        piece, cast = flat[at : at + STEP], own[at : at + STEP].to("cpu", found.dtype)
        where = chosen[at : at + STEP]
        differing += int((where & (same_size_int(piece) != same_size_int(cast))).count_nonzero())
        removed += int((~where & (cast != 0)).count_nonzero())
    return differing, removed


def refuse_trained(path: Path, rows: Iterable[tuple[str, int]]) -> None:
    """Refuse weights that are not the base's.

    Args:
        rows: name of each tensor that was compared, and how many of its kept weights differ.

    Raises:
        BackboneMismatchError: if any does; the message says how many tensors and weights, and which is first.
    """
    counts = Counter[str]()
    for name, count in rows:
        counts[name] += count
    differing = {name: count for name, count in counts.items() if count}
    if differing:
        first = min(differing)
        raise BackboneMismatchError(
            f"{path}: {sum(differing.values())} kept weights in {len(differing)} of {len(counts)} tensors are not the "
            f"base's, first {first!r} ({differing[first]} weights); give the backbone that was pruned, or, if it was "
            f"trained after that, train a mask instead: a mask selects weights and cannot hold new ones"
        )


def pruned(path: Path, names: Iterable[str], read: Callable[[str], Tensor], base: Mapping[str, Tensor]) -> Found:
    """Return the masks of a pruned network: bit 0 where a weight is 0 (or -0).

    Masked is every parameter with a zero where the base has none; all other weights are compared.

    Args:
        names: tensors of the base that the network has. read: gives the network's, of the base's shape.

    Raises:
        BackboneMismatchError: if a weight is neither 0 nor the base's, or there is no name.
        DataError: if no parameter has a zero that the base has not.
    """
    if not (names := sorted(names)):
        raise BackboneMismatchError(
            f"{path} has no tensor of the backbone's, which has {', '.join(list(base)[:3])}, …; give the backbone that "
            f"was pruned"
        )
    masked = []

    def rows() -> Iterator[tuple[str, int]]:
        for name in names:
            found = read(name)
            differing, removed = compare(found, base[name], found != 0)
            if not isinstance(base[name], nn.Parameter):
                differing += removed  # a buffer cannot be masked
            elif removed:
                masked.append(name)
            yield name, differing

    refuse_trained(path, rows())
    if not masked:
        raise DataError(
            f"{path}: no parameter has a zero where the backbone has none, expected a pruned network; give the file "
            f"after pruning, and the backbone before it"
        )
    return {name: tuple(base[name].shape) for name in masked}, lambda name: PackedMask.from_tensor(read(name) != 0)
