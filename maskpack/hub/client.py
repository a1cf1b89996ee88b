"""The client of the Hub: one place where it is called, where passing faults are tried again and errors become ours."""

import logging
import re
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

from ..errors import HubError
from ..network import SILENCE, UnreachableError, give_up, own_retries, reach
from ..redact import clean
from .failures import LOGIN, explain, is_passing, most_attempts, origin, seconds_to_wait
from .nearest import did_you_mean

if TYPE_CHECKING:
    from .reference import Reference

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
