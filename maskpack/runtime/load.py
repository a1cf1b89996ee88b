"""load_mask: an adapter by reference, onto a model."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, Unpack

from torch import nn

from ..adapter.chain import base_of_chain, check_chain, merged, why_no_patch
from ..adapter.content import Parts
from ..adapter.read import Adapter
from ..backbone.fingerprint import Measured, check_measured, measure_body
from ..backbone.model import Fingerprint, inside, named_parameters, unwrap
from ..backbone.shards import any_shared
from ..errors import AdapterError, BackboneMismatchError, ConfigError, StateError, check_choice
from ..hub.pull import PullOptions, earlier_adapters, open_adapter
from ..mask import MaskSet, PackedMask
from ..threads import in_thread
from .apply import Model, applied, apply_parts, check_free, check_masks, tensors_of, unload_mask
from .place import TOP, find_place, view

LOG = logging.getLogger(__name__)
Reference = str | os.PathLike[str]
Verify = Literal["strict", "warn", "off"]
HeadChoice = Literal["replace", "keep"]
Mode = Literal["target", "source"]


class MaskpackWarning(UserWarning):
    """Warned when verification is relaxed and the base differs."""


def load_adapter(ref: Reference, **options: Unpack[PullOptions]) -> Adapter:
    """Read and verify an adapter from the Hub, a folder or a single file; nothing is decoded or applied yet.

    Arguments and errors as of `pull`. The adapter's `pinned` is the reference that always means these bytes.

    Example:
        adapter = load_adapter("user/my-mask@main")
        print(adapter.pinned)
    """
    return open_adapter(ref, **options).adapter


def load_mask(
    model: Model,
    ref: Reference | Adapter | Sequence[Reference | Adapter],
    *,
    verify: Verify = "strict",
    head: HeadChoice = "replace",
    mode: Mode = "target",
    restorable: bool = True,
    **options: Unpack[PullOptions],
) -> Model:
    """Apply an adapter to a model in place and return the same model.

    Class, parameter names, storage and `requires_grad` of the body stay. A mask loaded before is unloaded first. The
    adapter's names may stand under a prefix in the model, or the model under one of theirs: an encoder's adapter fits
    the model with a head, and the other way round. That is found by shapes and digests, and the log says it. If it
    fails or is interrupted, the model is the base, to the bit; if it is interrupted once more while it puts that back,
    `unload_mask(model)` finishes it.

    Args:
        ref: `user/name[@revision]` on the Hub, a folder, a `.safetensors` file, or an `Adapter`. Or several patches, of
            which each stands on the one before: a chain, applied as one patch. Where a patch on the Hub stands on one
            of an earlier commit, those are fetched back to the one that stands on the model's weights.
        verify: "strict" refuses a base whose body differs from the adapter's; "warn" says so and goes on; "off" does
            not look. Names and shapes are checked always, and so are weights that masks were packed with.
        head: "replace" puts the adapter's head in the place of the model's; "keep" leaves the model's.
        mode: of an adapter that replaces weights, as `train_transfer` makes: "target" puts the values in, "source"
            removes these weights, and leaves the adapter's head, statistics and parameters out.
        restorable: keep what `unload_mask` needs: the weights that the mask changes, or a whole copy where the scale is
            on. Until the mask is on, they are kept in any case.
        revision, require_revision, token, cache_dir, local_files_only, require_signature: as of `pull`; not used for an
            `Adapter`, which was verified when it was read.

    Raises:
        BackboneMismatchError: if the model is not the base that the adapter was made for.
        AdapterError: if the adapter is not there or not valid, or has no source. HubError: if the download failed.

    Example:
        load_mask(model, "user/my-mask")
        outputs = model(images)
        unload_mask(model)  # the base again, to the bit
    """
    check_choices(verify, head, mode)
    unwrap(model)  # a wrong argument is told before anything is fetched
    chain, several = read_chain(ref, options)
    if not several and verify != "off":
        take_off(model)
        chain = with_earlier(chain[0], lambda one: _check_is_for(model, one), options)
    check_mode(chain, mode)
    if len(chain) > 1:
        return load_chain(model, chain, verify=verify, restorable=restorable)
    adapter = chain[0]
    parts = loaded_parts(adapter, head, mode)
    take_off(model)
    place = find_place(model, adapter.base, parts.masks.shapes)
    inner = view(model, place)
    check_masks(inner, parts.masks.shapes)  # before the digests, since quantised weights have none
    masks = _masks_on(inner, adapter, verify)
    masks = masks if mode == "target" else removing(masks)
    apply_parts(model, parts, mask_id=adapter.mask_id, masks=masks, restorable=restorable, place=place)
    if place != TOP:
        LOG.warning("the names of %s stand %s in this model", adapter.path, place)
    return model


def load_chain(model: Model, chain: Sequence[Adapter], *, verify: Verify, restorable: bool) -> Model:
    """Apply a chain of patches as one, and compare the model with what the last one makes; see `load_mask`."""
    check_chain(chain)
    base = base_of_chain(chain)
    shapes = {name: shape for one in chain for name, shape in one.shapes().items()}
    take_off(model)
    place = find_place(model, base, shapes)
    inner = view(model, place)
    check_masks(inner, shapes)
    check_base(inner, base, verify, stacklevel=5)
    parts, last = merged(chain, tensors_of(inner)), chain[-1]

    def check() -> None:
        checked(verify, lambda: check_result(measure_body(inner, last.base.head), last), stacklevel=7)

    apply_parts(model, parts, mask_id=last.mask_id, restorable=restorable, place=place, check=check)
    return model


def read_chain(
    ref: Reference | Adapter | Sequence[Reference | Adapter], options: PullOptions
) -> tuple[list[Adapter], bool]:
    """Return the adapters that were given, and whether they were given as several."""
    several = isinstance(ref, list | tuple)  # whatever else it is is told as no reference
    given: Sequence[Reference | Adapter] = ref if several else [ref]  # type: ignore[assignment,list-item]
    chain = [one if isinstance(one, Adapter) else load_adapter(one, **options) for one in given]
    if not chain:
        raise ConfigError("a chain has at least one patch, got none; give the references of patches, oldest first")
    return chain, several


def check_mode(chain: Sequence[Adapter], mode: Mode) -> None:
    if len(chain) > 1 and mode != "target":
        raise ConfigError("mode='source' is for an adapter alone, and a chain has several; leave it out")


def check_result(found: Measured, last: Adapter) -> None:
    """Compare a body with what the last patch of a chain makes, if that says it."""
    if last.about.result is None:
        return
    try:
        check_measured(found, replace(last.base, digests=last.about.result, tensors={}))
    except BackboneMismatchError:
        raise BackboneMismatchError(
            f"with {last.path} the weights are not those that it says it makes, so that the model does not keep them; "
            f"fetch the patches of the chain again, or tell who wrote them"
        ) from None


def with_earlier(newest: Adapter, check: Callable[[Adapter], object], options: PullOptions) -> list[Adapter]:
    """Return the chain that ends in a patch: from the earlier commit whose patch fits the model's weights on.

    `check` raises BackboneMismatchError for one that does not.
    """
    chain = [newest]
    if newest.about.result is None or newest.pinned == newest.path or why_no_patch(newest) is not None:
        return chain
    before = earlier_adapters(newest, **options)
    while True:
        try:
            check(chain[0])
            return chain
        except BackboneMismatchError:
            found = next(before, None)
        if found is None:
            return chain
        chain.insert(0, found)
        if found.about.result != chain[1].base.digests:
            return chain  # a gap, of which the chain is refused


def _check_is_for(model: nn.Module, adapter: Adapter) -> None:
    check_measured(measure_body(view(model, find_place(model, adapter.base, adapter.shapes())), ()), adapter.base)


def check_choices(verify: Verify, head: HeadChoice = "replace", mode: Mode = "target") -> None:
    for name, value, kind in (("verify", verify, Verify), ("head", head, HeadChoice), ("mode", mode, Mode)):
        check_choice(name, value, kind)


def check_one_set(adapter: Adapter) -> None:
    if len(adapter.sets) > 1:
        how = "masks are loaded from adapters of one"
        if adapter.cascade is not None:
            how = "it is a cascade: use load_cascade, or `maskpack cascade eval` and `maskpack predict`"
        raise StateError(f"{adapter.path} holds {len(adapter.sets)} mask sets; {how}")


def loaded_parts(adapter: Adapter, head: HeadChoice, mode: Mode) -> Parts:
    """Return the parts of an adapter with one mask set; its masks are decoded when they are used."""
    check_one_set(adapter)
    parts = adapter.parts(stream=True)
    if mode == "target":
        replaces = parts.head is None or parts.head.module is not None
        if head == "replace":
            return parts if replaces else replace(parts, head=None)
        beside = {name: one for name, one in parts.parameters.items() if not inside(name, adapter.base.head)}
        return replace(parts, head=None, parameters=beside)
    if not parts.values:
        raise AdapterError(f"{adapter.path} replaces no weights; mode='source' is for adapters of `maskpack transfer`")
    return Parts(parts.masks)


def decoded_parts(adapter: Adapter, base: nn.Module, set: str = "default") -> Parts:
    """Return the parts of a set with decoded masks, which stay on the device that decodes them."""
    masks = {name: mask.but(zeros=None) for name, mask in adapter.iter_masks(set, base, zeros=True)}
    return replace(adapter.parts(set, stream=True), masks=MaskSet(masks))


def removing(masks: Iterable[tuple[str, PackedMask]]) -> Iterator[tuple[str, PackedMask]]:
    """Yield masks by name, with op "zero" in the place of op "replace"."""
    for name, mask in masks:
        yield name, mask.but(op="zero") if mask.op == "replace" else mask


def take_off(model: nn.Module) -> None:
    """Unload what a model has loaded; StateError if it has scores or belongs to a bank."""
    if applied(model) is not None:
        unload_mask(model)
    check_free(model)


def _masks_on(model: nn.Module, adapter: Adapter, verify: Verify) -> Iterable[tuple[str, PackedMask]]:
    """Return an adapter's masks, which are decoded while the base is hashed and compared."""
    masks = adapter.iter_masks(base=unwrap(model), zeros=True)
    if verify == "off":
        return masks
    if any_shared(named_parameters(model)):  # they are gathered for both, one after another
        check_base(model, adapter.base, verify, stacklevel=5)
        return masks
    measured = in_thread(lambda: measure_body(model, adapter.base.head))
    try:
        decoded = list(masks)
    finally:  # a wrong base is the error to raise, whatever it made of decoding
        checked(verify, lambda: check_measured(measured(), adapter.base), stacklevel=4)
    return decoded


def check_base(model: nn.Module, base: Fingerprint, verify: Verify, stacklevel: int) -> None:
    checked(verify, lambda: check_measured(measure_body(model, base.head), base), stacklevel)


def checked(verify: Verify, compare: Callable[[], object], stacklevel: int) -> None:
    """Call `compare`, which may raise BackboneMismatchError; with "warn" that is a warning, and "off" calls nothing."""
    if verify == "off":
        return
    try:
        compare()
    except BackboneMismatchError as error:
        if verify == "strict":
            raise
        warnings.warn(str(error), MaskpackWarning, stacklevel=stacklevel)
