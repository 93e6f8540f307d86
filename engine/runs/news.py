"""What all ranks must know of a step, one step later: a stop signal on any of them, and steps that were skipped."""

import torch
from torch import Tensor

from engine.distributed.signals import StopSignal
from engine.training.update import Update


class News:
    """Signals travel with the sum over ranks that guards a step, and reach the host beside the count of skipped steps
    while the next step runs: nobody waits for them. A step without such a sum has its signals sent by themselves."""

    def __init__(self, update: Update, stop: StopSignal):
        self.update, self.stop = update, stop
        self.is_carried = update.group is not None
        self.on_its_way: HostCopy | None = None
        if self.is_carried:
            update.message = stop.message

    def after_step(self) -> int:
        """Once a step, on every rank: the signal that some rank had received by the step before, or 0.

        Raises:
            RunFailed: on every rank, where too many steps in a row, up to the one before, had bad gradients.
        """
        if not self.is_carried:
            return self.stop.agreed()
        before, update = self.on_its_way, self.update
        self.on_its_way = HostCopy(torch.cat([update.skipped_in_a_row.double()[None], update.heard]))
        if before is None:
            return 0
        skips, *counts = before.numbers()
        update.check_skips(int(skips), update.step - 1)
        return self.stop.loudest(counts)


class HostCopy:
    """Numbers of the device on their way to the host."""

    def __init__(self, numbers: Tensor):
        self.copy = numbers.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.arrival = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrival is not None:
            self.arrival.record()

    def numbers(self) -> list[float]:
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.copy.tolist()
