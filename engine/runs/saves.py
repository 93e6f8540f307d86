"""A run's checkpoints: when one cannot be written, the run goes on and makes up for it with the next."""

from engine.checkpoint.layout import checkpoint_folders, point, read_pointer, step_name
from engine.checkpoint.retain import retain
from engine.checkpoint.save import SaveFailed, save
from engine.errors import UserError
from engine.files import remove
from engine.logger import warn
from engine.recipe.identity import fingerprint
from engine.runs.directory import RunDirectory
from engine.runs.log import MetricsLog
from engine.runs.task import Task


class Saves:
    """failures: saves that failed so far."""

    def __init__(self, task: Task, log: MetricsLog, directory: RunDirectory):
        self.task, self.plan, self.log, self.directory = task, task.plan(), log, directory
        self.checkpoints = directory.checkpoints
        self.failures = self.in_a_row = 0

    def make(self, *, must: bool) -> None:
        """Save the present step. All ranks call it together.

        must: nothing comes after it that could make up for it.

        Raises:
            SaveFailed: it failed and must not, or the last few in a row did.
            RunFailed: the run's folder is gone.
            UserError: another run writes there.
        """
        task = self.task
        try:
            save(
                self.checkpoints,
                task.tensors(),
                task.state(),
                recipe_sha256=fingerprint(task.recipe),
                group=task.world.host_group,
                before=self._before,
            )
        except SaveFailed as failure:
            self._bear(failure, must)
            return
        self.in_a_row = 0
        if task.world.is_first:
            self._tidy()

    def _tidy(self) -> None:
        """On rank 0: what `best` should name is not removed before it does."""
        if self.point_best():
            retain(self.checkpoints, self.plan.keep)

    def _before(self) -> None:
        """On rank 0, before anything is written: a checkpoint is never ahead of the log."""
        self.directory.check_there()
        self.log.sync()

    def _bear(self, failure: SaveFailed, must: bool) -> None:
        """Raises the failure where the run cannot go on with it."""
        self.failures += 1
        self.in_a_row += 1
        most = self.plan.max_failures
        if must or self.in_a_row >= most:
            raise SaveFailed(f"{failure}; put this right, and the same command goes on") from failure
        if self.task.world.is_first:
            ends = f"{self.in_a_row} in a row failed, and {most} end the run"
            warn(f"{failure}; training goes on, and the next save makes up for it ({ends})")

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
            self.log.suffer(self.checkpoints / "best", error)
            return False
        return True
