"""Calls to servers, our own and those of other libraries: time limits, one layer of retries, and no lines of theirs."""

import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from .errors import MaskpackError

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
    """Raised where no connection can be made; `attempts` is how often it is worth trying in all."""

    def __init__(self, reason: str, host: str, attempts: int = 1) -> None:
        super().__init__(reason)
        self.host, self.attempts = host, attempts


def reach(url: str) -> None:
    """Return once a connection can be made to the server of an address, or to the proxy that is asked in its place.

    Raises:
        UnreachableError: with the reason, after CONNECT seconds at most: libraries wait much longer for a silent name
            server, and for one address after another.
    """
    address = _address(url)
    if address is None:  # not for us to judge
        return
    began = time.monotonic()
    at, why = _given_up.get(address, (-FORGET, ""))
    if began - at < FORGET:
        raise UnreachableError(why, address[0])
    failed: list[OSError] = []

    def connect() -> None:
        try:
            socket.create_connection(address, CONNECT).close()
        except OSError as error:
            failed.append(error)

    # a thread, since looking up a name knows no time limit
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT)
    if thread.is_alive():
        raise UnreachableError(f"no answer in {CONNECT:.0f} seconds", address[0], attempts=2)
    if failed:
        reason = failed[0].strerror or str(failed[0])
        raise UnreachableError(reason, address[0], attempts=3 if time.monotonic() - began < 1 else 2)


def give_up(url: str, error: UnreachableError) -> None:
    """Remember for FORGET seconds that a server cannot be reached, so that several calls wait no longer than one."""
    address = _address(url)
    if address is not None:
        _given_up[address] = time.monotonic(), str(error)


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
def own_retries() -> Iterator[None]:
    """Let the Hub's client try everything once, say nothing and wait a minute for a silent server."""
    with _quietly("own"):
        yield


@contextmanager
def library_calls(url: str | None = None) -> Iterator[None]:
    """Let another library ask a server; where that cannot be reached, it has its cache only.

    Args:
        url: an address of the server; None for the Hub.

    Raises:
        UnreachableError: in place of the library's error, where the server cannot be reached and the cache does not do.
    """
    from huggingface_hub import constants

    away: UnreachableError | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            reach(url or constants.ENDPOINT)
        except UnreachableError as error:
            away = error
            give_up(url or constants.ENDPOINT, error)
    before = constants.HF_HUB_OFFLINE
    with _quietly("library"):
        constants.HF_HUB_OFFLINE = before or away is not None
        try:
            yield
        except MaskpackError:
            raise
        except Exception as error:
            if away is None:
                raise
            raise UnreachableError(str(away), away.host) from error
        finally:
            constants.HF_HUB_OFFLINE = before


@contextmanager
def _quietly(caller: str) -> Iterator[None]:
    """Choose how often the client tries in this thread; limits and silence hold for the process while one calls."""
    global _running
    _watch_retries()
    chosen = _caller.set(caller)
    with _lock:
        _running += 1
        if _running == 1:
            _limit_session()
            _silence()
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


def _silence() -> None:
    """Keep the lines of libraries off the terminal: they repeat addresses with signatures, for every attempt."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        _undo.callback(logger.setLevel, logger.level)
        logger.setLevel(max(logging.ERROR, logger.level))
