"""Stored values of masks with op "replace", as steps from the base's weights (docs/format.md section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from bitarray import bitarray
from blake3 import blake3
from numpy.typing import NDArray

from ..backbone.model import same_size_int
from ..backbone.shards import whole
from ..codecs import ulps
from ..codecs.base import flipped, where_ones
from ..errors import AdapterError, BackboneMismatchError, CorruptAdapterError, short_repr
from ..mask import packed_bits
from ..safetensors_io import NAMES, tensor_of, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHECK_BYTES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Values that are known once the base's weights in their places are.

    Attributes:
        data: the first 4 bytes of the digest of the values, and the payload of the codec.
    """

    data: bytes | memoryview

    __repr__ = short_repr

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return len(self.data)

    @property
    def name(self) -> str:
        """The dtype of the values, as safetensors names it."""
        return ulps.kind_of(self.data[CHECK_BYTES:]).name

    @classmethod
    def of(cls, values: Tensor, base: Tensor) -> Steps | None:
        """Code values, flat; `base`: the weights in their places, flat, both on the CPU.

        None if values and base have another dtype in which the base is not all there.
        """
        cast, words = _exact(base, values.dtype), _words(values)
        if cast is None:
            return None
        own = cls(_check(words) + ulps.encode(NAMES[str(values.dtype)], _words(cast), words))
        if not np.array_equal(_words(own.values(base)), words):  # what does not decode is lost for good
            raise AdapterError("stored values do not come back from their steps; report this, with the checkpoints")
        return own

    def values(self, base: Tensor) -> Tensor:
        """Return the values, flat on the CPU, from the weights of the base in their places.

        Raises:
            BackboneMismatchError: if these are others than those that the values were coded with, or in a dtype that
                does not tell.
        """
        dtype = torch_dtype(self.name)
        cast = _exact(base.detach().cpu(), dtype)
        if cast is None:
            raise BackboneMismatchError(
                f"stored values are steps from weights in {dtype}, and those of the base given are in {base.dtype} and "
                f"have others; load the base as {dtype} and apply the adapter before casting the model"
            )
        try:
            words = ulps.decode(self.data[CHECK_BYTES:], _words(cast))
        except CorruptAdapterError as error:
            raise _others(str(error)) from None
        if _check(words) != bytes(self.data[:CHECK_BYTES]):
            raise _others("they become other values than those that were stored")
        return tensor_of(memoryview(words.tobytes()), self.name, tuple(words.shape))


def at_zeros(weight: Tensor, bits: bitarray) -> Tensor:
    """Return the weights, flat on the CPU, at the zeros of a mask."""
    import torch

    flat = whole(weight).detach().cpu().reshape(-1)
    if flat.element_size() not in (2, 4):
        return flat[torch.from_numpy(where_ones(flipped(packed_bits(bits), len(bits))))]
    return torch.from_numpy(ulps.at_zeros(_words(flat), packed_bits(bits))).view(flat.dtype)


def put_at_zeros(flat: Tensor, bits: bitarray, values: Tensor) -> None:
    """Put values of the same dtype in the place of weights, flat on the CPU, at the zeros of a mask."""
    ulps.put_at_zeros(_words(flat), packed_bits(bits), _words(values))


def _exact(base: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return weights in a dtype, or None if that changes their bits."""
    cast = base.to(dtype)
    return cast if np.array_equal(_words(cast.to(base.dtype)), _words(base)) else None


def _others(what: str) -> BackboneMismatchError:
    return BackboneMismatchError(
        f"stored values do not follow from the weights of the base given: {what}; load the base that the adapter was "
        f"made for, or fetch the adapter again"
    )


def _check(words: NDArray[Any]) -> bytes:
    return blake3(words.view(np.uint8).data).digest()[:CHECK_BYTES] if words.size else bytes(CHECK_BYTES)


def _words(flat: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = same_size_int(flat.detach().contiguous()).numpy()
    return found.view(f"u{flat.element_size()}")
