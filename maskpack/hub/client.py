"""Calls to the Hub: transient faults are retried, and the client's errors become maskpack's."""

import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple, TypeVar
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

T = TypeVar("T")
log = logging.getLogger("maskpack")


class Fault(NamedTuple):
    """The meaning of an error: a text, the attempts that are allowed, and the class of our error."""

    text: str
    attempts: int = 1
    kind: type[MaskpackError] = HubError


NO_LOGIN = Fault(f"this needs a login; {LOGIN}")
NOT_ASKED = Fault(OFFLINE)
NO_HUB = "{host} does not answer like a Hub; check HF_ENDPOINT, firewall and proxy"
NOT_A_HUB = Fault("{host} does not answer like a Hub ({named}); check HF_ENDPOINT and proxy")
NO_REPOSITORY = "{host} has no such repository, or it is private and {who}; check the name"
NO_REVISION = "{repo_id} has no revision {revision!r}; give a branch, tag or commit of {page}"
CHANGED = Fault("somebody else changed it meanwhile{quote}; pull, look, and try again")
AWAY = "{host} cannot be reached ({line}); check network, proxy and HF_ENDPOINT"
BROKE = Fault("the connection to {host} broke ({named}); try again", ATTEMPTS)
SILENT = BROKE._replace(attempts=2)  # for a minute
XET = Fault("the Xet store failed ({named}); try again, or set HF_HUB_DISABLE_XET=1", 2)  # it tried for minutes
# By the name of the class or of its first base that has a row, since those of the HTTP library have no fixed module:
REFUSED = {  # whatever the status
    "DisabledRepoError": Fault("access to it was disabled on the Hub; ask its owner"),
    "FileMetadataError": Fault(NO_HUB),
    "GatedRepoError": Fault(f"its owner asks for an agreement first; open {{page}}, accept it, {LOGIN}, and try again"),
    "HFValidationError": Fault("the Hub accepts no such name; expected user/name", 1, AdapterError),
    "JSONDecodeError": Fault(NO_HUB, ATTEMPTS),  # from something between here and the Hub
    "LocalEntryNotFoundError": NOT_ASKED,
    "LocalTokenNotFoundError": NO_LOGIN,
    "OfflineModeIsEnabled": NOT_ASKED,
    "RemoteEntryNotFoundError": Fault("a file that it listed is missing there; try again", 1, AdapterError),
    "RepositoryNotFoundError": Fault(NO_REPOSITORY, 1, AdapterError),
    "RevisionNotFoundError": Fault(NO_REVISION, 1, AdapterError),
    "RevisionResolutionError": NOT_ASKED,
}
ANSWERED = {
    401: Fault(f"the token is refused{{quote}}; {LOGIN}, which comes first"),
    403: Fault("not allowed{quote}; use a token that may write there, of an account with access"),
    409: CHANGED,
    412: CHANGED,
    429: Fault("too many requests{quote}; wait {wait} and try again", ATTEMPTS),
}
FAILED = {  # without a status
    "ConnectError": Fault(AWAY, ATTEMPTS),
    "ConnectTimeout": Fault(AWAY, 2),
    "ProxyError": Fault(AWAY),
    "UnreachableError": Fault(AWAY, 1, HubUnreachableError),
    "UnsupportedProtocol": Fault(AWAY),
    **dict.fromkeys(("HTTPError", "LocalProtocolError", "StreamError"), BROKE._replace(attempts=1)),
    **dict.fromkeys(("TimeoutError", "TimeoutException"), SILENT),
    **dict.fromkeys(("TransportError", "BrokenPipeError", "ConnectionAbortedError"), BROKE),
    **dict.fromkeys(("ConnectionRefusedError", "ConnectionResetError"), BROKE),
    **dict.fromkeys(("ConnectionError", "RuntimeError"), XET),  # it raises these, whatever happened to it
    **dict.fromkeys(("TypeError", "LookupError", "AttributeError"), NOT_A_HUB),
    "Exception": Fault("the client failed with {named}; if it stays, update huggingface_hub and hf-xet"),
}


def origin(error: BaseException) -> BaseException:
    """Return the error inside of those in which the client wraps others."""
    names = {kind.__name__ for kind in type(error).__mro__}
    wrapped = bool(names & {"LocalEntryNotFoundError", "RevisionResolutionError"}) or type(error) is RuntimeError
    wrapped = wrapped or (type(error) is ValueError and "Force download failed" in str(error))
    return origin(error.__cause__) if wrapped and error.__cause__ is not None else error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that the Hub or its store answered with, if it did."""
    status = getattr(getattr(origin(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def fault_of(error: BaseException) -> Fault:
    """Return the meaning of an error of the client, once `origin` has unwrapped it."""
    names, status, text = [kind.__name__ for kind in type(error).__mro__], status_of(error), str(error)
    refused = next((REFUSED[name] for name in names if name in REFUSED), None)
    if refused is not None:
        return refused
    if status is not None:
        if status == 401 and not _sent_login(error):
            return NO_LOGIN
        again = ", also when asked again; try later" if status >= 500 else ""
        other = Fault(f"{{host}} answered {status}{{quote}}{again}", ATTEMPTS if status in PASSING else 1)
        return ANSWERED.get(status, other)
    found = next(FAILED[name] for name in names if name in FAILED)
    if found is not FAILED["Exception"]:
        return found
    if "Consistency check failed" in text:
        return Fault("a download ended before the file was whole; try again", ATTEMPTS)
    if isinstance(error, ValueError) and "README.md" in text:
        return Fault("the Hub refuses the model card ({card}); correct README.md")
    if isinstance(error, OSError) and error.errno is not None:
        return Fault("{file}; check space and permissions of the cache")
    return found


def _sent_login(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    return response is not None and "authorization" in response.request.headers


def _seconds_to_wait(error: BaseException) -> float:
    """Return the seconds that the server asks to wait, or 0."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = str(headers.get("retry-after", ""))
    if value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers({"ratelimit": str(headers.get("ratelimit", ""))})
    return limit.reset_in_seconds + 1.0 if limit and limit.remaining == 0 else 0.0


class Session:
    """Calls to the Hub on behalf of one task, such as "pull user/name", about one repository or none.

    The client is imported here and not with the module: it takes a third of a second, and applying a local adapter
    does not need it.
    """

    def __init__(self, task: str, token: str | bool | None, reference: Reference | None = None) -> None:
        from huggingface_hub import HfApi, constants

        if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
            # such a token cannot be sent, and the client would write it into its log
            raise HubError(f"cannot {task}: the token is empty or holds spaces, line ends or non-ASCII; {LOGIN}")
        release = "unknown"  # run from a checkout that is not installed
        with suppress(PackageNotFoundError):
            release = version("maskpack")
        self.task, self.token, self.reference = task, token, reference
        self.offline = bool(constants.HF_HUB_OFFLINE)
        self.api = HfApi(library_name="maskpack", library_version=release, token=token)
        self.reached = False

    def call(self, action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
        """Call `action`, again after faults that pass; raise our errors in place of the client's.

        This is the one layer of retries: within it the client tries everything once.
        """
        attempt = 1
        while True:
            try:
                if not (self.offline or self.reached):
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
        if attempt >= min(attempts, fault_of(inner).attempts) or wait > LONGEST_WAIT:
            ours = self._explained(inner)
            ours.__cause__ = error
            clean(ours, self.token)
            raise ours
        if wait >= 10:
            log.warning("the Hub asks to wait %.0f seconds before it goes on to %s", wait, self.task)
        time.sleep(wait)

    def info(self, repo_id: str, revision: str | None = None) -> "ModelInfo":
        """Return the Hub's description of a repository; not retried."""
        return self.api.model_info(repo_id, revision=revision, timeout=SILENCE)

    def content(self, repo_id: str, name: str, commit: str, most: int) -> bytes:
        """Return the bytes of a file, by one request, past the client's cache; AdapterError if it has more than `most`.

        Not retried.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url, found = hf_hub_url(repo_id, name, revision=commit, endpoint=self.api.endpoint), bytearray()
        headers = build_hf_headers(token=self.token, library_name="maskpack")
        with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=SILENCE) as answer:
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            for piece in answer.iter_bytes():
                found += piece
                if len(found) > most:
                    raise AdapterError(f"{name} of {repo_id}@{commit} has more than {most} bytes, which are accepted")
        return bytes(found)

    def refs(self, repo_id: str, pull_requests: bool = False) -> "GitRefs":
        """Return the heads of a repository's branches and tags, and if asked of its pull requests."""
        return self.call(lambda: self.api.list_repo_refs(repo_id, include_pull_requests=pull_requests))

    def _explained(self, error: BaseException) -> MaskpackError:
        """Return our error for one of the client's."""

        def hidden(text: object) -> str:  # before a text is shortened: half of a token is a secret as well
            return redact(str(text or ""), self.token, error)

        fault, reference, wait = fault_of(error), self.reference or Reference("the repository"), _seconds_to_wait(error)
        host, text, said = (
            urlsplit(self.api.endpoint).hostname,
            hidden(error),
            hidden(getattr(error, "server_message", "")),
        )
        if fault.text == AWAY:  # it may be the store of large files that was asked
            with suppress(AttributeError, RuntimeError):
                host = error.host if isinstance(error, UnreachableError) else error.request.url.host  # type: ignore[attr-defined]
        line, quote = _first_line(text), _first_line(said)
        reason = fault.text.format(
            card=" ".join(text.split())[:300],
            file=f"{getattr(error, 'strerror', '')} ({getattr(error, 'filename', '')})",
            host=host,
            line=line,
            named=f"{type(error).__name__}: {line}".removesuffix(": "),
            page=f"{self.api.endpoint}/{reference.repo_id}",
            quote=f" ({quote})" if quote else "",
            repo_id=reference.repo_id,
            revision=reference.revision or "main",
            wait=f"{wait:.0f} seconds" if wait else "some minutes",
            who="your token's account may not see it" if _sent_login(error) else f"you are not logged in ({LOGIN})",
        )
        kind = HubUnreachableError if fault.attempts > 1 else fault.kind
        return kind(hidden(f"cannot {self.task}: {reason}{self._nearest_name(fault)}"))

    def _nearest_name(self, fault: Fault) -> str:
        """Return a clause with the nearest name, for an error that says that a name is not there; else no text."""
        reference, near = self.reference, list[str]()
        if reference is None or reference.repo_id is None:
            return ""
        with suppress(Exception), quietly("own"):  # a hint must not fail
            if fault is REFUSED["RepositoryNotFoundError"]:
                owner, _, name = reference.repo_id.partition("/")
                known = [found.id for found in self.api.list_models(author=owner, limit=NAMES)]
                # the owner may be what is misspelt
                known = known or [one.id for one in self.api.list_models(search=name, filter="maskpack", limit=NAMES)]
                near = get_close_matches(reference.repo_id, known)
            elif fault is REFUSED["RevisionNotFoundError"]:
                refs = self.api.list_repo_refs(reference.repo_id)
                near = get_close_matches(reference.revision or "main", [r.name for r in (*refs.branches, *refs.tags)])
        return f"; did you mean {' or '.join(near)}?" if near else ""


def _first_line(text: str) -> str:
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")
