"""A model's state dict as a safetensors file, or several: written, and loaded strictly."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import BackboneError
from ..mask import Shape
from ..tensorfile import read_tensors, write_tensors
from .head import swap_module
from .parameters import aliases, canonical, unwrap


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


COUNTER = "num_batches_tracked"  # of BatchNorm; it has no effect on what is computed


def load_weights(model: nn.Module, path: str | Path, head: str | None = None) -> None:
    """Load a safetensors state dict into a model, strictly.

    Args:
        path: a safetensors file, the index of one in several files (`*.safetensors.index.json`), or a folder of either.
        head: dotted name of the model's head, which the file may have for other classes.

    Raises:
        BackboneError: if names or shapes differ; the message shows the first of them.
        DataError: if the file cannot be used.
    """
    load_tensors(model, read_tensors(path), path, head)


def load_tensors(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, head: str | None = None) -> None:
    """Load what was read from a file into a model; as `load_weights`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if head is not None:
        fit_head(model, head, shapes)
    stored = sources(model, shapes, path)
    model = unwrap(model)
    wanted = {name: stored.get(canonical(name)) for name in model.state_dict()}
    model.load_state_dict({name: state[source] for name, source in wanted.items() if source is not None}, strict=True)


def sources(model: nn.Module, shapes: Mapping[str, Shape], path: str | Path) -> dict[str, str]:
    """Return, for each tensor of a model's state dict by canonical name, which tensor of a file it is loaded from.

    A tied tensor may be in the file under one of its names alone, as Hugging Face writes it. The counters of BatchNorm
    may be missing, as in files of old PyTorch: they stay.

    Args:
        shapes: of the tensors of the file. path: what messages call it.

    Raises:
        BackboneError: if names or shapes differ; the message shows the first of them.
    """
    own = {canonical(name): tensor for name, tensor in unwrap(model).state_dict(keep_vars=True).items()}
    first = aliases(model)
    present: dict[str, str] = {}
    for name in sorted(own.keys() & shapes.keys()):
        present.setdefault(first.get(name, name), name)
    found = {name: name if name in shapes else present.get(first.get(name, name)) for name in own}
    missing = sorted(name for name, source in found.items() if source is None and not name.endswith(COUNTER))
    unexpected = sorted(shapes.keys() - own.keys())
    other = [
        f"{name}: {shapes[source]} in the file, {tuple(own[name].shape)} in the model"
        for name, source in found.items()
        if source is not None and shapes[source] != tuple(own[name].shape)
    ]
    if missing or unexpected or other:
        raise BackboneError(
            f"the weights in {path} do not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(other)} of another shape {other[:3]}"
        )
    return {name: source for name, source in found.items() if source is not None}


def fit_head(model: nn.Module, head: str, shapes: Mapping[str, Shape]) -> None:
    """Give a model a linear head for as many classes as a state dict of these shapes has weights for."""
    own, weight = unwrap(model).get_submodule(head), shapes.get(f"{head}.weight", ())
    bias = f"{head}.bias" in shapes
    if len(weight) != 2 or not isinstance(own, nn.Linear) or weight[1] != own.in_features:
        return
    had = own.bias is not None
    if bias >= had and (weight[0] != own.out_features or bias != had):
        swap_module(model, head, nn.Linear(own.in_features, weight[0], bias, own.weight.device, own.weight.dtype))
