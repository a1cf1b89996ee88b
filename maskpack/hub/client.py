"""The client of the Hub: the one place where it is called, passing faults are retried, and errors become ours."""

import json
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
from ..network import SILENCE, UnreachableError, clean, give_up, own_retries, reach, redact
from .reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import GitRefs, HfApi

    from .reference import Reference


Clean = Callable[[object], str]
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
# The client raises its HTTP library's own errors, which are no OSError, and the library's name depends on its version.
TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
LASTING = frozenset({"ProxyError", "UnsupportedProtocol", "LocalProtocolError"})
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


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


def _header(error: BaseException, name: str) -> str:
    headers = getattr(getattr(origin(error), "response", None), "headers", None) or {}
    return str(headers.get(name, ""))


def _sent_token(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    return response is not None and "authorization" in response.request.headers


def seconds_to_wait(error: BaseException) -> float:
    """Return how many seconds the server asks to wait, or 0."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = _header(error, "retry-after")
    if value.isdigit():
        return float(value)
    limit = parse_ratelimit_headers({"ratelimit": _header(error, "ratelimit")})
    return limit.reset_in_seconds + 1.0 if limit and limit.remaining == 0 else 0.0


def _is_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in TRANSPORTS


def _kinds(error: BaseException) -> set[str]:
    """Return the names of an error's classes; those of the HTTP library cannot be imported by one name."""
    return {kind.__name__ for kind in type(error).__mro__}


def _asked(error: BaseException) -> str | None:
    """Return the server that an error of the HTTP library is about: the Hub's, or that of the large files."""
    try:
        host: str = error.request.url.host  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return None
    return host


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError

    return isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, RevisionResolutionError))


def is_passing(error: BaseException) -> bool:
    """Return True if the same call may well succeed in a moment."""
    error = origin(error)
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUSES
    if _is_offline(error):
        return False
    if _is_transport(error):
        return "TransportError" in _kinds(error) and not _kinds(error) & LASTING
    # an answer that was cut off, or that something between here and the Hub gave in its place
    cut = isinstance(error, (ConnectionError, TimeoutError, json.JSONDecodeError))
    return cut or is_from_xet(error) or "Consistency check failed" in str(error)


def is_from_xet(error: BaseException) -> bool:
    """Return True if the client's Xet library failed: it raises these builtins, whatever happened to it."""
    return type(origin(error)) in (RuntimeError, ConnectionError)


def most_attempts(error: BaseException) -> int:
    """Return how often a call that fails so may be made: less often where every attempt was long."""
    error = origin(error)
    if isinstance(error, UnreachableError):
        return error.attempts
    # a server that said nothing for a minute; Xet, which has tried for minutes by itself
    waited = is_from_xet(error) or isinstance(error, TimeoutError)
    return 2 if waited or "TimeoutException" in _kinds(error) else 5


def explain(
    error: Exception, task: str, reference: "Reference | None", endpoint: str, token: str | bool | None, hint: str = ""
) -> MaskpackError:
    """Return our error for one of the client's; `hint` goes behind the reason."""

    def clean(text: object) -> str:  # before a text is shortened: half of a token is a secret as well
        return redact(str(text or ""), token, error)

    kind, reason = _reason(origin(error), reference, endpoint, clean)
    if kind is HubError and is_passing(error):
        kind = HubUnreachableError
    return kind(clean(f"cannot {task}: {reason}{hint}"))


def _reason(
    error: BaseException, reference: "Reference | None", endpoint: str, clean: Clean
) -> tuple[type[MaskpackError], str]:
    """Return the class and the words for an error, the most telling first."""
    from huggingface_hub import errors

    host, text = urlsplit(endpoint).hostname, clean(error)
    repo_id, revision = (reference.repo_id, reference.revision or "main") if reference else ("the repository", "main")
    page = f"{endpoint}/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return HubError, f"its owner asks for an agreement first; open {page}, accept it, {LOGIN}, and try again"
    if isinstance(error, errors.DisabledRepoError):
        return HubError, "access to it was disabled on the Hub; ask its owner"
    if isinstance(error, errors.RevisionNotFoundError):
        return AdapterError, f"{repo_id} has no revision {revision!r}; give a branch, tag or commit of {page}"
    if isinstance(error, errors.RepositoryNotFoundError):
        who = "your token's account may not see it" if _sent_token(error) else f"you are not logged in ({LOGIN})"
        return AdapterError, f"{host} has no such repository, or it is private and {who}; check the name"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return AdapterError, "a file that it listed is missing there; try again"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return HubError, f"this needs a login; {LOGIN}"
    if isinstance(error, errors.HFValidationError):
        return AdapterError, "the Hub accepts no such name; expected user/name"
    if isinstance(error, (errors.FileMetadataError, json.JSONDecodeError)):
        return HubError, f"{host} does not answer like a Hub; check HF_ENDPOINT, firewall and proxy"
    if _is_offline(error):
        return HubError, "it is not in the cache and the Hub may not be asked; go online (unset HF_HUB_OFFLINE) once"
    if (status := status_of(error)) is not None:
        return HubError, _status_reason(error, status, host, clean)
    if is_from_xet(error):
        return HubError, f"the Xet store failed ({_named(error, text)}); try again, or set HF_HUB_DISABLE_XET=1"
    if _is_transport(error) or isinstance(error, (ConnectionError, TimeoutError)):
        if _kinds(error) & {"UnreachableError", "ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}:
            host = error.host if isinstance(error, UnreachableError) else _asked(error) or host
            return HubError, f"{host} cannot be reached ({_first_line(text)}); check network, proxy and HF_ENDPOINT"
        return HubError, f"the connection to {host} broke ({_named(error, text)}); try again"
    if "Consistency check failed" in text:
        return HubError, "a download ended before the file was whole; try again"
    if isinstance(error, ValueError) and "README.md" in text:
        return HubError, f"the Hub refuses the model card ({' '.join(text.split())[:300]}); correct README.md"
    if isinstance(error, OSError) and error.errno is not None:
        return HubError, f"{error.strerror} ({error.filename}); check space and permissions of the cache"
    if isinstance(error, (TypeError, LookupError, AttributeError)):
        return HubError, f"{host} does not answer like a Hub ({_named(error, text)}); check HF_ENDPOINT and proxy"
    return HubError, f"the client failed with {_named(error, text)}; if it stays, update huggingface_hub and hf-xet"


def _named(error: BaseException, text: str) -> str:
    line = _first_line(text)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _status_reason(error: BaseException, status: int, host: str | None, clean: Clean) -> str:
    said = _first_line(clean(getattr(error, "server_message", None)))
    quote = f" ({said})" if said else ""
    if status == 401:
        if not _sent_token(error):
            return f"this needs a login; {LOGIN}"
        return f"the token is refused{quote}; {LOGIN}, which comes first"
    if status == 403:
        return f"not allowed{quote}; use a token that may write there, of an account with access"
    if status in (409, 412):
        return f"somebody else changed it meanwhile{quote}; pull, look, and try again"
    if status == 429:
        wait = seconds_to_wait(error)
        return f"too many requests{quote}; wait {f'{wait:.0f} seconds' if wait else 'some minutes'} and try again"
    if status >= 500:
        return f"{host} answered {status}{quote}, also when asked again; try later"
    return f"{host} answered {status}{quote}"


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


LIMIT = 200  # repositories of an owner that are looked at


def did_you_mean(api: "HfApi", error: BaseException, reference: Reference | None) -> str:
    """Return a clause with the nearest name, for an error that says that a name is not there; else no text.

    A hint must not fail: whatever goes wrong in looking for one means that there is none.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if reference is None or reference.repo_id is None or isinstance(error, GatedRepoError):
        return ""
    with suppress(Exception):
        if isinstance(error, RepositoryNotFoundError):
            return _clause(reference.repo_id, _repositories(api, reference.repo_id))
        if isinstance(error, RevisionNotFoundError):
            refs = api.list_repo_refs(reference.repo_id)
            return _clause(reference.revision or "main", [one.name for one in (*refs.branches, *refs.tags)])
    return ""


def _repositories(api: "HfApi", repo_id: str) -> list[str]:
    owner, _, name = repo_id.partition("/")
    own = [found.id for found in api.list_models(author=owner, limit=LIMIT)]
    # the owner may be what is misspelt
    return own or [found.id for found in api.list_models(search=name, filter="maskpack", limit=LIMIT)]


def _clause(name: str, known: list[str]) -> str:
    nearest = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""


ATTEMPTS = 5
LONGEST_WAIT = 310.0  # the Hub counts requests in windows of five minutes
TIMEOUT = SILENCE

T = TypeVar("T")
log = logging.getLogger("maskpack")


class Session:
    """Calls to the Hub on behalf of one task.

    Args:
        task: what is done, for messages: "pull user/name".
        reference: the repository that it is about, if it is about one.

    The client is imported here and not with the module: it takes a third of a second, and applying a local adapter
    does not need it.
    """

    def __init__(self, task: str, token: str | bool | None, reference: "Reference | None" = None) -> None:
        from huggingface_hub import HfApi, constants

        if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
            # such a token cannot be sent, and the client would write it into its log
            raise HubError(f"cannot {task}: the token is empty or holds spaces, line ends or non-ASCII; {LOGIN}")
        self.task, self.token, self.reference = task, token, reference
        self.offline = bool(constants.HF_HUB_OFFLINE)
        self.api = HfApi(library_name="maskpack", library_version=_version(), token=token)
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
                with own_retries():
                    return action()
            except Exception as error:
                failed = error
            self.wait_or_fail(failed, attempt, attempts)
            attempt += 1

    def wait_or_fail(self, error: Exception, attempt: int, attempts: int = ATTEMPTS) -> None:
        """Wait before the next attempt, or raise if the fault will not pass, or has not for long enough."""
        wait = seconds_to_wait(error) or float(2 ** (attempt - 1))
        if attempt >= min(attempts, most_attempts(error)) or wait > LONGEST_WAIT or not is_passing(error):
            if isinstance(error, UnreachableError) and attempt >= error.attempts:
                give_up(self.api.endpoint, error)
            with own_retries():
                hint = did_you_mean(self.api, origin(error), self.reference)
            ours = explain(error, self.task, self.reference, self.api.endpoint, self.token, hint)
            ours.__cause__ = error
            clean(ours, self.token)
            raise ours
        if wait >= 10:
            log.warning("the Hub asks to wait %.0f seconds before it goes on to %s", wait, self.task)
        time.sleep(wait)


def _version() -> str:
    try:
        return version("maskpack")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def read_refs(session: Session, repo_id: str, pull_requests: bool = False) -> "GitRefs":
    """Return what a repository's branches and tags, and if asked its pull requests, point to."""
    return session.call(lambda: session.api.list_repo_refs(repo_id, include_pull_requests=pull_requests))


def check_is_no_branch(session: Session, reference: Reference, offline: bool) -> None:
    """Refuse a reference that may mean other bytes tomorrow: no revision, a branch, a pull request.

    Raises:
        AdapterError: with what to write instead.
    """
    if reference.is_pinned:
        return
    name = reference.revision
    hint = f"give a tag or a commit: {reference.repo_id}@COMMIT, as `maskpack pull {reference.repo_id}` prints it"
    if name is None:
        raise AdapterError(f"{reference} names no revision, and one is required; {hint}")
    if offline:
        raise AdapterError(f"{reference} may be a branch, and the Hub may not be asked; {hint}")
    refs = read_refs(session, str(reference.repo_id))
    if name not in {tag.name for tag in refs.tags} or name in {branch.name for branch in refs.branches}:
        raise AdapterError(f"{reference} is no tag and no commit, so it can change, and a revision is required; {hint}")


def read_tag(session: Session, repo_id: str, tag: str) -> str | None:
    """Return the commit that a tag points to, or None if there is no such tag."""
    return next((one.target_commit for one in read_refs(session, repo_id).tags if one.name == tag), None)


def set_tag(session: Session, repo_id: str, tag: str, commit: str) -> None:
    """Give a commit a tag; a tag that points to another one is never moved.

    Raises:
        HubError: if there is such a tag.
    """
    session.call(lambda: session.api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    check_tag(repo_id, tag, read_tag(session, repo_id, tag), commit)


def check_tag(repo_id: str, tag: str, found: str | None, wanted: str | None) -> None:
    """Refuse to go on where a tag points to another commit than the wanted one; None means a commit to come.

    Raises:
        HubError: with both commits.
    """
    if found is not None and found != wanted:
        raise HubError(
            f"{repo_id} has a tag {tag!r} at commit {found[:12]} already, and tags are not moved; choose another tag, "
            f"or delete it: hf repos tag delete {repo_id} {tag}"
        )


def pull_requests(session: Session, repo_id: str) -> dict[str, str]:
    """Return the head of every pull request by its number."""
    found = read_refs(session, repo_id, pull_requests=True).pull_requests or []
    return {one.ref.removeprefix("refs/pr/"): one.target_commit for one in found}
