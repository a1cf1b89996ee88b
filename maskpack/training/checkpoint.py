"""Checkpoints of a training run: one safetensors file, the facts as JSON in a tensor; no pickle."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, StateError
from ..tensorfile import read_tensors, write_tensors

FILE = "checkpoint.safetensors"


def run_folder(output: str | Path | None, resume: bool) -> Path | None:
    """Return the folder of a run, made if it is not there; None for None.

    Raises:
        StateError: as `check_untaken`.
    """
    if output is None:
        return None
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    check_untaken(folder, resume)
    return folder


def check_untaken(folder: Path, resume: bool) -> None:
    """Raise StateError if a folder has a checkpoint, and its run is not to be resumed."""
    if (folder / FILE).exists() and not resume:
        raise StateError(
            f"{folder} holds the checkpoint of an earlier run; continue it with resume, or choose another folder"
        )


def write_with_facts(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, and JSON values as one more of them; atomic."""
    text = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    write_tensors(path, {**tensors, "facts": text}, {"format": "pt"})


def read_with_facts(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_with_facts` wrote.

    Raises:
        StateError: if it is damaged; `remedy` says what else it may be and what to do then.
    """
    try:
        whole = read_tensors(path)
        return whole, json.loads(whole.pop("facts").numpy().tobytes())
    except (DataError, KeyError, ValueError):
        raise StateError(f"{path} is damaged, or {remedy}") from None


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
    write_with_facts(path, whole, facts)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: (tensors by name, optimiser state by parameter index, facts).

    Raises:
        StateError: if there is none, or it is damaged.
    """
    if not path.is_file():
        raise StateError(f"there is no checkpoint to resume from at {path}; train without --resume")
    whole, facts = read_with_facts(path, "no checkpoint; delete it and train without --resume")
    tensors = {name.removeprefix("model/"): t for name, t in whole.items() if name.startswith("model/")}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in whole.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    return tensors, state, facts


def check_same_run(folder: Path, ours: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Compare the facts of a run with those of the checkpoint in a folder.

    Raises:
        StateError: if they differ; the message names the facts, and of `config` the settings.
    """
    differing = [key for key in ours if there.get(key) != ours[key] and key != "config"]
    differing += [key for key, value in ours["config"].items() if there["config"].get(key) != value]
    if differing:
        raise StateError(
            f"the checkpoint in {folder} belongs to another run: {', '.join(differing)} differ; resume with "
            f"the same settings, data and backbone, or choose another folder"
        )


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


def take_over(module_tensors: Mapping[str, Tensor], path: Path, base: str, fresh: Collection[str]) -> None:
    """Copy what another run ended with into a new run, to start from, except the tensors called `fresh`.

    Args:
        base: digest of the new run's backbone.

    Raises:
        StateError: if there is no checkpoint, or it is of another backbone or of other tensors.
    """
    tensors, _, facts = load_checkpoint(path)
    if facts["run"]["base"] != base:
        raise StateError(f"the run in {path.parent} is of another backbone; start from one of the same")
    taken = {name: tensor for name, tensor in module_tensors.items() if name not in fresh}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in fresh}
    differing = sorted(name for name in taken.keys() | shapes.keys() if shapes.get(name) != _shape(taken.get(name)))
    if differing:
        raise StateError(
            f"the run in {path.parent} ended with other tensors: {len(differing)} differ, first {differing[0]!r}; "
            f"start from a run with the same selection, objective and BatchNorm setting"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            tensor.copy_(tensors[name])


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def checkpoint_digest(path: Path) -> str:
    """Return the hex sha256 of a checkpoint.

    Raises:
        StateError: if there is none.
    """
    if not path.is_file():
        raise StateError(f"there is no checkpoint to start from at {path}; train that run first")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained and every buffer, by name: all that a run changes."""
    found: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    found.update(dict(module.named_buffers()))
    return dict(sorted(found.items()))
