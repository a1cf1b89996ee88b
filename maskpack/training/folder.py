"""The folder of a run: one process at a time writes into it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import StateError
from .accelerator import is_main_process
from .checkpoint import FILE

LOCK = ".lock"  # names its holder; without one that lives it means nothing
_held: set[IO[str]] = set()


@contextmanager
def run_folder(output: str | Path | None, resume: bool) -> Iterator[Path | None]:
    """Give the folder of a run, made if it is not there, and lock it as long as the run lasts; None for None.

    Raises:
        StateError: as `check_untaken`.
    """
    if output is None:
        yield None
        return
    folder = Path(output)
    with locked(folder):
        check_untaken(folder, resume, ours=True)
        try:
            yield folder
        except KeyboardInterrupt as error:
            if (folder / FILE).exists():
                error.add_note(f"Train again with resume (--resume) to go on from the checkpoint in {folder}")
            raise


def check_untaken(folder: Path, resume: bool, ours: bool = False) -> None:
    """Check that a run may begin in a folder, or go on.

    Args:
        ours: this process has locked it.

    Raises:
        StateError: if another process writes into it, or it has a checkpoint and its run is not to be resumed.
    """
    if not ours and (folder / LOCK).exists():
        with locked(folder):
            pass
    if (folder / FILE).exists() and not resume:
        raise StateError(
            f"{folder} holds the checkpoint of an earlier run; continue it with resume, or choose another folder"
        )


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Lock a folder, made if it is not there, against other processes and threads that lock it; None locks nothing.

    The system lets go of the lock when this process ends, however it ends. Folders in it have locks of their own. Of
    processes that train together the main one has the lock.

    Raises:
        StateError: if it is locked; the message names the holder.
    """
    if folder is None or not is_main_process():
        yield
        return
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _opened(path)
    except OSError as error:
        raise StateError(
            f"cannot write into {folder}: {error.strerror or error}; choose a folder that you may write to"
        ) from error
    try:
        yield
    finally:
        _held.discard(file)
        path.unlink(missing_ok=True)  # while it is locked: whoever opened it before sees that it is another file now
        file.close()


def _opened(path: Path) -> IO[str]:
    """The lock's file, locked, with the name of this process in it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if not _lock(file):
                file.seek(0)
                holder = file.read(200).strip()
                raise StateError(
                    f"another run writes into {path.parent}{f' (process {holder})' if holder else ''}; wait for its "
                    f"end, or choose another folder"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                _held.add(file)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[str]) -> bool:
    """Lock an open file; return False if another has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _lock_bytes(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_bytes(file: IO[str]) -> bool:
    import msvcrt

    system: Any = msvcrt
    file.seek(1 << 20)  # a locked byte cannot be read: one behind the text
    try:
        system.locking(file.fileno(), system.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def _let_go() -> None:
    """In a process that was forked: a copy of the open file would hold the lock longer than the run."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
