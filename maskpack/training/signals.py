"""Signals that ask a process to end: SIGTERM, and SIGUSR1 as schedulers send it before they take a machine away."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import StoppedError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def on_signal(answer: Callable[[int], None]) -> Iterator[None]:
    """Answer the first SIGTERM or SIGUSR1; a second one does what it did before.

    In another than the main thread, where none arrives, nothing changes.
    """
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        # one that is ignored stays so, and one that was not installed by Python could not be put back
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        earlier = {number: one for number, one in handlers.items() if one not in (None, signal.SIG_IGN)}

    def put_back() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def first(number: int, _: object) -> None:
        put_back()
        answer(number)

    for number in earlier:
        signal.signal(number, first)
    try:
        yield
    finally:
        put_back()


@contextmanager
def stopping(remedy: str) -> Iterator[None]:
    """Raise StoppedError at SIGTERM and SIGUSR1, as at once as an interrupt.

    Args:
        remedy: how to go on.
    """

    def stop(number: int) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name}; {remedy}", number)

    with on_signal(stop):
        yield
