"""The masked dense model as a file, for tools that know nothing of masks."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..backbone.parameters import canonical, unwrap
from ..tensorfile import write_tensors


def export_state(path: str | Path, model: nn.Module, metadata: Mapping[str, str] | None = None) -> int:
    """Write a model's state dict, as it is now, as a safetensors file; return the number of tensors.

    Tied tensors are written under each of their names, so that the file loads strictly.

    Raises:
        StateError: if the file cannot be written.
    """
    state = unwrap(model).state_dict()
    tensors = {canonical(name): tensor.cpu() for name, tensor in state.items() if isinstance(tensor, Tensor)}
    write_tensors(path, tensors, {"format": "pt", **(metadata or {})})
    return len(tensors)
