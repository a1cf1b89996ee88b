"""Writing adapters: one walk over the masks, then one file, whole or not at all."""

import difflib
import importlib.metadata
import itertools
import logging
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from bitarray import bitarray
from blake3 import blake3
from torch import Tensor, nn

from ..backbone.model import Fingerprint, unwrap
from ..codecs.base import Codec, Profile, Side, to_frame, words_of
from ..codecs.choose import rivals, smallest
from ..errors import (
    AdapterError,
    BackboneMismatchError,
    ConfigError,
    CorruptAdapterError,
    StateError,
    brief,
    check_argument,
)
from ..mask import MaskSet, Op, PackedMask, bits_digest, packed_bits, rows_id
from ..preprocess import Preprocess, preprocess_to_json
from ..safetensors_io import MAX_HEADER, NAMES, Blob, replacing, write_file, writing
from ..threads import Progress, counted, in_order
from .card import CARD_FILE, render_card, update_card
from .content import LEARNING, About, Cascade, Learned, Parts
from .decode import Weights, by_name, coded_weight, in_step, tells_classes
from .describe import config_text, inspect_adapter
from .header import DICTIONARY, Coding, Header, Payload, SetHeader, cascade_to_json
from .read import CONFIG_FILE, DIGEST_BYTES, MAX_CONFIG, MODEL_FILE, Adapter, opening, parse_adapter, read_model
from .signature import remove_signature
from .tensors import BASE, BASE_BYTES, FLOATS, dense_blobs, head_to_json, not_float
from .values import Steps, at_zeros

LOG = logging.getLogger(__name__)
WORTH = 1 << 14  # weights; coding is slow
WORTH_STEPS = 0.5  # of the bytes of stored values
PIECE = 1 << 20  # bytes
LEVEL = 19  # of the index's frame
version_of = cache(importlib.metadata.version)


class Spooled:
    """Bytes kept in a temporary file, which can be read back in pieces any number of times."""

    def __init__(self, file: IO[bytes], folder: Path):
        self._file, self._folder = file, folder
        self._start = self._end = file.seek(0, 2)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self._end - self._start

    def append(self, data: bytes) -> None:
        """Put bytes aside; StateError if the disk is full."""
        with writing(self._folder):
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
        self._end += len(data)

    def __iter__(self) -> Iterator[bytes]:
        for start in range(self._start, self._end, PIECE):
            self._file.seek(start)
            yield self._file.read(min(PIECE, self._end - start))


Reference = tuple[str, MaskSet, Mapping[tuple[str, Op], str]]  # a set that is coded: name, masks, digests of bits


class _Job(NamedTuple):
    """One payload to make, with the values that it puts in, if any.

    `reference`: set, bits that it may be coded against, digest that they should have.
    """

    set: str
    name: str
    mask: PackedMask
    op: Op
    bits: bitarray
    reference: tuple[str, bitarray, str] | None
    values: Tensor | Steps | None


class _Coded(NamedTuple):
    """A coded payload without its bytes: digest of its packed bits, scale of its mask, stored values."""

    payload: Payload
    bits_digest: str
    alpha: float | None
    values: Blob | None


def _jobs(set_name: str, parts: Parts, reference: Reference | None) -> Iterator[_Job]:
    for name, mask in parts.masks.items():
        values = _checked_values(name, mask, parts)
        referenced = None if reference is None else reference[1].get(name)
        others = {} if referenced is None or referenced.shape != mask.shape else dict(referenced.payloads())
        for op, bits in mask.payloads():
            against = (reference[0], others[op], reference[2][name, op]) if reference and op in others else None
            yield _Job(set_name, name, mask, op, bits, against, values)


def _code(
    job: _Job, rivals_of: Callable[[bool], Sequence[Codec]], weights: Mapping[str, Tensor] | None, least: float
) -> tuple[_Coded, bytes, bool]:
    """Code a payload with every codec and verify the smallest; return it, its bytes, and whether the mask is complete.

    Args:
        rivals_of: whether codecs may have the base -> codecs.
        least: share of their bytes that stored values must take at most as steps, which bind them to the base's dtype.
    """
    bits, shape = packed_bits(job.bits), job.mask.shape
    codecs = rivals_of(weights is not None)
    uses_base = any(one.needs_base for one in codecs)
    weight = None if weights is None or not (uses_base or job.values is not None) else weights.get(job.name)
    words = None
    if uses_base and weights is not None:
        if job.values is not None and weight is not None and not tells_classes(weight):
            codecs = rivals_of(False)
        else:
            words = words_of(coded_weight(weights, job.name, shape))
    # whether a weight was changed at all hardly follows from the direction, and so not from its sign
    lean = job.op != "replace"
    variants, against = [(bits, Side(shape, words, lean=lean))], None
    if job.reference is not None:
        against, other, digest = job.reference
        if bits_digest(other) != digest:
            raise AdapterError(
                f"the mask of {job.name!r} is another one when it is asked for again; what MaskSet.streamed is given "
                f"must make the same mask each time"
            )
        variants.append((bits ^ packed_bits(other), Side(shape, words, packed_bits(other), lean)))
    try:
        codec, data, variant = smallest(codecs, variants)
    except ConfigError as error:
        raise ConfigError(f"the mask of {job.name!r}: {error}") from None
    # a mask that does not decode is lost for good, and decoding is far cheaper than coding
    given, side = variants[variant]
    side = side if codec.needs_base else replace(side, weights=None)
    if not np.array_equal(type(codec)(**codec.config()).decode(data, side), given):
        raise AdapterError(f"the codec {codec.id!r} does not give back the mask that it coded; choose another codec")
    coding = Coding(codec.id, job.op, codec.config(), against if variant else None)
    payload = Payload(job.set, job.name, shape, coding, job.bits.count(), len(data))
    values = None if job.values is None else _values_blob(job, job.values, weight, least)
    return _Coded(payload, bits_digest(job.bits), job.mask.alpha, values), data, job.op == job.mask.op


def _values_blob(job: _Job, values: Tensor | Steps, weight: Tensor | None, least: float) -> Blob:
    """Return stored values, as steps from the base's weights where that takes at most this share of their bytes."""
    name, steps = f"{job.set}/values/{job.name}", values if isinstance(values, Steps) else None
    if not isinstance(values, Steps):
        if NAMES.get(str(values.dtype)) not in FLOATS:
            raise not_float(name, values)
        if weight is not None and tuple(weight.shape) == job.mask.shape:
            steps = Steps.of(values.detach().cpu(), at_zeros(weight, job.mask).cpu())
        if steps is None or steps.nbytes >= least * values.nbytes:
            return Blob.of(name, values)
    assert steps is not None
    return Blob(name, "U8", (steps.nbytes,), [steps.data])


def _checked_values(name: str, mask: PackedMask, parts: Parts) -> Tensor | Steps | None:
    if mask.alpha is not None and (not 0 < mask.alpha < float("inf") or float(np.float32(mask.alpha)) != mask.alpha):
        raise AdapterError(f"the mask of {name!r} has alpha {mask.alpha!r}, expected a positive float32")
    if mask.op != "replace":
        if name in parts.values:
            raise AdapterError(
                f"values are given for {name!r}, whose mask has the op {mask.op!r}, expected no such tensor; only op "
                f"'replace' has values"
            )
        return None
    stored, needed = parts.values.get(name), len(mask.bits) - mask.kept
    if isinstance(stored, Steps):
        return stored
    if stored is None or tuple(stored.shape) != (needed,):
        given = "none are given" if stored is None else f"values of shape {tuple(stored.shape)} are given"
        raise AdapterError(
            f"the mask of {name!r} replaces {needed} weights and {given}, expected a flat tensor of {needed}; "
            f"put it in Parts.values"
        )
    return stored


def _check_names(sets: Mapping[str, Parts], base: Fingerprint) -> None:
    """Refuse mask sets that cannot be stored, without asking for a mask."""
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
    about: About,
    cascade: Cascade | None,
    weights: Weights | None,
    profile: Profile,
    codec: str | None,
    progress: Progress | None,
    spool: Callable[[], Spooled],
) -> tuple[Header, list[Blob]]:
    """Code mask sets and return the header and the tensors of their file in order; payloads are put aside."""
    sets = dict(sorted(sets.items()))
    heads = {name: None if parts.head is None else head_to_json(parts.head) for name, parts in sets.items()}
    dense = dense_blobs(sets, cascade)
    rivals_of = cache(partial(rivals, profile, codec))
    rivals_of(weights is not None)  # says what is wrong before anything is coded
    least = 1.0 if profile == "max" else WORTH_STEPS
    known = None if weights is None else by_name(weights)
    work = partial(_code, rivals_of=rivals_of, weights=known, least=least)
    step = counted(progress, (parts.masks.total for parts in sets.values()))
    # experts begin where the dispatcher ended
    first = cascade.dispatcher if cascade is not None and cascade.dispatcher in sets else next(iter(sets))
    coded: dict[str, list[_Coded]] = {}
    payloads, reference = dict[str, Blob](), None
    for name in sorted(sets, key=lambda name: name != first):  # the others are coded against the first
        coded[name], pieces = [], spool()
        jobs = _jobs(name, sets[name], reference)
        for one, data, done in in_order(work, jobs, lambda job: len(job.bits), WORTH, in_step(known)):
            pieces.append(data)
            coded[name].append(one)
            if done:
                step(one.payload.weights)
        payloads[name] = Blob(f"{name}/payloads", "U8", (pieces.size,), pieces)
        if name == first:
            digests = {(one.payload.name, one.payload.coding.op): one.bits_digest for one in coded[name]}
            reference = name, sets[name].masks, digests
    rows = [one for name in sets for one in coded[name]]
    dense += [one.values for one in rows if one.values is not None]
    for name in sets:
        if any(one.alpha is not None for one in coded[name]):
            alphas = np.array([one.alpha or 0.0 for one in coded[name]], dtype="<f4")
            dense.append(Blob(f"{name}/scale", "F32", alphas.shape, [alphas.tobytes()]))
    masked = sorted({one.payload.name for one in rows})
    dense.sort(key=lambda blob: blob.name)
    first_blob = Blob(BASE, "U8", (len(masked), BASE_BYTES), [base.tensors[name] for name in masked])
    header = Header(
        f"maskpack/{version_of('maskpack')}",
        rows_id((p.set, p.name, p.coding.op, p.shape, digest) for p, digest, *_ in rows),
        replace(base, tensors={}),
        {
            name: SetHeader(tuple(one.payload for one in coded[name]), head, _layers(sets[name]))
            for name, head in heads.items()
        },
        about,
        None if cascade is None else cascade_to_json(cascade),
        {blob.name: (blob.dtype, blob.shape) for blob in dense},
    )
    return header, [first_blob, *(payloads[name] for name in sets), *dense]


def _layers(parts: Parts) -> dict[str, tuple[int, bool]]:
    """Return channels of each norm, and whether it has shifts, by name."""
    return {name: (len(one.scale), one.shift is not None) for name, one in sorted(parts.norms.items())}


def _write(path: Path, header: Header, blobs: Sequence[Blob]) -> None:
    """Write the bytes of a model file."""
    text = header.to_json().encode()
    if len(text) > MAX_HEADER:
        raise AdapterError(
            f"its index would have {len(text)} bytes, at most {MAX_HEADER} are allowed; store less in it"
        )
    index, whole = to_frame(text, LEVEL, DICTIONARY), blake3()
    pieces = [struct.pack("<I", len(index)), index]
    size = DIGEST_BYTES + sum(map(len, pieces)) + sum(blob.size for blob in blobs)
    for piece in itertools.chain(pieces, *(blob.data for blob in blobs)):
        whole.update(piece)
    with path.open("wb") as file:
        file.write(opening(size) + whole.digest()[:DIGEST_BYTES])
        for piece in itertools.chain(pieces, *(blob.data for blob in blobs)):
            file.write(piece)


def learned(model: nn.Module, base: Fingerprint | str | None) -> Learned:
    """Return what a model with scores learned; `base` is the id of its weights, or None where the model says it."""
    take = LEARNING.get(unwrap(model))
    if take is None:
        raise StateError("this model has no scores; call attach_scores(model) first, and train what it returns")
    if isinstance(base, Fingerprint):
        raise ConfigError("a model with scores takes its base's fingerprint itself; leave base out, or give its id")
    return take(unwrap(model), base)


def save_adapter(
    path: str | Path,
    parts: MaskSet | Parts | Mapping[str, MaskSet | Parts] | nn.Module,
    base: Fingerprint | str | None = None,
    about: About | None = None,
    *,
    task: str | None = None,
    class_names: Iterable[str] | None = None,
    preprocess: Mapping[str, Any] | Preprocess | None = None,
    training: Mapping[str, Any] | None = None,
    cascade: Cascade | None = None,
    profile: Profile = "default",
    codec: str | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
    overwrite: bool | None = None,
) -> Adapter:
    """Write an adapter: a folder with model file, config and card, or only the file if `path` ends in `.safetensors`.

    Masks are asked for one after another and not kept, so that a set of `MaskSet.streamed` may exceed memory. The new
    model file is read back and verified before it takes the place of an old one, whose signature goes. A card that is
    there already keeps what its owner wrote.

    If several processes share the model (`fully_shard`), all of them call this; the first one writes the files.

    Args:
        path: the folder (made if need be) or file.
        parts: masks, alone or with what travels beside them; or several named sets of these, coded against the first by
            name (of a cascade, the dispatcher) where that is smaller. Or a model with scores: all that it learned so
            far; it goes on learning.
        base: fingerprint of the frozen model that the masks belong to. With a model, where its weights come from, as in
            "timm/resnet18.a1_in1k"; default: what the model says.
        about: what training gives as `result.about`; the next four say the same one by one, and take its place.
        task: as in "image-classification". class_names: one for each row of the head.
        preprocess: how inputs are prepared, with a `kind`. training: the training record.
        cascade: how the named sets work together.
        profile: which codecs compete: "fast", "default", or "max", which is smallest with `weights`.
        codec: only this codec, by id.
        weights: the frozen model or its state dict, for codecs that use the base.
        progress: called after each mask with the number of weights done and of those in all.
        overwrite: replace an adapter that is there. False: that is a StateError. Default: it is replaced, since a
            training may stand behind this call, and a warning is logged.

    Raises:
        AdapterError: if there is no mask, or anything cannot be stored; the message says what.
        BackboneMismatchError: if a masked parameter is not in the fingerprint.
        ConfigError, UnknownNameError: if profile or codec are not known.
        StateError: if the files cannot be written. DataError: if the card that is there cannot be updated (the
            adapter is saved then).

    Example:
        base = fingerprint(model, id="my-network", head="fc")
        save_adapter("./saved", masks, base, task="image-classification")
    """
    check_argument("path", path, str | Path, "the folder or .safetensors file to write", "it comes before the parts")
    writes = True
    if isinstance(parts, nn.Module):
        found = learned(parts, base)
        writes = found.writes
        weights = found.weights if weights is parts else weights
        parts, base = found.parts, found.base
    named = {"default": parts} if isinstance(parts, MaskSet | Parts) else parts
    for one in named.values() if isinstance(named, Mapping) else [named]:
        advice = "MaskSet.from_tensors makes masks of tensors, and a training has `.parts`"
        check_argument("what to save", one, MaskSet | Parts, "a MaskSet, Parts, or a model with scores", advice)
    if not isinstance(base, Fingerprint):
        advice = "give result.base of a training, or fingerprint(model, id=…)"
        raise AdapterError(f"the base is {brief(base)}, expected the fingerprint of the frozen model; {advice}")
    sets = {name: Parts(one) if isinstance(one, MaskSet) else one for name, one in named.items()}
    names = None if class_names is None else tuple(class_names)
    prepared = preprocess_to_json(preprocess) if isinstance(preprocess, Preprocess) else preprocess
    given: dict[str, Any] = {"task": task, "class_names": names, "preprocess": prepared, "training": training}
    said = replace(about or About(), **{key: value for key, value in given.items() if value is not None})
    _check_names(sets, base)
    if writes and not overwrite and (file := _model_file(Path(path))).exists():
        if overwrite is not None:
            raise StateError(f"{file} is there already; choose another name, or replace it with overwrite=True")
        LOG.warning("%s was there already, and is replaced; overwrite=True says so without this warning", file)
    make = partial(encode, sets, base, said, cascade, weights, profile, codec, progress)
    if writes:
        return write_adapter(Path(path), make)
    with tempfile.TemporaryDirectory() as folder:  # the same bytes as the process that writes
        content = write_adapter(Path(folder) / MODEL_FILE, make).content
    return parse_adapter(content, Path(path))


def _model_file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / MODEL_FILE


def write_adapter(
    path: Path, encoded: Callable[[Callable[[], Spooled]], tuple[Header, list[Blob]]], owners: Path | None = None
) -> Adapter:
    """Write the folder or file; see `save_adapter`.

    `encoded` gives header and tensors; what it raises ends the writing before anything is replaced. A new folder gets
    the owner's words of the card `owners`.
    """
    whole, model = path.suffix == ".safetensors", _model_file(path)
    config, card = (None, None) if whole else (path / CONFIG_FILE, path / CARD_FILE)
    with nullcontext() if whole else _folder(path):
        with writing(model.parent):
            file = tempfile.TemporaryFile(dir=model.parent)  # nameless: it goes with the process
        with file:
            header, blobs = encoded(partial(Spooled, file, model.parent))
            with replacing(*(one for one in (model, config) if one is not None)) as temporary:
                _write(temporary[0], header, blobs)
                try:  # what a reader would refuse must not replace an older file
                    adapter = parse_adapter(read_model(temporary[0], model), model)
                    adapter.check_values()
                except CorruptAdapterError as error:
                    raise AdapterError(f"this adapter cannot be saved, readers would refuse it: {error}") from None
                if config is not None:
                    temporary[1].write_bytes(_config_bytes(adapter))
                    # between the two renames the folder has no config rather than one that contradicts the model file
                    config.unlink(missing_ok=True)
                remove_signature(model)
    if card is not None:
        rendered = render_card(inspect_adapter(adapter))
        earlier = card if card.exists() else owners
        if earlier is not None:
            rendered = update_card(earlier.read_bytes().decode("utf-8", "surrogateescape"), rendered)
        write_file(card, rendered.encode("utf-8", "surrogateescape"))
    return adapter


def _config_bytes(adapter: Adapter) -> bytes:
    text = config_text(inspect_adapter(adapter), MODEL_FILE).encode()
    if len(text) > MAX_CONFIG:
        raise AdapterError(
            f"{CONFIG_FILE} would have {len(text)} bytes, at most {MAX_CONFIG} are allowed; shorten the class names or "
            f"the training record"
        )
    return text


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder within the context; a new one is removed if the block fails."""
    new = not path.exists()
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):
                path.rmdir()
        raise
