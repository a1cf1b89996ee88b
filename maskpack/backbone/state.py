"""A model's state dict as a safetensors file: written, and loaded strictly."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import BackboneError
from ..tensorfile import read_tensors, write_tensors
from .head import swap_module
from .parameters import canonical, unwrap


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


def load_weights(model: nn.Module, path: str | Path, head: str | None = None) -> None:
    """Load a safetensors state dict into a model, strictly.

    Args:
        head: dotted name of the model's head, which the file may have for other classes.

    Raises:
        BackboneError: if names or shapes differ; the message shows the first of them.
    """
    load_tensors(model, read_tensors(path), path, head)


def load_tensors(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, head: str | None = None) -> None:
    """Load what was read from a file into a model; as `load_weights`."""
    if head is not None:
        _fit_head(model, head, state)
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError:
        own = model.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        shapes = [f"{n}: {tuple(state[n].shape)} in the file, {tuple(own[n].shape)} in the model" for n in own
                  if n in state and own[n].shape != state[n].shape]  # fmt: skip
        raise BackboneError(
            f"the weights in {path} do not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of another shape {shapes[:3]}"
        ) from None


def _fit_head(model: nn.Module, head: str, state: Mapping[str, Tensor]) -> None:
    """Give a model a linear head for as many classes as a state dict has weights for."""
    own, weight = unwrap(model).get_submodule(head), state.get(f"{head}.weight")
    bias = f"{head}.bias" in state
    if weight is None or weight.ndim != 2 or not isinstance(own, nn.Linear) or weight.shape[1] != own.in_features:
        return
    had = own.bias is not None
    if bias >= had and (weight.shape[0] != own.out_features or bias != had):
        swap_module(model, head, nn.Linear(own.in_features, weight.shape[0], bias, own.weight.device, own.weight.dtype))
