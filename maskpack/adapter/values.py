"""Stored values of masks with op "replace", as steps from the base's weights (docs/format.md section 4.3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..backbone.model import exact_cast, same_size_int
from ..backbone.shards import whole
from ..codecs import ulps
from ..codecs.base import words_of
from ..errors import AdapterError, BackboneMismatchError, CorruptAdapterError, by_triton, short_repr
from ..mask import PackedMask, packed_bits
from ..safetensors_io import NAMES, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

CHECK_BYTES = 4
LOG = logging.getLogger(__name__)


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
        cast, words = exact_cast(base, values.dtype), words_of(values)
        if cast is None:
            return None
        payload = ulps.encode(NAMES[str(values.dtype)], words_of(cast), words)
        if not np.array_equal(ulps.decode(payload, words_of(cast)), words):  # what does not decode is lost for good
            raise AdapterError("stored values do not come back from their steps; report this, with the checkpoints")
        return cls(_check(values) + payload)

    def values(self, base: Tensor) -> Tensor:
        """Return the values, flat and where the base lies, from its weights in their places.

        Raises:
            BackboneMismatchError: if these are others than those that the values were coded with, or in a dtype that
                does not tell.
        """
        dtype = torch_dtype(self.name)
        cast = exact_cast(base.detach(), dtype)
        if cast is None:
            raise BackboneMismatchError(
                f"stored values are steps from weights in {dtype}, and those of the base given are in {base.dtype} and "
                f"have others; load the base as {dtype} and apply the adapter before casting the model"
            )
        try:
            found = self._decoded(same_size_int(cast)).view(dtype)
        except CorruptAdapterError as error:
            raise _others(str(error)) from None
        if _check(found) != bytes(self.data[:CHECK_BYTES]):
            raise _others("they become other values than those that were stored")
        return found

    def _decoded(self, base: Tensor) -> Tensor:
        """Return the values as integers, from those of the base."""
        import torch

        data = self.data[CHECK_BYTES:]
        if not base.is_cpu and by_triton(base.device.type):
            try:
                from ..codecs.native import steps_gpu

                return steps_gpu.decode(data, base)
            except CorruptAdapterError:
                raise
            except Exception as error:  # as of `gpu.decode_on`
                LOG.warning("values are not decoded on %s, but on the CPU: %s", base.device, error)
        words = ulps.decode(data, words_of(base))
        return torch.from_numpy(words.view(f"i{words.itemsize}")).to(base.device)


def at_zeros(weight: Tensor, mask: PackedMask) -> Tensor:
    """Return the weights, flat and where they lie, at the zeros of a mask."""
    import torch

    flat = whole(weight).detach().reshape(-1)
    if not flat.is_cpu or flat.element_size() not in (2, 4):
        return flat[~mask.on(flat.device)]
    return torch.from_numpy(ulps.at_zeros(words_of(flat), packed_bits(mask.bits))).view(flat.dtype)


def put_at_zeros(weight: Tensor, mask: PackedMask, values: Tensor) -> None:
    """Put values of the same dtype in the place of weights, which are contiguous, at the zeros of a mask."""
    flat = weight.view(-1)
    if flat.is_cpu:
        ulps.put_at_zeros(words_of(flat), packed_bits(mask.bits), words_of(values))
    else:
        flat[~mask.on(flat.device)] = values


def _others(what: str) -> BackboneMismatchError:
    return BackboneMismatchError(
        f"stored values do not follow from the weights of the base given: {what}; load the base that the adapter was "
        f"made for, or fetch the adapter again"
    )


def _check(values: Tensor) -> bytes:
    from ..backbone.fingerprint import tensor_digest

    return tensor_digest(values, values.dtype)[:CHECK_BYTES] if len(values) else bytes(CHECK_BYTES)
