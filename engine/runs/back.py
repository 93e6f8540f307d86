"""`--from`: a run goes on from an earlier checkpoint of its own, and its later ones are set aside."""

from pathlib import Path

from engine.checkpoint.layout import checkpoint_folders, damaged_folders, point, read_pointer, rename_aside, step_of
from engine.checkpoint.load import check_whole
from engine.errors import UserError, listed
from engine.files import remove, replace_file
from engine.logger import say
from engine.runs.directory import WENT_BACK, RunDirectory
from engine.weights.opening import checkpoint_folder


def find_earlier(directory: RunDirectory, wanted: Path | None) -> Path | None:
    """The run's checkpoint that `--from` means, found whole; None where it says nothing, or where the start before this
    one has obeyed it: the same command goes on. Called on rank 0.

    Raises:
        UserError: it is no checkpoint of this run, or damaged.
    """
    done = directory.path / WENT_BACK
    if wanted is not None and done.exists() and _name(directory, wanted) == done.read_text().strip():
        say(f"went back to {wanted} before, and goes on from there; remove {done} to go back to it again")
        return None
    remove(done)
    if wanted is None:
        return None
    found = checkpoint_folder(wanted) if wanted.exists() else None
    if found is None or found.resolve() not in {own.resolve() for own in checkpoint_folders(directory.checkpoints)}:
        raise UserError(
            f"--from ({wanted}) must be a checkpoint of the run in {directory.path}, {_choice(directory)}; a new run "
            f"that begins with another one's weights says run.continue_from"
        )
    own = directory.checkpoints / found.resolve().name
    check_whole(own, own)
    return own


def _name(directory: RunDirectory, wanted: Path) -> str | None:
    """Of a path among the run's checkpoints, though none may be there any more; None of one that names the run."""
    return wanted.name if wanted.resolve().parent == directory.checkpoints.resolve() else None


def _choice(directory: RunDirectory) -> str:
    names = [folder.name for folder in checkpoint_folders(directory.checkpoints)]
    return f"which has {listed(names) or 'none'}"


def go_back(directory: RunDirectory, checkpoint: Path, wanted: Path) -> None:
    """Make a checkpoint the run's newest: later ones get another name, under which they are not taken again, and stay.

    wanted: what `--from` called it. Called on rank 0. Raises OSError.
    """
    folders = [(folder, folder) for folder in checkpoint_folders(directory.checkpoints)]
    folders += damaged_folders(directory.checkpoints)  # which would be taken once they are mended
    later = [
        rename_aside(folder, former, "left").name  # newest first: a cut between two of them loses nothing
        for folder, former in folders
        if step_of(former) > step_of(checkpoint)
    ]
    point(directory.checkpoints, "latest", checkpoint)
    best = read_pointer(directory.checkpoints, "best")
    if best is not None and not (directory.checkpoints / best).exists():
        remove(directory.checkpoints / "best")  # the next save names the best of those that are there
    replace_file(directory.path / WENT_BACK, f"{_name(directory, wanted) or checkpoint.name}\n")
    if later:
        say(f"set aside {', '.join(later)}, later than {checkpoint.name}: yours to remove")
    say(f"back to {checkpoint.name}: the same command goes on from here")
