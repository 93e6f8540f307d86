"""A run's checkpoints: when one cannot be written, the run goes on and makes up for it with the next."""

from engine.checkpoint.background import Saver
from engine.checkpoint.layout import checkpoint_folders, point, read_pointer, step_name
from engine.checkpoint.retain import retain
from engine.checkpoint.save import SaveFailed
from engine.errors import UserError
from engine.files import remove
from engine.logger import warn
from engine.recipe.identity import fingerprint
from engine.runs.directory import RunDirectory
from engine.runs.log import MetricsLog
from engine.runs.task import Task


class Saves:
    """A context manager, which waits for a save under way. Methods are called on all ranks together unless they say
    otherwise.

    failures: saves that failed so far.
    """

    def __init__(self, task: Task, log: MetricsLog, directory: RunDirectory):
        self.task, self.plan, self.log, self.directory = task, task.plan(), log, directory
        self.checkpoints, self.beside = directory.checkpoints, task.recipe.checkpoint.asynchronous
        self.failures = self.in_a_row = 0
        self.saved = self.started = task.step  # a run goes on from a checkpoint; a fresh one has nothing to save
        self.saver = Saver(
            self.checkpoints,
            fingerprint(task.recipe),
            task.world.save_group,
            beside=self.beside,
            before=self._before,
            after=self._tidy,
        )

    def __enter__(self) -> "Saves":
        self.saver.prepare(self.task.tensors())
        return self

    def __exit__(self, *error: object) -> None:
        self.saver.__exit__(*error)

    def make(self, *, must: bool) -> None:
        """Save the present step, beside the following ones or before them.

        must: nothing comes after it that could make up for it; so it is waited for.

        Raises:
            SaveFailed: it must not fail and did, or the last few in a row did.
            RunFailed: the run's folder is gone.
            UserError: another run writes there.
        """
        self.settle(followed=must)
        self.started = self.task.step
        self.saver.start(self.task.tensors(), self.task.state())
        at_the_end = 0 < self.in_a_row == self.plan.max_failures - 1  # one more failure ends the run: here, not later
        if must or at_the_end or not self.beside:
            self.settle(must=must)

    def secure(self) -> None:
        """Returns when the present step is saved. Raises what `make` raises."""
        self.settle(followed=True)
        if self.saved != self.task.step:
            self.make(must=True)

    def settle(self, *, must: bool = False, followed: bool = False) -> None:
        """Wait for the save under way, if there is one. Raises what `make` raises.

        must: of that save, as `make` has it.
        followed: another one comes next that must not fail, and ends the run if it does.
        """
        if not self.saver.under_way:
            return
        try:
            self.saver.wait()
        except SaveFailed as failure:
            self._bear(failure, must=must, followed=followed)
        else:
            self.in_a_row, self.saved = 0, self.started

    def point_best(self) -> bool:
        """Let `best` name the checkpoint that the monitor likes most, of those that are there; whether it does. Called
        on rank 0."""
        try:
            names = {folder.name for folder in checkpoint_folders(self.checkpoints)}
            named, best = read_pointer(self.checkpoints, "best"), self.log.best_step(lambda s: step_name(s) in names)
            if best is not None and named != step_name(best):
                point(self.checkpoints, "best", self.checkpoints / step_name(best))
            elif best is None and named not in (None, *names):
                remove(self.checkpoints / "best")
        except (OSError, UserError) as error:
            self.log.count_failure(self.checkpoints / "best", error)
            return False
        return True

    def _before(self) -> None:
        """On rank 0, before anything is written: a checkpoint is never ahead of the log."""
        self.directory.check_there()
        self.log.sync()

    def _tidy(self) -> None:
        """On rank 0: what `best` should name is not removed before it does."""
        if self.point_best():
            retain(self.checkpoints, self.plan.keep, self.plan.archives)

    def _bear(self, failure: SaveFailed, *, must: bool, followed: bool) -> None:
        """Raises the failure where the run cannot go on with it."""
        self.failures += 1
        self.in_a_row += 1
        most = self.plan.max_failures
        if must or (self.in_a_row >= most and not followed):
            raise SaveFailed(f"{failure}; put this right, and the same command goes on") from failure
        if self.task.world.is_first:
            ends = f"{self.in_a_row} in a row failed, and {most} end the run"
            warn(f"{failure}; training goes on, and the next save makes up for it ({ends})")
