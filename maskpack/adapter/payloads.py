"""One mask set -> its payloads in the spool, in one walk over the masks."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from bitarray import bitarray
from torch import Tensor

from ..codecs.base import Bits, Codec, Profile, Side
from ..codecs.choose import Contest, Offer, contest, settle
from ..errors import AdapterError, ConfigError
from ..mask import MaskSet, Op, PackedMask, bits_digest, packed_bits
from ..parts import Parts
from ..threads import in_order
from .heads import head_spec
from .reference import counterpart, is_nearer
from .sets import Coding, Payload, SetHeader
from .spool import Spool, Stretch
from .weights import base_classes

WORTH = 1 << 14  # weights; coding is slow
Key = tuple[str, Op]
Base = Mapping[str, Tensor] | None  # of the base by name, where a codec that competes uses them


class Reference(NamedTuple):
    """The set that others may be coded against, and the hex BLAKE3 of the packed bits that it was stored with."""

    name: str
    masks: MaskSet
    digests: Mapping[Key, str]


class Encoded(NamedTuple):
    """A set in the spool: tables, then payloads; scale and hex BLAKE3 of the packed bits of each payload."""

    header: SetHeader
    stretches: list[Stretch]
    alphas: list[float | None]
    digests: dict[Key, str]


class _Job(NamedTuple):
    """One payload to make; `other` is the reference's, where there is one, and `stored` the digest that it had."""

    name: str
    mask: PackedMask
    op: Op
    bits: bitarray
    other: bitarray | None
    stored: str | None


class _Made(NamedTuple):
    """What is left of a job: no bits, so that results may wait."""

    name: str
    op: Op
    mask_op: Op
    shape: tuple[int, ...]
    alpha: float | None
    kept: int
    digest: str
    offers: list[Offer]


class _Kept(NamedTuple):
    """An offer in the spool."""

    codec: Codec
    variant: int
    table: int | None
    stretch: Stretch


class _Walk(Iterable[tuple[Bits, Side]]):
    """The masks of a set, asked for anew in each walk."""

    def __init__(self, parts: Parts, reference: Reference | None, weights: Base):
        self.parts, self.reference, self.weights = parts, reference, weights

    def __iter__(self) -> Iterator[tuple[Bits, Side]]:
        """For shared tables: of each mask and its difference from the reference the one with fewer rare bits."""
        for job in self.jobs():
            yield self._variants(job)[job.other is not None and is_nearer(job.bits, job.other)]

    def jobs(self) -> Iterator[_Job]:
        """Return what is to be made, in file order."""
        for name, mask in self.parts.masks.items():
            _check(name, mask, self.parts)
            for op, bits in mask.payloads():
                other, stored = None, None
                if self.reference is not None:
                    other = counterpart(self.reference.masks, name, mask.shape, op)
                    stored = self.reference.digests.get((name, op))
                yield _Job(name, mask, op, bits, other, stored)

    def make(self, job: _Job, rivals: Contest) -> _Made:
        """Code one payload in every way and decode what is offered; called in several threads."""
        variants = self._variants(job)
        try:
            offers = rivals.offers(variants)
        except ConfigError as error:
            raise ConfigError(f"the mask of {job.name!r}: {error}") from None
        for offer in offers:
            table = None if offer.table is None else rivals.tabled[offer.table][1]
            _check_round_trip(offer, *variants[offer.variant], table)
        digest, mask = bits_digest(job.bits), job.mask
        return _Made(job.name, job.op, mask.op, mask.shape, mask.alpha, job.bits.count(), digest, offers)

    def _variants(self, job: _Job) -> list[tuple[Bits, Side]]:
        """Return the bits with their side and, where there is a reference, the difference with its side."""
        bits, shape = packed_bits(job.bits), job.mask.shape
        classes = None if self.weights is None else base_classes(self.weights, job.name, shape)
        if job.other is None:
            return [(bits, Side(shape, classes))]
        if bits_digest(job.other) != job.stored:
            raise AdapterError(
                f"the mask of {job.name!r} is another one when it is asked for again; what MaskSet.streamed is given "
                f"must make the same mask each time"
            )
        other = packed_bits(job.other)
        return [(bits, Side(shape, classes)), (bits ^ other, Side(shape, classes, other))]


def encode_set(
    parts: Parts,
    spool: Spool,
    weights: Base,
    profile: Profile,
    codec: str | None,
    reference: Reference | None,
    step: Callable[[int], None],
) -> Encoded:
    """Code the masks of one set into the spool; each payload is decoded again before it is kept.

    Args:
        reference: another set of the file, coded already.
        step: called with the number of weights of each mask that is done.

    Raises:
        AdapterError: if a mask cannot be stored, or a codec does not give back what it coded.
    """
    walk = _Walk(parts, reference, weights)
    rivals = contest(walk, profile, codec, base=weights is not None)
    made: list[_Made] = []
    rows: list[list[_Kept]] = []
    for one in in_order(partial(walk.make, rivals=rivals), walk.jobs(), lambda job: len(job.bits), WORTH):
        rows.append([_Kept(o.codec, o.variant, o.table, spool.append(o.payload)) for o in one.offers])
        made.append(one._replace(offers=[]))
        if one.op == one.mask_op:  # the signs of a ternary mask come before its zeros
            step(math.prod(one.shape))
    tables = [table for _, table in rivals.tabled]
    chosen, used = settle([[(o.stretch.size, o.table) for o in row] for row in rows], [len(table) for table in tables])
    stretches = [spool.append(tables[index]) for index in used]
    payloads = []
    for one, row, index in zip(made, rows, chosen, strict=True):
        kept = row[index]
        against = reference.name if reference is not None and kept.variant else None
        table = None if kept.table is None else used.index(kept.table)
        coding = Coding(kept.codec.id, one.op, kept.codec.config(), against, table)
        payloads.append(Payload(one.name, one.shape, coding, one.kept, kept.stretch.size))
        stretches.append(kept.stretch)
    header = SetHeader(tuple(payloads), tuple(s.size for s in stretches[: len(used)]), head_spec(parts.head))
    return Encoded(header, stretches, [one.alpha for one in made], {(one.name, one.op): one.digest for one in made})


def _check(name: str, mask: PackedMask, parts: Parts) -> None:
    if mask.alpha is not None and (not 0 < mask.alpha < float("inf") or float(np.float32(mask.alpha)) != mask.alpha):
        raise AdapterError(f"the mask of {name!r} has alpha {mask.alpha!r}, expected a positive float32")
    if mask.op != "replace":
        return
    stored, needed = parts.values.get(name), len(mask.bits) - mask.kept
    if stored is None or tuple(stored.shape) != (needed,):
        given = "none are given" if stored is None else f"values of shape {tuple(stored.shape)} are given"
        raise AdapterError(
            f"the mask of {name!r} replaces {needed} weights and {given}, expected a flat tensor of {needed}; "
            f"put it in Parts.values"
        )


def _check_round_trip(offer: Offer, bits: Bits, side: Side, table: bytes | None) -> None:
    # a mask that does not decode is lost for good, and decoding is far cheaper than coding
    side = replace(side, classes=side.classes if offer.codec.needs_base else None, table=table)
    again = type(offer.codec)(**offer.codec.config()).decode(offer.payload, side)
    if not np.array_equal(again, bits):
        raise AdapterError(
            f"the codec {offer.codec.id!r} does not give back the mask that it coded; choose another codec"
        )
