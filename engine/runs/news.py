"""What all ranks must know of a step, one step later: a word to stop, and steps that were skipped."""

from datetime import timedelta

import torch

from engine.distributed.signals import StopSignal
from engine.runs.on_host import HostCopy
from engine.runs.task import Task


class News:
    """Words to stop travel with the sum over ranks that guards a step, and reach the host beside the counts of skipped
    steps while the next step runs: nobody waits for them. A step without such a sum has them sent by themselves; its
    counts are equal on all ranks."""

    def __init__(self, task: Task, stop: StopSignal):
        self.task, self.stop = task, stop
        self.is_carried = task.update.group is not None
        self.on_its_way: HostCopy | None = None
        if self.is_carried:
            task.update.message = stop.message

    def after_step(self, within: timedelta) -> int | None:
        """Once a step, on every rank: the word to stop (StopSignal) that some rank knew by the step before, or None.

        Args:
            within: how long what the step sends to other ranks may take.

        Raises:
            RunFailed: on every rank, where more steps up to the one before were skipped than the task bears.
            RuntimeError: the step before has not ended in its time.
        """
        before, update = self.on_its_way, self.task.update
        counts = torch.stack([update.skipped, update.skipped_in_a_row]).double()
        self.on_its_way = HostCopy(torch.cat([counts, update.heard]) if self.is_carried else counts, within)
        word = None if self.is_carried else self.stop.agreed()
        if before is None:
            return word
        skipped, in_a_row, *heard = before.numbers()
        self.task.check_skips(int(skipped), int(in_a_row), update.step - 1)
        return self.stop.loudest(heard) if self.is_carried else word
