"""What lies in a folder of checkpoints: names, the pointers `latest` and `best`, changes that are never half done."""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from engine.errors import UserError
from engine.logger import warn

POINTERS = ("latest", "best")
LOCK = ".lock"
_STEP = re.compile(r"step_(\d{7,})")
_LEFTOVER = re.compile(r"(?:step_\d{7,}|latest|best)\.(?:tmp|removed)-[0-9a-f]{8}")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def step_name(step: int) -> str:
    return f"step_{step:07d}"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Everything named like a checkpoint, newest (highest step) first; [] where the folder does not exist.

    Raises UserError where it cannot be listed.
    """
    named = [(int(match[1]), path) for path in _entries(checkpoints) if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def leftovers(checkpoints: Path) -> list[Path]:
    """What killed runs left: saves that were not finished, removals that were not finished."""
    return sorted(path for path in _entries(checkpoints) if _LEFTOVER.fullmatch(path.name))


def _entries(checkpoints: Path) -> list[Path]:
    try:
        return list(checkpoints.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"checkpoint folder ({checkpoints}) must be a readable folder; {error.strerror}") from error


def aside(path: Path, kind: str) -> Path:
    """A free name beside `path` for something that is no checkpoint (yet, or any more): kind is tmp or removed."""
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def set_aside(checkpoint: Path, reason: str) -> None:
    """Rename a damaged checkpoint to step_X.damaged-1 (or -2, ...), never to be loaded or overwritten, and say so.

    Raises OSError.
    """
    count = 1
    while os.path.lexists(target := checkpoint.with_name(f"{checkpoint.name}.damaged-{count}")):
        count += 1
    checkpoint.rename(target)
    warn(f"checkpoint {checkpoint} is damaged: {reason}; it is set aside as {target.name}")


def read_pointer(checkpoints: Path, pointer: str) -> str | None:
    """The name that `latest` or `best` holds, whether or not it is there; None without that file."""
    try:
        return (checkpoints / pointer).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def point(checkpoints: Path, pointer: str, checkpoint: Path) -> None:
    """Let `latest` or `best` name a checkpoint, in one move: a reader finds the old name or the new one.

    Called by rank 0 alone. Raises OSError.
    """
    draft = aside(checkpoints / pointer, "tmp")
    write_durably(draft, checkpoint.name + "\n")
    draft.replace(checkpoints / pointer)
    sync_folder(checkpoints)


def write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(checkpoints: Path) -> Iterator[bool]:
    """Hold the folder's lock, which dies with its process; yields False where the file system has no locks.

    Raises UserError where another process holds it: two runs, or the orphan of a killed one, share the folder.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    with (checkpoints / LOCK).open("w") as file:
        yield _lock(file, checkpoints)


def _lock(file: TextIO, checkpoints: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"checkpoint folder ({checkpoints}) must belong to one run; another process is writing there: end it"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
