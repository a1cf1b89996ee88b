"""The digest of one weight tensor (docs/format.md section 3): at the speed of memory, for hundreds of megabytes."""

import hashlib
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .parameters import same_size_int

LEAST = 1 << 18  # bytes of a tensor from which on sums are hashed in the place of the bytes themselves
HALF = 512  # words; one of the first half of a row is multiplied with one of the second
ROW = 8 * 2 * HALF  # bytes
TILE = 64  # rows that numpy works on at a time: what is between fits a core's cache
TILE_ON_DEVICE = 1 << 13
SEED = b"maskpack base"


@cache
def keys() -> NDArray[np.uint64]:
    """Return what is added to the words of a row."""
    return np.frombuffer(hashlib.shake_128(SEED).digest(ROW), dtype="<u8")


def tensor_digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return the digest of a tensor cast to a dtype, 32 bytes.

    A large one is hashed by sums of products of its words, which tells whether two tensors differ by accident, not
    by intent, and is exact wherever the tensor lies.
    """
    cast = tensor.detach().to(dtype=dtype).contiguous()
    flat = same_size_int(cast).reshape(-1)
    if flat.nbytes < LEAST:
        return hashlib.sha256(flat.cpu().numpy().data).digest()
    flat = flat if flat.is_cuda else flat.cpu()
    whole = flat.nbytes // ROW * ROW // flat.itemsize
    words, rest = flat[:whole], flat[whole:].cpu().numpy()
    sums = sums_on_device(words) if flat.is_cuda else sums_by_numpy(words.numpy().view(np.uint64).reshape(-1, 2 * HALF))
    if rest.size:
        last = np.zeros(2 * HALF, np.uint64)
        last.view(rest.dtype)[: rest.size] = rest
        sums = np.append(sums, sums_by_numpy(last[None]))
    return hashlib.sha256(sums.tobytes() + flat.nbytes.to_bytes(8, "little")).digest()


def sums_by_numpy(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the sum of each row of words, modulo 2^64."""
    sums, added = np.empty(len(words), np.uint64), np.empty((TILE, 2 * HALF), np.uint64)
    for at in range(0, len(words), TILE):
        tile = words[at : at + TILE]
        one = np.add(tile, keys(), out=added[: len(tile)])
        np.einsum("ij,ij->i", one[:, :HALF], one[:, HALF:], out=sums[at : at + TILE])
    return sums


def sums_on_device(flat: Tensor) -> NDArray[np.uint64]:
    """As `sums_by_numpy`, of integers of any size, by torch where they lie."""
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()
    words = flat.view(torch.int64).view(-1, 2 * HALF)
    added = torch.from_numpy(keys().view(np.int64).copy()).to(flat.device)
    sums = []
    for at in range(0, len(words), TILE_ON_DEVICE):
        one = words[at : at + TILE_ON_DEVICE] + added
        sums.append((one[:, :HALF] * one[:, HALF:]).sum(1))
    return torch.cat(sums).cpu().numpy().view(np.uint64)
