"""TALL-masks: for each task the bits of which weights take the sum of all tasks' changes."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import BackboneMismatchError, DataError
from .base import IMPORTERS, Found, exact, match, task_of
from .pickled import saved, saved_array, tensor

FOLDERS = "tall_masks", "checkpoints"
TUNED = "nonlinear_finetuned.pt"


@IMPORTERS.register
class Tall:
    """Masks of TALL-masks (`tall_masks/MODEL/TALL_mask_8task.npy#MNIST`), beside the tuned `checkpoints/MODEL`."""

    id: ClassVar[str] = "tall"
    reference: ClassVar[str] = "https://arxiv.org/abs/2405.07813"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        path, task = task_of(path)
        # numpy.save wrote them in one version of its code, and torch.load, which wants a zip archive, reads them
        masks = saved(path) if zipfile.is_zipfile(path) else saved_array(path)
        if not isinstance(masks, dict) or task not in masks or "ties" in path.name:
            known = ", ".join(map(str, masks)) if isinstance(masks, dict) else "none"
            raise DataError(f"{path} has masks of the tasks {known}, by sums of changes, and #{task} is none of them")
        folder = path.parent.parent.parent / FOLDERS[1] / path.parent.name
        tuned = [folder / f"{name}Val" / TUNED for name in masks]
        checkpoints = [saved(one) for one in tuned]
        first = {name: tensor(one, tuned[0]) for name, one in sorted(checkpoints[0].items())}
        names = {own: name for name, own in match(path, first, base).items()}
        alike = {name for own, name in names.items() if first[name].shape == base[own].shape}
        sizes, lacking = [one.numel() for one in first.values()], sorted(first.keys() - alike)
        packed = tensor(masks[task], path).numpy()
        if lacking or packed.size != (sum(sizes) + 7) // 8:
            raise BackboneMismatchError(
                f"{path} has {8 * packed.size} bits for {sum(sizes)} weights, and of the tensors of {folder} "
                f"{len(lacking)} are not the backbone's, first {lacking[:1]}; give the model that was tuned"
            )
        bits = np.unpackbits(packed, count=sum(sizes))
        starts = dict(zip(first, np.cumsum([0, *sizes[:-1]]), strict=True))

        def make(own: str) -> Tensor:
            name, weight = names[own], base[own].detach().cpu()
            changes = [tensor(one[name], file) - weight for one, file in zip(checkpoints, tuned, strict=True)]
            summed = torch.stack(changes).sum(0)
            kept = torch.from_numpy(bits[starts[name] : starts[name] + weight.numel()]).reshape(weight.shape).bool()
            return (weight + summed * kept).to(weight.dtype)

        return exact(path, names, make, base)
