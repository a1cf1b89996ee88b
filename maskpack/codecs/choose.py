"""Choice of the codec that codes a mask in the fewest bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError, check_choice
from .base import CODECS, Bits, Codec, Profile, Side, matrix_shape, plausible

PIECE, PIECES, FAR = 1024, 4, 1.5  # bytes of packed bits, and how often the best codec's are too many
NEAR = 1.04  # of what a codec takes at least; a patch that is as small by a quicker codec is not coded by it as well


class Offer(NamedTuple):
    """One way to store a mask: the codec, its payload, which of the variants it codes."""

    codec: Codec
    payload: bytes
    variant: int


def smallest(codecs: Sequence[Codec], variants: Sequence[tuple[Bits, Side]]) -> Offer:
    """Code a mask by every codec and return the smallest payload.

    Args:
        variants: packed bits and their sides: those of the mask, and others that it can be had from.

    Returns:
        The offer; ties go to the earlier variant, then to the id that sorts first. Of a patch without the base another
        codec's payload may have a hundredth less.

    Raises:
        ConfigError: if every codec declines the mask.
    """
    offers = list[Offer]()
    patch = not variants[0][1].lean and not any(codec.needs_base for codec in codecs)
    for codec in sorted(codecs, key=lambda codec: codec.local != patch):
        for variant, (bits, side) in enumerate(variants):
            best = min((len(offer.payload) for offer in offers), default=None)
            if best is not None and codec.local and _hopeless(codec, bits, side.shape, best):
                continue
            if best is not None and patch and best <= NEAR * codec.at_least(bits, side):
                continue
            if (payload := codec.encode(bits, side)) is not None and plausible(payload, side.count):
                offers.append(Offer(codec, payload, variant))
    if not offers:  # raw is in every profile, so that one codec was asked for
        raise ConfigError(
            f"the codec {codecs[0].id!r} is not made for this mask of shape {variants[0][1].shape}; choose another, or "
            f"leave the choice to a profile"
        )
    return min(offers, key=lambda offer: (len(offer.payload), offer.variant, offer.codec.id))


def _hopeless(codec: Codec, bits: Bits, shape: tuple[int, ...], best: int) -> bool:
    """Return True if a codec cannot win, judged by how its size grows on growing parts of the mask."""
    if bits.size < PIECES * PIECE * 8:
        return False
    row = max(1, matrix_shape(shape)[1] // 8)  # rows that repeat must be seen to do so
    starts = [(bits.size - PIECE) * k // (PIECES - 1) // row * row for k in range(PIECES)]
    sizes = list[int]()
    for some in (starts[::2], starts):
        pieces = np.concatenate([bits[start : start + PIECE] for start in some])
        sizes.append(len(codec.encode(pieces, Side((8 * pieces.size,))) or b""))
    return (sizes[1] - sizes[0]) * bits.size > FAR * best * PIECE * (PIECES - len(starts[::2]))


def rivals(profile: Profile, codec: str | None, base: bool) -> list[Codec]:
    """Return the codec instances that compete, sorted by id.

    Args:
        profile: "fast", "default" or "max". codec: only the one with this id, whatever the profile.
        base: whether the weights of the base are at hand.

    Raises:
        ConfigError: if the profile is unknown, or the codec needs the base and it is not there.
        UnknownNameError: if no codec has the id.
    """
    check_choice("profile", profile, Profile)
    if codec is None:
        found = [rival for cls in CODECS.all() if base or not cls.needs_base for rival in cls.candidates(profile)]
        superseded = {rival.supersedes for rival in found}
        return [rival for rival in found if rival.id not in superseded]
    cls = CODECS[codec]
    if cls.needs_base and not base:
        raise ConfigError(f"the codec {codec!r} needs the weights of the base; pass weights=")
    return list(cls.candidates(profile) or cls.candidates("max") or [cls()])
