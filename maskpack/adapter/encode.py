"""Mask sets -> the header and tensors of a file."""

import difflib
import hashlib
import importlib.metadata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from bitarray import bitarray
from torch import Tensor

from ..backbone.fingerprint import Fingerprint
from ..codecs.base import Bits, Profile, Side
from ..codecs.choose import Coded, encode_set, rivals
from ..errors import AdapterError, BackboneMismatchError
from ..mask import MaskSet, Op, PackedMask, mask_id
from ..parts import Parts
from ..tensorfile import Blob, in_order
from .header import Header
from .layout import BASE, BASE_BYTES, DIGEST_BYTES, DIGESTS, dense_blobs, head_spec
from .sets import Coding, Payload, SetHeader
from .weights import base_classes

Row = tuple[str, PackedMask, Op, bitarray]


class _Masks(Collection[tuple[Bits, Side]]):
    """The payloads of a set as codecs want them, made one at a time: classes take a byte a weight."""

    def __init__(self, rows: list[Row], weights: Mapping[str, Tensor] | None):
        self.rows, self.weights = rows, weights

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, item: object) -> bool:
        return False

    def __iter__(self) -> Iterator[tuple[Bits, Side]]:
        for name, mask, _, bits in self.rows:
            classes = None if self.weights is None else base_classes(self.weights, name, mask.shape)
            yield np.frombuffer(bits.tobytes(), dtype=np.uint8), Side(mask.shape, classes)


def check_sets(sets: Mapping[str, Parts], base: Fingerprint) -> None:
    """Refuse mask sets that cannot be stored.

    Raises:
        AdapterError: if there is none, one is empty, or parts contradict each other.
        BackboneMismatchError: if a masked parameter is not in the fingerprint.
    """
    if not sets:
        raise AdapterError("there is no mask set to save, expected at least one; train or make masks first")
    for set_name, parts in sets.items():
        if not parts.masks:
            raise AdapterError(
                f"the mask set {set_name!r} is empty, expected at least one mask; train or make masks first"
            )
        for name, mask in parts.masks.items():
            if len(base.tensors.get(name, b"")) != BASE_BYTES:
                near = difflib.get_close_matches(name, base.tensors, n=3, cutoff=0.4)
                raise BackboneMismatchError(
                    f"the mask set {set_name!r} masks {name!r}, which is not among the {len(base.tensors)} tensors of "
                    f"{base.id}; nearest: {', '.join(near) or 'none'}; name parameters as the backbone does"
                )
            if mask.alpha is not None and (
                not 0 < mask.alpha < float("inf") or float(np.float32(mask.alpha)) != mask.alpha
            ):
                raise AdapterError(f"the mask of {name!r} has alpha {mask.alpha!r}, expected a positive float32")
            stored, needed = parts.values.get(name), len(mask.bits) - mask.kept
            if mask.op == "replace" and (stored is None or tuple(stored.shape) != (needed,)):
                given = "none are given" if stored is None else f"values of shape {tuple(stored.shape)} are given"
                raise AdapterError(
                    f"the mask of {name!r} replaces {needed} weights and {given}, expected a flat tensor of {needed}; "
                    f"put it in Parts.values"
                )


def encode(
    sets: Mapping[str, Parts],
    base: Fingerprint,
    weights: Mapping[str, Tensor] | None,
    profile: Profile,
    codec: str | None,
    **about: Any,
) -> tuple[Header, list[Blob]]:
    """Code mask sets and return the header and the tensors of their file.

    Args:
        about: `task`, `class_names`, `preprocess` and `training` of the header.

    Raises:
        AdapterError: if a tensor cannot be stored, or a codec does not give back what it coded.
    """
    headers: dict[str, SetHeader] = {}
    payloads: dict[str, list[bytes]] = {}
    dense: list[Blob] = []
    if not any(rival.needs_base for rival in rivals(profile, codec, weights is not None)):
        weights = None  # classes cost time, and nobody asks for them
    for name in sorted(sets):
        headers[name], payloads[name] = _encode_set(sets[name], weights, profile, codec)
        dense += dense_blobs(name, sets[name])
    dense.sort(key=lambda blob: blob.name)
    digests = [hashlib.sha256(piece).digest() for name in sorted(sets) for piece in payloads[name]]
    for blob in dense:
        whole = hashlib.sha256()
        for piece in blob.data:
            whole.update(piece)
        digests.append(whole.digest())
    masked = sorted({name for parts in sets.values() for name in parts.masks})
    blobs = in_order(
        [
            *dense,
            Blob(BASE, "U8", (len(masked), BASE_BYTES), [base.tensors[name] for name in masked]),
            Blob(DIGESTS, "U8", (len(digests), DIGEST_BYTES), [digest[:DIGEST_BYTES] for digest in digests]),
            *(Blob(f"{name}/payloads", "U8", (sum(map(len, made)),), made) for name, made in payloads.items()),
        ]
    )
    whole = hashlib.sha256()
    for blob in blobs:
        for piece in blob.data:
            whole.update(piece)
    producer = f"maskpack/{importlib.metadata.version('maskpack')}"
    identity = mask_id({name: parts.masks for name, parts in sets.items()})
    return Header(producer, identity, whole.hexdigest(), replace(base, tensors={}), headers, **about), blobs


def _encode_set(
    parts: Parts, weights: Mapping[str, Tensor] | None, profile: Profile, codec: str | None
) -> tuple[SetHeader, list[bytes]]:
    """Return the header of a set, and its tables and payloads in file order."""
    rows = _rows(parts.masks)
    masks = _Masks(rows, weights)
    coded, tables = encode_set(masks, profile, codec, base=weights is not None)
    payloads = []
    for (name, mask, op, bits), one, (packed, side) in zip(rows, coded, masks, strict=True):
        table = None if one.table is None else tables[one.table]
        _check_round_trip(one, packed, Side(side.shape, side.classes if one.codec.needs_base else None, None, table))
        coding = Coding(one.codec.id, op, one.codec.config(), table=one.table)
        payloads.append(Payload(name, mask.shape, coding, bits.count(), len(one.payload)))
    header = SetHeader(tuple(payloads), tuple(len(table) for table in tables), head_spec(parts.head))
    return header, [*tables, *(one.payload for one in coded)]


def _check_round_trip(coded: Coded, packed: Bits, side: Side) -> None:
    # a mask that does not decode is lost for good, and decoding is far cheaper than coding
    again = type(coded.codec)(**coded.codec.config()).decode(coded.payload, side)
    if not np.array_equal(again, packed):
        raise AdapterError(
            f"the codec {coded.codec.id!r} does not give back the mask that it coded; choose another codec"
        )


def _rows(masks: MaskSet) -> list[Row]:
    return [(name, mask, op, bits) for name, mask in masks.items() for op, bits in mask.payloads()]
