"""Signals that ask a run to stop, known to all ranks after the same step."""

import signal
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # where ranks received several, the last of them counts


class StopSignal:
    """SIGINT or SIGTERM on any rank, known to all ranks after the same step. A second SIGINT ends the process at once.

    A second SIGTERM changes nothing: schedulers send it to ranks and launcher alike, and the launcher passes it on.
    What a rank has received travels as `message` with a sum over ranks that a step makes anyway, which `loudest` reads;
    where a step makes none, `agreed` sends it.
    """

    def __init__(self, world: World):
        self.world = world
        self.received = 0  # a plain number: a handler may run in the middle of a compilation, which forbids tensors
        self.silence = self._counts(0).to(world.device)
        self.on_its_way: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self._receive) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: object) -> None:
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    def message(self) -> Tensor:
        """What this rank has received, on the device, to be added up over ranks. Does not wait for the device."""
        received = self.received
        return self._counts(received).to(self.world.device) if received else self.silence

    def loudest(self, counts: Sequence[float]) -> int:
        """The signal of which a sum of messages tells, or 0."""
        return max((signum for signum, count in zip(SIGNALS, counts, strict=True) if count), default=0)

    def agreed(self) -> int:
        """Once a step, on every rank: the signal that some rank had received before the step began, or 0.

        The ranks' answers travel while the next step runs, so nobody waits for them.
        """
        signum = 0
        if self.on_its_way is not None:
            work, counts = self.on_its_way
            work.wait()
            signum = self.loudest(counts.tolist())
        counts = self._counts(self.received)
        self.on_its_way = dist.all_reduce(counts, group=self.world.host_group, async_op=True), counts
        return signum

    @staticmethod
    def _counts(received: int) -> Tensor:
        return torch.tensor([float(received == signum) for signum in SIGNALS], dtype=torch.float64)
