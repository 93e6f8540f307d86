"""At which steps a run logs, saves, evaluates and ends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps. `evaluate_every` 0: never. The run ends after `last_step` steps.

    archive_every: between checkpoints that stay for good, a part of a step or so too; 0: none do.
    """

    last_step: int
    log_every: int
    checkpoint_every: int
    keep: int
    evaluate_every: int
    max_failures: int = 1
    archive_every: float = 0.0

    def logs_after(self, step: int) -> bool:
        return step in (1, self.last_step) or step % self.log_every == 0

    def saves_after(self, step: int) -> bool:
        return step == self.last_step or step % self.checkpoint_every == 0 or self.archives(step)

    def archives(self, step: int) -> bool:
        """Whether the step's checkpoint stays for good: it is the first at or after a multiple of `archive_every`."""
        every = self.archive_every
        return every > 0 and step // every > (step - 1) // every

    def evaluates_after(self, step: int) -> bool:
        return self.evaluate_every > 0 and (step in (0, self.last_step) or step % self.evaluate_every == 0)
