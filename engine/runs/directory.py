"""The folder of a run: who may write in it, and that every node sees it."""

import fcntl
import secrets
import time
from pathlib import Path
from typing import IO

from engine.checkpoint.manifest import Manifest
from engine.distributed.agreement import agreement, share
from engine.distributed.world import World
from engine.errors import UserError
from engine.files import replace_file
from engine.recipe.identity import resume_differences
from engine.recipe.load import dump, loads, task_of
from engine.recipe.sections import Linear, Recipe

LOCK_SECONDS = 10.0  # ranks of a killed launch need a moment to notice and to let go
VISIBLE_SECONDS = 10.0  # network file systems need a moment to show a new file


class RunDirectory:
    """`run.dir`, held by one launch at a time. A context manager, entered on all ranks together.

    Raises:
        UserError: on every rank, where the folder cannot be written, is in use, or is not the same on every node.
    """

    def __init__(self, path: Path, world: World):
        self.path, self.world = path, world
        self.checkpoints = path / "checkpoints"
        self.lock: IO | None = None

    def __enter__(self) -> "RunDirectory":
        try:
            with agreement(self.world.host_group):
                if self.world.is_first:
                    self._make()
            self._check_visible()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            self.lock.close()

    def check_fresh(self, recipe: Recipe) -> None:
        """Raises UserError, on every rank, where a start would bury a run: all of it damaged, or of another task."""
        with agreement(self.world.host_group):
            if (self.path / "recipe.yaml").exists():
                check_same_task((self.path / "recipe.yaml").read_text(), recipe)
            damaged = sorted(path.name for path in self.checkpoints.glob("step_*.damaged-*"))
            if damaged:
                raise UserError(
                    f"run.dir ({self.path}) must hold a valid checkpoint, and all are damaged ({', '.join(damaged)}): "
                    f"move {self.checkpoints} away to start anew, or pass another run.dir"
                )

    def write_recipe(self, recipe: Recipe) -> None:
        """Leave what runs, resolved, in recipe.yaml."""
        with agreement(self.world.host_group):
            if self.world.is_first:
                replace_file(self.path / "recipe.yaml", dump(recipe))

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"run.dir ({self.path}) must be a writable folder: {error.strerror}; pass run.dir=/path/to/runs"
            ) from error
        deadline = time.monotonic() + LOCK_SECONDS
        while not self._try_lock():
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.dir ({self.path}) must not be in use by another launch; stop it, or pass another run.dir"
                )
            time.sleep(0.2)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: nothing to hold
            return True
        return True

    def _check_visible(self) -> None:
        token = self.path / f".visible-{share(secrets.token_hex(8), self.world.host_group)}"
        with agreement(self.world.host_group):
            if self.world.is_first:
                token.touch()
        try:
            with agreement(self.world.host_group):
                deadline = time.monotonic() + VISIBLE_SECONDS
                while not token.exists():
                    if time.monotonic() > deadline:
                        raise UserError(f"run.dir ({self.path}) must be visible to every node; pass a shared path")
                    time.sleep(0.2)
        finally:
            if self.world.is_first:
                token.unlink(missing_ok=True)


def check_same_recipe(manifest: Manifest, recipe: Recipe) -> None:
    """Raises UserError where a checkpoint was begun with values that a resume may not change."""
    check_same_task(manifest.state["recipe"], recipe)
    begun = loads(manifest.state["recipe"], f"recipe of the run in {recipe.run.dir}", kind=type(recipe))
    differences = resume_differences(begun, recipe)
    if differences:
        raise UserError(
            f"run.dir ({recipe.run.dir}) holds a run with other values: {', '.join(differences)}; "
            "go on with its own, or pass another run.dir"
        )
    wide = any(tensor["dtype"] == "float64" for tensor in manifest.tensors.values())
    precision = "float32" if isinstance(recipe, Linear) else recipe.parallel.precision
    if wide != (precision == "float64"):
        kept = "float64" if wide else "bf16 or float32"
        raise UserError(
            f"parallel.precision ({precision}) must be {kept}, in which the run in {recipe.run.dir} keeps its weights; "
            "pass it, or another run.dir"
        )


def check_same_task(text: str, recipe: Recipe) -> None:
    """Raises UserError where the recipe that was found in the run directory is of another task."""
    if task_of(text) not in (None, recipe.task):
        raise UserError(
            f"run.dir ({recipe.run.dir}) holds a run of task {task_of(text)}, not {recipe.task}; pass another run.dir"
        )
