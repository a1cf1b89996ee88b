"""Checkpoints of a training run: one safetensors file, the facts as JSON in a tensor; no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..tensorfile import read_tensors, write_tensors

FILE = "checkpoint.safetensors"


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> None:
    """Write the trained tensors, the optimiser's state and the facts to continue from; atomic.

    Args:
        tensors: scores, head and buffers by name.
        facts: JSON values, among them `run`, which must be equal for a run to be resumed.
    """
    state = optimizer.state_dict()["state"]
    whole = {f"model/{name}": tensor for name, tensor in tensors.items()}
    for index, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                whole[f"optimizer/{index}/{key}"] = value
    whole["facts"] = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    write_tensors(path, whole, {"format": "pt"})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: (tensors by name, optimiser state by parameter index, facts).

    Raises:
        StateError: if there is none.
    """
    if not path.is_file():
        raise StateError(f"there is no checkpoint to resume from at {path}; train without --resume")
    whole = read_tensors(path)
    tensors = {name.removeprefix("model/"): t for name, t in whole.items() if name.startswith("model/")}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in whole.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    return tensors, state, json.loads(whole["facts"].numpy().tobytes())


def restore(
    module_tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    state: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Copy a checkpoint's tensors into the run's, and its state into the optimiser."""
    with torch.no_grad():
        for name, tensor in module_tensors.items():
            tensor.copy_(tensors[name])
    whole = optimizer.state_dict()
    whole["state"] = {index: dict(values) for index, values in state.items()}
    optimizer.load_state_dict(whole)


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained and every buffer, by name: all that a run changes."""
    found: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    found.update(dict(module.named_buffers()))
    return dict(sorted(found.items()))
