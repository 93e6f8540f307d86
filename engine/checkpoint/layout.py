"""What lies in a folder of checkpoints: names, the pointers `latest` and `best`, changes that are never half done."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import SystemRefused, reason
from engine.files import lock, replace_file, sync
from engine.logger import warn

POINTERS = ("latest", "best")
LOCK = ".lock"
_STEP = re.compile(r"step_\d{7,}")
_DAMAGED = re.compile(r"(step_\d{7,})\.damaged-\d+")
_LEFTOVER = re.compile(r"(?:step_\d{7,}|latest|best)\.(?:tmp|removed)-[0-9a-f]{8}")


def step_name(step: int) -> str:
    return f"step_{step:07d}"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Everything named like a checkpoint, newest (highest step) first; [] where the folder does not exist.

    Raises SystemRefused where it cannot be listed.
    """
    return sorted((path for path, _ in _matches(checkpoints, _STEP)), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Of something named like a checkpoint."""
    return int(checkpoint.name.partition("_")[2])


def damaged_folders(checkpoints: Path) -> list[tuple[Path, Path]]:
    """What was set aside, each with the path that it had; highest step first. Raises SystemRefused."""
    pairs = [(path, path.with_name(match[1])) for path, match in _matches(checkpoints, _DAMAGED)]
    return sorted(pairs, key=lambda pair: (step_of(pair[1]), pair[0]), reverse=True)


def leftovers(checkpoints: Path) -> list[Path]:
    """What killed runs left: saves that were not finished, removals that were not finished."""
    return sorted(path for path, _ in _matches(checkpoints, _LEFTOVER))


def _matches(checkpoints: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    return [(path, match) for path in _entries(checkpoints) if (match := pattern.fullmatch(path.name))]


def _entries(checkpoints: Path) -> list[Path]:
    try:
        return list(checkpoints.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        if isinstance(error, NotADirectoryError) and checkpoints.parent.is_file():  # it does not exist either
            return []
        raise SystemRefused(f"checkpoint folder ({checkpoints}) must be a readable folder; {reason(error)}") from error


def rename_aside(folder: Path, checkpoint: Path, kind: str) -> Path:
    """Give a folder the name of a checkpoint and `.<kind>-1` (or -2, ...) behind it; its new path. Raises OSError."""
    count = 1
    while os.path.lexists(target := checkpoint.with_name(f"{checkpoint.name}.{kind}-{count}")):
        count += 1
    folder.rename(target)
    sync(target.parent)
    return target


def set_aside(checkpoint: Path, why: str) -> None:
    """Rename a damaged checkpoint to step_X.damaged-1 (or -2, ...), never to be loaded or overwritten, and say so.

    Raises OSError.
    """
    target = rename_aside(checkpoint, checkpoint, "damaged")
    warn(f"checkpoint {checkpoint} is damaged: {why}; it is set aside as {target.name}")


def put_back(folder: Path, former: Path) -> None:
    """Give what was set aside its former path back, and say so. Raises OSError."""
    folder.rename(former)  # fails where something else has the name
    sync(former.parent)
    warn(f"checkpoint {former}, which was set aside as {folder.name}, is whole again and taken")


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
    replace_file(checkpoints / pointer, checkpoint.name + "\n")


@contextmanager
def writing(checkpoints: Path) -> Iterator[bool]:
    """Hold the folder's lock, which dies with its process; yields False where the file system has no locks.

    Raises UserError where another process holds it: two runs, or the orphan of a killed one, share the folder.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    in_use = f"checkpoint folder ({checkpoints}) must belong to one run; another process is writing there: end it"
    with lock(checkpoints / LOCK, in_use) as held:
        yield held
