"""load_mask and unload_mask: an adapter by reference, onto a model."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal, TypeVar, Unpack

from torch import nn

from ..adapter.content import Parts
from ..adapter.decode import Weights
from ..adapter.read import Adapter
from ..backbone.fingerprint import check_measured, measure_body
from ..backbone.model import unwrap
from ..errors import AdapterError, BackboneMismatchError, ConfigError, StateError
from ..hub.pull import PullOptions, open_adapter
from ..mask import PackedMask
from ..threads import in_thread
from .apply import applied, apply_parts, check_masks, restore

Model = TypeVar("Model", bound=nn.Module)
Reference = str | os.PathLike[str]
Verify = Literal["strict", "warn", "off"]
VERIFY = ("strict", "warn", "off")
HeadChoice = Literal["replace", "keep"]
Mode = Literal["target", "source"]
MODES: tuple[Mode, ...] = ("target", "source")


class MaskpackWarning(UserWarning):
    """Warned when verification is relaxed and the base differs."""


def load_adapter(ref: Reference, **options: Unpack[PullOptions]) -> Adapter:
    """Read and verify an adapter from the Hub, a folder or a single file; nothing is decoded or applied yet.

    Args:
        ref: `user/name`, `user/name@revision`, `./folder`, `/folder` or `file.safetensors`.
        revision, require_revision, token, cache_dir, local_files_only, require_signature: as of `pull`.

    Returns:
        The adapter; its `pinned` is the reference that always means these bytes.

    Raises:
        AdapterError: if it is not there or not valid. HubError: if the download failed.
    """
    return open_adapter(ref, **options).adapter


def load_mask(
    model: Model,
    ref: Reference | Adapter,
    *,
    verify: Verify = "strict",
    head: HeadChoice = "replace",
    mode: Mode = "target",
    restorable: bool = True,
    **options: Unpack[PullOptions],
) -> Model:
    """Apply an adapter to a model in place and return the same model.

    Class, parameter names, storage and `requires_grad` of the body stay. A mask loaded before is unloaded first. If it
    fails or is interrupted, the model is the base, to the bit; if it is interrupted once more while it puts that back,
    `unload_mask(model)` finishes it.

    Args:
        ref: `user/name[@revision]` on the Hub, a folder, a `.safetensors` file, or an `Adapter`.
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
    """
    check_choices(verify, head, mode)
    adapter = ref if isinstance(ref, Adapter) else load_adapter(ref, **options)
    parts = loaded_parts(adapter, head, mode)
    clear(model, adapter)
    masks = _masks_on(model, adapter, verify)
    masks = masks if mode == "target" else removing(masks)
    apply_parts(model, parts, mask_id=adapter.mask_id, masks=masks, restorable=restorable)
    return model


def check_choices(verify: Verify, head: HeadChoice = "replace", mode: Mode = "target") -> None:
    """Raise ConfigError if one of these arguments of `load_mask` is not one of its values."""
    if verify not in VERIFY or head not in ("replace", "keep") or mode not in MODES:
        raise ConfigError(
            f"verify must be strict, warn or off, head replace or keep, and mode target or source; got "
            f"verify={verify!r}, head={head!r}, mode={mode!r}"
        )


def check_one_set(adapter: Adapter) -> None:
    """Raise StateError if an adapter holds more than one mask set."""
    if len(adapter.sets) > 1:
        how = "masks are loaded from adapters of one"
        if adapter.cascade is not None:
            how = "it is a cascade: use load_cascade, or `maskpack cascade eval` and `maskpack predict`"
        raise StateError(f"{adapter.path} holds {len(adapter.sets)} mask sets; {how}")


def loaded_parts(adapter: Adapter, head: HeadChoice, mode: Mode, base: Weights | None = None) -> Parts:
    """Return what an adapter of one mask set puts onto a model, with masks that are decoded when they are asked for.

    Args:
        head, mode: as of `load_mask`. base: as of `Adapter.parts`.

    Raises:
        StateError: if it has several sets. AdapterError: if `mode` is "source" and it has none.
    """
    check_one_set(adapter)
    parts = adapter.parts(base=base, stream=True)
    if mode == "target":
        replaces = parts.head is not None and parts.head.module is not None and head == "replace"
        return parts if replaces else replace(parts, head=None)
    if not parts.values:
        raise AdapterError(
            f"{adapter.path} replaces no weights, so it holds no source; mode='source' is for adapters of "
            f"`maskpack transfer`: leave it out"
        )
    return Parts(parts.masks)


def removing(masks: Iterable[tuple[str, PackedMask]]) -> Iterator[tuple[str, PackedMask]]:
    """Yield masks by name, with op "zero" in the place of op "replace"."""
    for name, mask in masks:
        yield name, replace(mask, op="zero") if mask.op == "replace" else mask


def clear(model: nn.Module, adapter: Adapter) -> None:
    """Unload what a model has loaded, and check that it has the parameters that an adapter's masks are for."""
    if applied(model) is not None:
        restore(model)
    for name in adapter.sets:  # before the digests, since quantised weights have none
        check_masks(model, adapter.shapes(name))


def _masks_on(model: nn.Module, adapter: Adapter, verify: Verify) -> Iterable[tuple[str, PackedMask]]:
    """Return an adapter's masks, which are decoded while the base is hashed and compared."""
    masks = adapter.iter_masks(base=unwrap(model), zeros=True)
    if verify == "off":
        return masks
    measured = in_thread(lambda: measure_body(model, adapter.base.head))
    try:
        decoded = list(masks)
    finally:  # a wrong base is the error to raise, whatever it made of decoding
        checked(verify, lambda: check_measured(measured(), adapter.base), stacklevel=4)
    return decoded


def check_base(model: nn.Module, adapter: Adapter, verify: Verify, stacklevel: int) -> None:
    """Compare a model with an adapter's base, as `load_mask` does."""
    checked(verify, lambda: check_measured(measure_body(model, adapter.base.head), adapter.base), stacklevel)


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


def unload_mask(model: Model, *, force: bool = False) -> Model:
    """Undo `load_mask`: weights, statistics and head get back, to the bit, what they had; return the same model.

    If it is interrupted or fails, the next call finishes it. That also holds for a `load_mask` that was interrupted
    twice, so that it could not undo itself.

    Parameters that something else wrote meanwhile (an optimizer step, `load_state_dict`) are noticed by PyTorch's count
    of in-place writes. Only those that the mask changes are looked at, and no buffers: a forward pass in training mode
    writes the statistics of BatchNorm. `model.to` and `model.half` leave the count as it is, and what is put back is
    moved or cast alike. Not counted, and so not noticed: writes through `.data` or numpy, fused optimizers
    (`fused=True`), and tensors made in inference mode.

    Args:
        force: undo although parameters were written: what the mask changed gets its earlier values, the rest stays as
            it was written.

    Raises:
        StateError: if no mask is loaded, it was loaded with restorable=False, or parameters were written meanwhile.
    """
    restore(model, force=force)
    return model
