"""Mask sets -> the header and tensors of a file."""

import difflib
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from blake3 import blake3
from torch import Tensor

from ..backbone.fingerprint import Fingerprint
from ..codecs.base import Profile
from ..codecs.choose import rivals
from ..errors import AdapterError, BackboneMismatchError
from ..mask import rows_id
from ..parts import CascadeParts, Parts
from ..tensorfile import Blob, in_order
from ..threads import Progress, counted
from .cascade import cascade_header
from .header import Header
from .layout import BASE, BASE_BYTES, DIGEST_BYTES, DIGESTS, cascade_blobs, dense_blobs, scale_blob
from .payloads import Encoded, Reference, encode_set
from .reference import choose_reference
from .spool import Spool, Spooled


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
    blobs = in_order(
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
