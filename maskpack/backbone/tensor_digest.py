"""BLAKE3 of one tensor's bytes (docs/format.md section 3), and whether it has to be taken again."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

PIECE = 1 << 24  # bytes of the cast tensor that are in memory at one time


def tensor_digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return the BLAKE3 digest of a tensor's bytes after a cast to `dtype`, 32 bytes.

    The bytes are row-major and little-endian, so the digest is the same on every device.
    """
    flat = tensor.detach().reshape(-1)
    whole = blake3()
    if flat.is_cuda:
        for piece in _copied(flat, dtype):
            whole.update(piece.numpy().data)
    elif flat.dtype == dtype:
        whole.update(_bytes(flat.cpu()).numpy().data)
    else:
        for piece in _split(flat, PIECE // dtype.itemsize):
            whole.update(_bytes(piece.cpu().to(dtype)).numpy().data)
    return whole.digest()


def _copied(flat: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the bytes of a CUDA tensor piece by piece; while the caller hashes one, the next is copied.

    A piece is valid until the next one is asked for.
    """
    pieces = _split(flat, PIECE // dtype.itemsize)
    buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in pieces[:2]]
    stream = torch.cuda.Stream(flat.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(flat.device))

    def copy(index: int) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            cast = _bytes(pieces[index].to(dtype))
            target = buffers[index % 2][: cast.numel()]
            target.copy_(cast, non_blocking=True)
            return target, stream.record_event()

    copies = [copy(0)] if flat.numel() else []
    for index in range(len(copies) and len(pieces)):
        copies += [copy(index + 1)] if index + 1 < len(pieces) else []
        target, done = copies.pop(0)
        done.synchronize()
        yield target


def _split(flat: Tensor, size: int) -> list[Tensor]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def _bytes(flat: Tensor) -> Tensor:
    return flat.contiguous().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Stamp:
    """Evidence that a tensor has not changed; equal stamps mean equal bytes.

    Attributes:
        storage: its memory. Weak, but the identity is not given to other memory while the reference exists.
        layout: dtype, shape, stride, offset. version: PyTorch's count of writes.
        total: sum of the bytes as 64-bit words. It shows writes that are not counted: through `.data`, or by a fused
            optimiser.
    """

    storage: StorageWeakRef
    layout: tuple[object, ...]
    version: int
    total: int


def stamp(tensor: Tensor) -> Stamp | None:
    """Return a tensor's stamp, or None for an inference tensor, whose writes are not counted."""
    if tensor.is_inference():
        return None
    layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    version = tensor._version
    data = _bytes(tensor.detach().reshape(-1))
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    # numpy sums in this thread; PyTorch would wake threads that are busy elsewhere
    total = int(words.numpy().sum() if words.is_cpu else words.sum()) + int(data[whole:].sum())
    storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return Stamp(storage, layout, version, total)
