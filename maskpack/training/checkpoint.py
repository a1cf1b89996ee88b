"""Sealed files, and the checkpoint of a run, which is one: safetensors with digests of all that it holds; no pickle."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from ..errors import CorruptAdapterError, StateError
from ..safetensors_io import (
    SEAL,
    UNSEALED,
    Blob,
    Buffer,
    check_seal,
    parse_header,
    strict_json,
    tensor_of,
    write_tensors,
)

DIGESTS = "digests"  # key in __metadata__: the BLAKE3 of every tensor; the header has one of its own
FILE = "checkpoint.safetensors"
REMEDY = "delete it and train without --resume"
# how the names of a checkpoint's tensors begin
MODEL, OBJECTIVE, OPTIMIZER = "model/", "objective/", "optimizer/"


def write_sealed(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, JSON values as one more of them, and the digests of all; atomic."""
    text = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    blobs = [Blob.of(*item) for item in {**tensors, "facts": text}.items()]
    digests = {blob.name: _digest(*blob.data) for blob in blobs}
    write_tensors(path, blobs, {"format": "pt", DIGESTS: json.dumps(digests, sort_keys=True), SEAL: UNSEALED})


def read_sealed(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_sealed` wrote, every bit of it verified: (tensors, JSON values); StateError with the remedy."""
    try:
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise damaged(path, f"its header should end at byte {start}, the file has {len(data)}", remedy)
        head = bytes(data[8:start])
        metadata, spans = parse_header(memoryview(head), len(data) - start)
        check_seal(head, metadata)
        digests = strict_json(metadata.get(DIGESTS, "{}"), DIGESTS)
    except CorruptAdapterError as error:
        raise damaged(path, str(error).partition(";")[0], remedy) from None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    tensors = {}
    for name, (dtype, shape, first, last) in spans.items():
        part = memoryview(data)[start + first : start + last]
        if _digest(part) != digests.get(name):
            raise damaged(path, f"{name!r} has another digest than was stored", remedy)
        tensors[name] = tensor_of(part, dtype, shape)
    missing = {*digests, "facts"} - tensors.keys()
    if missing:
        raise damaged(path, f"{min(missing)!r} is missing", remedy)
    try:
        facts = json.loads(tensors.pop("facts").numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its facts are not JSON: {error}", remedy) from None
    if not isinstance(facts, dict):
        raise damaged(path, f"its facts are no object but a {type(facts).__name__}", remedy)
    return tensors, facts


def _digest(*pieces: Buffer) -> str:
    whole = blake3()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def damaged(path: Path, what: str, remedy: str = REMEDY) -> StateError:
    """Return the error for a damaged file."""
    return StateError(f"{path} is damaged: {what}; {remedy}")


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> None:
    """Write what a run goes on from: all tensors that it changes, the optimiser's state, and JSON values; atomic."""
    state = optimizer.state_dict()["state"]
    moments = {
        f"{OPTIMIZER}{index}/{key}": one
        for index, values in state.items()
        for key, one in values.items()
        if isinstance(one, Tensor)
    }
    write_sealed(path, {**tensors, **moments}, {**facts, "optimizer": sorted(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: (tensors, facts); StateError if there is none, or it is damaged."""
    if not path.is_file():
        raise StateError(f"there is no checkpoint to resume from at {path}; train without --resume")
    return read_sealed(path, REMEDY)


def restore(
    path: Path,
    found: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    indices: Collection[int],
) -> None:
    """Copy a checkpoint's tensors into a run's own, and its state into the optimiser; all are compared first.

    Tensors of an objective are compared alone, and may have other lengths. `indices` are of the parameters of which the
    optimiser had a state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keys = ("momentum_buffer",) if "momentum" in optimizer.param_groups[0] else ("step", "exp_avg", "exp_avg_sq")
    expected = dict(ours)
    for index in indices:
        if not 0 <= index < len(parameters):
            raise damaged(path, f"optimizer/{index} is not expected: there are {len(parameters)} parameters")
        for key in keys:
            expected[f"{OPTIMIZER}{index}/{key}"] = torch.tensor(0.0) if key == "step" else parameters[index]
    for name, what in _differences(found, expected):
        raise damaged(path, f"the tensor {name!r} is {what}")
    _copy(found, {name: tensor for name, tensor in ours.items() if name.startswith(MODEL)})
    whole = optimizer.state_dict()
    whole["state"] = {index: {key: found[f"{OPTIMIZER}{index}/{key}"] for key in keys} for index in indices}
    optimizer.load_state_dict(whole)


@torch.no_grad()
def _copy(found: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    for name, tensor in ours.items():
        tensor.copy_(found[name])


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Yield (name, what is wrong) of tensors that are missing, not expected, or of another dtype or shape."""
    for name in sorted(found.keys() | expected.keys()):
        own, one, other = name.removeprefix(MODEL), found.get(name), expected.get(name)
        if one is None or other is None:
            yield own, "missing" if one is None else "not expected"
            continue
        same = one.ndim == other.ndim if name.startswith(OBJECTIVE) else one.shape == other.shape
        if not same or one.dtype != other.dtype:
            kinds = [f"{each.dtype} of shape {tuple(each.shape)}" for each in (one, other)]
            yield own, ", expected ".join(kinds)


def check_like(path: Path, name: str, value: Any, example: Any) -> None:
    """Raise StateError unless a fact has the types of an example.

    Args:
        example: the key "" stands for any keys, a list of one element for any number of such elements.
    """
    kinds = (float, int) if type(example) is float else (type(example),)
    if type(value) not in kinds:
        words = " or ".join(kind.__name__ for kind in kinds)
        raise damaged(path, f"the fact {name!r} is {str(value)[:80]}, expected {words}")
    if isinstance(example, dict):
        inner = dict.fromkeys(value, example[""]) if "" in example else example
        for key in sorted(inner.keys() | value.keys()):
            if key not in inner or key not in value:
                raise damaged(path, f"the fact {name}.{key} is {'missing' if key in inner else 'not expected'}")
            check_like(path, f"{name}.{key}", value[key], inner[key])
    elif isinstance(example, list) and example:
        kept = example * len(value) if len(example) == 1 else example
        if len(kept) != len(value):
            raise damaged(path, f"the fact {name!r} has {len(value)} elements, expected {len(kept)}")
        for one, other in zip(value, kept, strict=True):
            check_like(path, name, one, other)


def take_over(ours: Mapping[str, Tensor], path: Path, base: str, fresh: Collection[str] = ()) -> None:
    """Copy what another run on the backbone with this digest ended with into a new run, but for tensors in `fresh`."""
    tensors, facts = load_checkpoint(path)
    if facts.get("run", {}).get("base") != base:
        raise StateError(f"the run in {path.parent} is of another backbone; start from one of the same")
    left_out = {MODEL + name for name in fresh}
    mine, there = (
        {name: one for name, one in own.items() if name.startswith(MODEL) and name not in left_out}
        for own in (ours, tensors)
    )
    differing = list(_differences(there, mine))
    if differing:
        raise StateError(
            f"the run in {path.parent} ended with other tensors: {len(differing)} differ, first {differing[0][0]!r}; "
            f"start from a run with the same selection, objective and BatchNorm setting"
        )
    _copy(there, mine)


def checkpoint_digest(path: Path) -> str:
    """Return the BLAKE3 of a checkpoint's file, in hexadecimal."""
    if not path.is_file():
        raise StateError(f"there is no checkpoint to start from at {path}; train that run first")
    return blake3().update_mmap(path).hexdigest()
