"""Checks of JSON that somebody else wrote. A check takes a value and its place in the file, and returns the value.

Checks raise CorruptAdapterError, which says the place, the value and what was expected.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CorruptAdapterError

# control characters, line and paragraph separators, halves of surrogate pairs: none belongs in a name
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
HEX = re.compile("[0-9a-f]{64}")
# what stands for a place on somebody's disk: /x, ./x, ../x, ~/x, C:..., anything with a backslash, file.py:function
PATH = re.compile(r"(hf/)?[/.~]|[A-Za-z]:|.*\\|.*/(\.\.?|~|)(/|$)|.*\.py:")
MAX_TEXT = 4096
MISSING = object()

Check = Callable[[Any, str], Any]


def plain(value: object) -> bool:
    """Return True for non-empty text without control characters that is short enough for a name."""
    return isinstance(value, str) and 0 < len(value) <= MAX_TEXT and not UNPRINTABLE.search(value)


def refuse(where: str, value: object, expected: str) -> CorruptAdapterError:
    """Return the error for a value that is missing or not as expected."""
    shown = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    what = "missing" if value is MISSING else shown
    return CorruptAdapterError(f"{where} is {what}, expected {expected}; fetch the file again")


def check(fits: Callable[[Any], bool], expected: str) -> Check:
    """Make a check of a single value."""

    def checked(value: Any, where: str) -> Any:
        if not fits(value):
            raise refuse(where, value, expected)
        return value

    return checked


def integer(least: int, most: int) -> Check:
    """Make a check of an integer."""
    return check(lambda value: type(value) is int and least <= value <= most, f"an integer from {least} to {most}")


def integers(below: int, count: int | None = None) -> Check:
    """Make a check of an array of integers from 0 to `below` - 1."""

    def fits(value: Any) -> bool:
        counted = isinstance(value, list) and count in (None, len(value))
        return counted and all(type(one) is int and 0 <= one < below for one in value)

    number = "" if count is None else f"{count} "
    return check(fits, f"an array of {number}integers from 0 to {below - 1}")


def one_of(*allowed: str) -> Check:
    """Make a check of one of some texts."""
    return check(lambda value: value in allowed, f"one of {', '.join(allowed)}")


TEXT = check(plain, "text without control characters")
TEXT_OR_NULL = check(lambda value: value is None or plain(value), "text without control characters, or null")
TEXTS = check(
    lambda value: isinstance(value, list) and all(map(plain, value)),
    "an array of non-empty texts without control characters",
)
STRING = check(lambda value: isinstance(value, str), "text")
DIGEST = check(lambda value: isinstance(value, str) and bool(HEX.fullmatch(value)), "64 lower-case hexadecimal digits")
BOOLEAN = check(lambda value: type(value) is bool, "true or false")
OBJECT = check(lambda value: isinstance(value, dict), "an object")
ARRAY = check(lambda value: isinstance(value, list), "an array")


def record(members: Mapping[str, Check]) -> Check:
    """Make a check of an object, which returns these members alone; a name that ends in "?" may be missing."""

    def checked(value: Any, where: str) -> dict[str, Any]:
        OBJECT(value, where)
        found = {}
        for name, one in members.items():
            key = name.removesuffix("?")
            if key in value or key == name:
                found[key] = one(value.get(key, MISSING), f"{where}.{key}")
        return found

    return checked


def values(one: Check) -> Check:
    """Make a check of an object with any names, whose members pass one check."""
    return lambda value, where: {key: one(own, f"{where}.{key}") for key, own in OBJECT(value, where).items()}


def items(one: Check) -> Check:
    """Make a check of an array whose items pass one check."""
    return lambda value, where: [one(own, f"{where}[{i}]") for i, own in enumerate(ARRAY(value, where))]
