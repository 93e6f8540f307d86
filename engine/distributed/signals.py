"""Signals that ask a run to stop, known to all ranks after the same step."""

import signal

import torch
import torch.distributed as dist

from engine.distributed.world import World


class StopSignal:
    """SIGINT or SIGTERM on any rank, known to all ranks after the same step. A second SIGINT ends the process at once.

    A second SIGTERM changes nothing: schedulers send it to ranks and launcher alike, and the launcher passes it on.
    The ranks' answers travel while the next step runs, so nobody waits for them.
    """

    def __init__(self, world: World):
        self.world = world
        self.received = 0  # a plain number: a handler may run in the middle of a compilation, which forbids tensors
        self._start()

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: object) -> None:
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)

    def _start(self) -> None:
        self.message = torch.tensor([self.received], dtype=torch.int32)
        self.work = dist.all_reduce(self.message, dist.ReduceOp.MAX, group=self.world.host_group, async_op=True)

    def agreed(self) -> int:
        """Once a step, on every rank: the signal that some rank had received before the step began, or 0."""
        self.work.wait()
        signum = int(self.message)
        self._start()
        return signum
