"""An adapter packed anew: the same masks and all that travels with them, in other codecs."""

from pathlib import Path

from torch import nn

from ..backbone.fingerprint import check_fingerprint
from ..codecs.base import Profile
from ..parts import Parts
from ..tensorfile import Blob
from ..threads import Progress
from .adapter import Adapter
from .decode import check_id
from .encode import encode
from .file import CARD_FILE, write_adapter
from .header import Header
from .read import MODEL_FILE, read_adapter
from .spool import Spool
from .weights import by_name


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
        profile, codec: as in `save_adapter`.
        base: the adapter's frozen base; needed where masks were packed with its weights, or are to be.
        progress: as in `save_adapter`.

    Raises:
        AdapterError: if masks were packed with the base's weights and it is not given.
        BackboneMismatchError: if the base given is not the adapter's.
        CorruptAdapterError: if the masks are not those that the adapter states.
        Others: as `read_adapter` and `save_adapter`.
    """
    old = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if base is not None:
        check_fingerprint(base, old.base)
    sets = {
        name: Parts(
            old.stream_masks(base, name),
            old.head(name),
            old.statistics(name),
            old.parameters(name),
            old.values(name),
        )
        for name in old.sets
    }

    def coded(spool: Spool) -> tuple[Header, list[Blob]]:
        header, blobs = encode(
            sets,
            old.base,
            None if base is None else by_name(base),
            profile,
            codec,
            spool,
            progress,
            task=old.task,
            class_names=old.class_names,
            preprocess=old.preprocess_config,
            training=old.training,
            cascade=old.cascade,
        )
        check_id(old.path, old.header, header.mask_id)
        return header, blobs

    card = Path(old.path).with_name(CARD_FILE)
    has_card = Path(old.path).name == MODEL_FILE and card.is_file()
    return write_adapter(Path(path), coded, card if has_card else None)
