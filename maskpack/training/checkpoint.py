"""Checkpoints of a run: sealed files; no pickle."""

import json
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from ..errors import CorruptAdapterError, StateError, StoppedError
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

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def on_signal(answer: Callable[[int], None]) -> Iterator[None]:
    """Answer the first SIGTERM or SIGUSR1; a second one does what it did before.

    In another than the main thread, where none arrives, nothing changes.
    """
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        # one that is ignored stays so, and one that was not installed by Python could not be put back
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        earlier = {number: one for number, one in handlers.items() if one not in (None, signal.SIG_IGN)}

    def put_back() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def first(number: int, _: object) -> None:
        put_back()
        answer(number)

    for number in earlier:
        signal.signal(number, first)
    try:
        yield
    finally:
        put_back()


@contextmanager
def stopping(remedy: str) -> Iterator[None]:
    """Raise StoppedError at SIGTERM and SIGUSR1, as at once as an interrupt.

    Args:
        remedy: how to go on.
    """

    def stop(number: int) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name}; {remedy}", number)

    with on_signal(stop):
        yield


DIGESTS = "digests"  # key in __metadata__: the BLAKE3 of every tensor; the header has one of its own


def _digest(*pieces: Buffer) -> str:
    whole = blake3()
    for piece in pieces:
        whole.update(piece)
    return whole.hexdigest()


def damaged(path: Path, remedy: str, what: str) -> StateError:
    """Return the error for a damaged file."""
    return StateError(f"{path} is damaged: {what}; {remedy}")


def write_with_facts(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, JSON values as one more of them, and the digests of all; atomic."""
    text = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    blobs = [Blob.of(*item) for item in {**tensors, "facts": text}.items()]
    digests = {blob.name: _digest(*blob.data) for blob in blobs}
    write_tensors(path, blobs, {"format": "pt", DIGESTS: json.dumps(digests, sort_keys=True), SEAL: UNSEALED})


def read_with_facts(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_with_facts` wrote, every bit of it verified.

    Raises:
        StateError: if it is damaged; `remedy` says what to do then.
    """
    try:
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise damaged(path, remedy, f"its header should end at byte {start}, the file has {len(data)}")
        head = bytes(data[8:start])
        metadata, spans = parse_header(memoryview(head), len(data) - start)
        check_seal(head, metadata)
        digests = strict_json(metadata.get(DIGESTS, "{}"), DIGESTS)
    except CorruptAdapterError as error:
        raise damaged(path, remedy, str(error).partition(";")[0]) from None
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    tensors = {}
    for name, (dtype, shape, first, last) in spans.items():
        part = memoryview(data)[start + first : start + last]
        if _digest(part) != digests.get(name):
            raise damaged(path, remedy, f"{name!r} has another digest than was stored")
        tensors[name] = tensor_of(part, dtype, shape)
    missing = digests.keys() - tensors.keys()
    if missing or "facts" not in tensors:
        raise damaged(path, remedy, f"{min(missing, default='facts')!r} is missing")
    try:
        facts = json.loads(tensors.pop("facts").numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, remedy, f"its facts are not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise damaged(path, remedy, f"its facts are no object but a {type(facts).__name__}")
    return tensors, facts


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
