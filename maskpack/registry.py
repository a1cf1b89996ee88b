"""Plug-ins of one kind: classes found by the id that they carry.

A plug-in is a class in a file of the kind's folder, or in another distribution that names it as an entry point
of the group `maskpack.<folder>`. It is registered with the decorator `REGISTRY.register`, has a class attribute
`id`, a docstring whose first line `maskpack list` prints, and a `reference` (a paper or specification, or "").
A file can name an id, but can never cause code to be imported: only installed packages are looked at.
"""

import difflib
import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from .errors import ConfigError, UnknownNameError


class Plugin(Protocol):
    """What every plug-in class carries."""

    id: ClassVar[str]
    reference: ClassVar[str]


T = TypeVar("T", bound=Plugin)


class Registry(Generic[T]):
    """Classes of one kind by id, discovered on the first look-up.

    Args:
        kind: the word for one of them in messages, as in "codec".
        package: the package whose modules are searched, as in "maskpack.codecs".
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._classes: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, cls: type[T]) -> type[T]:
        """Class decorator: make `cls` known under `cls.id`.

        Raises:
            UnknownNameError: if another class has that id already.
        """
        known = self._classes.get(cls.id)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UnknownNameError(
                f"two {self.kind}s have the id {cls.id!r}: {known.__module__}.{known.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; rename one"
            )
        self._classes[cls.id] = cls
        return cls

    def __getitem__(self, name: str) -> type[T]:
        """Return the class with this id.

        Raises:
            UnknownNameError: if there is none; the message lists the known ids and the nearest.
        """
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


_BOOLS = {"true": True, "false": False, "1": True, "0": False}


def check_above_zero(options: Any, *names: str) -> None:
    """Check that these options are finite numbers above 0.

    Raises:
        ConfigError: if one is not.
    """
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number above 0, got {value}")


def make_options(cls: type[Any], what: str, options: Mapping[str, Any]) -> Any:
    """Make a dataclass, each field of which has a default, from options as the command line or a file gives them.

    Args:
        what: whose options they are, for messages, as in "the method 'threshold'".

    Raises:
        ConfigError: if there is no such field, or a value is not of the type of the field's default.
    """
    known = {field.name: field for field in fields(cls)}
    values = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"{what} has no option {key!r}; it has: {', '.join(known) or 'none'}")
        kind = type(getattr(cls(), key))
        try:
            values[key] = _BOOLS[str(value).lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ConfigError(f"option {key!r} of {what} must be of type {kind.__name__}, got {value!r}") from None
    return cls(**values)
