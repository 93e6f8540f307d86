"""Files that are there completely or not at all, locks that end with their process, and the reader of metrics.jsonl."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError
from engine.logger import warn

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}  # the last: NFS, of folders
_RETRY_SECONDS = 0.2
_SWEPT_SECONDS = 10.0  # that a draft may be held by who looks whether its writer lives
_BLOCK = 1 << 16  # bytes that are read at once from a file's end
_OWN_DRAFTS: set[Path] = set()  # of this process
os.register_at_fork(after_in_child=_OWN_DRAFTS.clear)


def replace_file(path: Path, content: bytes | str) -> None:
    """Give a file new content (text as UTF-8): a reader finds the old or the new, also after a power cut.

    Raises OSError.
    """
    with naming(path), draft(path) as place:
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(place, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses in the body is said with this path, where it names none. Raises OSError."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """A free name beside `path`, to write a file or a folder there and `publish` it; what is left at the end goes."""
    place = aside(path, "tmp")
    _OWN_DRAFTS.add(place)
    try:
        yield place
    finally:
        if os.path.lexists(place):
            remove_or_warn(place)  # a failure must not hide what happened inside
        _OWN_DRAFTS.discard(place)


def abandon_drafts() -> None:
    """Remove what lies under the names of this process's drafts, which ends now."""
    for place in tuple(_OWN_DRAFTS):
        remove_or_warn(place)


def publish(place: Path, path: Path) -> None:
    """Let a finished file or folder take its name, in one move that outlives a power cut.

    A file replaces the one that is there, a folder must find the name free. The files in a folder are flushed by who
    writes them (`sync`). Raises OSError.
    """
    sync(place)
    place.replace(path)
    sync(path.parent)


def aside(path: Path, kind: str) -> Path:
    """A free name beside `path` for what is not to be taken for it: `name.tmp-0123abcd`, where kind is tmp."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def remove_drafts(folder: Path, names: Collection[str]) -> None:
    """Remove what a killed process left of drafts of these names; for who alone writes them. Raises OSError."""
    for path in folder.iterdir():
        found = re.fullmatch(r"(.+)\.tmp-[0-9a-f]{8}", path.name, re.DOTALL)
        if found and found[1] in names:
            remove(path)


@contextmanager
def shared_draft(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """`draft` of a file, or a folder, that anybody may write, also several at once: there at once, and locked while its
    writer lives. Raises OSError."""
    with draft(path) as place:
        if is_folder:
            place.mkdir()
        with lock(place, f"{place} must be its writer's alone", _SWEPT_SECONDS):
            yield place


def sweep(folder: Path, suffix: str, *, folders: bool = False) -> None:
    """Remove what killed processes left of `shared_draft`s, files or folders, whose names end in suffix; where nothing
    can be locked or removed, nothing."""
    with suppress(OSError):
        for path in folder.iterdir():
            is_one = re.fullmatch(rf".*{re.escape(suffix)}\.tmp-[0-9a-f]{{8}}", path.name, re.DOTALL)
            if is_one and (path.is_dir() if folders else path.is_file()):
                with suppress(OSError), _open_to_lock(path) as handle:
                    if _try_lock(handle):
                        remove(path)


def sync(place: Path | IO) -> None:
    """Make a file's content, or the names in a folder, outlive a power cut. Raises OSError."""
    if not isinstance(place, Path):
        os.fsync(place)
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing where there is none. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_or_warn(path: Path, outlook: str = "") -> bool:
    """`remove`; whether it did. If not, a warning says so; outlook: and what comes of it."""
    try:
        remove(path)
    except OSError as error:
        warn(f"{path} could not be removed{outlook}: {error}")
        return False
    return True


@contextmanager
def lock(path: Path, in_use: str, seconds: float = 0.0) -> Iterator[bool]:
    """Hold `path`, a file for that alone or a folder, to the end of the body or of this process.

    Yields False where the file system has no locks, so that nothing is held. Raises UserError(in_use) where another
    process still holds it after `seconds`, and OSError.
    """
    deadline = time.monotonic() + seconds
    with _open_to_lock(path) as handle:
        while (held := _try_lock(handle)) is None:
            if time.monotonic() >= deadline:
                raise UserError(in_use)
            time.sleep(_RETRY_SECONDS)
        try:
            yield held
        finally:
            if held:
                with suppress(OSError):  # closed here alone, it would stay locked by what was forked in the body
                    fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def _open_to_lock(path: Path) -> Iterator[int]:
    """A handle of a folder, or of a file, which is made if need be; what its holder has written there stays."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool | None:
    """True: held; None: another process holds it; False: no locks on this file system."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def read_rows(path: Path, key: str = "") -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, one for each complete line, oldest first; each has a `step`.

    A last line without its end, which a killed run leaves or a living one is just writing, is no row.
    key: the rows that have it, alone; nothing is made of other lines.
    Raises, as it comes to it, UserError for any other line that is no row, and OSError.
    """
    return (row for row, _ in rows_and_lines(path, key) if key in row or not key)


def rows_and_lines(path: Path, key: str = "") -> Iterator[tuple[dict[str, Any], bytes]]:
    """`read_rows`, each with the line that it stands on."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and key.encode() in line:
                yield row_on(line, f"{path} line {number}"), line


def newest_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """The complete lines of a file, newest first, each with the byte at which it begins. Raises OSError."""
    with path.open("rb") as file:
        start, rest, is_torn = file.seek(0, os.SEEK_END), b"", True  # what follows the last line's end is no line
        while start:
            size = min(_BLOCK, start)
            start -= size
            file.seek(start)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            at = start + len(rest) + sum(len(line) + 1 for line in lines)
            for line in reversed(lines):
                at -= len(line)
                if not is_torn:
                    yield line + b"\n", at
                is_torn, at = False, at - 1
        if not is_torn:
            yield rest + b"\n", 0


def row_on(line: bytes, where: str) -> dict[str, Any]:
    """The row of a line; raises UserError, which names `where`, for a line that is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(
            f"{where} ({line[:40]!r}) must be a JSON object with a step; mend the line or move the file away"
        )
    return row
