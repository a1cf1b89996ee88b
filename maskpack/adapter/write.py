"""Writing adapters: one walk over the masks, then one file, whole or not at all."""

import difflib
import importlib.metadata
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from bitarray import bitarray
from bitarray.util import count_xor
from blake3 import blake3
from torch import Tensor

from ..backbone.fingerprint import Fingerprint
from ..codecs.base import Bits, Codec, Profile, Side
from ..codecs.choose import Contest, Offer, contest, rivals, settle
from ..errors import AdapterError, BackboneMismatchError, ConfigError, CorruptAdapterError, StateError
from ..mask import MaskSet, Op, PackedMask, bits_digest, packed_bits, rows_id
from ..safetensors_io import SEAL, UNSEALED, Blob, file_order, replacing, write_blobs
from ..threads import Progress, counted, in_order
from .card import render_card, update_card
from .content import CascadeParts, Parts
from .decode import Weights, base_classes, by_name
from .describe import config_text, describe
from .header import (
    BASE,
    BASE_BYTES,
    DIGEST_BYTES,
    DIGESTS,
    Coding,
    Header,
    Payload,
    SetHeader,
    cascade_blobs,
    dense_blobs,
    scale_blob,
)
from .read import CONFIG_FILE, MAX_CONFIG, MODEL_FILE, Adapter, read_adapter, read_file
from .signature import remove_signature
from .tensors import cascade_header, head_spec

PIECE = 1 << 20  # bytes


class Stretch(NamedTuple):
    """Where a payload lies in the spool, in bytes, and its BLAKE3."""

    start: int
    size: int
    digest: bytes


class Spool:
    """A nameless temporary file in a folder; it is gone when the process ends, however it ends.

    Args:
        folder: where the bytes will be needed, so that they come to lie on the same disk.

    Raises:
        StateError: if the folder cannot be written to, or the disk is full.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.size = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, data: bytes) -> Stretch:
        """Put bytes aside."""
        stretch, left = Stretch(self.size, len(data), blake3(data).digest()), memoryview(data)
        try:
            self._file.seek(self.size)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from error
        self.size += len(data)
        return stretch

    def read(self, stretch: Stretch) -> Iterator[bytes]:
        """Return the bytes of a stretch in small pieces."""
        at, end = stretch.start, stretch.start + stretch.size
        while at < end:
            self._file.seek(at)
            piece = self._file.read(min(PIECE, end - at))
            assert piece, "the spool is shorter than what was put into it"
            at += len(piece)
            yield piece

    def _unwritable(self, error: OSError) -> StateError:
        return StateError(
            f"cannot write in {self.folder}: {error.strerror or error}; nothing was changed there; free space, or "
            f"choose a folder that exists and that you may write to"
        )


class Spooled:
    """Stretches of a spool one after another, as small pieces that can be read any number of times."""

    def __init__(self, spool: Spool, stretches: Sequence[Stretch]):
        self.spool, self.stretches = spool, stretches

    def __iter__(self) -> Iterator[bytes]:
        for stretch in self.stretches:
            yield from self.spool.read(stretch)


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


COMPARED = 64 << 20  # bytes compared for one parameter, over all pairs of sets
CANDIDATES = 64  # sets, beyond which as many of them, evenly spaced, are compared: pairs are not linear


def choose_reference(sets: Mapping[str, MaskSet]) -> str | None:
    """Return the set whose masks the others are most like, or None if that would make no set smaller.

    A set gains, for each mask of the same parameter, op and shape, what its difference from the reference has fewer
    rare bits than itself. The middle part of large masks stands for the whole, the more sets the shorter. Of more than
    64 sets some stand for all.

    Args:
        sets: by name. Where there are several, those of one parameter are in memory at one time.
    """
    gains = dict.fromkeys(sorted(sets)[:: math.ceil(len(sets) / CANDIDATES)], 0)
    having: dict[str, list[str]] = {}
    for key in gains:
        for name in sets[key]:
            having.setdefault(name, []).append(key)
    for name, holders in sorted(having.items()):
        alike: dict[tuple[Op, tuple[int, ...]], list[tuple[str, bitarray]]] = {}
        if len(holders) < 2:
            continue
        for key in holders:
            mask = sets[key][name]
            for op, bits in mask.payloads():
                alike.setdefault((op, mask.shape), []).append((key, _middle(bits, len(gains))))
        for samples in alike.values():
            for (one, own), (other, others) in itertools.combinations(samples, 2):
                difference = _rare(count_xor(own, others), len(own))
                gains[one] += max(0, _rare(others.count(), len(own)) - difference)
                gains[other] += max(0, _rare(own.count(), len(own)) - difference)
    best = max(gains, key=lambda key: gains[key])
    return best if gains[best] else None


def counterpart(masks: MaskSet | None, name: str, shape: tuple[int, ...], op: Op) -> bitarray | None:
    """Return the bits that a payload may be coded against: of the same parameter, shape and op in the reference."""
    mask: PackedMask | None = None if masks is None else masks.get(name)
    return None if mask is None or mask.shape != shape else dict(mask.payloads()).get(op)


def is_nearer(bits: bitarray, other: bitarray) -> bool:
    """Tell whether the difference from other bits has fewer rare bits than the bits themselves."""
    return _rare(count_xor(bits, other), len(bits)) < _rare(bits.count(), len(bits))


def _middle(bits: bitarray, sets: int) -> bitarray:
    length = max(8 * COMPARED // sets**2, 1)
    start = max(0, len(bits) - length) // 16 * 8  # whole bytes are copied faster
    return bits[start : start + length]


def _rare(ones: int, count: int) -> int:
    return min(ones, count - ones)


def check_names(sets: Mapping[str, Parts], base: Fingerprint) -> None:
    """Refuse mask sets that cannot be stored, without asking for a mask.

    Raises:
        AdapterError: if there is none, or one is empty.
        BackboneMismatchError: if a masked parameter is not in the fingerprint.
    """
    if not sets:
        raise AdapterError("there is no mask set to save, expected at least one; train or make masks first")
    for set_name, parts in sets.items():
        if not parts.masks:
            raise AdapterError(
                f"the mask set {set_name!r} is empty, expected at least one mask; train or make masks first"
            )
        for name in parts.masks:
            if len(base.tensors.get(name, b"")) != BASE_BYTES:
                near = difflib.get_close_matches(name, base.tensors, n=3, cutoff=0.4)
                raise BackboneMismatchError(
                    f"the mask set {set_name!r} masks {name!r}, which is not among the {len(base.tensors)} tensors of "
                    f"{base.id}; nearest: {', '.join(near) or 'none'}; name parameters as the backbone does"
                )


def encode(
    sets: Mapping[str, Parts],
    base: Fingerprint,
    weights: Mapping[str, Tensor] | None,
    profile: Profile,
    codec: str | None,
    spool: Spool,
    progress: Progress | None,
    cascade: CascadeParts | None = None,
    **about: Any,
) -> tuple[Header, list[Blob]]:
    """Code mask sets and return the header and the tensors of their file; the payloads' bytes are in the spool.

    Args:
        progress: called after each mask with the weights done and those in all.
        cascade: what makes a cascade of the sets.
        about: `task`, `class_names`, `preprocess` and `training` of the header.

    Raises:
        AdapterError: if a tensor cannot be stored, or a codec does not give back what it coded.
    """
    dense = [blob for name, parts in sets.items() for blob in dense_blobs(name, parts)] + cascade_blobs(cascade)
    if not any(rival.needs_base for rival in rivals(profile, codec, weights is not None)):
        weights = None  # classes cost time, and nobody asks for them
    step = counted(progress, (parts.masks.total for parts in sets.values()))
    if cascade is not None and cascade.dispatcher in sets:
        name: str | None = cascade.dispatcher  # where the experts began
    else:
        name = choose_reference({name: parts.masks for name, parts in sets.items()})
    made: dict[str, Encoded] = {}
    reference = None
    if name is not None:  # the others are coded against it, so it is first
        made[name] = encode_set(sets[name], spool, weights, profile, codec, None, step)
        reference = Reference(name, sets[name].masks, made[name].digests)
    for name in sorted(sets.keys() - made.keys()):
        made[name] = encode_set(sets[name], spool, weights, profile, codec, reference, step)
    made = dict(sorted(made.items()))
    scales = [scale_blob(name, one.alphas) for name, one in made.items()]
    dense = sorted([*dense, *(blob for blob in scales if blob is not None)], key=lambda blob: blob.name)
    digests = [stretch.digest for one in made.values() for stretch in one.stretches]
    digests += [_digest([blob]) for blob in dense]
    masked = sorted({name for parts in sets.values() for name in parts.masks})
    blobs = file_order(
        [
            *dense,
            Blob(BASE, "U8", (len(masked), BASE_BYTES), [base.tensors[name] for name in masked]),
            Blob(DIGESTS, "U8", (len(digests), DIGEST_BYTES), [digest[:DIGEST_BYTES] for digest in digests]),
            *(
                Blob(f"{name}/payloads", "U8", (sum(s.size for s in one.stretches),), Spooled(spool, one.stretches))
                for name, one in made.items()
            ),
        ]
    )
    identity = rows_id(
        (name, payload.name, payload.coding.op, payload.shape, digest)
        for name, one in made.items()
        for payload, digest in zip(one.header.payloads, one.digests.values(), strict=True)
    )
    headers = {name: one.header for name, one in made.items()}
    producer = f"maskpack/{importlib.metadata.version('maskpack')}"
    about["cascade"] = None if cascade is None else cascade_header(cascade)
    return Header(producer, identity, _digest(blobs).hex(), replace(base, tensors={}), headers, **about), blobs


def _digest(blobs: Iterable[Blob]) -> bytes:
    whole = blake3()
    for blob in blobs:
        for piece in blob.data:
            whole.update(piece)
    return whole.digest()


__all__ = ["CARD_FILE", "CONFIG_FILE", "MODEL_FILE", "Parts", "read_adapter", "save_adapter"]

CARD_FILE = "README.md"


def save_adapter(
    path: str | Path,
    masks: MaskSet | Parts | Mapping[str, MaskSet | Parts],
    base: Fingerprint,
    *,
    task: str | None = None,
    class_names: Iterable[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    cascade: CascadeParts | None = None,
    profile: Profile = "default",
    codec: str | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Write an adapter: a folder with model file, config and card, or only the file if `path` ends in `.safetensors`.

    Masks are asked for one after another and not kept, so that a set of `MaskSet.streamed` may exceed memory. The new
    model file is read back and verified before it takes the place of an old one, whose signature goes. A card that is
    there already keeps what its owner wrote.

    Args:
        path: the folder (made if need be) or file.
        masks: the masks, alone or with what travels beside them; or several named sets of these.
        base: fingerprint of the frozen model that the masks belong to.
        task: as in "image-classification". class_names: one for each row of the head.
        preprocess: how inputs are prepared, with a `kind`. training: the training record.
        cascade: what makes a cascade of the named sets.
        profile: which codecs compete: "fast", "default", or "max", which is smallest with `weights`.
        codec: only this codec, by id.
        weights: the frozen model or its state dict, for codecs that use the base.
        progress: called after each mask with the number of weights done and of those in all.

    Raises:
        AdapterError: if there is no mask, or anything cannot be stored; the message says what.
        BackboneMismatchError: if a masked parameter is not in the fingerprint.
        ConfigError, UnknownNameError: if profile or codec are not known.
        StateError: if the files cannot be written. DataError: if the card that is there cannot be updated (the
            adapter is saved then).
    """
    sets = _named(masks)
    check_names(sets, base)

    def coded(spool: Spool) -> tuple[Header, list[Blob]]:
        return encode(
            sets,
            base,
            None if weights is None else by_name(weights),
            profile,
            codec,
            spool,
            progress,
            task=task,
            class_names=None if class_names is None else tuple(class_names),
            preprocess=preprocess,
            training=training,
            cascade=cascade,
        )

    return write_adapter(Path(path), coded)


def write_adapter(
    path: Path, coded: Callable[[Spool], tuple[Header, list[Blob]]], owners: Path | None = None
) -> Adapter:
    """Write the folder or file; what `coded` returns and raises is what `encode` does. Else as `save_adapter`.

    Args:
        owners: a card whose owner's words a new folder gets.
    """
    whole = path.suffix == ".safetensors"
    with nullcontext() if whole else _folder(path), Spool(path.parent if whole else path) as spool:
        header, blobs = coded(spool)
        metadata = {"format": "pt", SEAL: UNSEALED, "maskpack": header.to_json()}
        if whole:
            with replacing(path) as (temporary,):
                write_blobs(temporary, blobs, metadata)
                adapter = _read_back(temporary, path)
                remove_signature(path)
                return adapter
        adapter = _write_model(path, blobs, metadata)
    card = path / CARD_FILE
    rendered = render_card(describe(adapter))
    earlier = card if card.exists() else owners
    if earlier is not None:
        rendered = update_card(earlier.read_bytes().decode("utf-8", "surrogateescape"), rendered)
    with replacing(card) as (temporary,):
        temporary.write_bytes(rendered.encode("utf-8", "surrogateescape"))
    return adapter


def _write_model(path: Path, blobs: list[Blob], metadata: Mapping[str, str]) -> Adapter:
    """Write model file and config of a folder."""
    model, config = path / MODEL_FILE, path / CONFIG_FILE
    with replacing(model, config) as (temporary, temporary_config):
        write_blobs(temporary, blobs, metadata)
        adapter = _read_back(temporary, model)
        text = config_text(describe(adapter), MODEL_FILE).encode()
        if len(text) > MAX_CONFIG:
            raise AdapterError(
                f"{CONFIG_FILE} would have {len(text)} bytes, at most {MAX_CONFIG} are allowed; shorten the class "
                f"names or the training record"
            )
        temporary_config.write_bytes(text)
        # between the two renames the folder has no config rather than one that contradicts the model file
        config.unlink(missing_ok=True)
        remove_signature(model)
    return adapter


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder; if it is new and the block fails, it goes again."""
    new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(
            f"cannot make the folder {path}: {error.strerror}; choose a path where no file is and that you may write to"
        ) from error
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):
                path.rmdir()
        raise


def _named(masks: MaskSet | Parts | Mapping[str, MaskSet | Parts]) -> dict[str, Parts]:
    named = {"default": masks} if isinstance(masks, MaskSet | Parts) else masks
    return {name: Parts(one) if isinstance(one, MaskSet) else one for name, one in named.items()}


def _read_back(temporary: Path, path: Path) -> Adapter:
    """Read what was just written; what a reader would refuse must not replace an older file."""
    try:
        adapter = read_file(temporary, path)
        _ = adapter.cascade  # its values are checked when it is asked for
        return adapter
    except CorruptAdapterError as error:
        raise AdapterError(f"this adapter cannot be saved, readers would refuse it: {error}") from None
