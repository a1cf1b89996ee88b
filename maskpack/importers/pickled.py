"""What torch.save and numpy.save write as pickles, read without running one: tensors, arrays, plain containers.

A pickle is a program. Here its instructions are only looked at (`pickletools`): a name in it stays a name, and what it
would call is kept as a note of the call, of which a few are understood. Nothing that a file names is imported.
"""

import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError
from ..safetensors_io import DTYPES, tensor_of

STORAGES = {"Float": "F32", "Half": "F16", "BFloat16": "BF16", "Double": "F64", "Int": "I32", "Long": "I64"}
STORAGES |= {"Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LIMIT = 64 << 20  # bytes of instructions


@dataclass
class Call:
    """A call that a pickle asks for, its arguments, and the state for its result."""

    name: Any
    given: Any = ()
    state: Any = None


def saved(path: Path) -> Any:
    """Return the object in a file of torch.save; a tensor is read when it is asked for, by `tensor`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {one.filename.partition("/")[2]: one for one in archive.infolist()}
            program = entries["data.pkl"]
            if program.file_size > LIMIT or any(one.compress_type for one in entries.values()):
                raise ValueError("it is compressed, or too large")
            return _followed(archive.read(program), lambda given: _Stored(path, entries, *given))
    except (OSError, KeyError, ValueError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not as torch.save writes tensors: {error}; save it again") from None


def saved_array(path: Path) -> Any:
    """Return the Python object in a file of numpy.save."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            found = _followed(file.read(LIMIT), None)
        return found.state[4][0]
    except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not as numpy.save writes an object: {error}; save it again") from None


@dataclass
class _Stored:
    """The place of numbers in a file of torch.save."""

    path: Path
    entries: Mapping[str, zipfile.ZipInfo]
    kind: str
    storage: Any
    key: str
    device: str
    count: int

    def numbers(self) -> Tensor:
        dtype = STORAGES[str(self.storage.name).removeprefix("torch ").removesuffix("Storage")]
        entry = self.entries[f"data/{self.key}"]
        if entry.file_size != self.count * DTYPES[dtype][1]:
            raise ValueError(f"{self.key!r} has {entry.file_size} bytes for {self.count} numbers of {dtype}")
        with zipfile.ZipFile(self.path) as archive:
            return tensor_of(memoryview(archive.read(entry)), dtype, (self.count,))


def tensor(found: Any, path: Path) -> Tensor:
    """Return a tensor that `saved` found, read now, or an array that either found."""
    try:
        if found.name == "torch._utils _rebuild_parameter":
            return tensor(found.given[0], path)
        if found.name == "torch._utils _rebuild_tensor_v2":
            stored, offset, size, stride, *_ = found.given
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if min((offset, *size, *stride), default=0) < 0 or (0 not in size and last >= stored.count):
                raise ValueError(f"it goes beyond its {stored.count} numbers")
            numbers: Tensor = stored.numbers()
            return numbers.as_strided(size, stride, offset)
        _, shape, dtype, _, data = found.state
        if found.name.endswith("multiarray _reconstruct") and dtype.given[0] == "u1":
            return tensor_of(memoryview(data), "U8", tuple(shape))
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: a tensor is not as torch.save or numpy.save writes it: {error}") from None
    raise DataError(f"{path}: expected a tensor, found {str(found)[:100]}")


def _followed(program: bytes, stored: Callable[[Any], Any] | None) -> Any:
    """Return the object that a pickle describes, with a `Call` for each object of a class."""
    stack, marks, kept = list[Any](), list[int](), dict[int, Any]()

    def since_mark() -> list[Any]:
        at = marks.pop()
        found = stack[at:]
        del stack[at:]
        return found

    arg: Any
    for op, arg, _ in pickletools.genops(program):
        name = op.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name.startswith("EMPTY_"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name.startswith("TUPLE"):
            count = int(name[5:])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPENDS", "SETITEMS"):
            own = since_mark()
            stack[-1].extend(own) if name == "APPENDS" else stack[-1].update(zip(own[::2], own[1::2], strict=True))
        elif name == "APPEND":
            value = stack.pop()
            stack[-1].append(value)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                last = stack.pop()
                arg = f"{stack.pop()} {last}"
            stack.append(Call(arg))
        elif name == "REDUCE":
            given, called = stack.pop(), stack.pop()
            if called.name == "_codecs encode":  # how protocol 2 has bytes
                stack.append(given[0].encode("latin1"))
            else:
                stack.append({} if called.name == "collections OrderedDict" else Call(called.name, given))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Call):
                stack[-1].state = state
        elif name == "BINPERSID" and stored is not None:
            stack.append(stored(stack.pop()))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            kept[len(kept) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(kept[arg])
        elif op.stack_before or not op.stack_after:
            raise ValueError(f"it has the instruction {name}")
        else:
            stack.append(arg)  # a number, a text, bytes
    return stack[-1]
