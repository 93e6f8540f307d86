"""The folder of a run: who may write in it, that every node sees it, and what a stop leaves there."""

import secrets
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

from engine.checkpoint.layout import LOCK, checkpoint_folders
from engine.data.began import list_of
from engine.distributed.agreement import agreement, all_gather, broadcast
from engine.distributed.launcher import found_mark, leave_mark
from engine.distributed.world import World
from engine.errors import Interrupted, RunFailed, UserError, reason
from engine.files import lock, remove, remove_drafts, remove_or_warn, replace_file
from engine.logger import warn
from engine.recipe.load import dump, task_of
from engine.recipe.paths import expand
from engine.recipe.sections import Recipe
from engine.runs.claim import claimed

STOP = "STOP"  # a file by which a person stops the run; the run that obeys removes it
REQUEUE = "REQUEUE"  # a file that a run leaves which a scheduler's signal stopped: it wants to go on
SCHEDULERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
WENT_BACK = ".from"  # a file that says what `--from` of the newest start was, once it has gone back there
# What a run replaces.
OWN = (
    *("recipe.yaml", "metrics.jsonl", "classes.csv", "confusion.png", "timm", "timm_ema", REQUEUE, WENT_BACK),
    *(list_of(Path(), split).name for split in ("train", "val")),
)
MARK = "run_dir"  # of a launch that has found or made its folder
LOCK_SECONDS = 10.0  # ranks of a killed launch need a moment to notice and to let go
VISIBLE_SECONDS = 10.0  # network file systems need a moment to show a new file


def checkpoints_of(recipe: Recipe) -> list[Path]:
    """Those that a recipe's run has, newest first; none where it has not begun. Raises SystemRefused."""
    return checkpoint_folders(expand(recipe.run.dir) / "checkpoints")


class RunDirectory:
    """`run.dir`, held by one launch at a time. A context manager, entered on all ranks together.

    A folder that it had to make is gone again where a UserError ends its body before the first step. REQUEUE is there
    from the end of a body that a scheduler's signal ended to the next entry; STOP is gone when the body has obeyed or
    has come to its end.

    Raises:
        UserError: on every rank, where the folder cannot be written, is in use, or is not the same on every node.
        RunFailed: on every rank, where it was there before the launcher restarted them.
    """

    def __init__(self, path: Path, world: World):
        self.path, self.world = path, world
        self.checkpoints = path / "checkpoints"
        self.made: list[Path] = []  # parents and the folder, those that were not there
        self.is_new = False  # made and held by this launch
        self.is_ours = False  # on rank 0: nobody else writes there
        self.number = 0  # by which the file system knows the folder
        self.held = ExitStack()

    def __enter__(self) -> "RunDirectory":
        try:
            was_there = any(all_gather(found_mark(MARK), self.world.host_group))
            with agreement(self.world.host_group):
                if self.world.is_first:
                    self._check_kept(was_there)
                    self._make()
            self._check_visible()
            leave_mark(MARK)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, UserError):
            self._leave_nothing()
        elif self.is_ours:
            self._mark_end(error)
        self.held.close()

    def _check_kept(self, was_there: bool) -> None:
        if was_there and not self.path.exists():
            raise RunFailed(
                f"run.dir ({self.path}) is gone, which was there before the launcher restarted its ranks: no new run "
                "begins in its place by itself; start again where it stays"
            )

    def _mark_end(self, error: BaseException | None) -> None:
        signum = error.signum if isinstance(error, Interrupted) else None
        if signum == 0 or error is None:
            remove_or_warn(self.path / STOP)
        if signum in SCHEDULERS:
            try:
                (self.path / REQUEUE).touch()
            except OSError as failure:
                warn(f"{self.path / REQUEUE} could not be left: {reason(failure)}")

    def _leave_nothing(self) -> None:
        if self.is_new and not self._has_steps():
            for name in (*OWN, "tensorboard", "checkpoints", LOCK):
                remove_or_warn(self.path / name)
        with suppress(OSError):  # something else lies there
            for path in reversed(self.made):
                path.rmdir()

    def _has_steps(self) -> bool:
        if checkpoint_folders(self.checkpoints):
            return True
        log = self.path / "metrics.jsonl"  # has the first step, always
        with log.open("rb") if log.exists() else nullcontext(()) as lines:
            return any(b'"loss"' in line for line in lines)

    def check_there(self) -> None:
        """On rank 0. Raises RunFailed where the folder is gone, or another is in its place; OSError."""
        try:
            number = self.path.stat().st_ino
        except (FileNotFoundError, NotADirectoryError):
            number = None
        if number != self.number:
            raise RunFailed(
                f"run.dir ({self.path}) was deleted or replaced while the run went on, and its checkpoints with it; "
                "start again where it stays"
            )

    def check_fresh(self, recipe: Recipe) -> None:
        """Raises UserError where a start would bury a run: all of it damaged, or of another task."""
        if (self.path / "recipe.yaml").exists():
            check_same_task((self.path / "recipe.yaml").read_text(), recipe)
        kinds = ("damaged", "left")  # by `--from`
        aside = sorted(path.name for kind in kinds for path in self.checkpoints.glob(f"step_*.{kind}-*"))
        if aside:
            raise UserError(
                f"run.dir ({self.path}) must hold a valid checkpoint, and all were set aside ({', '.join(aside)}): "
                f"move {self.checkpoints} away to start anew, or pass another run.dir"
            )

    def write_recipe(self, recipe: Recipe, made_by: Mapping[str, str]) -> None:
        """Leave what runs, resolved, in recipe.yaml; its first line says by what and on what."""
        with agreement(self.world.host_group):
            if self.world.is_first:
                words = ", ".join(f"{what} {value}" for what, value in made_by.items())
                replace_file(self.path / "recipe.yaml", f"# {words}\n{dump(recipe)}")

    def _make(self) -> None:
        in_use = f"run.dir ({self.path}) must not be in use by another launch; stop it, or pass another run.dir"
        try:
            for path in [p for p in (*reversed(self.path.parents), self.path) if not p.exists()]:
                path.mkdir(exist_ok=True)
                self.made.append(path)
            self.path.mkdir(exist_ok=True)  # raises where it is a file
            self.number = self.path.stat().st_ino
            locked = self.held.enter_context(lock(self.path / LOCK, in_use, LOCK_SECONDS))
            self.held.enter_context(claimed(self.path / LOCK, locked, LOCK_SECONDS))
            if locked:
                self.is_new = self.path in self.made
                remove_drafts(self.path, OWN)
            else:
                warn(f"no file locks in {self.path}: only the times of .lock tell one launch of another")
            self.is_ours = True
            remove(self.path / REQUEUE)
        except OSError as error:
            raise UserError(
                f"run.dir ({self.path}) must be a writable folder: {reason(error)}; pass run.dir=/path/to/runs"
            ) from error

    def _check_visible(self) -> None:
        token = self.path / f".visible-{broadcast(secrets.token_hex(8), self.world.host_group)}"
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


def check_same_task(text: str, recipe: Recipe) -> None:
    """Raises UserError where a recipe that was found in the run directory is of another task."""
    found = task_of(text)
    if found not in (None, recipe.task):
        raise UserError(
            f"run.dir ({recipe.run.dir}) holds a run of task {found}, not {recipe.task}; pass another run.dir"
        )
