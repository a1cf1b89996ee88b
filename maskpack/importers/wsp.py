"""Patches of weightscope: which weights of a checkpoint differ, and what stands there."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from ..errors import BackboneMismatchError, CorruptAdapterError, DataError
from ..mask import PackedMask
from ..safetensors_io import MAX_HEADER, NAMES, Made, strict_json, tensor_of
from .base import IMPORTERS, Found, known

MAGIC, VERSION = b"WSP2", "0.2"
FLOATS = ("float32", "bfloat16", "float16")


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
            and one["dtype"] in (*FLOATS, "int64", "int32", "int16", "int8", "uint8")
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
    if one["n_changed"] and (one["dtype"] not in FLOATS or not isinstance(weight, nn.Parameter)):
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
