"""Masks as plain tensors (`maskpack pack` without --from) or MaskLLM's bits, and masks of pruned networks."""

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from bitarray import bitarray
from torch import Tensor, nn

from ..backbone.model import same_size_int
from ..errors import BackboneMismatchError, ConfigError, DataError
from ..mask import PackedMask, Shape
from ..safetensors_io import TensorFile
from .base import IMPORTERS, STEP, Found, check_shape, known, match


@IMPORTERS.register
class Masks:
    """Safetensors file of bool tensors, or uint8 zeros and ones, named as the parameters; True = weight kept."""

    id: ClassVar[str] = "masks"
    reference: ClassVar[str] = ""

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = TensorFile(path)

        def make(name: str) -> PackedMask:
            try:
                return PackedMask.from_tensor(tensors[name])
            except ConfigError as error:
                raise ConfigError(
                    f"mask {name!r}: {error}; if another tool wrote {path}, name its format with --from"
                ) from None

        return Found(tensors.shapes, make)


LONGEST_HEADER = 1 << 12  # bytes that numpy writes before the data of a flat array; it writes 128
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others may ask for any memory


@IMPORTERS.register
class MaskllmNpz:
    """NumPy .npz of `X.mask`: the bits of each mask, big-endian, row-major, without its shape."""

    id: ClassVar[str] = "maskllm-npz"
    reference: ClassVar[str] = "https://github.com/NVlabs/MaskLLM"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        with _archive(path) as archive:
            entries = archive.infolist()
        stems = {entry.filename.removesuffix(".npy").removesuffix(".mask"): entry for entry in entries}
        strange = [entry.filename for entry in entries if not entry.filename.endswith(".npy")]
        if not entries or strange or len(stems) != len(entries):
            what = f"{strange[0]!r}" if strange else "no entry" if not entries else "a name that comes twice"
            raise DataError(f"{path} has {what}, expected an .npz of arrays, each under its own name; fetch it again")
        masked = {parameter: stems[stem] for stem, parameter in known(path, stems, base).items()}
        shapes = {name: tuple(base[name].shape) for name in masked}
        for name, entry in masked.items():
            size, shape = (base[name].numel() + 7) // 8, shapes[name]
            if not size < entry.file_size <= size + LONGEST_HEADER:
                raise BackboneMismatchError(
                    f"{path}: the mask of {name!r} has {entry.file_size} bytes, expected {size} and a short header for "
                    f"the shape {shape}; give the backbone that the masks were made for"
                )
            if entry.compress_type not in COMPRESSIONS:
                raise DataError(
                    f"{path}: {entry.filename!r} has the compression {entry.compress_type}; save it with "
                    "numpy.savez_compressed"
                )
        return Found(shapes, lambda name: _read(path, name, masked[name], shapes[name]))


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}; expected the .npz of masks that MaskLLM releases")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read {path} as an .npz file: {error}; fetch it again") from error


def _read(path: Path, name: str, entry: zipfile.ZipInfo, shape: tuple[int, ...]) -> PackedMask:
    count = math.prod(shape)
    size = (count + 7) // 8
    with _archive(path) as archive, archive.open(entry) as file:
        # what numpy writes for these bits, compared as text: a header that is not this one need not be understood
        start = file.read(10)
        header = file.read(int.from_bytes(start[8:], "little")).strip()
        data = file.read(size + 1)
    bits = bitarray(endian="little")
    bits.frombytes(data)
    bits.bytereverse()
    described = header == f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".encode()
    if start[:8] != b"\x93NUMPY\1\0" or not described or len(data) != size or bits[count:].any():
        raise DataError(
            f"{path}: the mask of {name!r} is an array {header[:80]!r} of {len(data)} bytes, expected uint8 of shape "
            f"({size},) without bits beyond {count}; fetch it again"
        )
    del bits[count:]
    return PackedMask(bits, shape)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MEMBERS = ("bitmask", "compressed", "shape", "row_offsets")  # of a compressed weight


@IMPORTERS.register
class Zeros:
    """Safetensors state dict whose pruned weights are zeros and whose others are the base's."""

    id: ClassVar[str] = "zeros"
    reference: ClassVar[str] = ""

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = TensorFile(path)
        return zeros_of(path, tensors, partial(read_weights, tensors), base)


@IMPORTERS.register
class Prune:
    """Safetensors file of `X_mask` tensors, with or without the rest of a torch.nn.utils.prune state dict."""

    id: ClassVar[str] = "prune"
    reference: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.prune.BasePruningMethod.html"
    )

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = TensorFile(path)
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

        differing = Counter[str]()
        for name, stem in masked.items():
            for stored in {f"{stem}_orig", stem} & tensors.keys():
                found = read_weights(tensors, stored, tuple(base[name].shape))
                differing[name] += compare(found, base[name], make(name).tensor())[0]
        for stored, name in own.items():
            if base[name].is_floating_point() and name not in masked:
                found = read_weights(tensors, stored, tuple(base[name].shape))
                differing[name] += compare(found, base[name], torch.ones_like(found, dtype=torch.bool))[0]
        refuse_trained(path, differing)
        return Found({name: tuple(base[name].shape) for name in masked}, make)


@IMPORTERS.register
class CompressedTensors:
    """Safetensors checkpoint in the formats sparse-bitmask or sparse-24-bitmask."""

    id: ClassVar[str] = "compressed-tensors"
    reference: ClassVar[str] = "https://github.com/vllm-project/compressed-tensors"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        tensors = TensorFile(path)
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

        def read(stored: str, shape: Shape) -> Tensor:
            return (
                _dense(tensors, stem_of[stored], shape) if stored in stem_of else read_weights(tensors, stored, shape)
            )

        return zeros_of(path, every, read, base)


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


def read_weights(tensors: TensorFile, stored: str, shape: Shape | None = None) -> Tensor:
    """Read weights that can be compared with a base's: floats, and of this shape if one is given."""
    if shape is not None:
        check_shape(tensors, stored, shape)
    found = tensors[stored]
    if found.dtype not in FLOATS:
        raise DataError(
            f"{tensors.path}: {stored!r} is {found.dtype}, expected float weights; import the masks before they are "
            "quantised"
        )
    return found


def compare(found: Tensor, base: Tensor, kept: Tensor) -> tuple[int, int]:
    """Compare weights with the base's, cast to their dtype, bit by bit.

    Return how many kept weights differ, and how many of those that are not kept the base has other than zero.
    """
    differing = removed = 0
    flat, own, chosen = found.reshape(-1), base.detach().reshape(-1), kept.reshape(-1)
    for at in range(0, flat.numel(), STEP):
        piece, cast = flat[at : at + STEP], own[at : at + STEP].to("cpu", found.dtype)
        where = chosen[at : at + STEP]
        differing += int((where & (same_size_int(piece) != same_size_int(cast))).count_nonzero())
        removed += int((~where & (cast != 0)).count_nonzero())
    return differing, removed


def refuse_trained(path: Path, differing: Mapping[str, int]) -> None:
    """Raise BackboneMismatchError if weights are not the base's: numbers of kept weights that differ, by tensor."""
    found = {name: count for name, count in differing.items() if count}
    if found:
        raise BackboneMismatchError(
            f"{path}: {sum(found.values())} kept weights in {len(found)} of {len(differing)} tensors are not the "
            f"base's, first {min(found)!r} ({found[min(found)]} weights); give the backbone that was pruned. If it was "
            "trained after that, train a mask instead, which cannot hold new weights"
        )


def zeros_of(
    path: Path, names: Iterable[str], read: Callable[[str, Shape], Tensor], base: Mapping[str, Tensor]
) -> Found:
    """Return the masks of a pruned network: bit 0 where a weight is 0 (or -0).

    Masked is every parameter with a zero where the base has none; all other weights are compared. `names` are the
    file's; `read` gives the tensor of such a name, which must have this shape.
    """
    stored = {own: name for name, own in match(path, names, base).items() if base[own].is_floating_point()}
    if not stored:
        raise BackboneMismatchError(
            f"{path} has no tensor of the backbone's, {', '.join(list(base)[:3])}, …; give the backbone that was pruned"
        )
    shapes = {name: tuple(base[name].shape) for name in sorted(stored)}
    masked, differing = dict[str, Shape](), Counter[str]()
    for name, shape in shapes.items():
        found = read(stored[name], shape)
        differing[name], removed = compare(found, base[name], found != 0)
        if not isinstance(base[name], nn.Parameter):
            differing[name] += removed  # a buffer cannot be masked
        elif removed:
            masked[name] = shape
    refuse_trained(path, differing)
    if not masked:
        raise DataError(
            f"{path}: no parameter has a zero where the backbone has none; give the file after pruning, and the base "
            "before it"
        )
    return Found(masked, lambda name: PackedMask.from_tensor(read(stored[name], shapes[name]) != 0))
