"""What a bank takes in: checked against the model, and decoded."""

from pathlib import PurePath
from typing import Any

from torch import nn

from ..adapter.adapter import Adapter
from ..adapter.read import MODEL_FILE
from ..backbone.parameters import unwrap
from ..errors import ConfigError
from ..hub.download import PullOptions
from ..mask import MaskSet, mask_id
from ..parts import Parts
from .load import VERIFY, Verify, check_base, check_one_set, load_adapter
from .resident import Resident, parts_of
from .weights import check_masks


class Gate:
    """Checks adapters against one model.

    Args:
        verify: as of `load_mask`.
    """

    def __init__(self, model: nn.Module, verify: Verify):
        if verify not in VERIFY:
            raise ConfigError(f"verify must be strict, warn or off, got {verify!r}")
        self.model, self.verify = model, verify

    def admit(self, name: str, source: Adapter | MaskSet, options: PullOptions) -> Resident:
        """Check and decode an adapter, or masks alone, while the model has its base's bits.

        Raises:
            As `MaskBank.add`.
        """
        if isinstance(source, MaskSet):
            check_masks(self.model, source.shapes)
            masks = MaskSet(dict(source))
            return Resident(name, Parts(masks), mask_id({"default": masks}))
        check_one_set(source)
        check_masks(self.model, source.shapes())
        check_base(self.model, source, self.verify, stacklevel=4)
        parts, pinned = parts_of(source, unwrap(self.model)), source.pinned
        # what a branch or tag meant is pinned by the commit
        later: Any = {key: value for key, value in options.items() if key not in ("revision", "require_revision")}
        return Resident(
            name,
            parts,
            source.mask_id,
            lambda: load_adapter(pinned, **later),
            source.digest,
        )


def name_of(source: Adapter | MaskSet) -> str:
    """Return the last part of an adapter's reference, without commit and suffix; of a folder's file, the folder's.

    Raises:
        ConfigError: if masks are no adapter's.
    """
    if isinstance(source, MaskSet):
        raise ConfigError("masks that are no adapter have no name of their own; give one: bank.add(masks, 'name')")
    path = PurePath(source.pinned)
    name = path.parent.name if path.name == MODEL_FILE else path.name
    return name.split("@")[0].removesuffix(".safetensors")
