"""Checkpoints of compressed-tensors: kept weights in a row, and a bitmask that says where they are."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..mask import Shape
from ..safetensors_io import TensorFile, open_tensors
from .base import IMPORTERS, Found, check_shape, match, pruned, read_weights

MEMBERS = ("bitmask", "compressed", "shape", "row_offsets")


@IMPORTERS.register
class CompressedTensors:
    """Safetensors checkpoint in the formats sparse-bitmask or sparse-24-bitmask."""

    id: ClassVar[str] = "compressed-tensors"
    reference: ClassVar[str] = "https://github.com/vllm-project/compressed-tensors"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)
        stems = {name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")}
        if not stems:
            raise DataError(
                f"{path} has no tensor X.bitmask, it has {', '.join(list(tensors)[:3]) or 'none'}; expected the format "
                "sparse-bitmask or sparse-24-bitmask; import a checkpoint with plain zeros with --from zeros"
            )
        parts = {f"{stem}.{member}" for stem in stems for member in MEMBERS}
        # X is the module of the weight; until version 0.5 it was the weight itself
        full = [(name, stem) for stem in sorted(stems) for name in (stem, f"{stem}.weight")]
        every = Counter([*(name for name in tensors if name not in parts), *(name for name, _ in full)])
        if twice := [name for name, times in every.items() if times > 1]:
            raise DataError(f"{path} holds the weight {twice[0]!r} twice, expected it once; fetch it again")
        stem_of = dict(full)
        stored = {own: name for name, own in match(path, every, base).items() if base[own].is_floating_point()}

        def read(name: str) -> Tensor:
            if stored[name] not in stem_of:
                return read_weights(tensors, stored[name], tuple(base[name].shape))
            return _dense(tensors, stem_of[stored[name]], tuple(base[name].shape))

        return pruned(path, stored, read, base)


def _dense(tensors: TensorFile, stem: str, shape: Shape) -> Tensor:
    """Return a weight with its zeros."""

    def check(fits: bool, what: str) -> None:
        if not fits:
            raise DataError(f"{tensors.path}: {stem!r} {what}; save it anew with compressed-tensors, or fetch it again")

    for member in ("compressed", "shape"):
        check(f"{stem}.{member}" in tensors, f"has a bitmask and no {member!r}, expected both")
    sizes = tensors.shapes[f"{stem}.shape"]
    check(bool(shape) and math.prod(sizes) == len(shape), f"states {sizes} sizes, expected those of {shape}")
    stated = tuple(tensors[f"{stem}.shape"].reshape(-1).tolist())
    check(stated == shape, f"has shape {stated}, the backbone's parameter {shape}")
    check_shape(tensors, f"{stem}.bitmask", (*shape[:-1], (shape[-1] + 7) // 8))
    packed = tensors[f"{stem}.bitmask"]
    check(packed.dtype is torch.uint8, f"has a bitmask of {packed.dtype}, expected torch.uint8")
    bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(bits[..., : shape[-1]].astype(np.bool_))
    beyond = bool(bits[..., shape[-1] :].any())
    check(not beyond, f"has bits beyond the {shape[-1]} columns of a row, expected zeros there")
    values, count = math.prod(tensors.shapes[f"{stem}.compressed"]), int(kept.count_nonzero())
    check(values == count, f"has {values} values for {count} true bits")
    compressed = read_weights(tensors, f"{stem}.compressed")
    dense = torch.zeros(shape, dtype=compressed.dtype)
    dense[kept] = compressed.reshape(-1)
    return dense
