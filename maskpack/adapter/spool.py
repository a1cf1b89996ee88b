"""Payloads put aside on disk until all are made: a file's header comes first and says how long each is."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from blake3 import blake3

from ..errors import StateError

PIECE = 1 << 20  # bytes


class Stretch(NamedTuple):
    """Where a payload lies in the spool, in bytes, and its BLAKE3."""

    start: int
    size: int
    digest: bytes


class Spool:
    """A nameless temporary file in a folder; it is gone when the process ends, however it ends.

    Args:
        folder: where the bytes will be needed, so that they come to lie on the same disk.

    Raises:
        StateError: if the folder cannot be written to, or the disk is full.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.size = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, data: bytes) -> Stretch:
        """Put bytes aside."""
        stretch, left = Stretch(self.size, len(data), blake3(data).digest()), memoryview(data)
        try:
            self._file.seek(self.size)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from error
        self.size += len(data)
        return stretch

    def read(self, stretch: Stretch) -> Iterator[bytes]:
        """Return the bytes of a stretch in small pieces."""
        at, end = stretch.start, stretch.start + stretch.size
        while at < end:
            self._file.seek(at)
            piece = self._file.read(min(PIECE, end - at))
            assert piece, "the spool is shorter than what was put into it"
            at += len(piece)
            yield piece

    def _unwritable(self, error: OSError) -> StateError:
        return StateError(
            f"cannot write in {self.folder}: {error.strerror or error}; nothing was changed there; free space, or "
            f"choose a folder that exists and that you may write to"
        )


class Spooled:
    """Stretches of a spool one after another, as small pieces that can be read any number of times."""

    def __init__(self, spool: Spool, stretches: Sequence[Stretch]):
        self.spool, self.stretches = spool, stretches

    def __iter__(self) -> Iterator[bytes]:
        for stretch in self.stretches:
            yield from self.spool.read(stretch)
