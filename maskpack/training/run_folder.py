"""The folder of a run: its lock and claim, its log, its checkpoint in a sealed file, and signals that stop it."""

import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypedDict

import torch
from blake3 import blake3
from torch import Tensor

from ..backbone.fingerprint import tensor_digest
from ..errors import ConfigError, CorruptAdapterError, DataError, StateError, StoppedError, require
from ..safetensors_io import (
    SEAL,
    UNSEALED,
    lock,
    read_with_seal,
    strict_json,
    write_file,
    write_tensors,
    writing,
)

Report = Callable[[Mapping[str, Any]], None]


class PartOptions(TypedDict, total=False):
    """Options for checkpoints and progress of a training.

    Attributes:
        resume: go on from what an interrupted run left in `output`. On one process and CPU the result is, bit for bit,
            that of a run that was not interrupted.
        checkpoint_every: a time or a number of optimiser steps, as in "10min" or "500steps"; None: every epoch.
        report: called, in the main process, with every event: {"event": "begin" | "step" | "epoch" | "warning" | "end",
            "step", "steps", "loss", "density", …}, and with "part", the name of the run where there are several.
            If it is not given, a bar shows the progress in a terminal or a notebook, elsewhere the logger `maskpack`
            does, at level INFO. None shows nothing.
    """

    resume: bool
    checkpoint_every: str | None
    report: Report | None


class RunOptions(PartOptions, total=False):
    """The same options, and the folder.

    Attributes:
        output: folder for checkpoint, `log.jsonl` and TensorBoard curves, of one run at a time; None keeps nothing.
    """

    output: str | Path | None


def tagged(report: Report | None, part: str) -> Report | None:
    """Return a report whose events have also "part", the name of the run that they are of."""
    return None if report is None else lambda event: report({**event, "part": part})


def is_main_process() -> bool:
    """Return True in the process that writes and prints, of those that Accelerate started."""
    accelerate = require("accelerate", "train", "training")
    # the first state of a process decides on its device, and does not look at this variable
    return bool(accelerate.PartialState(accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")).is_main_process)


LOCK = ".lock"  # names its holder; without one that lives it means nothing
_held: set[IO[str]] = set()


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Lock a folder, made if it is not there, against other processes and threads that lock it; None locks nothing.

    The system lets go of the lock when this process ends, however it ends. Folders in it have locks of their own. Of
    processes that train together the main one has the lock. StateError, which names the holder: if it is locked.
    """
    if folder is None or not is_main_process():
        yield
        return
    path = folder / LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked_file(path)
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        path.unlink(missing_ok=True)  # while it is locked: whoever opened it before sees that it is another file now
        file.close()


def _locked_file(path: Path) -> IO[str]:
    """Return the lock's file, locked, with the name of this process in it."""
    while True:
        with ExitStack() as closed:
            file = closed.enter_context(path.open("a+", encoding="utf-8"))
            if lock(file.fileno()) is False:
                file.seek(0)
                holder = file.read(200).strip()
                raise StateError(
                    f"another run writes into {path.parent}{f' (process {holder})' if holder else ''}; wait for its "
                    f"end, or choose another folder"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                closed.pop_all()
                return file


def _let_go() -> None:
    """Close inherited lock files in a forked process, which would hold the lock longer than the run."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def check_untaken(folder: Path, resume: bool) -> None:
    """Raise StateError if another process writes into a folder, or it has a checkpoint that is not to be resumed."""
    if (folder / LOCK).exists():
        with locked(folder):
            pass
    check_new(folder / FILE, resume)


def check_new(path: Path, resume: bool, what: str = "checkpoint") -> None:
    """Raise StateError if there is a file of an earlier run, such as its checkpoint, which is not to be resumed."""
    if path.exists() and not resume:
        raise StateError(
            f"{path.parent} holds the {what} of an earlier run; continue it with resume (--resume), or choose another "
            f"folder (--overwrite replaces it)"
        )


def check_parts(folder: Path | None, resume: bool) -> None:
    """Raise StateError if several runs cannot begin in the subfolders of a folder, or go on there."""
    if resume and (folder is None or not folder.is_dir()):
        raise StateError(
            f"resume (--resume) needs the folder of an earlier run as output, got {folder}; without it a new one starts"
        )
    for path in [] if folder is None else sorted(folder.glob(f"*/{FILE}")):
        check_untaken(path.parent, resume)


def part_options(options: PartOptions, folder: Path | None, name: str) -> RunOptions:
    """Return the options of one of several runs; it goes on if it was begun in its subfolder."""
    own = None if folder is None else folder / name
    return {
        "output": own,
        "resume": options.get("resume", False) and own is not None and (own / FILE).exists(),
        "checkpoint_every": options.get("checkpoint_every"),
        "report": tagged(options.get("report"), name),
    }


def differing(here: Mapping[str, Any], there: Any) -> list[str]:
    """Return the names under which `there` has another value than `here`, or none."""
    return [name for name, one in here.items() if not isinstance(there, dict) or there.get(name) != one]


def claim(path: Path, about: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, write: bool = True) -> None:
    """Write down what a folder is for, in a JSON file in it; StateError if it is for something else already.

    `defaults` are of `about["settings"]`, where the file of an earlier release lacks some. Without `write` it is
    compared.
    """
    if not path.exists():
        if write and is_main_process():
            write_json(path, about)
        return
    there, here = read_json(path, frozenset(about), "choose another folder"), json.loads(json.dumps(about))
    there["settings"] = {**(defaults or {}), **there.get("settings", {})}
    found = []
    for part in differing(here, there):
        if not isinstance(here[part], dict):
            found.append(part)
        elif own := sorted(differing(here[part], there[part])):
            found.append(f"{part} ({', '.join(own)})")
    if found:
        raise StateError(
            f"{path.parent} holds results of other settings: {', '.join(found)}; choose another folder, or give "
            f"the settings that it was begun with"
        )


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as JSON, whole or not at all."""
    write_file(path, json.dumps(value, indent=indent, sort_keys=True) + "\n")


def read_json(path: Path, keys: frozenset[str], remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file; StateError with the remedy if there is none, or it lacks one of the keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StateError(f"cannot read {path} as JSON: {error}; {remedy}") from None
    if not isinstance(value, dict) or not keys <= value.keys():
        has = ", ".join(sorted(value)[:10]) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise StateError(f"{path} must have {', '.join(sorted(keys))}, it has {has or 'nothing'}; {remedy}")
    return value


LOG = "log.jsonl"
SECONDS = {"s": 1, "min": 60, "h": 3600}


def parse_every(text: str | None) -> tuple[float | None, int | None]:
    """Return (seconds, steps) between checkpoints, of which at most one is given, of "90s", "10min" or "500steps"."""
    if text is None:
        return None, None
    found = re.fullmatch(r"(\d+) ?steps?|(\d+(?:\.\d+)?) ?(s|min|h)", text)
    if found is None or not float(found[1] or found[2]) > 0:
        raise ConfigError(
            f"checkpoint_every must be a time above 0 as in 90s, 10min or 2h, or a number of steps as in 500steps; got "
            f"{text!r}"
        )
    return (None, int(found[1])) if found[1] else (float(found[2]) * SECONDS[found[3]], None)


class RunFolder:
    """The folder of a run, with its log; see `RunOptions`. Where nothing is kept, its paths are None.

    Attributes:
        resume: the run goes on from the checkpoint that is there.
        seconds, steps: between two checkpoints; both None: every epoch.
    """

    def __init__(self, options: RunOptions):
        output, main = options.get("output"), is_main_process()
        self.path = None if output is None else Path(output)
        self.checkpoint = None if self.path is None else self.path / FILE
        self.log = None if self.path is None or not main else self.path / LOG
        self.resume = options.get("resume", False)
        self.seconds, self.steps = parse_every(options.get("checkpoint_every"))
        self.report = options.get("report") if main else None
        self.board: Any = None
        self.purged: int | None = None  # first step that TensorBoard is to forget
        if self.resume and self.path is None:
            raise StateError("resume needs the folder of the run in `output`")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the folder, made if it is not there, and begin its log, or go on with it."""
        if self.path is None or self.checkpoint is None:
            yield
            return
        with locked(self.path):
            check_new(self.checkpoint, self.resume)
            if self.log is not None:
                require("tensorboard", "train", "writing TensorBoard logs")
                with writing(self.log):
                    self.log.open("a" if self.resume else "w").close()
            try:
                yield
            except KeyboardInterrupt as error:
                if self.checkpoint.exists():
                    error.add_note(f"Train again with resume (--resume) to go on from the checkpoint in {self.path}")
                raise
            finally:
                if self.board is not None:
                    with suppress(OSError):  # curves are not worth a run
                        self.board.close()

    def size(self) -> int:
        """Return the bytes written to the log so far, also by the runs that this one continues."""
        return 0 if self.log is None else self.log.stat().st_size

    def rewind(self, size: int, step: int) -> None:
        """Forget what was logged after `size` bytes and after a step: it happens again."""
        if self.log is not None and size < self.size():
            os.truncate(self.log, size)
        self.purged = step + 1

    def tell(self, event: Mapping[str, Any]) -> None:
        """Report an event, and do not log it."""
        if self.report is not None:
            self.report(event)

    def write(self, event: Mapping[str, Any]) -> None:
        """Report and log one event: "event" says which kind, "step" when, and the rest are its numbers."""
        self.tell(event)
        if self.log is None:
            return
        with writing(self.log, unchanged=False):
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event, sort_keys=True) + "\n")
            if self.board is None:
                writer = require("torch.utils.tensorboard", "train", "writing TensorBoard logs").SummaryWriter
                self.board = writer(f"{self.path}/tensorboard", purge_step=self.purged)
        for name, value in event.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{event['event']}/{name}", value, event["step"])


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def on_signal(answer: Callable[[int], None], *more: int) -> Iterator[None]:
    """Answer the first of SIGTERM, SIGUSR1 and `more`; a second does what it did before. Only in the main thread."""
    earlier: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def first(number: int, _: object) -> None:
        put_back()
        answer(number)

    if threading.current_thread() is threading.main_thread():
        for number in (*SIGNALS, *more):
            # one that is ignored stays so, and one that was not installed by Python could not be put back
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                earlier[number] = signal.signal(number, first)
    try:
        yield
    finally:
        put_back()


@contextmanager
def stopping(remedy: str) -> Iterator[None]:
    """Raise StoppedError at SIGTERM and SIGUSR1, as promptly as KeyboardInterrupt; `remedy` says how to go on."""

    def stop(number: int) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name}; {remedy}", number)

    with on_signal(stop):
        yield


DIGESTS = "digests"  # key in __metadata__: the BLAKE3 of every tensor; the header has one of its own
FILE = "checkpoint.safetensors"
REMEDY = "delete it and train without --resume"
# how the names of a checkpoint's tensors begin
MODEL, OBJECTIVE, OPTIMIZER = "model/", "objective/", "optimizer/"


def write_sealed(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, JSON values as one more of them, and the digests of all; atomic."""
    text = torch.frombuffer(bytearray(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
    tensors = {**tensors, "facts": text}
    digests = {name: tensor_digest(one, one.dtype).hex() for name, one in tensors.items()}
    write_tensors(path, tensors, {"format": "pt", DIGESTS: json.dumps(digests, sort_keys=True), SEAL: UNSEALED})


def read_sealed(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_sealed` wrote, every bit of it verified: (tensors, JSON values); StateError with the remedy."""
    try:
        tensors, metadata = read_with_seal(path)
        digests = strict_json(metadata.get(DIGESTS, "{}"), DIGESTS)
    except (ConfigError, CorruptAdapterError, DataError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise StateError(f"cannot read {path}: {cause}; {remedy}") from None
        raise damaged(path, str(cause).partition(";")[0], remedy) from None
    for name, tensor in tensors.items():
        if tensor_digest(tensor, tensor.dtype).hex() != digests.get(name):
            raise damaged(path, f"{name!r} has another digest than was stored", remedy)
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

    In an example the key "" stands for any keys, a list of one element for any number of such elements.
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
