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

    Every method raises CorruptAdapterError that names the member, its value and what was expected.
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

    def object(self, key: str) -> "Fields":
        """Return a member that must be an object."""
        if not isinstance(self.get(key), dict):
            raise self.refuse(key, "an object")
        return Fields(f"{self.where}.{key}", self.members[key])

    def optional_object(self, key: str) -> dict[str, Any] | None:
        """Return a member that is an object, or None if it is missing."""
        return dict(self.object(key).members) if key in self.members else None

    def text(self, key: str, expected: str = "text without control characters") -> str:
        """Return a member that must be a name."""
        if not plain(self.get(key)):
            raise self.refuse(key, expected)
        return str(self.members[key])

    def optional_text(self, key: str) -> str | None:
        """Return a member that is a name, or None if it is missing or null."""
        return None if self.get(key) is None else self.text(key)

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        """Return a member that must be one of a few words."""
        if self.get(key) not in allowed:
            raise self.refuse(key, f"one of {', '.join(allowed)}")
        return str(self.members[key])

    def boolean(self, key: str) -> bool:
        """Return a member that must be true or false."""
        if type(self.get(key)) is not bool:
            raise self.refuse(key, "true or false")
        return bool(self.members[key])

    def digest(self, key: str) -> str:
        """Return a member that must be a digest in lower-case hex."""
        value = self.get(key)
        if not isinstance(value, str) or not HEX.fullmatch(value):
            raise self.refuse(key, "64 lower-case hexadecimal digits")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a member that must be an array of names."""
        value = self.get(key)
        if not isinstance(value, list) or not all(plain(item) for item in value):
            raise self.refuse(key, "an array of non-empty texts without control characters")
        return tuple(value)

    def array(self, key: str, length: int | None = None) -> list[Any]:
        """Return a member that must be an array, of `length` items if given."""
        value = self.get(key)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self.refuse(key, "an array" if length is None else f"an array of {length} items")
        return value

    def integers(self, key: str, below: int, length: int | None = None) -> list[int]:
        """Return a member that must be an array of integers from 0 to `below` - 1."""
        value = self.array(key, length)
        if not all(type(item) is int and 0 <= item < below for item in value):
            raise self.refuse(key, f"integers from 0 to {below - 1}")
        return value


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
