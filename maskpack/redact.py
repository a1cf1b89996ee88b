"""Secrets in errors: every token in force is taken out, whatever its form."""

import functools
import json
import os
import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from .errors import MaskpackError

SHORTEST = 4  # characters of a secret; the rest of a message would be unreadable without shorter texts
P = ParamSpec("P")
R = TypeVar("R")

# What looks like a secret, whether it is known here or not.
PATTERNS = (
    (re.compile(r"(https?://)[^\s/@\"'<>]+@"), r"\1***@"),
    (re.compile(r"(https?://[^\s?#\"'<>]*)\?[^\s\"'<>]*"), r"\1?***"),  # a presigned address is a credential
    (re.compile(r"(?i)\b(x-amz-[a-z-]+|signature|key-pair-id|policy|sig|\w*token)(=|%3D)[^\s&\"'<>]+"), r"\1\2***"),
    (re.compile(r"(?i)\b(bearer\s+|basic\s+(?=\S*[\d=+/]))[\w.~+/=-]{6,}"), r"\1***"),
    (re.compile(r"\beyJ[\w-]{5,}\.[\w.-]{5,}"), "***"),  # a JSON web token
    (re.compile(r"\bhf_(?:[A-Za-z0-9]{6,}|(?:oauth|jwt)_[\w.-]{6,})"), "hf_***"),
)


def redact(text: str, token: str | bool | None = None, error: BaseException | None = None) -> str:
    """Return a text without the secrets in force, in plain, percent-encoded, JSON or base64 form.

    Args:
        token: the one that a call was given, beside those of the environment and of the login.
        error: what went wrong; what its request carried is a secret as well.
    """
    plain = unquote(text)
    seen = "\0".join((text, plain, plain.replace("-", "+").replace("_", "/")))  # base64 has two alphabets
    # patterns are slow to make, and a long process may know hundreds of short-lived tokens
    forms = {form for secret in _secrets(token, error) for found, form in _forms(secret) if found in seen}
    for form in sorted((make() for make in forms), key=len, reverse=True):
        text = re.sub(form, "***", text)
    for pattern, instead in PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _secrets(token: str | bool | None, error: BaseException | None) -> set[str]:
    """Return every credential that may have been sent: tokens, Xet's short-lived ones, signatures of addresses."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _auth, _xet

    found = {token if isinstance(token, str) else None, *map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))}
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        with suppress(OSError, UnicodeError):
            lines = Path(getattr(constants, name, "")).read_text(encoding="utf-8").splitlines()
            found |= {line.rpartition(" = ")[2] for line in lines if not line.startswith("[")}
    # private to the client, so each may be missing in another version of it
    found.add((getattr(_auth, "_OIDC_TOKEN_CACHE", None) or {}).get("token"))
    found.add(getattr(_auth, "_GOOGLE_COLAB_SECRET", None))
    found |= {info.access_token for info in [*getattr(_xet, "XET_CONNECTION_INFO_CACHE", {}).values()]}
    for one in chain(error):
        found |= _sent(one)
    return {text.strip() for text in found if text and len(text.strip()) >= SHORTEST}


def _sent(error: BaseException) -> set[str]:
    """Return the credentials of the request that an error of an HTTP library is about, and of its answer's address."""
    found: set[str] = set()
    with suppress(Exception):  # it may be about none
        response = getattr(error, "response", None)
        request = response.request if response is not None else error.request  # type: ignore[attr-defined]
        found.add(request.headers.get("authorization", "").partition(" ")[2])
        location = response.headers.get("location", "") if response is not None else ""
        for url in (str(request.url), location):
            found |= {value for _, value in parse_qsl(urlsplit(url).query) if len(value) >= 2 * SHORTEST}
    return found


def _forms(secret: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the ways in which a server may repeat a secret, each with what makes its pattern."""
    for text in {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]}:
        yield text, functools.partial(_pattern, text)
    for shift in range(3):  # in base64 a text looks different at each place modulo 3: behind "user:", for instance
        coded = b64encode(bytes(shift) + secret.encode()).decode()
        inner = coded[(0, 2, 3)[shift] : (shift + len(secret.encode())) * 8 // 6]
        if len(inner) > SHORTEST:
            yield inner, functools.partial(_pattern, inner, True)


def _pattern(text: str, base64: bool = False) -> str:
    if not base64:
        return "".join(map(_quoted, text))
    around = r"(?:[\w+/=-]|%2[BbFf]|%3[Dd])*"
    return around + "".join(_quoted(one, {"+": "-", "/": "_"}.get(one, one)) for one in text) + around


def _quoted(one: str, other: str = "") -> str:
    """Return a pattern for a character, plain or percent-encoded."""
    return f"(?:%(?i:{ord(one):02x})|{re.escape(one)}|{re.escape(other or one)})"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that it came from, whether a traceback would show them or not."""
    seen: list[BaseException] = []
    left = [error]
    while left:
        one = left.pop()
        if one is not None and one not in seen:
            seen.append(one)
            left += [one.__cause__, one.__context__]
            yield one


def hides_secrets(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a verb: its errors hold no secret, and come from none that would show one in a traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token: Any = kwargs.get("token")
        try:
            return function(*args, **kwargs)
        except MaskpackError as error:
            clean(error, token)
            raise

    return run


def clean(error: MaskpackError, token: str | bool | None) -> None:
    """Take secrets out of an error; where what it came from would show one, forget that."""
    hide = functools.partial(redact, token=token, error=error)
    words = [str(text) for one in [*chain(error)][1:] for text in (one, *one.args, *vars(one).values())]
    args = tuple(hide(one) if isinstance(one, str) else one for one in error.args)
    if any(hide(text) != text for text in words):
        error.__cause__ = error.__context__ = None
    error.args = args
