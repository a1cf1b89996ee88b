"""Which codec codes a mask in the fewest bytes."""

from collections.abc import Collection
from dataclasses import dataclass

from ..errors import ConfigError
from .base import CODECS, PROFILES, Bits, Codec, Profile, Side


@dataclass(frozen=True, slots=True)
class Coded:
    """One mask's payload, the codec that made it, and the index of the shared table it needs."""

    codec: Codec
    payload: bytes
    table: int | None = None


def rivals(profile: Profile, codec: str | None, base: bool) -> list[Codec]:
    """Return the codec instances that compete, sorted by id.

    Args:
        profile: "fast", "default" or "max". codec: only the one with this id, whatever the profile.
        base: whether the weights of the base are at hand.

    Raises:
        ConfigError: if the profile is unknown, or the codec needs the base and it is not there.
        UnknownNameError: if no codec has the id.
    """
    if profile not in PROFILES:
        raise ConfigError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
    if codec is None:
        return [rival for cls in CODECS.all() if base or not cls.needs_base for rival in cls.candidates(profile)]
    cls = CODECS[codec]
    if cls.needs_base and not base:
        raise ConfigError(f"the codec {codec!r} needs the weights of the base; pass weights=")
    return list(cls.candidates(profile) or cls.candidates("max") or [cls()])


def encode_smallest(bits: Bits, side: Side, profile: Profile, codec: str | None = None) -> tuple[Codec, bytes]:
    """Code packed bits with every candidate of a profile and return the smallest payload with its codec.

    Ties go to the id that sorts first. Raises as `rivals` does.
    """
    best = _smallest(rivals(profile, codec, side.classes is not None), bits, side)
    assert best is not None, "raw is a candidate of every profile"
    return best


def encode_set(
    masks: Collection[tuple[Bits, Side]], profile: Profile, codec: str | None = None, base: bool = False
) -> tuple[list[Coded], list[bytes]]:
    """Code the masks of one set, with shared tables where those gain more than they cost.

    Args:
        masks: packed bits and their sides; walked several times, so that one mask at a time is in memory.
        profile, codec, base: as for `rivals`.

    Returns:
        One `Coded` per mask in the order given, and the tables that they use.
    """
    competing = rivals(profile, codec, base)
    tables = [(rival, rival.table(masks)) for rival in competing]
    plain = [rival for rival, table in tables if table is None]
    tabled = [(rival, table) for rival, table in tables if table is not None]
    best = [_smallest(plain, bits, side) for bits, side in masks]
    with_table = [
        [rival.encode(bits, Side(side.shape, side.classes, side.reference, table)) for bits, side in masks]
        for rival, table in tabled
    ]

    def pick(used: list[int]) -> list[Coded]:
        chosen = []
        for row, own in enumerate(best):
            offers = [Coded(tabled[t][0], with_table[t][row], at) for at, t in enumerate(used)]
            if own is not None:
                offers.append(Coded(*own))
            chosen.append(min(offers, key=lambda offer: (len(offer.payload), offer.codec.id)))
        return chosen

    def cost(used: list[int]) -> int:
        return sum(len(c.payload) for c in pick(used)) + sum(len(tabled[t][1]) for t in used)

    used = list(range(len(tabled)))
    while used:
        fewer = min(([t for t in used if t != gone] for gone in used), key=cost) if plain or len(used) > 1 else used
        if fewer == used or cost(fewer) > cost(used):
            break
        used = fewer
    return pick(used), [tabled[t][1] for t in used]


def _smallest(competing: list[Codec], bits: Bits, side: Side) -> tuple[Codec, bytes] | None:
    offers = [(codec, codec.encode(bits, side)) for codec in competing]
    return min(offers, key=lambda offer: (len(offer[1]), offer[0].id), default=None)
