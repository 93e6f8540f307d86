"""A file that a run adds to, and that loses nothing where the disk is full for a while."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import reason
from engine.files import naming, sync
from engine.logger import warn


class GrowingFile:
    """What cannot be written stays in memory and is tried again with what comes next, from where the file is whole.

    A write that fails may leave a part behind, which goes again; and the system forgets what it could not bring to the
    disk when it is asked once to do so. So all that came since the last `sync` stays in memory until the next.

    failures: writes that failed so far. Threads may share it.
    """

    def __init__(self, path: Path):
        self.path, self.failures = path, 0
        self._file = None
        self._lock = threading.RLock()
        self._pieces: list[bytes] = []  # since the last sync
        self._written = 0  # of the pieces
        self._torn = False  # something lies behind the end
        self._fails = False  # the last write did

    def add(self, piece: bytes) -> None:
        """To the end of the file at once, or later where the system refuses it now, which is said."""
        with self._lock:
            self._pieces.append(piece)
            self.try_to(self._write)

    def try_to(self, act: Callable[[], None]) -> None:
        """Write, `sync` or `close`; where the system refuses it, this is said and counted."""
        try:
            act()
        except OSError as error:
            with self._lock:
                self._count_failure(error)

    def sync(self) -> None:
        """Returns when all that was added would survive a power failure. Raises OSError."""
        with self._lock, naming(self.path):
            self._write()
            written = self._written
        try:
            with naming(self.path):
                sync(self._file)
                sync(self.path.parent)  # the file's name is an entry of its own
        except OSError:
            with self._lock:
                self._end -= sum(map(len, self._pieces[: self._written]))
                self._written, self._torn = 0, True
            raise
        with self._lock:
            del self._pieces[:written]
            self._written -= written

    def close(self) -> None:
        """Raises OSError where something that was added is not in the file."""
        with self._lock, naming(self.path):
            if self._pieces:
                self._write()
            if self._file is not None:
                self._file.close()

    def _write(self) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._end = self._file.tell()
        try:
            self._mend()
            for piece in self._pieces[self._written :]:
                self._append(piece)
        except OSError:
            with suppress(OSError):  # the next write tries again
                self._mend()  # else a reader would find half a line
            raise
        if self._fails:
            self._fails = False
            warn(f"{self.path} can be written again, and lacks nothing")

    def _append(self, piece: bytes) -> None:
        self._torn, rest = True, memoryview(piece)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._torn, self._end, self._written = False, self._end + len(piece), self._written + 1

    def _mend(self) -> None:
        if self._torn:
            os.ftruncate(self._file.fileno(), self._end)
            self._torn = False

    def _count_failure(self, error: OSError) -> None:
        self.failures += 1
        if not self._fails:
            self._fails = True
            why = f"{self.path} could not be written ({reason(error)})"
            warn(f"{why}; training goes on, and what it lacks stays in memory until it can be")
