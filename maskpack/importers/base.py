"""The contract of an importer: the masks in a file that another tool wrote (docs/extending.md).

`open(path, base)` gets the parameters and buffers of the frozen model, under each of their names, which `match` and
`known` find in a file. The file comes from a stranger and may have 14 GB: sizes are compared with the base's before
anything is allocated, and tensors are read one by one and not kept. A mask only selects: weights beside masks must be
the base's, bit by bit, but in `checkpoint.py`. A mask is the same each time that it is asked for, in one thread.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..backbone.model import aliases, canonical, named_buffers, named_parameters, same_size_int
from ..codecs import ulps
from ..codecs.base import words_of
from ..errors import BackboneMismatchError, ConfigError, DataError
from ..mask import MaskSet, PackedMask, Shape, packed_bits
from ..registry import Registry
from ..safetensors_io import Made, TensorFile

MOST_PREFIX_PARTS = 2  # as in "module.model."
STEP = 1 << 24  # weights compared at a time
DENSE = 0.875  # share of weights that changed from which all are stored


class Found(NamedTuple):
    """The masks in a file: their shapes by parameter name, and a function that makes one of them.

    Attributes:
        values: what makes the values that a mask with op "replace" puts in, flat.
        statistics: BatchNorm buffers, float32.
        after: what a patch makes: the tensors of the checkpoint by the backbone's names, read when asked for.
    """

    shapes: Mapping[str, Shape]
    make: Callable[[str], PackedMask]
    values: Callable[[str], Tensor] | None = None
    statistics: Mapping[str, Tensor] = {}
    after: Mapping[str, Tensor] = {}


class Imported(NamedTuple):
    """Imported masks and values, each made when it is asked for; the other fields are those of `Found`."""

    masks: MaskSet
    values: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


class Importer(Protocol):
    """The interface of an importer (see the module's docstring)."""

    id: ClassVar[str]
    reference: ClassVar[str]

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found: ...


IMPORTERS: Registry[Importer] = Registry("importer", "maskpack.importers")


def import_masks(path: str | Path, model: nn.Module, format: str = "masks", *, scale: bool = False) -> MaskSet:
    """Return the masks of a file; see `import_file`."""
    return import_file(path, model, format, scale=scale).masks


def import_file(path: str | Path, model: nn.Module, format: str = "masks", *, scale: bool = False) -> Imported:
    """Return the masks and values of a file by the model's names; each is read whenever it is asked for.

    Weights beside the masks are compared here, all of them; what is wrong with a mask itself may be raised when it is
    asked for. `scale` sets alpha, only for the format "masks".

    Raises:
        DataError: if the file cannot be read, or is not in that format.
        BackboneMismatchError: if the masks, or the weights beside them, are not of this model.
    """
    check_format(format, scale)
    found = IMPORTERS[format].open(Path(path), {**named_buffers(model), **named_parameters(model)})
    shapes, make = found.shapes, found.make
    first, sources = aliases(model), dict[str, str]()
    for name in shapes:
        other = sources.setdefault(first.get(name, name), name)
        if other != name and make(other) != make(name):
            raise DataError(
                f"{path}: {other!r} and {name!r} are one tensor in the backbone and have different masks; leave one of "
                "them out"
            )

    def own(name: str) -> PackedMask:
        mask = make(sources[name])
        return mask.scaled() if scale else mask

    masks = MaskSet.streamed(sources, own, {name: shapes[stored] for name, stored in sources.items()})
    values = found.values
    made = Made(sources if values else (), lambda name: values(sources[name]) if values else torch.empty(0))
    return Imported(masks, made, found.statistics, found.after)


def check_format(format: str, scale: bool) -> None:
    if IMPORTERS[format].id != "masks" and scale:
        raise ConfigError(f"scale is for masks trained with it, and {format!r} files hold none; leave it out")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return True if tensors of one shape have the same dtype and bits."""
    return one.dtype == other.dtype and all(torch.equal(*pair) for pair in _pieces(one, other))


def _pieces(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    flat, own = one.detach().reshape(-1), other.detach().reshape(-1)
    for at in range(0, flat.numel(), STEP):
        yield same_size_int(flat[at : at + STEP]), same_size_int(own[at : at + STEP].cpu())


def exact(path: Path, names: Iterable[str], make: Callable[[str], Tensor], base: Mapping[str, Tensor]) -> Found:
    """Return the exact change from the base to tensors that `make` makes, of the base's shapes and dtypes, by name."""
    names, last = sorted(names), dict[str, tuple[PackedMask, Tensor]]()
    changed = {name: tuple(base[name].shape) for name in names if not same_bits(make(name), base[name])}
    if not changed:
        raise DataError(
            f"{path} has the weights of the backbone: {len(names)} tensors are equal, to the bit; give the checkpoint "
            f"after training, and the backbone before it"
        )

    def read(name: str) -> tuple[PackedMask, Tensor]:
        """Return mask and values of a tensor; the last result is kept, as mask and values are asked for one by one."""
        if name not in last:
            last.clear()
            last[name] = _change(make(name), base[name])
        return last[name]

    return Found(changed, lambda name: read(name)[0], lambda name: read(name)[1], after=Made(names, make))


def _change(tensor: Tensor, weight: Tensor) -> tuple[PackedMask, Tensor]:
    """Return the mask of the weights that are equal, and the new values of the others."""
    same = torch.cat([one == other for one, other in _pieces(tensor, weight)]) if tensor.numel() else torch.ones(0) > 0
    if int(same.count_nonzero()) < (1 - DENSE) * same.numel():
        same = torch.zeros_like(same)
    mask = PackedMask.from_tensor(same.reshape(tensor.shape), "replace")
    values = torch.from_numpy(ulps.at_zeros(words_of(tensor), packed_bits(mask.bits)))
    return mask, values.view(tensor.dtype)


def match(path: Path, names: Iterable[str], base: Mapping[str, Tensor]) -> dict[str, str]:
    """Map names of a file to the backbone's, for those that it has; DataError if two of them stand for one.

    The `_orig_mod.` of compiled modules does not count. If no name is the backbone's as it stands, a prefix such as
    `module.` or `model.`, of one or two parts and the same for all, does not count either.
    """
    plain = {name: canonical(name) for name in names}
    for parts in range(MOST_PREFIX_PARTS + 1):
        for name in plain.values():
            rest = name.split(".", parts)[-1]
            if rest not in base:
                continue
            prefix, seen = name[: len(name) - len(rest)], dict[str, str]()
            cut = {full: one.removeprefix(prefix) for full, one in plain.items() if one.startswith(prefix)}
            for full, one in cut.items():
                if one in base and (other := seen.setdefault(one, full)) != full:
                    raise DataError(f"{path}: {other!r} and {full!r} both stand for {one!r}; leave one of them out")
            return {full: one for one, full in seen.items()}
    return {}


def known(path: Path, names: Iterable[str], base: Mapping[str, Tensor]) -> dict[str, str]:
    """Map names of masks to the backbone's parameters; BackboneMismatchError if it lacks one."""
    names = sorted(names)
    found = match(path, names, base)
    missing = [name for name in names if name not in found]
    if missing:
        raise BackboneMismatchError(
            f"{path} has masks for {len(names)} parameters, and the backbone, with {', '.join(list(base)[:3])}, …, "
            f"lacks {len(missing)} of them, first {missing[0]!r}; give the backbone that the masks were made for"
        )
    return found


def check_shape(tensors: TensorFile, stored: str, expected: Shape) -> None:
    """Raise BackboneMismatchError if a tensor of the file has not the expected shape; nothing is read for it."""
    if tensors.shapes[stored] != expected:
        raise BackboneMismatchError(
            f"{tensors.path}: {stored!r} has shape {tensors.shapes[stored]}, expected {expected}; give the backbone "
            "that the file was made for"
        )
