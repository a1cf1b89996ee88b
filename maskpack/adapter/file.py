"""Writing adapters: folder or file, whole or not at all; see `read.py` for the way back."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from ..backbone.fingerprint import Fingerprint
from ..codecs.base import Profile
from ..errors import AdapterError, CorruptAdapterError, StateError
from ..mask import MaskSet
from ..parts import CascadeParts, Parts
from ..tensorfile import Blob, replacing, write_blobs
from ..tensorheader import SEAL, UNSEALED
from ..threads import Progress
from .adapter import Adapter
from .card import render_card, update_card
from .describe import config_text, describe
from .encode import check_names, encode
from .header import Header
from .read import CONFIG_FILE, MAX_CONFIG, MODEL_FILE, read_adapter, read_file
from .sign import remove_signature
from .spool import Spool
from .weights import Weights, by_name

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
