"""Temporary files of killed processes: found by their names, told from those of living ones by a lock."""

import os
import re
import time
from contextlib import suppress
from pathlib import Path


def lock(descriptor: int) -> bool:
    """Lock an open file for as long as this process has it open; return False if another has, or it cannot be."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # not on Windows, nor on every network disk
        return False
    return True


def is_leftover(path: Path, name: str) -> bool:
    """Return True for a temporary file of a file of that name: `.NAME.<12 hex digits>.tmp`."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.tmp", path.name) is not None


def clear_leftovers(target: Path) -> None:
    """Remove the temporary files of a path whose writers are gone."""
    with suppress(OSError):
        for path in [one for one in target.parent.iterdir() if is_leftover(one, target.name)]:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                status = os.fstat(descriptor)
                # a file that is new and empty may not have its lock yet
                if (status.st_size or status.st_mtime < time.time() - 10) and lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)
