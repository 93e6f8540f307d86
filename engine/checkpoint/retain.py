"""Remove checkpoints that are no longer wanted and what killed runs left behind."""

from collections.abc import Callable
from pathlib import Path

from engine.checkpoint import layout
from engine.distributed.agreement import rank
from engine.errors import UserError
from engine.files import aside, remove, remove_or_warn, sync
from engine.logger import warn


def retain(checkpoints: Path, keep: int, archives: Callable[[int], bool] = lambda step: False) -> list[Path]:
    """Remove all but the newest `keep` checkpoints, those that `latest` and `best` name, and those of which `archives`
    says, by their step, that they stay; returns the removed. An archive is none of the newest that count.

    Every rank may call it; rank 0 works and nobody waits. Damaged checkpoints that were set aside and foreign files
    stay. A checkpoint that cannot be removed is a warning.
    """
    if keep < 1:
        raise ValueError(f"keep ({keep}) must be at least 1")
    if rank() != 0:
        return []
    checkpoints = Path(checkpoints)
    try:
        named = {layout.read_pointer(checkpoints, pointer) for pointer in layout.POINTERS}
        folders = layout.checkpoint_folders(checkpoints)
    except (UserError, OSError) as error:
        warn(f"no old checkpoint is removed from {checkpoints}: {error}")
        return []
    old = [folder for folder in folders if not archives(layout.step_of(folder))][keep:]
    return [folder for folder in old if folder.name not in named and _remove(folder)]


def _remove(folder: Path) -> bool:
    # Renamed first: a removal that is cut off leaves nothing that looks like a checkpoint.
    doomed = aside(folder, "removed")
    try:
        folder.rename(doomed)
        sync(folder.parent)
        remove(doomed)
    except OSError as error:
        warn(f"checkpoint {folder} could not be removed: {error}")
        return False
    return True


def clean(checkpoints: Path) -> list[Path]:
    """At the start of a run: remove unfinished saves and removals; returns the removed.

    Every rank may call it; rank 0 works and nobody waits. Where another process is saving, or where that cannot be
    known (no file locks), all stays and a line says so.
    """
    checkpoints = Path(checkpoints)
    if rank() != 0:
        return []
    try:
        return _clean(checkpoints)
    except (UserError, OSError) as error:
        warn(f"unfinished saves stay in {checkpoints}: {error}")
        return []


def _clean(checkpoints: Path) -> list[Path]:
    found = layout.leftovers(checkpoints)
    if not found:
        return []
    with layout.writing(checkpoints) as locked:
        if locked:
            return [path for path in found if remove_or_warn(path)]
    warn(f"no file locks in {checkpoints}: remove {', '.join(path.name for path in found)} yourself")
    return []
