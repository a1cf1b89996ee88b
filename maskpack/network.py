"""Calls to servers, our own and those of other libraries: time limits, retries, and no secret in an error."""

import functools
import json
import logging
import os
import re
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from .errors import MaskpackError

SHORTEST = 4  # characters of a secret; the rest of a message would be unreadable without shorter texts
URL_SAFE = {"+": "|-", "/": "|_"}  # the second alphabet of base64, as alternatives in a pattern
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

    These are the token that a call was given, those of environment and login, and what the request of an error carried.
    """
    plain = unquote(text)
    seen = "\0".join((text, plain, plain.replace("-", "+").replace("_", "/")))  # base64 has two alphabets
    # patterns are slow to make, and a long process may know hundreds of short-lived tokens
    found = {form for secret in _secrets(token, error) for form in _forms(secret) if form[0] in seen}
    for form, coded in sorted(found, key=lambda one: len(one[0]), reverse=True):
        # each character plain or percent-encoded; base64 with the characters that its ends share with their neighbours
        around = r"(?:[\w+/=-]|%2[BbFf]|%3[Dd])*" if coded else ""
        inner = "".join(f"(?:%(?i:{ord(c):02x})|{re.escape(c)}{URL_SAFE.get(c, '') if coded else ''})" for c in form)
        text = re.sub(around + inner + around, "***", text)
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
        with suppress(Exception):  # most are about no request
            response = getattr(one, "response", None)
            request = one.request if response is None else response.request  # type: ignore[attr-defined]
            found.add(request.headers.get("authorization", "").partition(" ")[2])
            for url in (str(request.url), "" if response is None else response.headers.get("location", "")):
                found |= {value for _, value in parse_qsl(urlsplit(url).query) if len(value) >= 2 * SHORTEST}
    return {text.strip() for text in found if text and len(text.strip()) >= SHORTEST}


def _forms(secret: str) -> Iterator[tuple[str, bool]]:
    """Yield the ways in which a server may repeat a secret, and whether each is base64."""
    yield from ((text, False) for text in {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]})
    for shift in range(3):  # in base64 a text looks different at each place modulo 3: behind "user:", for instance
        coded = b64encode(bytes(shift) + secret.encode()).decode()
        inner = coded[(0, 2, 3)[shift] : (shift + len(secret.encode())) * 8 // 6]
        if len(inner) > SHORTEST:
            yield inner, True


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that it came from, whether a traceback would show them or not."""
    seen, left = list[BaseException](), [error]
    for one in left:
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


CONNECT = 6.0  # seconds to look up a name and to connect
SILENCE = 60.0  # seconds that a server may say nothing once it is connected
FORGET = 10.0  # seconds after which a server that could not be reached is tried again
# of the client and its HTTP library, whose name depends on its version
LOGGERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")

_caller: ContextVar[str] = ContextVar("_caller", default="")  # whose calls this thread makes: "own", "library" or ""
_lock = threading.Lock()
_running = 0  # calls
_undo = ExitStack()  # what the last of them puts back
_given_up: dict[tuple[str, int], tuple[float, str]] = {}  # servers that could not be reached: when and why


class UnreachableError(ConnectionError):
    """Raised where no connection can be made to a server, `host`."""

    def __init__(self, reason: str, host: str) -> None:
        super().__init__(reason)
        self.host = host


def reach(url: str, attempts: int = 3) -> None:
    """Return once a connection can be made to the server of an address, or to the proxy that is asked in its place.

    Libraries wait much longer for a silent name server, and for one address after another. A server that could not be
    reached is not tried again for FORGET seconds, so that several calls wait no longer than one.

    Raises:
        UnreachableError: with the reason, after so many attempts, or fewer that took long.
    """
    address = _address(url)
    if address is None:  # not for us to judge
        return
    at, why = _given_up.get(address, (-FORGET, ""))
    began = time.monotonic()
    if began - at >= FORGET:
        for attempt in range(attempts):
            if attempt:
                time.sleep(attempt)
            why = _connect(address)
            if not why:
                return
            if time.monotonic() - began > CONNECT + 1:
                break
        _given_up[address] = time.monotonic(), why
    raise UnreachableError(why, address[0])


def _connect(address: tuple[str, int]) -> str:
    """Return why no connection can be made to an address; no text if one can."""
    why = [f"no answer in {CONNECT:.0f} seconds"]

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT).close()
            why.append("")
        except OSError as error:
            why.append(error.strerror or str(error) or type(error).__name__)

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name knows no time limit
    thread.start()
    thread.join(CONNECT)
    return why[-1]


def _address(url: str) -> tuple[str, int] | None:
    parts = urlsplit(url)
    with suppress(ValueError, OSError):  # no number, or a name that cannot be looked up
        proxies = getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not proxy_bypass(parts.netloc):
            parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parts.hostname:
            return parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)
    return None


@contextmanager
def library_calls(url: str | None = None) -> Iterator[bool]:
    """Let another library ask a server, by default the Hub; where it cannot be reached, the library has its cache only.

    Yields:
        Whether the server may be asked and can be reached.

    Raises:
        UnreachableError: in place of the library's error, where the server cannot be reached and the cache does not do.
    """
    from huggingface_hub import constants

    before, away = constants.HF_HUB_OFFLINE, None
    try:
        if not before:
            reach(url or constants.ENDPOINT, attempts=1)
    except UnreachableError as error:
        away = error
    with quietly("library"):
        constants.HF_HUB_OFFLINE = before or away is not None
        try:
            yield not constants.HF_HUB_OFFLINE
        except Exception as error:
            if away is None or isinstance(error, MaskpackError):
                raise
            raise UnreachableError(str(away), away.host) from error
        finally:
            constants.HF_HUB_OFFLINE = before


@contextmanager
def quietly(caller: Literal["own", "library"]) -> Iterator[None]:
    """Call the Hub's client: no lines in the log, and at most a minute of silence, in the whole process meanwhile.

    "own" are calls that we repeat ourselves: the client tries everything once in this thread. "library" are those of
    other libraries, which are not repeated after a timeout.
    """
    global _running
    _watch_retries()
    chosen = _caller.set(caller)
    with _lock:
        _running += 1
        if _running == 1:
            _limit_session()
            for logger in map(logging.getLogger, LOGGERS):  # which repeat addresses with signatures
                _undo.callback(logger.setLevel, logger.level)
                logger.setLevel(max(logging.ERROR, logger.level))
    try:
        yield
    finally:
        _caller.reset(chosen)
        with _lock:
            _running -= 1
            if not _running:
                _undo.close()


def _watch_retries() -> None:
    """Let the client's retries depend on whose call it is; calls of others are as ever. Its names here are private."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    def backoff(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if _caller.get() == "own":
            options["max_retries"] = 0
        elif _caller.get() == "library" and options.get("retry_on_exceptions"):
            # after a timeout the next attempt would be as long
            options["retry_on_exceptions"] = tuple(
                kind
                for parent in options["retry_on_exceptions"]
                for kind in (parent.__subclasses__() or [parent])
                if not kind.__name__.endswith(("Timeout", "TimeoutException")) and kind.__name__ != "ConnectError"
            )
        return original(*args, **options)

    def http_get(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if _caller.get() == "own":
            options["_nb_retries"] = 0  # a broken download goes on where it was, as long as some of it arrives
        return original(*args, **options)

    for module, name, watch in ((_http, "_http_backoff_base", backoff), (file_download, "http_get", http_get)):
        original = getattr(module, name, None)
        if original is not None and not hasattr(original, "by_maskpack"):
            watched = functools.wraps(original)(functools.partial(watch, original))
            setattr(watched, "by_maskpack", True)  # noqa: B010
            setattr(module, name, watched)


def _limit_session() -> None:
    """Give the requests of the client's session time limits where they have none; it belongs to the whole process."""
    from huggingface_hub import get_session

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        for name in ("connect", "read", "write", "pool"):
            longest = CONNECT if name == "connect" else SILENCE
            limits[name] = min(limits.get(name) or longest, longest)
        request.extensions["timeout"] = limits

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = hooks | {"request": [*hooks.get("request", []), limit]}
    _undo.callback(setattr, session, "event_hooks", hooks)
