"""Checkpoints of the same network with other weights, and patches of weightscope: what differs, and its values."""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from ..backbone.load import COUNTER
from ..backbone.model import STATISTICS
from ..errors import BackboneMismatchError, ConfigError, CorruptAdapterError, DataError
from ..mask import MaskSet, PackedMask
from ..safetensors_io import MAX_HEADER, NAMES, Made, TensorFile, strict_json, tensor_of
from .base import IMPORTERS, Found, Imported, exact, known, match, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@IMPORTERS.register
class Checkpoint:
    """Safetensors checkpoint of the backbone after further training: the exact change is stored."""

    id: ClassVar[str] = "checkpoint"
    reference: ClassVar[str] = ""

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        """Compare all tensors.

        Parameters of the backbone take the dtypes of the file where they lose nothing by it, since a backbone may have
        been loaded in float32 whatever its own file holds.
        """
        tensors = TensorFile(path)
        if [*tensors] == ["maskpack"]:
            raise DataError(
                f"{path} is an adapter, expected a checkpoint; `maskpack export` writes the checkpoint that it makes"
            )
        stored, problems = _stored(path, tensors, base)
        statistics = dict[str, Tensor]()
        for name, place in stored.items():
            tensor, weight = tensors[place], base[name]
            if (problem := _problem(name, place, tensor, weight)) is not None:
                problems.append(problem)
            elif weight.is_floating_point() and not isinstance(weight, nn.Parameter):
                if not same_bits(tensor, weight):
                    statistics[name] = tensor
            elif not problems and isinstance(weight, nn.Parameter):
                if tensor.dtype != weight.dtype:
                    weight.data = weight.detach().to(tensor.dtype)
        if problems:
            raise DataError(
                f"{path} is no checkpoint of this backbone with other weights, {len(problems)} tensors do not fit: "
                f"{'; '.join(sorted(problems))}. A patch changes the values of weights, not which there are: give the "
                f"backbone that was trained, with the same names, shapes (embeddings resized before) and dtypes, and "
                f"leave out of the file what the backbone has not"
            )
        after = Made(stored, lambda name: tensors[stored[name]].to(base[name].dtype))
        found = exact(path, [name for name in stored if isinstance(base[name], nn.Parameter)], after.__getitem__, base)
        return found._replace(statistics=statistics, after=after)


def _stored(path: Path, tensors: TensorFile, base: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Map the backbone's tensors, each under its first name, to those of a file; and what has no counterpart."""
    found, first = {own: name for name, own in match(path, tensors, base).items()}, dict[int, str]()
    for name in sorted(base):
        first.setdefault(id(base[name]), name)
    groups: dict[str, list[str]] = {}
    for name in sorted(base):
        groups.setdefault(first[id(base[name])], []).append(name)
    stored, problems = dict[str, str](), list[str]()
    for name, names in groups.items():
        there = [found[one] for one in names if one in found]
        if there:
            stored[name] = there[0]
        elif not name.endswith(COUNTER) and isinstance(base[name], nn.Parameter):
            problems.append(f"{name}: missing in the file")
        for other in there[1:]:
            if tensors.shapes[other] != tensors.shapes[there[0]] or not same_bits(tensors[other], tensors[there[0]]):
                problems.append(f"{other}: one tensor with {there[0]} in the backbone, and another in the file")
    known = set(found.values())
    problems += [f"{name}: new, of shape {list(tensors.shapes[name])}" for name in tensors if name not in known]
    return stored, problems


def _problem(name: str, place: str, tensor: Tensor, weight: Tensor) -> str | None:
    """Return why a patch cannot hold a tensor of the file, or None."""
    if tuple(tensor.shape) != tuple(weight.shape):
        return f"{place}: of shape {list(tensor.shape)}, {list(weight.shape)} in the backbone"
    if not weight.is_floating_point():
        equal = tensor.dtype == weight.dtype and torch.equal(tensor, weight.cpu())
        return None if equal or name.endswith(COUNTER) else f"{place}: of {tensor.dtype}, and changed"
    if tensor.dtype not in FLOATS:
        return f"{place}: of {tensor.dtype}, expected float32, bfloat16 or float16"
    if isinstance(weight, nn.Parameter):
        cast = weight.detach().cpu().to(tensor.dtype)
        return (
            None
            if same_bits(cast.to(weight.dtype), weight)
            else f"{place}: of {tensor.dtype}, which does not hold the backbone's {weight.dtype}"
        )
    if same_bits(tensor.to(weight.dtype), weight) or (place.endswith(STATISTICS) and tensor.dtype == torch.float32):
        return None
    return f"{place}: a buffer of {tensor.dtype} that changed"


TRIES, NEAR = 8, 0.93  # of a budget: how often it is tried, what share of it is enough
BINS = 1 << 15  # of sizes of changes, by the upper half of their float32: of one power of two each has 128


class Largest:
    """The largest changes of a checkpoint, in place of all: those whose size is in the upper bins.

    Of the lowest of these bins there may be a part, evenly over each tensor: many changes of bfloat16 are of one size.

    Args:
        ternary: each change becomes its sign times one size for all of its row, as in ComPEFT and BitDelta.

    Attributes:
        changed: number of all changes.
    """

    def __init__(self, found: Imported, base: Mapping[str, Tensor], ternary: bool = False):
        self._found, self._base, self._ternary = found, base, ternary
        self._counts, self._squares = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.float64)
        self._ties = dict[str, Tensor]()
        for name, mask in found.masks.items():
            change = self._sizes(name, mask, found.values[name])
            bins = change.view(torch.int32) >> 16
            self._ties[name] = torch.bincount(bins, minlength=BINS).int()
            self._counts += self._ties[name]
            self._squares += torch.bincount(bins, change.double().square(), BINS)
        self.changed = int(self._counts.sum())

    def _old(self, name: str, mask: PackedMask) -> Tensor:
        return self._base[name].detach().reshape(-1)[~mask.tensor().reshape(-1)].cpu()

    def _sizes(self, name: str, mask: PackedMask, values: Tensor) -> Tensor:
        old = self._old(name, mask)
        # what is not finite, or was not, is never left out
        return (values.float() - old.float()).abs().nan_to_num(torch.inf, torch.inf, torch.inf)

    def take(self, share: float) -> tuple[Imported, float, int]:
        """Return at most this share of the changes, the error made, and their number.

        The error is the length of what is left out over that of the whole change, both as one vector.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"the share of changes to keep must be above 0 and at most 1, got {share}")
        above = self._counts.flip(0).cumsum(0).flip(0)  # of changes in this bin and those over it
        first = int((above > share * self.changed).count_nonzero())
        kept, infinite = int(above[first]) if first < BINS else 0, int(torch.tensor(torch.inf).view(torch.int32) >> 16)
        # of those in the bin below, so many of so many
        part = (int(share * self.changed) - kept, int(self._counts[first - 1])) if 0 < first <= infinite else (0, 1)
        tied = sum(int(ties[first - 1]) * part[0] // part[1] for ties in self._ties.values())
        kept += tied
        if not kept:
            raise ConfigError(f"a share of {share} of {self.changed} changes is none of them; keep more")
        shapes = self._found.masks.shapes
        finite = self._squares[:infinite]
        left = finite[:first].sum() - (finite[first - 1] * (tied / part[1]) if tied else 0)
        if self._ternary:
            each = [self._kept(name, first, part)[1:] for name in shapes]
            kept, left = sum(int(one.sum()) for one, _ in each), left + sum(missed for _, missed in each)
        error = float((left / finite.sum()).sqrt())

        def read(name: str) -> tuple[PackedMask, Tensor]:
            mask = self._found.masks[name]
            values, large, _ = self._kept(name, first, part)
            stays = mask.tensor().reshape(-1)
            stays[~stays] = ~large
            return PackedMask.from_tensor(stays.reshape(mask.shape), "replace"), values[large]

        masks = MaskSet.streamed(shapes, lambda name: read(name)[0], shapes)
        return self._found._replace(masks=masks, values=Made(shapes, lambda name: read(name)[1]), after={}), error, kept

    def _kept(self, name: str, first: int, part: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
        """Return the values of a tensor's changes, which of them are stored, and the squared error of these."""
        mask, values = self._found.masks[name], self._found.values[name]
        sizes = self._sizes(name, mask, values)
        bins = sizes.view(torch.int32) >> 16
        large, tied = bins >= first, (bins == first - 1).nonzero()[:, 0]
        number, places = len(tied) * part[0] // part[1], torch.arange(len(tied) + 1)
        large[tied[(places * number // max(len(tied), 1)).diff() > 0]] = True
        if not self._ternary:
            return values, large, 0.0
        old, wanted = self._old(name, mask), large & sizes.isfinite()  # what is not finite has no sign and size
        places, rows = (~mask.tensor().reshape(-1)).nonzero()[:, 0], mask.shape[0] if len(mask.shape) > 1 else 1
        row = places[wanted] // (mask.total // rows)
        found = torch.zeros(rows, dtype=torch.float64).index_add_(0, row, sizes[wanted].double())
        scale = found / torch.bincount(row, minlength=rows).clamp(min=1)
        change = values[wanted].double() - old[wanted].double()
        made = values.clone()
        made[wanted] = (old[wanted].double() + change.sign() * scale[row]).to(values.dtype)
        missed = float((made[wanted].double() - values[wanted].double()).square().sum())
        return made, large & ((made != old) | ~sizes.isfinite()), missed

    def within(self, budget: int, most: float, size_of: Callable[[Imported], int]) -> float:
        """Return a share of the changes, at most `most`, that takes nearly as many bytes as are allowed.

        `size_of` says how many some changes take. ConfigError if none is found in a few tries.
        """
        share, fits = min(most, 8 * budget / self.changed), 0.0
        for _ in range(TRIES):
            size = size_of(self.take(share)[0])
            fits = max(fits, share) if size <= budget else fits
            if NEAR * budget <= size <= budget or (size <= budget and share == most):
                break
            share = min(most, share * (0.5 + NEAR / 2) * budget / size)
        if not fits:
            raise ConfigError(f"no share of the changes was found that takes {budget} bytes; allow more")
        return fits


MAGIC, VERSION = b"WSP2", "0.2"
KINDS = ("float32", "bfloat16", "float16")


@IMPORTERS.register
class Wsp:
    """Patch of weightscope (`.wsp`): the values that differ in a checkpoint of the backbone, by their places."""

    id: ClassVar[str] = "wsp"
    reference: ClassVar[str] = "https://pypi.org/project/weightscope"

    @staticmethod
    def open(path: Path, base: Mapping[str, Tensor]) -> Found:
        header, packed = _parts(path)
        records = {one["name"]: one for one in header["tensors"]}
        others = [*header.get("only_in_a", []), *(name for name, one in records.items() if one["kind"] != "delta")]
        if others:
            raise DataError(
                f"{path} adds, removes or resizes {len(others)} tensors, first {others[0]!r}; a patch of ours changes "
                f"the values of weights, not which there are: export the patch from checkpoints of one architecture"
            )
        stored = {own: records[name] for name, own in known(path, records, base).items()}
        size = max((one["blob_offset"] + one["blob_size"] for one in records.values()), default=0)
        for name, one in stored.items():
            _check(path, name, one, base[name])
        blob = _unpacked(path, packed, size)
        changed = {name: one for name, one in stored.items() if one["n_changed"]}

        def read(name: str) -> tuple[Tensor, Tensor]:
            """Return places and values."""
            one = changed[name]
            raw = blob[one["blob_offset"] : one["blob_offset"] + one["blob_size"]]
            split = one["n_changed"] * one["index_width"]
            at = np.frombuffer(raw[:split], f"<u{one['index_width']}").astype(np.int64)
            if at[-1] >= base[name].numel() or (np.diff(at) <= 0).any():
                raise DataError(f"{path}: the places of {name!r} are not rising, or outside of it; fetch it again")
            return torch.from_numpy(at), tensor_of(raw[split:], NAMES[f"torch.{one['dtype']}"], (one["n_changed"],))

        def mask(name: str) -> PackedMask:
            kept = torch.ones(base[name].numel(), dtype=torch.bool)
            kept[read(name)[0]] = False
            return PackedMask.from_tensor(kept.reshape(base[name].shape), "replace")

        def after(name: str) -> Tensor:
            at, values = read(name)
            return base[name].detach().cpu().clone().reshape(-1).index_put_((at,), values).reshape(base[name].shape)

        shapes = {name: tuple(base[name].shape) for name in changed}
        return Found(shapes, mask, lambda name: read(name)[1], after=Made(changed, after))


def _parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the compressed rest of a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; give a .wsp file") from error
    size = struct.unpack("<I", content[4:8])[0] if len(content) >= 8 else 0
    if content[:4] != MAGIC or not 0 < size <= min(MAX_HEADER, len(content) - 8):
        raise DataError(f"{path} is no patch of weightscope: it does not begin with {MAGIC.decode()} and a header")
    try:
        header = strict_json(content[8 : 8 + size], str(path))
        rows, version, gone = header["tensors"], header["version"], header.get("only_in_a", [])
        whole = all(
            isinstance(one["name"], str)
            and one["dtype"] in (*KINDS, "int64", "int32", "int16", "int8", "uint8")
            and all(type(one.get(key, 0)) is int and one.get(key, 0) >= 0 for key in ("blob_offset", "blob_size"))
            and all(type(one.get(key, 0)) is int and one.get(key, 0) >= 0 for key in ("n_changed", "index_width"))
            for one in rows
        ) and isinstance(gone, list)
    except (CorruptAdapterError, KeyError, TypeError) as error:
        raise DataError(f"{path} has no header as weightscope writes it: {error}; export it again") from None
    if not whole:
        raise DataError(f"{path} has no header as weightscope writes it; export it again")
    if version != VERSION:
        raise DataError(
            f"{path} has the version {json.dumps(version)[:20]}, expected {VERSION}, as weightscope 0.4 writes"
        )
    return header, content[8 + size :]


def _check(path: Path, name: str, one: Mapping[str, Any], weight: Tensor) -> None:
    """Compare sizes and the digest of the base; the backbone takes the dtype of the file where it loses nothing."""
    size = torch.empty(0, dtype=getattr(torch, one["dtype"])).element_size()
    wanted = one["n_changed"] * (one["index_width"] + size)
    if one["index_width"] not in (4, 8) or one["blob_size"] != wanted or one["n_changed"] > weight.numel():
        raise DataError(f"{path}: {name!r} has {one['blob_size']} bytes, expected {wanted}; fetch the file again")
    if list(weight.shape) != one["shape"] or math.prod(one["shape"]) != weight.numel():
        raise BackboneMismatchError(f"{path}: {name!r} has shape {one['shape']}, in the backbone {list(weight.shape)}")
    cast = weight.detach().cpu().to(getattr(torch, one["dtype"])).contiguous()
    found = hashlib.sha256(cast.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if found != one.get("base_sha256"):
        raise BackboneMismatchError(
            f"{path}: {name!r} of the backbone has the SHA-256 {found[:12]} as {one['dtype']}, and the patch was made "
            f"for {str(one.get('base_sha256'))[:12]}; give the checkpoint that it was exported from"
        )
    if one["n_changed"] and (one["dtype"] not in KINDS or not isinstance(weight, nn.Parameter)):
        raise DataError(
            f"{path}: {name!r} is {one['dtype']} and no float parameter, which a patch of ours changes alone"
        )
    if isinstance(weight, nn.Parameter):
        weight.data = cast


def _unpacked(path: Path, packed: bytes, size: int) -> memoryview:
    try:
        stated = zstandard.get_frame_parameters(packed).content_size
        if stated != size:
            raise DataError(f"{path} states {stated} bytes of data, its header describes {size}; fetch it again")
        return memoryview(zstandard.ZstdDecompressor().decompress(packed, max_output_size=size or 1))
    except zstandard.ZstdError as error:
        raise DataError(f"{path} does not unpack: {error}; fetch it again") from None
