"""The client of the Hub: the one place where it is called, passing faults are retried, and errors become ours."""

import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ..errors import AdapterError, HubError, HubUnreachableError, MaskpackError
from ..network import SILENCE, UnreachableError, clean, quietly, reach, redact
from .reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import GitRefs
    from huggingface_hub.hf_api import ModelInfo

ATTEMPTS = 5
LONGEST_WAIT = 310.0  # the Hub counts requests in windows of five minutes
NAMES = 200  # repositories of an owner among which the nearest name is looked for
PASSING = frozenset({408, 429, 500, 502, 503, 504})
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
OFFLINE = "it is not in the cache and the Hub may not be asked; go online (unset HF_HUB_OFFLINE) once"
NO_HUB = "{host} does not answer like a Hub; check HF_ENDPOINT, firewall and proxy"
# What an error means, by the name of its class: those of the client's HTTP library have no fixed module.
NOT_ASKED = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "RevisionResolutionError")
NOT_THERE = {  # an AdapterError; the others are a HubError
    "HFValidationError": "the Hub accepts no such name; expected user/name",
    "RemoteEntryNotFoundError": "a file that it listed is missing there; try again",
    "RepositoryNotFoundError": "{host} has no such repository, or it is private and {who}; check the name",
    "RevisionNotFoundError": "{repo_id} has no revision {revision!r}; give a branch, tag or commit of {page}",
}
REASONS = NOT_THERE | {
    "DisabledRepoError": "access to it was disabled on the Hub; ask its owner",
    "FileMetadataError": NO_HUB,
    "GatedRepoError": f"its owner asks for an agreement first; open {{page}}, accept it, {LOGIN}, and try again",
    "JSONDecodeError": NO_HUB,
    "LocalTokenNotFoundError": f"this needs a login; {LOGIN}",
    **dict.fromkeys(NOT_ASKED, OFFLINE),
}
STATUSES = {
    401: f"the token is refused{{quote}}; {LOGIN}, which comes first",
    403: "not allowed{quote}; use a token that may write there, of an account with access",
    409: "somebody else changed it meanwhile{quote}; pull, look, and try again",
    412: "somebody else changed it meanwhile{quote}; pull, look, and try again",
    429: "too many requests{quote}; wait {wait} and try again",
}
LASTING = {"UnreachableError", "ProxyError", "UnsupportedProtocol", "LocalProtocolError", *NOT_ASKED}
NO_CONNECTION = {"UnreachableError", "ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}

T = TypeVar("T")
log = logging.getLogger("maskpack")


def origin(error: BaseException) -> BaseException:
    """Return what lies behind the errors in which the client wraps others."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError

    wrapped = isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)) or type(error) is RuntimeError
    wrapped = wrapped or (type(error) is ValueError and "Force download failed" in str(error))
    return origin(error.__cause__) if wrapped and error.__cause__ is not None else error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that the Hub or its store answered with, if it did."""
    status = getattr(getattr(origin(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _kinds(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _is_transport(error: BaseException) -> bool:
    """Tell whether an error is of the client's HTTP library; such are no OSError, and the name depends on versions."""
    library = type(error).__module__.partition(".")[0]
    return library in ("httpx", "httpx2", "httpcore", "httpcore2") or isinstance(error, (ConnectionError, TimeoutError))


def _is_from_xet(error: BaseException) -> bool:
    """Tell whether the client's Xet library failed: it raises these builtins, whatever happened to it."""
    return type(error) in (RuntimeError, ConnectionError)


def _seconds_to_wait(error: BaseException) -> float:
    """Return how many seconds the server asks to wait, or 0."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("retry-after", ""))
    if value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers({"ratelimit": str(headers.get("ratelimit", ""))})
    return limit.reset_in_seconds + 1.0 if limit and limit.remaining == 0 else 0.0


def _most_attempts(error: BaseException) -> int:
    """Return how often a call that fails so may be made; once if the fault will not pass in a moment."""
    kinds, status = _kinds(error), status_of(error)
    if status is not None:
        return ATTEMPTS if status in PASSING else 1
    if LASTING & {*kinds}:
        return 1
    # a server that said nothing for a minute; Xet, which has tried for minutes by itself
    if _is_from_xet(error) or {"TimeoutError", "TimeoutException"} & {*kinds}:
        return 2
    # an answer that was cut off, or that something between here and the Hub gave in its place
    passing = {"TransportError", "ConnectionError", "JSONDecodeError"} & {*kinds}
    return ATTEMPTS if passing or "Consistency check failed" in str(error) else 1


class Session:
    """Calls to the Hub on behalf of one task.

    Args:
        task: what is done, for messages: "pull user/name".
        reference: the repository that it is about, if it is about one.

    The client is imported here and not with the module: it takes a third of a second, and applying a local adapter
    does not need it.
    """

    def __init__(self, task: str, token: str | bool | None, reference: Reference | None = None) -> None:
        from huggingface_hub import HfApi, constants

        if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
            # such a token cannot be sent, and the client would write it into its log
            raise HubError(f"cannot {task}: the token is empty or holds spaces, line ends or non-ASCII; {LOGIN}")
        try:
            release = version("maskpack")
        except PackageNotFoundError:  # run from a checkout that is not installed
            release = "unknown"
        self.task, self.token, self.reference = task, token, reference
        self.offline = bool(constants.HF_HUB_OFFLINE)
        self.api = HfApi(library_name="maskpack", library_version=release, token=token)
        self.reached = False

    def call(self, action: Callable[[], T], attempts: int = ATTEMPTS, local: bool = False) -> T:
        """Return what `action` returns, trying again after faults that pass.

        This is the one layer of retries: within it the client tries everything once.

        Args:
            local: the action asks nobody.

        Raises:
            HubError, AdapterError: instead of whatever the client raised.
        """
        attempt = 1
        while True:
            try:
                if not (local or self.offline or self.reached):
                    reach(self.api.endpoint)
                    self.reached = True
                with quietly("own"):
                    return action()
            except Exception as error:
                failed = error
            self.wait_or_fail(failed, attempt, attempts)
            attempt += 1

    def wait_or_fail(self, error: Exception, attempt: int, attempts: int = ATTEMPTS) -> None:
        """Wait before the next attempt, or raise if the fault will not pass, or has not for long enough."""
        inner = origin(error)
        wait = _seconds_to_wait(inner) or float(2 ** (attempt - 1))
        if attempt >= min(attempts, _most_attempts(inner)) or wait > LONGEST_WAIT:
            ours = self._explained(inner)
            ours.__cause__ = error
            clean(ours, self.token)
            raise ours
        if wait >= 10:
            log.warning("the Hub asks to wait %.0f seconds before it goes on to %s", wait, self.task)
        time.sleep(wait)

    def info(self, repo_id: str, revision: str | None = None) -> "ModelInfo":
        """Return what the Hub says of a repository; not retried."""
        return self.api.model_info(repo_id, revision=revision, timeout=SILENCE)

    def refs(self, repo_id: str, pull_requests: bool = False) -> "GitRefs":
        """Return what a repository's branches and tags, and if asked its pull requests, point to."""
        return self.call(lambda: self.api.list_repo_refs(repo_id, include_pull_requests=pull_requests))

    def _explained(self, error: BaseException) -> MaskpackError:
        """Return our error for one of the client's."""

        def hidden(text: object) -> str:  # before a text is shortened: half of a token is a secret as well
            return redact(str(text or ""), self.token, error)

        endpoint, reference = self.api.endpoint, self.reference or Reference("the repository")
        response, host, text = getattr(error, "response", None), urlsplit(endpoint).hostname, hidden(error)
        sent = response is not None and "authorization" in response.request.headers
        kinds, status, wait = _kinds(error), status_of(error), _seconds_to_wait(error)
        said, line = _first_line(hidden(getattr(error, "server_message", None))), _first_line(text)
        quote, named = f" ({said})" if said else "", f"{type(error).__name__}: {line}".removesuffix(": ")
        known = next((name for name in kinds if name in REASONS), "")
        if status == 401 and not sent:
            known = known or "LocalTokenNotFoundError"
        kind: type[MaskpackError] = AdapterError if known in NOT_THERE else HubError
        if known:
            form = REASONS[known]
        elif status is not None:
            again = ", also when asked again; try later" if status >= 500 else ""
            form = STATUSES.get(status, "{host} answered {status}{quote}" + again)
        elif _is_from_xet(error):
            form = "the Xet store failed ({named}); try again, or set HF_HUB_DISABLE_XET=1"
        elif _is_transport(error) and not NO_CONNECTION & {*kinds}:
            form = "the connection to {host} broke ({named}); try again"
        elif _is_transport(error):
            form = "{host} cannot be reached ({line}); check network, proxy and HF_ENDPOINT"
            with suppress(AttributeError, RuntimeError):  # it may be the store of large files that was asked
                host = error.host if isinstance(error, UnreachableError) else error.request.url.host  # type: ignore[attr-defined]
        elif "Consistency check failed" in text:
            form = "a download ended before the file was whole; try again"
        elif isinstance(error, ValueError) and "README.md" in text:
            form, line = "the Hub refuses the model card ({line}); correct README.md", " ".join(text.split())[:300]
        elif isinstance(error, OSError) and error.errno is not None:
            form = "{named}; check space and permissions of the cache"
            named = f"{error.strerror} ({error.filename})"
        elif isinstance(error, (TypeError, LookupError, AttributeError)):
            form = "{host} does not answer like a Hub ({named}); check HF_ENDPOINT and proxy"
        else:
            form = "the client failed with {named}; if it stays, update huggingface_hub and hf-xet"
        if kind is HubError and (_most_attempts(error) > 1 or isinstance(error, UnreachableError)):
            kind = HubUnreachableError
        reason = form.format(
            host=host,
            line=line,
            named=named,
            page=f"{endpoint}/{reference.repo_id}",
            quote=quote,
            repo_id=reference.repo_id,
            revision=reference.revision or "main",
            status=status,
            wait=f"{wait:.0f} seconds" if wait else "some minutes",
            who="your token's account may not see it" if sent else f"you are not logged in ({LOGIN})",
        )
        return kind(hidden(f"cannot {self.task}: {reason}{self._nearest_name(kinds)}"))

    def _nearest_name(self, kinds: list[str]) -> str:
        """Return a clause with the nearest name, for an error that says that a name is not there; else no text."""
        reference, near = self.reference, list[str]()
        if reference is None or reference.repo_id is None or "GatedRepoError" in kinds:
            return ""
        with suppress(Exception), quietly("own"):  # a hint must not fail
            if "RepositoryNotFoundError" in kinds:
                owner, _, name = reference.repo_id.partition("/")
                known = [found.id for found in self.api.list_models(author=owner, limit=NAMES)]
                # the owner may be what is misspelt
                known = known or [one.id for one in self.api.list_models(search=name, filter="maskpack", limit=NAMES)]
                near = get_close_matches(reference.repo_id, known)
            elif "RevisionNotFoundError" in kinds:
                refs = self.api.list_repo_refs(reference.repo_id)
                near = get_close_matches(reference.revision or "main", [r.name for r in (*refs.branches, *refs.tags)])
        return f"; did you mean {' or '.join(near)}?" if near else ""


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
