"""One payload -> one mask's bits, with the base's weights where the codec wants them. Needs torch for these alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from bitarray import bitarray
from numpy.typing import NDArray

from ..backbone.model import Fingerprint, canonical, named_parameters
from ..codecs.base import CODECS, Bits, Codec, Side, place, plausible
from ..codecs.classes import weight_classes
from ..errors import AdapterError, BackboneMismatchError, CorruptAdapterError, UnknownCodecError
from ..mask import MaskSet, Op, PackedMask, bits_digest, packed_bits, rows_id
from ..threads import Progress, counted, in_order
from .header import Header, Payload

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = Union["nn.Module", Mapping[str, "Tensor"]]
Masks = Iterator[tuple[str, PackedMask]]
WORTH = 1 << 22  # weights


def by_name(weights: Weights) -> Mapping[str, Tensor]:
    """Return weights by canonical parameter name, whether they come as a module or as a state dict.

    No tensor is asked for where all names are canonical: a mapping that reads them from a file stays one.
    """
    if not isinstance(weights, Mapping):
        return dict(named_parameters(weights))
    if all(canonical(name) == name for name in weights):
        return weights
    return {canonical(name): tensor for name, tensor in weights.items()}


def base_classes(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Bits:
    """Return the magnitude classes and signs of one parameter of the base, one uint8 per weight, row-major.

    Raises:
        BackboneMismatchError: if the base has no such parameter, or it has another shape or was cast to a dtype that
            no longer tells which classes its weights had.
    """
    import torch

    tensor = weights.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        what = "no such parameter" if tensor is None else f"one of shape {tuple(tensor.shape)}"
        raise BackboneMismatchError(
            f"the mask of {name!r} is coded with the base's weights of shape {shape}, and the base given has {what}; "
            f"give the backbone that the adapter was made for"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise BackboneMismatchError(
            f"the mask of {name!r} is coded with the base's weights, and the base given has them as {tensor.dtype}, "
            f"expected torch.float32 or torch.bfloat16; load the adapter before casting the model"
        )
    rounded = tensor.detach().cpu().to(torch.bfloat16).contiguous()
    return weight_classes(rounded.view(torch.int16).numpy().view(np.uint16))


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Decodes the payloads of one file.

    Attributes:
        path: the file, for messages.
        header: its header. base: its base, with the digests of the masked tensors.
        pieces: for each set its tables, then its payloads.
        weights: of the base by name, or None.
        indices: for sets that others refer to, where each parameter and op is; filled when needed.

    Its methods raise AdapterError if a mask needs the base and `weights` is None, UnknownCodecError,
    BackboneMismatchError and CorruptAdapterError: see `Adapter.parts`.
    """

    path: str
    header: Header
    base: Fingerprint
    pieces: Mapping[str, list[memoryview]]
    weights: Mapping[str, Tensor] | None
    indices: dict[str, dict[tuple[str, Op], int]] = field(default_factory=dict)

    def codec(self, payload: Payload) -> Codec:
        """Return the codec of a payload with its settings."""
        id_ = payload.coding.codec
        if id_ not in CODECS:
            known = ", ".join(cls.id for cls in CODECS.all())
            raise UnknownCodecError(
                f"{self.path}: the mask of {payload.name!r} is packed with the codec {id_!r}, which is not installed "
                f"(installed: {known}); upgrade maskpack, or install the package that has it"
            )
        try:
            return CODECS[id_](**payload.coding.config)
        except (TypeError, ValueError) as error:
            raise CorruptAdapterError(
                f"{self.path}: the mask of {payload.name!r} has settings {dict(payload.coding.config)} that the codec "
                f"{id_!r} refuses: {error}; upgrade maskpack or fetch the file again"
            ) from None

    def decode(self, set: str, index: int, rising: bool = False) -> tuple[bitarray, NDArray[Any] | None]:
        """Decode one payload to exactly its weights, and check the number of true bits.

        Returns:
            The bits, and the positions of the false bits if the codec came by them, in order if `rising`.
        """
        one = self.header.sets[set]
        payload = one.payloads[index]
        codec = self.codec(payload)
        name, coding = payload.name, payload.coding
        if codec.needs_base and self.weights is None:
            raise AdapterError(
                f"{self.path}: the mask of {name!r} is packed with the weights of {self.header.base.id} and cannot be "
                f"decoded alone; pass that model: --backbone on the command line, base= in Python"
            )
        data = self.pieces[set][len(one.tables) + index]
        if not plausible(data, payload.weights):
            raise CorruptAdapterError(
                f"{self.path}: the mask of {name!r} has {payload.weights} weights in a payload of {len(data)} bytes, "
                f"which is too few for so many; fetch the file again"
            )
        classes = None
        if codec.needs_base and self.weights is not None:
            classes = base_classes(self.weights, name, payload.shape)
            self._check_base(name, self.weights[name])
        reference = None
        if coding.reference is not None:
            reference = packed_bits(self.decode(coding.reference, self._index_in(coding.reference, payload))[0])
        table = None if coding.table is None else bytes(self.pieces[set][coding.table])
        side = Side(payload.shape, classes, reference, table)
        try:
            events = codec.events(data, side)
            packed = side.checked(codec.decode(data, side) if events is None else place(*events, side.count))
            if reference is not None:
                packed = packed ^ reference
            bits = PackedMask.from_bytes(packed, payload.shape).bits
            if bits.count() != payload.kept:
                raise CorruptAdapterError(f"it has {bits.count()} true bits, the header states {payload.kept}")
            zeros = events[1] if events is not None and events[0] == 0 and reference is None else None
            # a position that comes twice carries into another bit, and there are fewer bits than positions
            if zeros is not None and len(zeros) != payload.weights - payload.kept:
                raise CorruptAdapterError(f"{len(zeros)} positions give {payload.kept} true bits: some come twice")
        except MemoryError:
            raise
        except Exception as error:  # a codec from elsewhere may fail in any way on bytes that a stranger wrote
            raise CorruptAdapterError(
                f"{self.path}: the mask of {name!r} in set {set!r} does not decode: {error}; fetch the file again"
            ) from error
        if rising and zeros is not None and (zeros[1:] < zeros[:-1]).any():
            zeros = np.sort(zeros)
        return bits, zeros

    def masks(self, set: str, alphas: Sequence[float | None], zeros: bool = False) -> Masks:
        """Decode the masks of a set in order, with `zeros` where decoding came by them; see `Adapter.iter_masks`."""
        payloads = self.header.sets[set].payloads
        decoded = in_order(
            lambda i: self.decode(set, i, zeros), range(len(payloads)), lambda i: payloads[i].weights, WORTH
        )
        signs = None
        for index, (bits, where) in enumerate(decoded):
            payload = payloads[index]
            if index + 1 < len(payloads) and payloads[index + 1].name == payload.name:
                signs = bits  # of a ternary mask: they come before its zeros
                continue
            own = where if zeros else None
            yield payload.name, PackedMask(bits, payload.shape, payload.coding.op, alphas[index], signs, own)
            signs = None

    def streamed(self, set: str, alphas: Sequence[float | None]) -> MaskSet:
        """Return the masks of a set, each decoded when it is asked for."""
        payloads = self.header.sets[set].payloads
        indices: dict[str, list[int]] = {}
        for index, payload in enumerate(payloads):
            indices.setdefault(payload.name, []).append(index)

        def make(name: str) -> PackedMask:
            *signs, index = indices[name]  # the signs of a ternary mask come before its zeros
            first, bits = (self.decode(set, signs[0])[0] if signs else None), self.decode(set, index)[0]
            return PackedMask(bits, payloads[index].shape, payloads[index].coding.op, alphas[index], first)

        return MaskSet.streamed(indices, make, {payload.name: payload.shape for payload in payloads})

    def verify(self, progress: Progress | None) -> dict[str, Any]:
        """Decode what can be decoded and compare `mask_id` if that is all; see `Adapter.verify`."""
        every = [(name, i, p) for name, one in self.header.sets.items() for i, p in enumerate(one.payloads)]
        needing = [self.weights is None and self._needs_base(payload) for _, _, payload in every]
        skipped = [f"{name}/{p.name}" for (name, _, p), left in zip(every, needing, strict=True) if left]
        found = [one for one, left in zip(every, needing, strict=True) if not left]
        step, rows = counted(progress, (payload.weights for _, _, payload in found)), []
        digests = in_order(
            lambda one: bits_digest(self.decode(one[0], one[1])[0]), found, lambda one: one[2].weights, WORTH
        )
        for (name, _, payload), own in zip(found, digests, strict=True):
            rows.append((name, payload.name, payload.coding.op, payload.shape, own))
            step(payload.weights)
        if not skipped:
            check_id(self.path, self.header, rows_id(rows))
        compared = None if skipped else True
        return {"payloads": len(every), "decoded": len(found), "needs_base": skipped, "mask_id": compared}

    def _needs_base(self, payload: Payload) -> bool:
        """Return True if a payload, or the one it refers to, is packed with the base's weights."""
        other = payload.coding.reference
        referenced = None if other is None else self.header.sets[other].payloads[self._index_in(other, payload)]
        return self.codec(payload).needs_base or (referenced is not None and self.codec(referenced).needs_base)

    def _index_in(self, other: str, payload: Payload) -> int:
        """Return the index of the payload of another set for the same parameter and op; the header's check found it."""
        if other not in self.indices:
            rows = enumerate(self.header.sets[other].payloads)
            self.indices[other] = {(p.name, p.coding.op): index for index, p in rows}
        return self.indices[other][payload.name, payload.coding.op]

    def _check_base(self, name: str, weight: Tensor) -> None:
        """Raise BackboneMismatchError if a weight that classes are made from is not the base's.

        Before decoding: few other classes may leave a payload that decodes, to another mask.
        """
        from ..backbone.fingerprint import same_digest, tensor_digest

        if not same_digest(tensor_digest(weight, weight.dtype), self.base, name, weight.dtype):
            raise BackboneMismatchError(
                f"the mask of {name!r} was packed with other weights than those of the base given; load "
                f"{self.header.base.id}, which the adapter was made for"
            )


def check_id(path: str, header: Header, found: str) -> None:
    """Raise CorruptAdapterError if the `mask_id` of the decoded masks is not the one that the header states."""
    if found != header.mask_id:
        raise CorruptAdapterError(
            f"{path}: the decoded masks have the mask_id {found}, the header states {header.mask_id}; fetch the file "
            f"again"
        )
