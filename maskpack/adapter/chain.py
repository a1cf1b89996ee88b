"""Chains of patches, each of which stands on what the one before makes (docs/format.md section 4.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbone.model import CASTS, Fingerprint, same_size_int
from ..codecs.base import Profile
from ..errors import BackboneMismatchError, StateError
from ..mask import DeviceBits, MaskSet, PackedMask, packed
from ..safetensors_io import Made
from ..threads import Progress
from .content import About, Parts
from .decode import Weights, base_weight, by_name
from .read import Adapter
from .values import Steps, at_zeros, put_at_zeros
from .write import save_adapter


def why_no_patch(adapter: Adapter) -> str | None:
    """Return why an adapter is no patch, the exact change from one checkpoint to another; None if it is one."""
    parts = adapter.header.sets.get("default")
    if parts is None or len(adapter.sets) != 1:
        return f"holds the mask sets {', '.join(adapter.sets)}"
    others = [payload.name for payload in parts.payloads if payload.coding.op != "replace"]
    if others:
        return f"does not store the values of {len(others)} parameters, first {others[0]!r}"
    roles = {name.split("/")[1] for name in adapter.names if name.startswith("default/")}
    if more := sorted(roles - {"payloads", "values", "statistics"}):
        return f"has more than masks, values and statistics: {', '.join(more)}"
    return f"leaves out the modules {', '.join(adapter.base.head)}" if adapter.base.head else None


def check_chain(chain: Sequence[Adapter]) -> None:
    """Refuse what is no chain: gaps, forks, steps back, and adapters that are no patches; nothing is decoded.

    Raises:
        StateError: if one of several adapters is no patch, or nothing can stand on it.
        BackboneMismatchError: if a patch does not stand on the one before.
    """
    states: list[Mapping[str, str]] = []
    for place, one in enumerate(chain if len(chain) > 1 else ()):
        if (why := why_no_patch(one)) is not None:
            raise StateError(f"{one.path} is no patch and cannot be in a chain: it {why}; load it alone")
        if states and one.base.digests != states[-1]:
            before, wanted = chain[place - 1].path, one.base.digests[CASTS[0]][:12]
            if one.base.digests in states:
                what = f"of what is {len(states) - states.index(one.base.digests) - 1} links before, a step back"
            else:
                what = f"{wanted}, which is none of the states so far: a patch is missing between them"
            raise BackboneMismatchError(
                f"{one.path} does not stand on {before}, whose result is {states[-1][CASTS[0]][:12]}: it was made for "
                f"the weights {what}; give the patches of one lineage in their order, as `maskpack log` shows them"
            )
        states = states or [one.base.digests]
        if one.about.result is not None:
            states.append(one.about.result)
        elif place < len(chain) - 1:
            raise StateError(
                f"{one.path} does not say what its result is, so that nothing can stand on it; pack it again"
            )


def base_of_chain(chain: Sequence[Adapter]) -> Fingerprint:
    """Return the fingerprint of what a chain stands on, with all tensors that it changes."""
    tensors = {name: digest for one in chain[::-1] for name, digest in one.base.tensors.items()}
    return replace(chain[0].base, tensors=tensors)


def merged(chain: Sequence[Adapter], base: Weights) -> Parts:
    """Return the parts of one patch that does what a chain does, made tensor by tensor when they are asked for.

    `base` are the weights that the first patch stands on; a tensor's values are made with its mask, so that they may be
    asked for when the weights are others already.
    """
    check_chain(chain)
    weights, now = by_name(base), dict[str, Tensor]()
    links = [one.parts(base=now, stream=True) for one in chain]
    shapes = {name: shape for one in chain for name, shape in one.shapes().items()}
    held = dict[str, Tensor]()

    def make(name: str) -> PackedMask:
        first = base_weight(weights, name, shapes[name]).detach().contiguous()
        found = first.clone()
        for one, parts in zip(chain, links, strict=True):
            if name in parts.masks:
                now.clear()
                now[name] = found
                mask, stored = one.mask_on(name, now, found), parts.values[name]
                values = stored.values(at_zeros(found, mask)) if isinstance(stored, Steps) else stored
                put_at_zeros(found, mask, values.to(found))
        now.clear()
        same = same_size_int(found) == same_size_int(first)
        if same.is_cpu:
            mask = PackedMask.from_tensor(same, "replace")
        else:
            there = DeviceBits(int(same.sum()), packed(same.view(-1).byte()))
            mask = PackedMask.on_device(there, shapes[name], "replace", None)
        held[name] = at_zeros(found, mask)
        return mask

    def values_of(name: str) -> Tensor:
        if name not in held:
            make(name)
        return held.pop(name)

    statistics = {name: tensor for parts in links for name, tensor in parts.statistics.items()}
    return Parts(MaskSet.streamed(shapes, make, shapes), statistics=statistics, values=Made(shapes, values_of))


def squash_adapters(
    chain: Sequence[Adapter],
    path: str | Path,
    base: Weights,
    *,
    profile: Profile = "max",
    progress: Progress | None = None,
) -> Adapter:
    """Write one patch that does what a chain does; `base`: what the first patch stands on, which is compared.

    Raises:
        StateError, BackboneMismatchError: as of `check_chain`, or if `base` has other weights.
    """
    for one in chain:
        if (why := why_no_patch(one)) is not None:
            raise StateError(f"{one.path} is no patch, and only patches are squashed: it {why}; leave it out")
    parts = merged(chain, base)
    if chain[-1].about.result == chain[0].base.digests:
        raise StateError(f"the {len(chain)} patches undo each other: there is nothing to write")
    about = About(training={"squashed": [one.mask_id for one in chain]}, result=chain[-1].about.result)
    options: dict[str, Any] = {"profile": profile, "weights": base, "progress": progress}
    return save_adapter(path, parts, base_of_chain(chain), about, overwrite=True, **options)


def lineage(adapter: Adapter) -> dict[str, Any]:
    """Return what a patch stands on and makes, as the command line shows it."""
    payloads = [payload for one in adapter.header.sets.values() for payload in one.payloads]
    result = adapter.about.result
    return {
        "patch": adapter.pinned,
        "base": adapter.base.digests[CASTS[0]],
        "result": None if result is None else result[CASTS[0]],
        "changed": sum(payload.weights - payload.kept for payload in payloads),
        "weights": sum(payload.weights for payload in payloads),
        "bytes": adapter.size,
    }
