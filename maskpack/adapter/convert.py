"""An adapter packed anew: the same masks and all that travels with them, in other codecs."""

from pathlib import Path

from torch import nn

from ..backbone.fingerprint import check_fingerprint
from ..codecs.base import Profile
from ..errors import CorruptAdapterError
from ..mask import mask_id
from ..parts import Parts
from ..tensorfile import replacing
from .adapter import Adapter
from .card import update_card
from .file import CARD_FILE, save_adapter
from .read import MODEL_FILE, read_adapter


def convert_adapter(
    adapter: Adapter | str | Path,
    path: str | Path,
    *,
    profile: Profile = "default",
    codec: str | None = None,
    base: nn.Module | None = None,
) -> Adapter:
    """Write an adapter again with another profile or codec; `mask_id` and everything but the coding stay.

    Args:
        adapter: opened, or its folder or file.
        path: folder or `.safetensors` file; may be the adapter's own. A new folder gets the owner's words of the card.
        profile, codec: as in `save_adapter`.
        base: the adapter's frozen base; needed where masks were packed with its weights, or are to be.

    Raises:
        AdapterError: if masks were packed with the base's weights and it is not given.
        BackboneMismatchError: if the base given is not the adapter's.
        CorruptAdapterError: if the masks are not those that the adapter states.
        Others: as `read_adapter` and `save_adapter`.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if base is not None:
        check_fingerprint(base, adapter.base)
    sets = {
        name: Parts(
            adapter.masks(base, name),
            adapter.head(name),
            adapter.statistics(name),
            adapter.parameters(name),
            adapter.values(name),
        )
        for name in adapter.sets
    }
    if (found := mask_id({name: parts.masks for name, parts in sets.items()})) != adapter.mask_id:
        raise CorruptAdapterError(
            f"{adapter.path}: the decoded masks have the mask_id {found}, the header states {adapter.mask_id}; fetch "
            f"the file again"
        )
    path = Path(path)
    card, earlier = path / CARD_FILE, Path(adapter.path)
    is_new = path.suffix != ".safetensors" and not card.exists()
    converted = save_adapter(
        path,
        sets,
        adapter.base,
        task=adapter.task,
        class_names=adapter.class_names,
        preprocess=adapter.preprocess_config,
        training=adapter.training,
        profile=profile,
        codec=codec,
        weights=base,
    )
    owners = earlier.with_name(CARD_FILE)
    if is_new and earlier.name == MODEL_FILE and owners.is_file():
        text = update_card(owners.read_bytes().decode("utf-8", "surrogateescape"), card.read_text(encoding="utf-8"))
        with replacing(card) as (temporary,):
            temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
    return converted
