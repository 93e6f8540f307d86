"""What a run or a picture writes must not become images of the set that it is made of."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from engine.data.decode import is_image_name
from engine.data.naming import is_system_folder
from engine.data.source import Source
from engine.errors import UserError
from engine.recipe.shipped import OF_A_RUN

_BESIDE = ("checkpoints", "metrics.jsonl")  # of which a run has one from its first step on


def holds_run(folder: str | bytes | Path) -> bool:
    """Whether it is a run directory, whose pictures are no images of a set that it lies in; a folder that may not be
    looked into is none, and whoever enters it is refused."""
    path = Path(os.fsdecode(folder))
    with suppress(PermissionError):
        return (path / OF_A_RUN).is_file() and any((path / name).exists() for name in _BESIDE)
    return False


def check_run_directory(path: Path, sources: Iterable[Source | None]) -> None:
    """For a new run: its folder is left out of the images that it lies among, so it must hold none of them.

    Raises:
        UserError: it is a folder of the images, or all of them.
    """
    for source in sources:
        for folder in () if source is None else source.folders:
            between = _between(path, folder)
            if between is not None and (not between or _has_images(path)):
                raise UserError(
                    f"run.dir ({path}) must be a folder of its own, and the training or validation images lie there; "
                    f"pass another, such as run.dir={path / 'run'}"
                )


def check_picture(out: Path, source: Source) -> None:
    """Raises UserError where a picture that is written to `out` would be an image of the source."""
    for folder in source.folders if is_image_name(os.fsencode(out.name)) else ():
        if lies_among(out, folder):
            raise UserError(f"OUT ({out}) must not become an image of {folder}; pass a place outside")


def lies_among(file: Path, folder: Path) -> bool:
    """Whether an image file would be one of those that a search of the folder finds."""
    between = _between(file, folder)
    if between is None or any(part[0] == "." or is_system_folder(part) for part in between):
        return False
    return not any(holds_run(inner) for inner in file.resolve().parents[: len(between) - 1])


def _between(path: Path, folder: Path) -> tuple[str, ...] | None:
    """The parts of a path below a folder; None where it does not lie there."""
    try:
        return path.resolve().relative_to(folder.resolve()).parts
    except ValueError:
        return None


def _has_images(folder: Path) -> bool:
    return any(is_image_name(os.fsencode(name)) for _, _, names in os.walk(folder) for name in names)
