"""One payload -> one mask's bits, whatever the codec and whoever wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from bitarray import bitarray
from torch import Tensor

from ..backbone.fingerprint import Fingerprint, same_tensor
from ..codecs.base import CODECS, Bits, Codec, Side
from ..errors import AdapterError, BackboneMismatchError, CorruptAdapterError, UnknownCodecError
from ..mask import Op, PackedMask
from .header import Header
from .sets import Payload
from .weights import base_classes


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Decodes the payloads of one file.

    Attributes:
        path: the file, for messages.
        header: its header. base: its base, with the digests of the masked tensors.
        pieces: for each set its tables, then its payloads.
        indices: for sets that others refer to, where each parameter and op is; filled when needed.
    """

    path: str
    header: Header
    base: Fingerprint
    pieces: Mapping[str, list[memoryview]]
    indices: dict[str, dict[tuple[str, Op], int]] = field(default_factory=dict)

    def codec(self, payload: Payload) -> Codec:
        """Return the codec of a payload with its settings.

        Raises:
            UnknownCodecError: if it is not installed. CorruptAdapterError: if it refuses the settings.
        """
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

    def decode(self, set: str, index: int, weights: Mapping[str, Tensor] | None) -> bitarray:
        """Decode one payload to exactly its weights, and check the number of true bits.

        Args:
            set, index: which payload. weights: the base by name, or None.

        Raises:
            AdapterError: if it needs the base and none is given; CorruptAdapterError, UnknownCodecError,
            BackboneMismatchError: see `Adapter.masks`.
        """
        one = self.header.sets[set]
        payload = one.payloads[index]
        codec = self.codec(payload)
        name, coding = payload.name, payload.coding
        if codec.needs_base and weights is None:
            raise AdapterError(
                f"{self.path}: the mask of {name!r} is packed with the weights of {self.header.base.id} and cannot be "
                f"decoded alone; pass that model: --backbone on the command line, base= in Python"
            )
        side = Side(
            payload.shape,
            base_classes(weights, name, payload.shape) if codec.needs_base and weights is not None else None,
            self._reference(payload, weights),
            None if coding.table is None else bytes(self.pieces[set][coding.table]),
        )
        try:
            packed = side.checked(codec.decode(self.pieces[set][len(one.tables) + index], side))
            bits = PackedMask.from_bytes(packed, payload.shape).bits
            if bits.count() != payload.kept:
                raise CorruptAdapterError(f"it has {bits.count()} true bits, the header states {payload.kept}")
        except MemoryError:
            raise
        except Exception as error:  # a codec from elsewhere may fail in any way on bytes that a stranger wrote
            if codec.needs_base and weights is not None:
                self._check_base(name, weights[name])
            raise CorruptAdapterError(
                f"{self.path}: the mask of {name!r} in set {set!r} does not decode: {error}; fetch the file again"
            ) from error
        return bits

    def needs_base(self, payload: Payload) -> bool:
        """Tell whether a payload, or the one it refers to, is packed with the base's weights."""
        other = payload.coding.reference
        referenced = None if other is None else self.header.sets[other].payloads[self._index_in(other, payload)]
        return self.codec(payload).needs_base or (referenced is not None and self.codec(referenced).needs_base)

    def _reference(self, payload: Payload, weights: Mapping[str, Tensor] | None) -> Bits | None:
        other = payload.coding.reference
        if other is None:
            return None
        bits = self.decode(other, self._index_in(other, payload), weights)
        return np.frombuffer(bits.tobytes(), dtype=np.uint8)

    def _index_in(self, other: str, payload: Payload) -> int:
        """Return the index of the payload of another set for the same parameter and op; the header's check found it."""
        if other not in self.indices:
            rows = enumerate(self.header.sets[other].payloads)
            self.indices[other] = {(p.name, p.coding.op): index for index, p in rows}
        return self.indices[other][payload.name, payload.coding.op]

    def _check_base(self, name: str, weight: Tensor) -> None:
        """Raise BackboneMismatchError if a weight that classes were made from is not the base's."""
        if not same_tensor(weight, self.base, name):
            raise BackboneMismatchError(
                f"the mask of {name!r} was packed with other weights than those of the base given; load "
                f"{self.header.base.id}, which the adapter was made for"
            )
