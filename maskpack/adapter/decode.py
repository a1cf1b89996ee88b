"""One payload -> one mask's bits, whatever the codec and whoever wrote it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bitarray import bitarray
from torch import Tensor

from ..backbone.fingerprint import Fingerprint, same_tensor
from ..codecs.base import CODECS, Bits, Codec, Side
from ..errors import AdapterError, BackboneMismatchError, CorruptAdapterError, UnknownCodecError
from ..mask import Op, PackedMask, bits_digest, packed_bits
from .header import Header
from .sets import Payload, SetHeader
from .threads import in_order
from .weights import base_classes

WORTH = 1 << 22  # weights; below, a thread gains nothing over zstd


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
        reference = self._reference(payload, weights)
        side = Side(
            payload.shape,
            base_classes(weights, name, payload.shape) if codec.needs_base and weights is not None else None,
            reference,
            None if coding.table is None else bytes(self.pieces[set][coding.table]),
        )
        try:
            packed = side.checked(codec.decode(self.pieces[set][len(one.tables) + index], side))
            if reference is not None:
                packed = packed ^ reference
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

    def masks(
        self, set: str, one: SetHeader, alphas: Sequence[float | None], weights: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[str, PackedMask]]:
        """Decode the masks of a set in order; see `Adapter.iter_masks`."""
        indices, signs = range(len(one.payloads)), None
        decoded = in_order(lambda i: self.decode(set, i, weights), indices, lambda i: one.payloads[i].weights, WORTH)
        for index, bits in enumerate(decoded):
            payload = one.payloads[index]
            if index + 1 < len(one.payloads) and one.payloads[index + 1].name == payload.name:
                signs = bits  # of a ternary mask: they come before its zeros
                continue
            yield payload.name, PackedMask(bits, payload.shape, payload.coding.op, alphas[index], signs)
            signs = None

    def digests(self, payloads: Iterable[tuple[str, int, Payload]]) -> Iterator[str]:
        """Decode payloads that need no base, given as (set, index, payload); return the hex sha256 of each's bits."""

        def digest(one: tuple[str, int, Payload]) -> str:
            return bits_digest(self.decode(one[0], one[1], None))

        return in_order(digest, payloads, lambda one: one[2].weights, WORTH)

    def needs_base(self, payload: Payload) -> bool:
        """Tell whether a payload, or the one it refers to, is packed with the base's weights."""
        other = payload.coding.reference
        referenced = None if other is None else self.header.sets[other].payloads[self._index_in(other, payload)]
        return self.codec(payload).needs_base or (referenced is not None and self.codec(referenced).needs_base)

    def _reference(self, payload: Payload, weights: Mapping[str, Tensor] | None) -> Bits | None:
        other = payload.coding.reference
        if other is None:
            return None
        return packed_bits(self.decode(other, self._index_in(other, payload), weights))

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
