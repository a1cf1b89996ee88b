"""Processes that begin with all that this one has imported: a new interpreter takes seconds for torch alone."""

import faulthandler
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a process ended, minus its number if by a signal, and what it printed."""

    code: int | None
    output: str
    errors: str


class Forked:
    """A call in a process of its own, with output and errors of its own; killed where the block is left."""

    def __init__(
        self, call: Callable[[], object], folder: Path | None = None, session: bool = False, **environment: str
    ) -> None:
        reading, writing = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")

        def run() -> None:
            os.close(reading)
            if session:
                os.setsid()
            os.dup2(writing, 1)
            os.dup2(self._errors.fileno(), 2)
            os.close(writing)  # or what is started here would hold it open
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            faulthandler.enable()  # where a crash of native code was, told in the errors
            os.environ.update(environment)
            os.chdir(folder or Path.cwd())
            warnings.simplefilter("default")  # warnings are errors in tests only
            call()

        with warnings.catch_warnings():  # of threads that the child has not; none of them holds a lock for long
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process = get_context("fork").Process(target=run)
            self.process.start()
        os.close(writing)
        self.output = os.fdopen(reading)
        self.pid = self.process.pid or 0

    def ended(self, timeout: float = 120) -> Ended:
        """Wait for the end."""
        output = self.output.read()
        self.process.join(timeout)
        self._errors.seek(0)
        return Ended(self.process.exitcode, output, self._errors.read())

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.output.close()
        self._errors.close()


def together(count: int, *words: object, folder: Path | None = None) -> list[Ended]:
    """Run Python in so many processes, with the variables by which torch.distributed finds them, as torchrun does.

    Interpreters of their own: autograd and the threads of a process group do not survive a fork.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    where["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])

    def begin() -> None:
        os.execv(sys.executable, [sys.executable, "-X", "faulthandler", *map(str, words)])

    with ExitStack() as stack:
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
        running = [stack.enter_context(Forked(begin, folder, **where, **rank)) for rank in ranks]
        return [one.ended(240) for one in running]


def command(*words: object) -> Callable[[], None]:
    """Return a call of the command line, for a process of its own."""

    def call() -> None:
        from maskpack_cli.main import main

        sys.argv = ["maskpack", *map(str, words)]
        main()

    return call
