"""The client of the Hub: one place where it is called, where passing faults are tried again and errors become ours."""

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, TypeVar

from .failures import explain, is_passing, retry_after

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from .reference import Reference

ATTEMPTS = 3
LONGEST_WAIT = 60.0

T = TypeVar("T")


class Session:
    """Calls to the Hub on behalf of one push or pull.

    The client is imported here and not with the module: it takes a third of a second, and applying a local adapter
    does not need it.
    """

    def __init__(self, verb: str, reference: "Reference", token: str | bool | None) -> None:
        from huggingface_hub import HfApi, constants

        assert reference.repo_id is not None
        self.verb, self.reference, self.token = verb, reference, token
        self.repo_id: str = reference.repo_id
        self.offline = bool(constants.HF_HUB_OFFLINE)
        self.api: HfApi = HfApi(library_name="maskpack", library_version=_version(), token=token)

    def call(self, action: Callable[[], T], retry: bool = True) -> T:
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
                wait = retry_after(error) or float(4 ** (attempt - 1))
                if retry and attempt < ATTEMPTS and is_passing(error) and wait <= LONGEST_WAIT:
                    attempt += 1
                else:
                    # a message that quotes the token would be printed with the traceback, so its chain is cut
                    ours, leaks = explain(error, self.verb, self.reference, self.api.endpoint, self.token)
                    raise ours from (None if leaks else error)
            time.sleep(wait)


def _version() -> str:
    try:
        return version("maskpack")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
