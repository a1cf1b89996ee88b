"""Files of methods that add to the weights: BitDelta, EMR-Merging, SHiRA and TALL-masks."""

import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import BackboneMismatchError, DataError
from ..safetensors_io import DTYPES, TensorFile, tensor_of
from .base import IMPORTERS, Found, check_shape, exact, known, match

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

        return added(path, matrices | rest, make, base)


@IMPORTERS.register
class Emr:
    """Importer for results of `emr_merge` saved by torch.save: vector, masks, factors; `FILE#TASK`, tasks from 0."""

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

        return added(path, map(str, vector), make, base)


@IMPORTERS.register
class Shira:
    """Adapter of SHiRA (`adapter_model.safetensors` of PEFT): what is added to a few weights of each matrix."""

    id: ClassVar[str] = "shira"
    reference: ClassVar[str] = "https://arxiv.org/abs/2406.13175"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = TensorFile(path)
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

        return added(path, matrices | rest, make, base)


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

        return added(path, first, make, base)


def task_of(path: Path) -> tuple[Path, str]:
    """Split FILE#TASK, for a file that holds several tasks; the task is "" where none is named."""
    name, _, task = path.name.partition("#")
    return path.with_name(name), task


def added(path: Path, names: Iterable[str], make: Callable[[str, Tensor], Tensor], base: Mapping[str, Tensor]) -> Found:
    """Return the change that a file makes; `make` computes a new tensor from its name in the file and the base's.

    Raises:
        BackboneMismatchError: if the backbone lacks one of the names.
    """
    stored = {own: name for name, own in known(path, names, base).items()}

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


# --- files of torch.save and numpy.save -----------------------------------------------------------------------------
#
# A pickle is a program. Here its instructions are only looked at (`pickletools`): a name in it stays a name, what it
# would call is kept as a note of the call, of which a few are understood. Nothing that a file names is imported.

STORAGES = {"Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Int": "I32", "Long": "I64"}
STORAGES |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LIMIT = 64 << 20  # bytes of instructions


@dataclass
class Call:
    """A call that a pickle asks for, its arguments, and the state for its result."""

    name: Any
    given: Any = ()
    state: Any = None


def saved(path: Path) -> Any:
    """Return the object in a file of torch.save; a tensor is read when it is asked for, by `tensor`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
            program = entries["data.pkl"]
            if program.file_size > LIMIT or any(one.compress_type for one in entries.values()):
                raise ValueError("it is compressed, or too large")
            return _followed(archive.read(program), lambda given: _Stored(path, entries, *given))
    except (OSError, KeyError, ValueError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not as torch.save writes tensors: {error}; save it again") from None


def saved_array(path: Path) -> Any:
    """Return the Python object in a file of numpy.save."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            found = _followed(file.read(LIMIT), None)
        return found.state[4][0]
    except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not as numpy.save writes an object: {error}; save it again") from None


@dataclass
class _Stored:
    """The place of numbers in a file of torch.save."""

    path: Path
    entries: Mapping[str, zipfile.ZipInfo]
    kind: str
    storage: Any
    key: str
    device: str
    count: int

    def numbers(self) -> Tensor:
        dtype = STORAGES[str(self.storage.name).removeprefix("torch ").removesuffix("Storage")]
        entry = self.entries[f"data/{self.key}"]
        if entry.file_size != self.count * DTYPES[dtype][1]:
            raise ValueError(f"{self.key!r} has {entry.file_size} bytes for {self.count} numbers of {dtype}")
        with zipfile.ZipFile(self.path) as archive:
            return tensor_of(memoryview(archive.read(entry)), dtype, (self.count,))


def tensor(found: Any, path: Path) -> Tensor:
    """Return a tensor that `saved` found, read now, or an array that either found."""
    try:
        if found.name == "torch._utils _rebuild_parameter":
            return tensor(found.given[0], path)
        if found.name == "torch._utils _rebuild_tensor_v2":
            stored, offset, size, stride, *_ = found.given
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= stored.count):
                raise ValueError(f"it goes beyond its {stored.count} numbers")
            numbers: Tensor = stored.numbers()
            return numbers.as_strided(size, stride, offset)
        _, shape, dtype, _, data = found.state
        if found.name.endswith("multiarray _reconstruct") and dtype.given[0] == "u1":
            return tensor_of(memoryview(data), "U8", tuple(shape))
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: a tensor is not as torch.save or numpy.save writes it: {error}") from None
    raise DataError(f"{path}: expected a tensor, found {str(found)[:100]}")


def _followed(program: bytes, stored: Callable[[Any], Any] | None) -> Any:
    """Return the object that a pickle describes, with a `Call` for each object of a class."""
    stack, marks, kept = list[Any](), list[int](), dict[int, Any]()

    def since_mark() -> list[Any]:
        at = marks.pop()
        found = stack[at:]
        del stack[at:]
        return found

    arg: Any
    for op, arg, _ in pickletools.genops(program):
        name = op.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name.startswith("EMPTY_"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name.startswith("TUPLE"):
            count = int(name[5:])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPENDS", "SETITEMS"):
            own = since_mark()
            stack[-1].extend(own) if name == "APPENDS" else stack[-1].update(zip(own[::2], own[1::2], strict=True))
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                last = stack.pop()
                arg = f"{stack.pop()} {last}"
            stack.append(Call(arg))
        elif name == "REDUCE":
            given, called = stack.pop(), stack.pop()
            if called.name == "_codecs encode":  # how protocol 2 has bytes
                stack.append(given[0].encode("latin1"))
            else:
                stack.append({} if called.name == "collections OrderedDict" else Call(called.name, given))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Call):
                stack[-1].state = state
        elif name == "BINPERSID" and stored is not None:
            stack.append(stored(stack.pop()))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            kept[len(kept) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(kept[arg])
        elif op.stack_before or not op.stack_after:
            raise ValueError(f"it has the instruction {name}")
        else:
            stack.append(arg)  # a number, a text, bytes
    return stack[-1]
