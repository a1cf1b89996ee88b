"""Decoding of payloads into masks, with the base's weights where the codec needs them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from bitarray import bitarray

from ..backbone.model import canonical, named_parameters
from ..backbone.shards import any_shared, shared, whole
from ..codecs.base import CODECS, Bits, Codec, Side, There, plausible, words_of
from ..errors import AdapterError, BackboneMismatchError, CorruptAdapterError, UnknownCodecError
from ..mask import DeviceBits, MaskSet, PackedMask, bits_digest, fetched, packed_bits, rows_id
from ..threads import AHEAD, Progress, counted, in_order
from .header import Payload
from .values import Steps, at_zeros

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .read import Adapter

Weights = Union["nn.Module", Mapping[str, "Tensor"]]
Masks = Iterator[tuple[str, PackedMask]]
Decoded = tuple[Union[Bits, "Tensor"], Union["Tensor", None]]  # packed bits; on a device positions of zeros too
Key = tuple[str, str]  # of a payload: its parameter and op
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


def in_step(weights: Mapping[str, Tensor] | None) -> int | None:
    """Return the number of threads that may read the base's weights: 1 if they are sharded, None if any number."""
    return 1 if weights is not None and any_shared(weights) else None


def tells_classes(weight: Tensor) -> bool:
    """Return True if weights of this dtype fall into the same classes as the base's."""
    return str(weight.dtype) in ("torch.float32", "torch.bfloat16")


def base_weight(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weights of one parameter of the base, which must have this shape, or raise BackboneMismatchError."""
    tensor = weights.get(name)
    if tensor is None or tuple(tensor.shape) != shape:
        what = "no such parameter" if tensor is None else f"one of shape {tuple(tensor.shape)}"
        raise BackboneMismatchError(
            f"the adapter changes {name!r} of shape {shape}, and the base given has {what}; give the backbone that the "
            f"adapter was made for"
        )
    return whole(tensor)


def coded_weight(weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the base's weights that a mask is coded with, as `base_weight`; they must be float32 or bfloat16."""
    weight = base_weight(weights, name, shape)
    if not tells_classes(weight):
        raise BackboneMismatchError(
            f"the mask of {name!r} is coded with the base's weights, and the base given has them as {weight.dtype}, "
            f"expected torch.float32 or torch.bfloat16; load the adapter before casting the model"
        )
    return weight


def key_of(payload: Payload) -> Key:
    return payload.name, payload.coding.op


def on_device(
    found: Sequence[Decoded | None], payloads: Sequence[Payload]
) -> tuple[DeviceBits, Tensor] | tuple[None, None]:
    """Return the bits and zero positions of a mask decoded on a device, after comparing its number of true bits."""
    pieces, where = list[Any](), None
    for one, payload in zip(found, payloads, strict=True):
        if one is None or isinstance(one[0], np.ndarray) or one[1] is None:
            return None, None
        if len(one[1]) != payload.weights - payload.kept:
            return None, None
        pieces.append(one[0])
        where = one[1]
    assert where is not None
    *signs, bits = pieces
    return DeviceBits(payloads[-1].kept, bits, *signs), where


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Decodes the payloads of one file, with the base's weights by name, if need be; see `Adapter.parts`."""

    adapter: Adapter
    weights: Mapping[str, Tensor] | None

    def codec(self, payload: Payload) -> Codec:
        """Return the codec of a payload with its settings."""
        id_, path = payload.coding.codec, self.adapter.path
        if id_ not in CODECS:
            known = ", ".join(cls.id for cls in CODECS.all())
            raise UnknownCodecError(
                f"{path}: the mask of {payload.name!r} is packed with the codec {id_!r}, which is not installed "
                f"(installed: {known}); upgrade maskpack, or install the package that has it"
            )
        try:
            return CODECS[id_](**payload.coding.config)
        except (TypeError, ValueError) as error:
            raise CorruptAdapterError(
                f"{path}: the mask of {payload.name!r} has settings {dict(payload.coding.config)} that the codec "
                f"{id_!r} refuses: {error}; upgrade maskpack or fetch the file again"
            ) from None

    def decode(self, payload: Payload, there: Decoded | None = None) -> bitarray:
        """Return the bits of one payload, exactly as many as its weights, after comparing the number of true ones.

        `there` is what came of it on another device, or of decoding many together.
        """
        path, name, codec, data = self.adapter.path, payload.name, self.codec(payload), self.adapter.piece(payload)
        if not plausible(data, payload.weights):
            raise CorruptAdapterError(
                f"{path}: the mask of {name!r} has {payload.weights} weights in a payload of {len(data)} bytes, "
                f"which is too few for so many; fetch the file again"
            )
        if there is None:
            words = words_of(self._base(payload)) if codec.needs_base else None
            referenced = self._referenced(payload)
            reference = None if referenced is None else packed_bits(self.decode(referenced))
            side = Side(payload.shape, words, reference)
        try:
            if there is not None:
                packed = there[0] if isinstance(there[0], np.ndarray) else fetched(there[0])
            else:
                packed = side.checked(codec.decode(data, side))
                packed = packed if reference is None else packed ^ reference
            bits = PackedMask.from_bytes(packed, payload.shape).bits
            if bits.count() != payload.kept:
                raise CorruptAdapterError(f"it has {bits.count()} true bits, the header states {payload.kept}")
        except MemoryError:
            raise
        except Exception as error:  # a codec from elsewhere may fail in any way on bytes that a stranger wrote
            raise CorruptAdapterError(
                f"{path}: the mask of {name!r} in set {payload.set!r} does not decode: {error}; fetch the file again"
            ) from error
        return bits

    def _base(self, payload: Payload) -> Tensor:
        """Return the weights that a payload is packed with, which must be the base's.

        They are compared before decoding: few other weights may leave a payload that decodes, to another mask.
        """
        from ..backbone.fingerprint import same_digest, tensor_digest

        name, base = payload.name, self.adapter.base
        if self.weights is None:
            raise AdapterError(
                f"{self.adapter.path}: the mask of {name!r} is packed with the weights of {base.id} and cannot be "
                f"decoded alone; pass that model: --backbone on the command line, base= in Python"
            )
        weight = coded_weight(self.weights, name, payload.shape)
        if not same_digest(tensor_digest(weight, weight.dtype), base, name, weight.dtype):
            raise BackboneMismatchError(
                f"the mask of {name!r} was packed with other weights than those of the base given; load {base.id}, "
                f"which the adapter was made for"
            )
        return weight

    def mask(
        self, set: str, name: str, zeros: bool = False, there: Mapping[Key, Decoded | None] | None = None
    ) -> PackedMask:
        """Decode the mask of a parameter; with `zeros` it has their positions, if it was decoded on a device."""
        payloads, alpha = self.adapter.payloads[set][name], self.adapter.alphas[set][name]
        *first, payload = payloads
        found, op = [(there or {}).get(key_of(one)) for one in payloads], payload.coding.op
        own, at = on_device(found, payloads) if zeros else (None, None)
        if own is not None:  # nothing comes back from there
            return PackedMask.on_device(own, payload.shape, op, alpha, at)
        signs = self.decode(first[0], found[0]) if first else None
        return PackedMask(self.decode(payload, found[-1]), payload.shape, op, alpha, signs)

    def mask_on(self, set: str, name: str, weight: Tensor) -> PackedMask:
        """Decode the mask of a parameter, with zeros, on the device of these weights of the base if its codec can."""
        return self.mask(set, name, True, self._there(set, [name], {name: weight}))

    def masks(self, set: str, zeros: bool = False) -> Masks:
        """Decode the masks of a set in order, in threads; see `Adapter.iter_masks`."""
        shapes, names, ahead = self.adapter.shapes(set), list[str](), 0
        for name, shape in shapes.items():
            if names and ahead + math.prod(shape) > AHEAD:
                yield from self._masks(set, names, zeros)
                names, ahead = [], 0
            names.append(name)
            ahead += math.prod(shape)
        yield from self._masks(set, names, zeros)

    def _masks(self, set: str, names: list[str], zeros: bool) -> Masks:
        shapes, work = self.adapter.shapes(set), partial(self.mask, set, zeros=zeros, there=self._there(set, names))
        found = in_order(work, names, lambda name: math.prod(shapes[name]), WORTH, in_step(self.weights))
        return zip(names, found, strict=True)

    def _there(
        self, set: str, names: Iterable[str], weights: Mapping[str, Tensor] | None = None
    ) -> dict[Key, Decoded | None]:
        """Decode in one batch the masks whose codec is quicker that way on their device; return them by name."""
        own = (self.weights or {}) if weights is None else weights
        payloads = [payload for name in names for payload in self.adapter.payloads[set][name]]
        away = [one for one in payloads if (weight := own.get(one.name)) is not None and not weight.is_cpu]
        others = {key_of(one): other for one in away if (other := self._referenced(one)) is not None}
        first = self._together(others.values(), own, {})
        known = {key: one[0] for key, one in first.items() if on_device([one], [others[key]])[0] is not None and one}
        return self._together(payloads, own, known)

    def _together(
        self, payloads: Iterable[Payload], weights: Mapping[str, Tensor], known: Mapping[Key, Any]
    ) -> dict[Key, Decoded | None]:
        groups, found = dict[tuple[Codec, Any], dict[Key, There]](), dict[Key, Decoded | None]()
        for payload in payloads:
            codec, data, key = self.codec(payload), self.adapter.piece(payload), key_of(payload)
            weight = weights.get(payload.name)
            if shared(weight) or not codec.decodes_on("cpu" if weight is None else weight.device.type):
                continue
            ready = (weight is not None or not codec.needs_base) and (payload.coding.reference is None or key in known)
            if ready and plausible(data, payload.weights):
                if codec.needs_base:
                    self._base(payload)  # compares them
                group = codec, None if weight is None else weight.device
                groups.setdefault(group, {})[key] = data, payload.shape, weight, known.get(key)
        for (codec, _), own in groups.items():
            found |= zip(own, codec.decode_on([*own.values()]), strict=True)
        return found

    def streamed(self, set: str) -> MaskSet:
        """Return the masks of a set, each decoded when it is asked for."""
        shapes = self.adapter.shapes(set)
        return MaskSet.streamed(shapes, partial(self.mask, set), shapes)

    def verify(self, progress: Progress | None) -> dict[str, Any]:
        """Decode what can be decoded and compare `mask_id` if that is all; see `Adapter.verify`."""
        found, needing, rows = list[Payload](), list[str](), []
        for payload in (payload for one in self.adapter.header.sets.values() for payload in one.payloads):
            if self.weights is None and self._needs_base(payload):
                needing.append(f"{payload.set}/{payload.name}")
            else:
                found.append(payload)
        step = counted(progress, (payload.weights for payload in found))
        digests = in_order(self._checked, found, lambda one: one.weights, WORTH, in_step(self.weights))
        for payload, own in zip(found, digests, strict=True):
            rows.append((payload.set, payload.name, payload.coding.op, payload.shape, own))
            step(payload.weights)
        if not needing:
            self.adapter.check_id(rows_id(rows))
        counts = {"payloads": len(found) + len(needing), "decoded": len(found)}
        return {**counts, "needs_base": needing, "mask_id": None if needing else True}

    def _checked(self, payload: Payload) -> str:
        """Return the digest of a payload's bits; with the base, stored values are decoded as well."""
        bits, values = self.decode(payload), f"{payload.set}/values/{payload.name}"
        if self.weights is not None and payload.coding.op == "replace" and self.adapter.spans[values].dtype == "U8":
            weight = base_weight(self.weights, payload.name, payload.shape)
            Steps(self.adapter.bytes_of(values)).values(at_zeros(weight, PackedMask(bits, payload.shape)))
        return bits_digest(bits)

    def _needs_base(self, payload: Payload) -> bool:
        """Return True if a payload, or the one it refers to, is packed with the base's weights."""
        referenced = self._referenced(payload)
        return self.codec(payload).needs_base or (referenced is not None and self.codec(referenced).needs_base)

    def _referenced(self, payload: Payload) -> Payload | None:
        """Return the payload that another is coded against, of the same parameter and op, if it is against one."""
        if payload.coding.reference is None:
            return None
        payloads = self.adapter.payloads[payload.coding.reference][payload.name]
        return next(one for one in payloads if one.coding.op == payload.coding.op)
