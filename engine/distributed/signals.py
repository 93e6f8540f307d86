"""What asks a run to stop, a signal on any rank or a file, known to all ranks at the same point of the run."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.world import World
from engine.errors import Interrupted
from engine.logger import say

SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
FILE = 0  # stands for the file among the signals' numbers
WORDS = (*SIGNALS, FILE)  # where several came, the last of these counts: a person's word goes before a scheduler's
LOOK_SECONDS = 1.0
NOTHING_LOST = "before a step was made; nothing is lost"


class StopSignal:
    """A signal of SIGNALS on any rank, or a file that rank 0 finds, known to all ranks at the same point.

    A context manager, within which signals are heeded: while `at_once`, the first raises Interrupted wherever its rank
    is; before and later, a signal is noted, and a second SIGINT ends the process at once. A second one of the others
    changes nothing: schedulers send it to ranks and launcher alike, and the launcher passes it on. A SIGHUP that was
    ignored before, as under nohup, stays ignored. What stopped the run is said at its end.

    What a rank knows travels as `message` with a sum over ranks that a step makes anyway, which `loudest` reads; where
    none is made, `agreed` sends it.
    """

    def __init__(self, world: World, file: Path | None = None):
        self.world = world
        self.file = file if world.is_first else None
        self.next_look = 0.0
        self.at_once = False
        # No tensor: a handler may run in the middle of a compilation, which forbids them.
        self.received: set[int] = set()
        self.silence = self._counts(set()).to(world.device)
        self.on_its_way: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> "StopSignal":
        heeded = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self.previous = {s: signal.signal(s, self._receive) for s in heeded}
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Interrupted):
            # Before signals act as ever: a launcher ends all ranks as soon as the first has ended.
            by = signal.Signals(error.signum).name if error.signum else "the file STOP"
            say(f"stopped by {by} {error.where}; the same command goes on")
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def end_at_once(self) -> None:
        """From now on a signal is heeded `at_once`. Raises Interrupted where one has come before."""
        self.at_once = True
        if (word := self.loudest(self._counts(self.received).tolist())) is not None:
            raise Interrupted(word, NOTHING_LOST)

    def _receive(self, signum: int, _frame: object) -> None:
        is_first = not self.received
        self.received.add(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
        if self.at_once and is_first:
            raise Interrupted(signum, NOTHING_LOST)

    def message(self) -> Tensor:
        """What this rank knows, on the device, to be added up over ranks. Does not wait for the device."""
        self._look()
        if not self.received:
            return self.silence
        return self._counts(self.received).to(self.world.device, non_blocking=True)

    def loudest(self, counts: Sequence[float]) -> int | None:
        """The word, a signal's number or FILE, of which a sum of messages tells, or None."""
        said = [word for word, count in zip(WORDS, counts, strict=True) if count]
        return said[-1] if said else None

    def agreed(self) -> int | None:
        """On every rank alike: the word that some rank knew at the call before this one, or None.

        The ranks' answers travel meanwhile, so nobody waits for them.
        """
        word = None
        if self.on_its_way is not None:
            work, counts = self.on_its_way
            work.wait()
            word = self.loudest(counts.tolist())
        self._look()
        counts = self._counts(self.received)
        self.on_its_way = dist.all_reduce(counts, group=self.world.host_group, async_op=True), counts
        return word

    def _look(self) -> None:
        now = time.monotonic()
        if self.file is not None and now >= self.next_look:
            self.next_look = now + LOOK_SECONDS
            if self.file.exists():
                self.received.add(FILE)

    @staticmethod
    def _counts(received: set[int]) -> Tensor:
        return torch.tensor([float(word in received) for word in WORDS], dtype=torch.float64)
