"""State dicts of modules under torch.nn.utils.prune: `X_mask`, and `X_orig` beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import DataError
from ..mask import PackedMask
from ..safetensors_io import open_tensors
from .base import IMPORTERS, Found, check_shape, compare, known, match, read_weights, refuse_trained


@IMPORTERS.register
class Prune:
    """Safetensors file of `X_mask` tensors, with or without the rest of a torch.nn.utils.prune state dict."""

    id: ClassVar[str] = "prune"
    reference: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.prune.BasePruningMethod.html"
    )

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)
        own = match(path, tensors, base)  # a backbone may have tensors of its own whose names end alike
        stems = {name.removesuffix("_mask"): name for name in tensors if name.endswith("_mask") and name not in own}
        if not stems:
            raise DataError(
                f"{path} has no tensor X_mask, it has {', '.join(list(tensors)[:3]) or 'none'}; expected the state "
                "dict of a module under torch.nn.utils.prune; after prune.remove, import it with --from zeros"
            )
        masked = {parameter: stem for stem, parameter in known(path, stems, base).items()}

        def make(name: str) -> PackedMask:
            stored = stems[masked[name]]
            check_shape(tensors, stored, tuple(base[name].shape))
            mask = tensors[stored]
            kept = mask == 1
            if bool((other := ~kept & (mask != 0)).any()):
                raise DataError(
                    f"{path}: {stored!r} holds {mask[other][0].item()}, expected zeros and ones; save the state dict "
                    "as it is"
                )
            return PackedMask.from_tensor(kept)

        def rows() -> Iterator[tuple[str, int]]:
            for name, stem in masked.items():
                kept = make(name).tensor()
                for stored in {f"{stem}_orig", stem} & tensors.keys():
                    yield name, compare(read_weights(tensors, stored, tuple(base[name].shape)), base[name], kept)[0]
            for stored, name in own.items():
                if base[name].is_floating_point() and name not in masked:
                    every = torch.ones(base[name].shape, dtype=torch.bool)
                    yield name, compare(read_weights(tensors, stored, tuple(base[name].shape)), base[name], every)[0]

        refuse_trained(path, rows())
        return Found({name: tuple(base[name].shape) for name in masked}, make)
