"""Members of the header's JSON objects, taken out with type and range checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptAdapterError

# control characters, line and paragraph separators, halves of surrogate pairs: none belongs in a name
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
HEX = re.compile("[0-9a-f]{64}")
SET_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,63}")
# what stands for a place on somebody's disk: /x, ./x, ../x, ~/x, C:..., anything with a backslash, file.py:function
PATH = re.compile(r"(hf/)?[/.~]|[A-Za-z]:|.*\\|.*/(\.\.?|~|)(/|$)|.*\.py:")
MAX_TEXT = 4096


def plain(value: object) -> bool:
    """Tell whether a value is non-empty text without control characters, short enough for a name."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and not UNPRINTABLE.search(value)


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object of the header; `where` is its path in error messages. Unknown members are ignored.

    A method returns the member `key`, of the type that it is named after. Each raises CorruptAdapterError that names
    the member, its value and what was expected; `optional_…` return None if it is missing.
    """

    where: str
    members: Mapping[str, Any]

    @classmethod
    def of(cls, value: object, where: str) -> "Fields":
        """Wrap a value that must be an object."""
        if not isinstance(value, dict):
            raise CorruptAdapterError(f"{where} is {_short(value)}, expected an object")
        return cls(where, value)

    def refuse(self, key: str, expected: str) -> CorruptAdapterError:
        """Return the error for a member that is missing or not as expected."""
        what = f"is {_short(self.members[key])}" if key in self.members else "is missing"
        return CorruptAdapterError(f"{self.where}.{key} {what}, expected {expected}; fetch the file again")

    def get(self, key: str) -> Any:
        """Return a member of any type; None if it is missing."""
        return self.members.get(key)

    def _checked(self, key: str, fits: bool, expected: str) -> Any:
        if not fits:
            raise self.refuse(key, expected)
        return self.members[key]

    def object(self, key: str) -> "Fields":
        return Fields(f"{self.where}.{key}", self._checked(key, isinstance(self.get(key), dict), "an object"))

    def optional_object(self, key: str) -> dict[str, Any] | None:
        return dict(self.object(key).members) if key in self.members else None

    def text(self, key: str) -> str:
        return str(self._checked(key, plain(self.get(key)), "text without control characters"))

    def optional_text(self, key: str) -> str | None:
        return None if self.get(key) is None else self.text(key)

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        return str(self._checked(key, self.get(key) in allowed, f"one of {', '.join(allowed)}"))

    def boolean(self, key: str) -> bool:
        return bool(self._checked(key, type(self.get(key)) is bool, "true or false"))

    def digest(self, key: str) -> str:
        value = self.get(key)
        fits = isinstance(value, str) and HEX.fullmatch(value) is not None
        return str(self._checked(key, fits, "64 lower-case hexadecimal digits"))

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.get(key)
        fits = isinstance(value, list) and all(plain(item) for item in value)
        return tuple(self._checked(key, fits, "an array of non-empty texts without control characters"))

    def array(self, key: str, length: int | None = None) -> list[Any]:
        """Return an array, of `length` items if given."""
        value = self.get(key)
        fits = isinstance(value, list) and (length is None or len(value) == length)
        found: list[Any] = self._checked(key, fits, "an array" if length is None else f"an array of {length} items")
        return found

    def integers(self, key: str, below: int, length: int | None = None) -> list[int]:
        """Return an array of integers from 0 to `below` - 1."""
        fits = all(type(item) is int and 0 <= item < below for item in self.array(key, length))
        found: list[int] = self._checked(key, fits, f"integers from 0 to {below - 1}")
        return found


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
