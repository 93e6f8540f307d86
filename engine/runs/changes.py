"""Images that are not as a run began with them: named, and refused or accepted (`data.accept_changes`)."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from engine.checkpoint.manifest import read_manifest
from engine.checkpoint.state import RunState
from engine.data.began import changes_in_words, list_of, write_began
from engine.data.contents import count, difference
from engine.data.leaving_out import leave_out
from engine.data.rules import by_rules
from engine.data.source import Source
from engine.data.splits import Splits
from engine.distributed.agreement import agreement, broadcast
from engine.distributed.world import World
from engine.errors import UserError
from engine.logger import warn
from engine.recipe.paths import expand
from engine.recipe.sections import Recipe
from engine.runs.directory import checkpoints_of
from engine.runs.task import Task


def begun(recipe: Recipe, world: World) -> Path | None:
    """The directory of a run that has begun and accepts other images; None where there is no such run."""
    with agreement(world.host_group):
        return expand(recipe.run.dir) if recipe.data.accept_changes and checkpoints_of(recipe) else None


def readable(splits: Splits, recipe: Recipe, world: World, *, batch: int = 1) -> Splits:
    """The splits without the training images that could not be read when the recipe's run began, or begins now.

    All ranks call it together. Raises UserError as `leave_out` does.
    """
    with agreement(world.host_group):
        found = _left_out(recipe) if world.is_first else None
    known = broadcast(found, world.host_group)
    return splits._replace(train=leave_out(splits.train, recipe.data, world, batch=batch, known=known))


def _left_out(recipe: Recipe) -> dict[int, str] | None:
    """What the run left out when it began; None where it begins now."""
    for path in checkpoints_of(recipe):
        with suppress(UserError):  # what is wrong with it is said where it is loaded
            state = RunState.read(path, read_manifest(path))
            if state.images:  # imported weights have seen none
                return {int(i): words for i, words in state.left_out.get("train", {}).items()}
    return None


def find_changes(task: Task, state: RunState, directory: Path) -> dict[str, str]:
    """What is not as it was, by split, in words; where nothing can be named they are empty. All ranks call it together.

    Rank 0 looks: it alone reads the list of what the run began with, where images are known to differ.
    """
    found: dict[str, str] = {}
    with agreement(task.world.host_group):
        if task.world.is_first:
            for split, (source, _) in task.images_bound().items():
                changes = _changes(source, state, split, task.contents[split], directory)
                found |= {} if changes is None else {split: changes}
    return broadcast(found, task.world.host_group)


def _changes(source: Source, state: RunState, split: str, now: Mapping[str, str], directory: Path) -> str | None:
    if source.changes:
        return source.changes
    if state.images.get(split, source.fingerprint) == source.fingerprint:  # imported weights have seen none
        return difference(source, state.contents.get(split, {}), now)
    words = changes_in_words(source.whole, list_of(directory, split))
    return words or difference(source, state.contents.get(split, {}), now) or ""


def check_images(task: Task, state: RunState) -> None:
    """Raises UserError where images have changed (`find_changes`), and that is not or cannot be accepted."""
    for split, words in task.changes.items():
        source, name = task.images_bound()[split]
        differs = state.images.get(split, source.fingerprint) != source.fingerprint
        if task.recipe.data.accept_changes and (not differs or count(state.contents.get(split, {})) == len(source)):
            continue
        why = by_rules(state.image_rules, source) if differs else ""
        why += f"; {words}" if words else ""
        do = "give it those, go on with data.accept_changes=true, or pass another run.dir"
        if task.recipe.data.accept_changes:
            do = "their number must be the same, or the run's list of them be there; give it those"
        raise UserError(f"{name} must hold the images that the run in {task.recipe.run.dir} began with{why}; {do}")


def accept(task: Task, state: RunState) -> None:
    """Say with what the run goes on, and keep it for the checkpoints to come, beside what it began with."""
    task.accepted = {**task.accepted, **task.changes}
    images, contents = (
        {split: value for split, value in kept.items() if split in task.changes}
        for kept in (state.images, state.contents)
    )
    task.began_with = images, contents
    for split, words in task.changes.items() if task.world.is_first else ():
        name = task.images_bound()[split][1]
        warn(f"{name}: not all images are as the run began with them, which is accepted: {words or 'they differ'}")


def list_images(task: Task, directory: Path) -> None:
    """Rank 0 lists what the run began with, for the day on which some of it has changed."""
    if task.world.is_first:
        for split, (source, _) in task.images_bound().items():
            if split not in task.accepted:
                write_began(source.whole, list_of(directory, split))
