"""Files of methods that add to the weights: BitDelta, EMR-Merging, SHiRA and TALL-masks."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import BackboneMismatchError, DataError
from ..safetensors_io import open_tensors
from .base import IMPORTERS, Found, check_shape, exact, known, match
from .pickled import saved, saved_array, tensor

BITS = 32  # packed into a number of BitDelta
WEIGHT, PLACES = ".shira_weight", ".shira_indices"
TUNED = "nonlinear_finetuned.pt"


@IMPORTERS.register
class BitDelta:
    """File of BitDelta (`diff.pt`): packed signs and a scale for each matrix, other parameters whole."""

    id: ClassVar[str] = "bitdelta"
    reference: ClassVar[str] = "https://arxiv.org/abs/2402.10193"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        found = saved(path)
        if not isinstance(found, dict) or not any(str(name).endswith(".mask") for name in found):
            raise DataError(f"{path} has no signs of BitDelta (X.mask and X.coeff for each matrix); give its diff.pt")
        matrices = {str(name).removesuffix(".mask") + ".weight" for name in found if str(name).endswith(".mask")}
        rest = {str(name) for name in found if not str(name).endswith((".mask", ".coeff"))}

        def make(name: str, weight: Tensor) -> Tensor:
            if name in rest:
                return fitting(path, name, tensor(found[name], path), weight.shape)
            packed, coeff = (tensor(found[name.removesuffix("weight") + one], path) for one in ("mask", "coeff"))
            if packed.dtype != torch.int32 or (packed.shape[0] * BITS, *packed.shape[1:]) != weight.T.shape:
                raise unlike(path, name, packed)
            bits = packed.unsqueeze(1) >> torch.arange(BITS, dtype=torch.int32)[:, None] & 1
            signs = (2 * bits - 1).reshape(weight.T.shape).T
            return weight + (signs * coeff).to(weight.dtype)

        return added(path, known(path, matrices | rest, base), make, base)


@IMPORTERS.register
class Emr:
    """What `emr_merge` returns, as torch.save writes it (`FILE#TASK`, tasks from 0): vector, masks, factors."""

    id: ClassVar[str] = "emr"
    reference: ClassVar[str] = "https://arxiv.org/abs/2405.17461"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        path, task = task_of(path)
        found = saved(path)
        three = isinstance(found, tuple | list) and len(found) == 3
        if not three or not all(isinstance(one, dict) for one in found[:2]):
            raise DataError(f"{path} is not (vector, masks, factors) as emr_merge of EMR-Merging returns them")
        vector, masks, factors = found
        rescalers, count = tensor(factors, path), len(next(iter(masks.values()), ()))
        if not task.isdecimal() or not int(task) < min(count, rescalers.numel()):
            raise DataError(f"{path} has {count} tasks, and #{task} names none of them; give {path.name}#0, …")

        def make(name: str, weight: Tensor) -> Tensor:
            unified, mask = (
                fitting(path, name, tensor(one, path), weight.shape) for one in (vector[name], masks[name][int(task)])
            )
            return weight + unified * mask * rescalers[int(task)]

        return added(path, known(path, map(str, vector), base), make, base)


@IMPORTERS.register
class Shira:
    """Adapter of SHiRA (`adapter_model.safetensors` of PEFT): what is added to a few weights of each matrix."""

    id: ClassVar[str] = "shira"
    reference: ClassVar[str] = "https://arxiv.org/abs/2406.13175"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = open_tensors(path)
        matrices = {name.removesuffix(WEIGHT) + ".weight" for name in tensors if name.endswith(WEIGHT)}
        if not matrices:
            raise DataError(f"{path} has no tensors of SHiRA (X{WEIGHT} and X{PLACES}); give what PEFT saved of one")
        rest = {name for name in tensors if not name.endswith((WEIGHT, PLACES))}

        def make(name: str, weight: Tensor) -> Tensor:
            if name not in matrices:
                check_shape(tensors, name, tuple(weight.shape))
                return tensors[name]
            stem = name.removesuffix(".weight")
            values, places = tensors[stem + WEIGHT], tensors[stem + PLACES].long()
            # as many as a LoRA of some rank has
            fits = weight.ndim == 2 and places.shape == (2, values.numel()) and not values.numel() % sum(weight.shape)
            if not fits or (places < 0).any() or (places >= torch.tensor(weight.shape)[:, None]).any():
                raise BackboneMismatchError(
                    f"{path}: the places of {stem!r} are not those of a matrix of shape {list(weight.shape)}; give the "
                    f"backbone that the adapter was made for"
                )
            return weight.clone().index_put_((places[0], places[1]), values.to(weight.dtype), accumulate=True)

        return added(path, known(path, matrices | rest, base), make, base)


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
            tasks = ", ".join(map(str, masks)) if isinstance(masks, dict) else "none"
            raise DataError(f"{path} has masks of the tasks {tasks}, by sums of changes, and #{task} is none of them")
        folder = path.parent.parent.parent / "checkpoints" / path.parent.name
        tuned = [folder / f"{name}Val" / TUNED for name in masks]
        checkpoints = [saved(one) for one in tuned]
        first = {name: tensor(one, tuned[0]) for name, one in sorted(checkpoints[0].items())}
        names = match(path, first, base)
        alike = {name for name, own in names.items() if first[name].shape == base[own].shape}
        sizes, lacking = [one.numel() for one in first.values()], sorted(first.keys() - alike)
        packed = tensor(masks[task], path).numpy()
        if lacking or packed.size != (sum(sizes) + 7) // 8:
            raise BackboneMismatchError(
                f"{path} has {8 * packed.size} bits for {sum(sizes)} weights, and of the tensors of {folder} "
                f"{len(lacking)} are not the backbone's, first {lacking[:1]}; give the model that was tuned"
            )
        bits = np.unpackbits(packed, count=sum(sizes))
        starts = dict(zip(first, np.cumsum([0, *sizes[:-1]]), strict=True))

        def make(name: str, weight: Tensor) -> Tensor:
            changes = [tensor(one[name], file) - weight for one, file in zip(checkpoints, tuned, strict=True)]
            kept = torch.from_numpy(bits[starts[name] : starts[name] + weight.numel()]).reshape(weight.shape).bool()
            return weight + torch.stack(changes).sum(0) * kept

        return added(path, names, make, base)


def task_of(path: Path) -> tuple[Path, str]:
    """Split FILE#TASK, for a file that holds several tasks; the task is "" where none is named."""
    name, _, task = path.name.partition("#")
    return path.with_name(name), task


def added(
    path: Path, names: Mapping[str, str], make: Callable[[str, Tensor], Tensor], base: Mapping[str, Tensor]
) -> Found:
    """Return the change that a file makes; `make` gives the new tensor of a name of the file from the base's."""
    stored = {own: name for name, own in names.items()}

    def after(own: str) -> Tensor:
        weight = base[own].detach().cpu()
        return make(stored[own], weight).to(weight.dtype)

    return exact(path, stored, after, base)


def fitting(path: Path, name: str, found: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of a file, or raise BackboneMismatchError if it has another shape."""
    if found.shape != shape:
        raise unlike(path, name, found)
    return found


def unlike(path: Path, name: str, found: Tensor) -> BackboneMismatchError:
    return BackboneMismatchError(
        f"{path}: {name!r} is stored as {found.dtype} of shape {list(found.shape)}, which does not fit the backbone; "
        f"give the backbone that it was made for, embeddings resized before"
    )
