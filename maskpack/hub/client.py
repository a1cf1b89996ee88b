"""The client of the Hub: one place where it is called, where passing faults are tried again and errors become ours."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

from ..errors import HubError
from .failures import LOGIN, explain, is_from_xet, is_passing, origin, quotes_token, seconds_to_wait
from .nearest import did_you_mean

if TYPE_CHECKING:
    from .reference import Reference

ATTEMPTS = 5
LONGEST_WAIT = 310.0  # the Hub counts requests in windows of five minutes
TIMEOUT = 60.0

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

    def call(self, action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
        """Return what `action` returns, trying again after faults that pass.

        The client retries some calls and not others, so every call that may be repeated is repeated here.

        Raises:
            HubError, AdapterError: instead of whatever the client raised.
        """
        attempt = 1
        while True:
            try:
                with patience():
                    return action()
            except Exception as error:
                self.wait_or_fail(error, attempt, attempts)
            attempt += 1

    def wait_or_fail(self, error: Exception, attempt: int, attempts: int = ATTEMPTS) -> None:
        """Wait before the next attempt, or raise if the fault will not pass, or has not for long enough."""
        if is_from_xet(error):
            attempts = min(attempts, 2)  # it has tried for minutes by itself
        wait = seconds_to_wait(error) or float(2 ** (attempt - 1))
        if attempt >= attempts or wait > LONGEST_WAIT or not is_passing(error):
            with patience():
                hint = did_you_mean(self.api, origin(error), self.reference)
            raise explain(error, self.task, self.reference, self.api.endpoint, self.token, hint) from self.cause(error)
        if wait >= 10:
            log.warning("the Hub asks to wait %.0f seconds before it goes on to %s", wait, self.task)
        time.sleep(wait)

    def cause(self, error: Exception) -> Exception | None:
        """Return the client's error as the cause of ours, unless the traceback would print a token with it."""
        return None if quotes_token(error, self.token) else error


@contextmanager
def patience() -> Iterator[None]:
    """Let the client wait a minute for a silent server; left alone it waits for ever in most of its calls.

    The HTTP session belongs to the whole process, so it is left as it was, and one that has limits keeps them.
    """
    from huggingface_hub import get_session

    session = get_session()
    before = session.timeout
    if any(limit is not None for limit in before.as_dict().values()):
        yield
        return
    session.timeout = TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


def _version() -> str:
    try:
        return version("maskpack")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
