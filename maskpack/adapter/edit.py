"""Adapters made from other adapters: converted to another codec, or combined."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..algebra import Missing, combine
from ..backbone.fingerprint import check_fingerprint
from ..codecs.base import Profile
from ..errors import BackboneMismatchError, ConfigError, StateError
from ..mask import MaskSet
from ..safetensors_io import Blob
from ..threads import Progress
from .card import CARD_FILE
from .content import FEATURES, About, Parts
from .header import Header
from .read import MODEL_FILE, Adapter, read_adapter
from .write import Spooled, encode, save_adapter, write_adapter


def convert_adapter(
    adapter: Adapter | str | Path,
    path: str | Path,
    *,
    profile: Profile = "default",
    codec: str | None = None,
    base: nn.Module | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Write an adapter again with another profile or codec; `mask_id` and everything but the coding stay.

    Masks are decoded one at a time when the writer asks for them, so that the adapter's masks may exceed memory.

    Args:
        adapter: opened, or its folder or file.
        path: folder or `.safetensors` file; may be the adapter's own. A new folder gets the owner's words of the card.
        profile, codec, progress: as in `save_adapter`.
        base: the adapter's frozen base; needed where masks were packed with its weights, or are to be.

    Raises:
        AdapterError: if masks were packed with the base's weights and it is not given.
        BackboneMismatchError: if the base given is not the adapter's.
    """
    old = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if base is not None:
        check_fingerprint(base, old.base)
    sets = {name: old.parts(name, base, stream=True) for name in old.sets}

    def encoded(spool: Callable[[], Spooled]) -> tuple[Header, list[Blob]]:
        made = encode(sets, old.base, old.about, old.cascade, base, profile, codec, progress, spool)
        old.check_id(made[0].mask_id)
        return made

    card = Path(old.path).with_name(CARD_FILE)
    has_card = Path(old.path).name == MODEL_FILE and card.is_file()
    return write_adapter(Path(path), encoded, card if has_card else None)


RECORD = "combined"  # key in the training record


def combine_adapters(
    how: str,
    adapters: Sequence[Adapter],
    path: str | Path,
    *,
    weights: Sequence[float] | None = None,
    k: int | None = None,
    missing: Missing = "error",
    base: nn.Module | None = None,
    profile: Profile = "default",
    codec: str | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Write an adapter whose masks are those of several adapters, combined; the same inputs give the same bytes.

    It has the base and the preprocessing of the first, and of class names, head, statistics and trained parameters what
    all adapters have alike; `left_out` says what they have not. Its training record names the operation and, in order,
    the `mask_id` and the pinned Hub reference of each adapter. Masks are decoded one parameter at a time.

    Args:
        how, weights, k, missing: as of `maskpack.combine`. path, profile, codec, progress: as of `save_adapter`.
        base: the frozen base; needed where masks were packed with its weights, or are to be.

    Raises:
        ConfigError: as `maskpack.combine`, or if an adapter replaces weights: values cannot be combined.
    """
    combined = combine(how, mask_sets(adapters, base), weights=weights, k=k, missing=missing)
    for one in adapters:
        replaced = [p.name for own in one.header.sets.values() for p in own.payloads if p.coding.op == "replace"]
        if replaced:
            raise ConfigError(
                f"{one.path} replaces weights by values, in {len(replaced)} parameters, first {replaced[0]!r}; only "
                f"bits can be combined: give adapters whose masks remove weights or flip their signs"
            )
    parents = [
        {"mask_id": one.mask_id, **({} if one.pinned == one.path else {"reference": one.pinned})} for one in adapters
    ]
    record: dict[str, Any] = {"operation": how, "missing": missing, "parents": parents}
    if k is not None:
        record["k"] = k
    if weights is not None:
        record["weights"] = [float(weight) for weight in weights]
    first, task = adapters[0], adapters[0].about.task
    alike = _alike(adapters)
    if "head" not in alike and task is not None:
        task = FEATURES.get(task, task)
    names = alike.pop("class_names", None)
    tensors = {name: digest for one in adapters for name, digest in one.base.tensors.items()}
    return save_adapter(
        path,
        Parts(combined, **alike),
        replace(first.base, tensors=tensors),
        About(task, names, first.about.preprocess, {RECORD: record}),
        profile=profile,
        codec=codec,
        weights=base,
        progress=progress,
        overwrite=True,
    )


def mask_sets(adapters: Sequence[Adapter], base: nn.Module | None = None) -> list[MaskSet]:
    """Return the masks of adapters of one base, decoded one at a time when they are asked for.

    Raises:
        StateError: if an adapter has several mask sets.
        BackboneMismatchError: if the adapters were made for other weights than the first, or than those of `base`.
    """
    for one in adapters:
        if len(one.sets) != 1:
            raise StateError(
                f"{one.path} holds {len(one.sets)} mask sets ({', '.join(one.sets[:5])}{', …' * (len(one.sets) > 5)}), "
                f"expected an adapter of one; in Python, maskpack.combine takes adapter.parts(NAME).masks"
            )
        _check_base(adapters[0], one)
    if base is not None and adapters:
        check_fingerprint(base, adapters[0].base)
    return [one.parts(one.sets[0], base, stream=True).masks for one in adapters]


def left_out(adapters: Sequence[Adapter]) -> list[str]:
    """Return, for each adapter that has more than masks, what `combine_adapters` leaves out of it, in words."""
    found, alike = [], _alike(adapters)
    for one in adapters:
        parts = one.parts(one.sets[0], stream=True)
        more = {
            "head": parts.head is not None and "head" not in alike,
            "class names": one.about.class_names is not None and "class_names" not in alike,
            "statistics": bool(parts.statistics) and "statistics" not in alike,
            "trained parameters": bool(parts.parameters or parts.norms) and "norms" not in alike,
            "training record": one.about.training is not None,
            "preprocessing, which is not the first's": one.about.preprocess != adapters[0].about.preprocess,
        }
        if any(more.values()):
            found.append(f"{one.pinned}: {', '.join(part for part, has in more.items() if has)}")
    return found


def _alike(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the class names and the fields of `Parts` beside masks that are the same in all adapters, by name."""
    parts = [one.parts(one.sets[0], stream=True) for one in adapters]
    found: dict[str, Any] = {}
    for names in (("statistics",), ("parameters", "norms")):
        if all(_same(getattr(parts[0], name), getattr(one, name)) for one in parts for name in names):
            found |= {name: getattr(parts[0], name) for name in names}
    classes = adapters[0].about.class_names
    if classes is not None and all(one.about.class_names == classes for one in adapters):
        found["class_names"] = classes
        if all(_same(parts[0].head, one.head) for one in parts):
            found["head"] = parts[0].head
    return found


def _same(one: Any, other: Any) -> bool:
    """Return True if tensors, or mappings and dataclasses of them, have the same values."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if is_dataclass(one) and type(one) is type(other):
        return all(_same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    if hasattr(one, "tolist") and hasattr(other, "tolist"):
        return bool(one.dtype == other.dtype) and one.tolist() == other.tolist()
    return bool(one == other)


def _check_base(first: Adapter, other: Adapter) -> None:
    """Raise BackboneMismatchError if two adapters were made for bodies with other weights."""
    if first.base.digests == other.base.digests:
        return
    shared = sorted(first.base.tensors.keys() & other.base.tensors.keys())
    differing = [name for name in shared if first.base.tensors[name] != other.base.tensors[name]]
    if differing:
        what = f"{len(differing)} of the {len(shared)} tensors that both mask differ, first {differing[0]!r}"
    elif not shared:
        what = "they mask no parameter of the same name"
    else:
        what = "the tensors that both mask agree, but other parameters, buffers or the head's place differ"
    ids = [f"{one.path} for {one.base.id} ({one.base.digests['float32'][:12]})" for one in (first, other)]
    raise BackboneMismatchError(
        f"the adapters were made for other weights, {' and '.join(ids)}: {what}; give adapters of one base"
    )
