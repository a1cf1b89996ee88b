"""Every error that maskpack raises on purpose.

A message says what was wrong (with the value), what was expected, and what to do.
"""

import importlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from types import ModuleType, UnionType
from typing import Any, Literal, get_args

Target = Literal["plain", "markdown", "code", "json"]

MOST_MEMBERS = 4  # of a collection that is shown whole
ACCURACIES = {"accuracy", "probe", "knn", "k-NN", "head"}  # words of the names of accuracies
LONGEST_REPR = 120  # characters; twice as many in a message

LINE_ENDS = re.compile(r"[\t\n\r]+")
MARKUP = re.compile(r"([`*_\[\]<>|&~$])")
# what some renderers make a link of although it is escaped: addresses, hosts, e-mail; a backslash may begin a formula
LINKS = re.compile(r"\\|@|//|\w\.[^\W\d]|mailto:|xmpp:", re.IGNORECASE)


def escape(text: object, target: Target = "plain") -> str:
    r"""Return text from elsewhere so that it is shown as it is and has no other effect.

    What `str.isprintable` refuses (controls, ESC, bidirectional and zero-width characters, separators of lines and
    paragraphs, halves of surrogate pairs, unusual spaces) becomes `\x1b` or `\u202e`, tabs and line ends a space.
    Escaping twice changes nothing more, except in Markdown.

    Args:
        target: "plain" for terminals (print without markup), messages and logs. "markdown" for a line or a table's
            cell, without markup, HTML or links. "code" for a code span there. "json" for JSON text, whose meaning and
            line ends stay.
    """
    shown = str(text)
    if target == "json":
        return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in shown)
    shown = LINE_ENDS.sub(" ", shown)
    if not shown.isprintable():
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)
    if target == "markdown" and not LINKS.search(shown):
        return MARKUP.sub(r"\\\1", shown)
    if target == "plain":
        return shown
    # neither the end of the span, nor of a table's cell, nor of a comment around it
    return f"`{re.sub('[`|<]', lambda found: f'{chr(92)}u{ord(found[0]):04x}', shown) or ' '}`"


def brief(value: object, longest: int = LONGEST_REPR) -> str:
    """Return a value on one short line: a tensor by its shape, a long collection by its length and first member."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{type(value).__name__} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    many = len(value) if isinstance(value, dict | list | tuple | set | frozenset | range) else 0
    text = "" if many > MOST_MEMBERS else repr(value)
    if text and len(text) <= longest and "\n" not in text:
        return text
    if isinstance(value, dict | list | tuple | set | frozenset | range):
        return f"<{many:,}: {brief(next(iter(value)))}, …>"
    return f"{text[:longest]}…" if isinstance(value, str | bytes) else f"{type(value).__name__}(…)"


def as_text(values: Mapping[str, Any], key: str) -> str:
    """Return a value of a result as text: accuracies in per cent, what they gain (SPLIT_over_BASELINE) in points."""
    value = values[key]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        split, gain, _ = key.partition("_over_")
        if gain and f"{split}_accuracy" in values:
            return f"{100 * value:+.2f} points"
        words = set(re.split(r"[ _(]", key))
        if not gain and ACCURACIES & words and "r2" not in words:
            return f"{100 * value:.2f} %"
        return f"{value:.4g}" if 0 < abs(value) < 0.001 else f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)


def short_repr(self: Any) -> str:
    """Return the repr of a dataclass on one line: its fields that are neither None nor empty, each by `brief`."""
    shown = {one.name: brief(getattr(self, one.name)) for one in fields(self) if one.repr}
    given = (f"{name}={one}" for name, one in shown.items() if one not in ("None", "{}", "()"))
    return f"{type(self).__name__}({', '.join(given)})"


def check_argument(name: str, value: object, kinds: type | UnionType, expected: str, advice: str) -> None:
    """Raise ConfigError if an argument is of none of these kinds; `advice` says what to do."""
    if not isinstance(value, kinds):
        raise ConfigError(f"{name} is {brief(value, 2 * LONGEST_REPR)}, expected {expected}; {advice}")


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise ConfigError unless a value is one of those of a `Literal`."""
    if value not in get_args(kind):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


class MaskpackError(Exception):
    """Base class of every error that maskpack raises on purpose.

    Example:
        try:
            load_mask(model, "./nothing-here")
        except MaskpackError as error:
            print(error)
    """

    def __str__(self) -> str:
        return escape(super().__str__())  # messages quote what files, servers and users say


class ConfigError(MaskpackError, ValueError):
    """Raised when a setting is impossible or two settings contradict each other."""


class UnknownNameError(MaskpackError, LookupError):
    """Raised when a name stands for nothing known; the message lists what is known."""


class MissingDependencyError(MaskpackError, ImportError):
    """Raised when an optional library is needed and not installed; the message has the pip line."""


class SelectionError(MaskpackError, ValueError):
    """Raised when the patterns match no parameter, or a parameter that cannot be masked."""


class BackboneError(MaskpackError, ValueError):
    """Raised when a backbone or its weights cannot be loaded."""


class DataError(MaskpackError, ValueError):
    """Raised when data cannot be read, or do not fit the backbone or the adapter."""


class TrainingError(MaskpackError, RuntimeError):
    """Raised when training cannot go on, for instance after a loss that is not finite."""


class StoppedError(MaskpackError):
    """Raised when SIGTERM or SIGUSR1 (`signal` is its number) stopped the work, after its checkpoint was written."""

    def __init__(self, message: str, signal: int = 15):
        super().__init__(message)
        self.signal = signal


class AdapterError(MaskpackError, ValueError):
    """Raised when an adapter cannot be found, read or written."""


class CorruptAdapterError(AdapterError):
    """Raised when the bytes of an adapter are not what the format, or its digests, say."""


class UnsupportedVersionError(AdapterError):
    """Raised when an adapter has a format version that this release does not know."""


class UnknownCodecError(AdapterError):
    """Raised when an adapter is packed with a codec that is not installed."""


class SignatureError(AdapterError):
    """Raised when an adapter is not signed by a trusted key, for this repository, or not as recently as before."""


class BackboneMismatchError(MaskpackError, ValueError):
    """Raised when an adapter was made for a backbone with other weights, names or shapes."""


class StateError(MaskpackError, RuntimeError):
    """Raised when a model or folder is not in the state that the call needs."""


class HubError(MaskpackError, OSError):
    """Raised when a push, a pull or the network under them failed."""


class HubUnreachableError(HubError):
    """Raised when the Hub could not answer after several attempts (network, overload, rate limit); retry later."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional library, or raise with the pip line that installs it.

    Args:
        module: name to import, dotted if need be. extra: the maskpack extra that brings it.
        purpose: what needs it, as in "loading timm backbones".
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{purpose} needs the library {error.name!r}, which is not installed; "
            f'install it with: pip install "maskpack[{extra}]"'
        ) from error


def by_triton(device: str) -> bool:
    """Return True if Triton computes on such a device ("cuda"); with TRITON_INTERPRET, for tests, on every one.

    It comes with PyTorch for CUDA.
    """
    return (device == "cuda" or "TRITON_INTERPRET" in os.environ) and find_spec("triton") is not None
