"""Checkpoints of a training run: one sealed safetensors file; no pickle."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from ..errors import StateError
from .sealed import damaged, read_with_facts, write_with_facts

FILE = "checkpoint.safetensors"
REMEDY = "delete it and train without --resume"
# what a checkpoint says beside its tensors, and how
FACTS: dict[str, tuple[type, ...]] = {
    **{"run": (dict,), "metrics": (dict,), "more": (dict,), "scaler": (dict, type(None)), "batches": (dict,)},
    **dict.fromkeys(("epoch", "step", "steps", "count", "log"), (int,)),
    **{"loss": (float,), "done": (bool,), "extended": (list,), "optimizer": (list,)},
}
OBJECTIVE = "objective/"  # begins the names of what an objective keeps beside its module


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> None:
    """Write the trained tensors, the optimiser's state and the facts to continue from; atomic.

    Args:
        tensors: scores, head and buffers by name; what an objective keeps beside them as `OBJECTIVE` and a name.
        facts: JSON values, those of `FACTS`; `run` must be equal for a run to be resumed.
    """
    state = optimizer.state_dict()["state"]
    whole = {name if name.startswith(OBJECTIVE) else f"model/{name}": tensor for name, tensor in tensors.items()}
    for index, values in state.items():
        whole |= {f"optimizer/{index}/{key}": one for key, one in values.items() if isinstance(one, Tensor)}
    write_with_facts(path, whole, {**facts, "optimizer": sorted(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint: (tensors by name, optimiser state by parameter index, facts).

    Raises:
        StateError: if there is none, or it is damaged.
    """
    if not path.is_file():
        raise StateError(f"there is no checkpoint to resume from at {path}; train without --resume")
    whole, facts = read_with_facts(path, REMEDY)
    for name, kinds in FACTS.items():
        check_kind(path, name, facts.get(name, "missing"), kinds)
    check_kind(path, "run.config", facts["run"].get("config"), (dict,))
    check_kind(path, "run.base", facts["run"].get("base"), (str,))
    for name, value in facts["metrics"].items():
        check_kind(path, f"metrics.{name}", value, (int, float))
    for name, value in facts["batches"].items():
        check_like(path, f"batches.{name}", dict(enumerate(value)) if type(value) is list else value, {0: 0, 1: 0})
    for index in facts["optimizer"]:
        check_kind(path, "optimizer", index, (int,))
    tensors, state = dict[str, Tensor](), {index: dict[str, Tensor]() for index in facts["optimizer"]}
    for name, tensor in whole.items():
        kind, _, own = name.partition("/")
        index, _, key = own.partition("/")
        if kind == "optimizer" and index.isdecimal() and int(index) in state:
            state[int(index)][key] = tensor
        elif kind == "model" or name.startswith(OBJECTIVE):
            tensors[own if kind == "model" else name] = tensor
        else:
            raise damaged(path, REMEDY, f"the tensor {name!r} is not expected")
    return tensors, state, facts


def check_kind(path: Path, name: str, value: Any, kinds: Collection[type]) -> None:
    """Raise StateError if a fact has another type."""
    if type(value) not in kinds:
        words = " or ".join(kind.__name__ for kind in kinds)
        raise damaged(path, REMEDY, f"the fact {name!r} is {str(value)[:80]}, expected {words}")


def check_like(path: Path, name: str, value: Any, example: Any) -> None:
    """Raise StateError if a fact has not the types of an example; an empty object there stands for any object."""
    check_kind(path, name, value, (type(example),))
    if isinstance(example, dict) and example:
        for key in sorted(example.keys() | value.keys()):
            if key not in example or key not in value:
                raise damaged(
                    path, REMEDY, f"the fact {name}.{key} is {'missing' if key in example else 'not expected'}"
                )
            check_like(path, f"{name}.{key}", value[key], example[key])


def check_same_run(
    folder: Path, ours: Mapping[str, Any], there: Mapping[str, Any], apart: Collection[str] = ()
) -> None:
    """Compare the facts of a run with those of the checkpoint in a folder.

    Args:
        apart: settings that may differ.

    Raises:
        StateError: if they differ; the message names the facts, and of `config` the settings.
    """
    differing = [key for key in ours if there.get(key) != ours[key] and key != "config"]
    config = {key: value for key, value in ours["config"].items() if key not in apart}
    differing += [key for key, value in config.items() if there["config"].get(key) != value]
    if differing:
        raise StateError(
            f"the checkpoint in {folder} belongs to another run: {', '.join(differing)} differ; resume with "
            f"the same settings, data and backbone, or choose another folder"
        )


def check_tensors(path: Path, prefix: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise StateError if tensors have not the names, dtypes and shapes that are expected.

    Those of an objective may have other lengths.
    """
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            raise damaged(
                path, REMEDY, f"the tensor {prefix + name!r} is {'missing' if name in expected else 'not expected'}"
            )
        one, other = found[name], expected[name]
        same = one.ndim == other.ndim if name.startswith(OBJECTIVE) else one.shape == other.shape
        if not same or one.dtype != other.dtype:
            raise damaged(
                path,
                REMEDY,
                f"the tensor {prefix + name!r} is {one.dtype} of shape {tuple(one.shape)}, expected {other.dtype} of "
                f"shape {tuple(other.shape)}",
            )


def restore(
    path: Path,
    ours: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    state: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Copy a checkpoint's tensors into the run's own, and its state into the optimiser; all are compared first.

    What an objective keeps is compared alone.

    Raises:
        StateError: if one is missing, not expected, or of another dtype or shape.
    """
    check_tensors(path, "", tensors, ours)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = ("momentum_buffer",) if "momentum" in optimizer.param_groups[0] else ("step", "exp_avg", "exp_avg_sq")
    for index, values in state.items():
        if not 0 <= index < len(parameters):
            raise damaged(path, REMEDY, f"optimizer/{index} is not expected: there are {len(parameters)} parameters")
        expected = {key: torch.tensor(0.0) if key == "step" else parameters[index] for key in keys}
        check_tensors(path, f"optimizer/{index}/", values, expected)
    with torch.no_grad():
        for name, tensor in ours.items():
            if not name.startswith(OBJECTIVE):
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
    there = {name: t for name, t in tensors.items() if name not in fresh and not name.startswith(OBJECTIVE)}
    differing = sorted(name for name in taken.keys() | there.keys() if _kind(there.get(name)) != _kind(taken.get(name)))
    if differing:
        raise StateError(
            f"the run in {path.parent} ended with other tensors: {len(differing)} differ, first {differing[0]!r}; "
            f"start from a run with the same selection, objective and BatchNorm setting"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            tensor.copy_(there[name])


def _kind(tensor: Tensor | None) -> tuple[torch.dtype, torch.Size] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape)


def checkpoint_digest(path: Path) -> str:
    """Return the BLAKE3 of a checkpoint's file, in hexadecimal.

    Raises:
        StateError: if there is none.
    """
    if not path.is_file():
        raise StateError(f"there is no checkpoint to start from at {path}; train that run first")
    return blake3().update_mmap(path).hexdigest()


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained and every buffer, by name: all that a run changes."""
    found: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    found.update(dict(module.named_buffers()))
    return dict(sorted(found.items()))
