"""Plug-ins: classes of one kind, found by their id, and the options of a plug-in.

A plug-in is a class in a file of the kind's folder, or in another distribution that names it as an entry point of the
group `maskpack.<folder>`. It is registered by the decorator `REGISTRY.register`. The first line of its docstring is
what `maskpack list` prints. A file can name an id, but never causes code to be imported: only installed packages are
searched.
"""

import ast
import difflib
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from .errors import ConfigError, UnknownNameError


class Plugin(Protocol):
    """What every plug-in class has: its name on the command line, and a paper or specification (or "")."""

    id: ClassVar[str]
    reference: ClassVar[str]


T = TypeVar("T", bound=Plugin)


class Registry(Generic[T]):
    """Classes of one kind, as in "codec", by id; those of a package are discovered on the first look-up."""

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._classes: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: make `cls` known under `cls.id`; an id that another class has raises UnknownNameError."""
        known = self._classes.get(cls.id)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UnknownNameError(
                f"two {self.kind}s have the id {cls.id!r}: {known.__module__}.{known.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; rename one"
            )
        self._classes[cls.id] = cls
        return cls

    def __getitem__(self, name: str) -> type[T]:
        """Return the class with this id, or raise UnknownNameError with the known ids and the nearest."""
        self._discover()
        if name not in self._classes:
            near = difflib.get_close_matches(name, self._classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._classes))}{hint}")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._classes

    def all(self) -> list[type[T]]:
        """Return every class of this kind, sorted by id."""
        self._discover()
        return [self._classes[name] for name in sorted(self._classes)]

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for entry in entry_points(group=self.package):
            self.register(entry.load())
        self._discovered = True


def plugins(package: str) -> list[tuple[str, str, str]]:
    """Return (id, first line of the docstring, reference) of every plug-in of a kind, by id.

    Those in the package's folder are read as text, because importing them would import torch.
    """
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    classes = [
        node
        for folder in folders
        for path in Path(folder).glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(one).endswith(".register") for one in node.decorator_list)
    ]
    rows = [(_literal(one, "id"), ast.get_docstring(one) or "", _literal(one, "reference")) for one in classes]
    for entry in entry_points(group=package):
        cls = entry.load()
        rows.append((cls.id, (cls.__doc__ or "").strip(), cls.reference))
    return sorted((name, text.partition("\n")[0], reference) for name, text, reference in rows)


def _literal(cls: ast.ClassDef, name: str) -> str:
    """Return the text that a class sets an attribute to, "" if it sets none."""
    for node in cls.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in map(ast.unparse, targets):
                return str(ast.literal_eval(node.value))
    return ""


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers above `above`, from `least` to `most`, below `below`; the annotation of an option."""

    above: float = -math.inf
    least: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError unless the value of the option `name` is one of these numbers."""
        if not (self.above < value < self.below and self.least <= value <= self.most):
            bounds = {"above": self.above, "at least": self.least, "at most": self.most, "below": self.below}
            stated = " and ".join(f"{word} {bound:.15g}" for word, bound in bounds.items() if math.isfinite(bound))
            kind = "" if isinstance(value, int) else "a finite number "
            raise ConfigError(f"{name} must be {(kind + stated).strip()}, got {value}")


Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
PartShare = Annotated[float, Range(least=0, below=1)]
Count = Annotated[int, Range(least=1)]
Number = Annotated[int, Range(least=0)]


@dataclass(frozen=True)
class Options:
    """Base of dataclasses whose fields are options: each has a default, and states in its type which values it takes.

    As in `share: Annotated[float, Range(above=0, most=1)] = 0.5`, or by a `Literal`.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(settings: Any) -> None:
    """Raise ConfigError unless each field of a dataclass has a value of its type, and in the range that it states."""
    hints = get_type_hints(type(settings), include_extras=True)
    for name in (one.name for one in fields(settings)):
        value = getattr(settings, name)
        if not _is(value, hints[name]):
            raise ConfigError(f"{name} must be {_in_words(hints[name])}, got {value!r}")
        for kind in (hints[name], *get_args(hints[name])):
            for known in getattr(kind, "__metadata__", ()) if value is not None else ():
                if isinstance(known, Range):
                    known.check(name, value)


def _is(value: Any, kind: Any) -> bool:
    """Return True if a value is of a type; numbers of numpy are numbers, and a list does for a tuple."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is(value, arguments[0])
    if origin in (UnionType, Union):
        return any(_is(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if kind is Any:
        return True
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_is(one, arguments[0]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, {int: Integral, float: Real}.get(kind, origin or kind))


def _in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _in_words(arguments[0])
    if origin in (UnionType, Union):
        return " or ".join(_in_words(one) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of texts"}
    return words.get(origin or kind) or {str: "a text", NoneType: "none"}.get(kind, "options by name")


_BOOLS = {"true": True, "false": False, "1": True, "0": False}


def make_options(cls: type[Any], what: str, options: Mapping[str, Any]) -> Any:
    """Make a dataclass whose fields all have defaults, from options of the command line or a file.

    Errors are ConfigError; `what` says in them whose options they are, as in "the method 'threshold'".
    """
    known = {field.name: field for field in fields(cls)}
    values = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"{what} has no option {key!r}; it has: {', '.join(known) or 'none'}")
        kind: Any = type(known[key].default)
        try:
            values[key] = _BOOLS[str(value).lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ConfigError(f"option {key!r} of {what} must be of type {kind.__name__}, got {value!r}") from None
    return cls(**values)
