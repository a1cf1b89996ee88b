"""Trials in processes of their own: a worker imports libraries once, and forks for each trial.

    python -m maskpack.evaluate.worker

It reads the name of a job's file from stdin, runs it, and reads the next, until stdin ends. Events go to stdout, one
JSON object a line; the last of a trial is {"event": "exit", "code"}.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ..errors import MaskpackError, StateError
from .trial import Job, run, write_json

# not run here, so that no thread is there when the process forks; one that is not installed is needed by no trial
IMPORTED = ("accelerate", "datasets", "torchvision.transforms.v2", "torch.utils.tensorboard", "sklearn.mixture", "PIL")


GRACE = 1.5  # seconds that a job has to end by itself
POLL = 0.1


class Worker:
    """Starts the worker when it is first needed, and ends it with all that it started.

    It ends also when this process is killed.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):  # a training that is asked to stop keeps its last step
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.communicate(timeout=GRACE)
                    break

    def run(self, job: Path) -> Iterator[dict[str, Any]]:
        """Give the events of a job, the last of which is {"event": "exit", "code"}."""
        if self._process is None or self._process.poll() is not None:
            # in a group of its own: the interrupt key reaches this process alone, which then ends the others
            self._process = subprocess.Popen(
                [sys.executable, "-m", "maskpack.evaluate.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                process_group=0,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # its end is seen below
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            yield event
            if event["event"] == "exit":
                return
        yield {"event": "exit", "code": self._process.wait()}


def serve() -> None:
    """Run the jobs that stdin names."""
    events, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no event
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(Path(line.rstrip("\n")), events)
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            # nothing comes in while a job runs but the end of who waits for it, by whatever signal
            if select.select([sys.stdin], [], [], POLL)[0]:
                os.killpg(0, signal.SIGKILL)
        _write(events, {"event": "exit", "code": os.waitstatus_to_exitcode(ended[1])})


def _run(path: Path, events: TextIO) -> None:
    """Run a job and end this process."""
    code = 1
    try:
        job = Job(**json.loads(path.read_text(encoding="utf-8")))
        write_json(Path(job.result), run(job, lambda event: _write(events, event)))
        code = 0
    except MaskpackError as error:
        _write(events, {"event": "error", "kind": type(error).__name__, "message": str(error)})
    except OSError as error:  # a full disk, say
        _write(events, {"event": "error", "kind": StateError.__name__, "message": str(error)})
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _write(events: TextIO, event: Mapping[str, Any]) -> None:
    try:
        events.write(json.dumps(event) + "\n")
        events.flush()
    except BrokenPipeError:  # nobody waits for the result any more
        os._exit(1)


if __name__ == "__main__":
    serve()
