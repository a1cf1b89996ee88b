"""Which codec codes a mask in the fewest bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigError
from .base import CODECS, PROFILES, Bits, Codec, Profile, Side, plausible


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to store a mask: the codec, its payload, which of the variants it codes, the shared table it needs."""

    codec: Codec
    payload: bytes
    variant: int
    table: int | None


@dataclass(frozen=True, slots=True)
class Contest:
    """The codecs that compete for the masks of one set, and the tables of those that have one for the set."""

    plain: Sequence[Codec]
    tabled: Sequence[tuple[Codec, bytes]] = ()

    def offers(self, variants: Sequence[tuple[Bits, Side]]) -> list[Offer]:
        """Code a mask and return the smallest payload without a table and, for each table, the smallest with it.

        Args:
            variants: packed bits and their sides: those of the mask, and others that it can be had from.

        Returns:
            At least one offer, smallest first. Ties go to the earlier variant, then to the id that sorts first.

        Raises:
            ConfigError: if every codec declines the mask.
        """
        own = [_offer(codec, variants) for codec in self.plain]
        smallest = min((offer for offer in own if offer is not None), key=_rank, default=None)
        found = [] if smallest is None else [smallest]
        for at, (codec, table) in enumerate(self.tabled):
            best = _offer(codec, [(bits, replace(side, table=table)) for bits, side in variants], at)
            if best is not None and (smallest is None or _rank(best) < _rank(smallest)):
                found.append(best)
        if not found:  # raw is in every profile, so that one codec was asked for
            (asked, *_) = [*self.plain, *(codec for codec, _ in self.tabled)]
            raise ConfigError(
                f"the codec {asked.id!r} is not made for this mask of shape {variants[0][1].shape}; choose another, or "
                f"leave the choice to a profile"
            )
        return sorted(found, key=_rank)


def _offer(codec: Codec, variants: Sequence[tuple[Bits, Side]], table: int | None = None) -> Offer | None:
    """Return the smallest that one codec makes of the variants, or None if it declines all."""
    made = [(codec.encode(bits, side), variant) for variant, (bits, side) in enumerate(variants)]
    count = variants[0][1].count
    offers = [
        Offer(codec, payload, v, table) for payload, v in made if payload is not None and plausible(payload, count)
    ]
    return min(offers, key=_rank, default=None)


def _rank(offer: Offer) -> tuple[int, int, str]:
    return len(offer.payload), offer.variant, offer.codec.id


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


def contest(
    masks: Iterable[tuple[Bits, Side]], profile: Profile, codec: str | None = None, base: bool = False
) -> Contest:
    """Return who competes for the masks of one set.

    Args:
        masks: packed bits and their sides; walked once or more for each codec that makes a table, else not at all.
        profile, codec, base: as for `rivals`.
    """
    tables = [(rival, rival.table(masks)) for rival in rivals(profile, codec, base)]
    return Contest(
        [rival for rival, table in tables if table is None],
        [(rival, table) for rival, table in tables if table is not None],
    )


def settle(offers: Sequence[Sequence[tuple[int, int | None]]], tables: Sequence[int]) -> tuple[list[int], list[int]]:
    """Choose one offer for each mask, and give up shared tables that gain no more than they cost.

    Args:
        offers: for each mask the bytes and the table of its offers, smallest first.
        tables: bytes of the tables.

    Returns:
        For each mask the index of its offer, and the tables that are kept, ascending.
    """
    plain = all(any(table is None for _, table in row) for row in offers)

    def pick(used: list[int]) -> list[int]:
        return [next(i for i, (_, table) in enumerate(row) if table is None or table in used) for row in offers]

    def cost(used: list[int]) -> int:
        return sum(row[i][0] for row, i in zip(offers, pick(used), strict=True)) + sum(tables[t] for t in used)

    used = list(range(len(tables)))
    while used and (plain or len(used) > 1):
        fewer = min(([t for t in used if t != gone] for gone in used), key=cost)
        if cost(fewer) > cost(used):
            break
        used = fewer
    return pick(used), used
