"""The client of the Hub: one place where it is called, where passing faults are tried again and errors become ours."""

import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

from ..errors import HubError
from .failures import LOGIN, explain, is_passing, quotes_token, retry_after

if TYPE_CHECKING:
    from .reference import Reference

ATTEMPTS = 3
LONGEST_WAIT = 60.0

T = TypeVar("T")


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

    def call(self, action: Callable[[], T]) -> T:
        """Return what `action` returns, trying again after faults that pass.

        The client retries some calls and not others, so every call that may be repeated is repeated here.

        Raises:
            HubError, AdapterError: instead of whatever the client raised.
        """
        attempt = 1
        while True:
            try:
                return action()
            except Exception as error:
                self.wait_or_fail(error, attempt)
            attempt += 1

    def wait_or_fail(self, error: Exception, attempt: int) -> None:
        """Wait before the next attempt, or raise if the fault will not pass, or has not for long enough."""
        wait = retry_after(error) or float(4 ** (attempt - 1))
        if attempt >= ATTEMPTS or wait > LONGEST_WAIT or not is_passing(error):
            raise explain(error, self.task, self.reference, self.api.endpoint, self.token) from self.cause(error)
        time.sleep(wait)

    def cause(self, error: Exception) -> Exception | None:
        """Return the client's error as the cause of ours, unless the traceback would print a token with it."""
        return None if quotes_token(error, self.token) else error


def _version() -> str:
    try:
        return version("maskpack")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
