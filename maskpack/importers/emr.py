"""Results of EMR-Merging: one vector for several tasks, and for each task a mask of it and a factor."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..errors import BackboneMismatchError, DataError
from .base import IMPORTERS, Found, exact, known, task_of
from .pickled import saved, tensor


@IMPORTERS.register
class Emr:
    """What `emr_merge` returns, as torch.save writes it (`FILE#TASK`, tasks from 0): vector, masks, factors."""

    id: ClassVar[str] = "emr"
    reference: ClassVar[str] = "https://arxiv.org/abs/2405.17461"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        path, task = task_of(path)
        found = saved(path)
        if (
            not isinstance(found, tuple | list)
            or len(found) != 3
            or not all(isinstance(one, dict) for one in found[:2])
        ):
            raise DataError(f"{path} is not (vector, masks, factors) as emr_merge of EMR-Merging returns them")
        vector, masks, factors = found
        rescalers, count = tensor(factors, path), len(next(iter(masks.values()), ()))
        if not task.isdecimal() or not int(task) < min(count, rescalers.numel()):
            raise DataError(f"{path} has {count} tasks, and #{task} names none of them; give {path.name}#0, …")
        names = {own: name for name, own in known(path, map(str, vector), base).items()}

        def make(own: str) -> Tensor:
            name, weight = names[own], base[own].detach().cpu()
            unified, mask = tensor(vector[name], path), tensor(masks[name][int(task)], path)
            if unified.shape != weight.shape or mask.shape != weight.shape:
                raise BackboneMismatchError(
                    f"{path}: {name!r} has shape {list(unified.shape)}, and the backbone {list(weight.shape)}; give "
                    f"the backbone that was merged"
                )
            return (weight + unified * mask * rescalers[int(task)]).to(weight.dtype)

        return exact(path, names, make, base)
