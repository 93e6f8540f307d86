"""The ranks of this node, started by a door itself; torchrun is for more nodes than one.

torch's elastic agent starts them from a function, so nothing in the working directory can stand in the engine's place.
The agent has a thread of its own and leaves signals to the main thread, which passes each on once. A rank begins with
these signals held back and heeds them when it has left the terminal's process group: Ctrl-C reaches it once, not twice.
"""

import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import uuid
from contextlib import suppress
from importlib import import_module
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from engine.distributed.launcher import cores, end_with_launcher, is_launched, share_compilers
from engine.door import carry_out, heed_stops
from engine.errors import RunFailed, UserError
from engine.logger import warn

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
LOOK_SECONDS = 0.1


def read_ranks(text: str) -> int:
    """The type of --ranks: a number, or `gpus` for as many as there are. Raises UserError."""
    if is_launched():
        raise UserError(f"--ranks ({text}) must be left out under torchrun and srun, which start the ranks")
    if text == "gpus":
        import torch  # takes seconds

        if not torch.cuda.device_count():
            raise UserError("--ranks (gpus) must be a number where there is no GPU; leave it out for one process")
        return torch.cuda.device_count()
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"--ranks ({text}) must be a number >= 1, or gpus; leave it out for one process")
    return int(text)


def read_restarts(text: str) -> int:
    """The type of --max-restarts. Raises UserError."""
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"--max-restarts ({text}) must be a number >= 0; leave it out for none")
    return int(text)


def launch(door: str, arguments: list[str], ranks: int, restarts: int) -> None:
    """Run engine.`door` on this many ranks until they end; what goes wrong they say themselves.

    restarts: how often they are started again, all of them, after a rank has died or failed. What the user stops or
    must put right is not.

    Raises:
        SystemExit: with the ranks' status, where that is not 0.
        RunFailed: a rank died without a word.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    share_compilers(ranks)
    # It lets go of signals that the thread of its start holds back, so it starts before the agents' do so.
    multiprocessing.resource_tracker.ensure_running()
    for left in reversed(range(restarts + 1)):
        end = _start(door, arguments, ranks)
        if end.status != 1 or end.is_stopped or not left:
            break
        warn(f"{end.killed or 'a rank has failed'}; restart {restarts - left + 1} of {restarts}")
    if end.killed:
        raise RunFailed(f"{end.killed}; the newest checkpoint is kept: the same command goes on")
    if end.status:
        sys.exit(end.status)


class _End(NamedTuple):
    """How the ranks ended: their status, which of them died without a word, whether a signal asked for it."""

    status: int
    killed: str
    is_stopped: bool


def _start(door: str, arguments: list[str], ranks: int) -> _End:
    """Start all ranks once and wait for their end."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    agent = _Agent(door, arguments, ranks)
    processes, received = _wait_and_pass_on(agent, ranks)
    if agent.error is None:
        return _End(0, "", False)
    if not isinstance(agent.error, ChildFailedError):
        raise agent.error
    killed = _killed(processes, received)
    status = 1 if killed else min(agent.error.failures.items())[1].exitcode
    return _End(status if status >= 0 else 128 - status, killed, bool(received))


class _Agent(threading.Thread):
    """torch's elastic agent for this node alone. `error`: how it ended."""

    def __init__(self, door: str, arguments: list[str], ranks: int):
        super().__init__(daemon=True)
        self.door, self.arguments, self.ranks = door, arguments, ranks
        self.error: BaseException | None = None

    def run(self) -> None:
        from torch.distributed.launcher.api import DefaultLogsSpecs, LaunchConfig, elastic_launch

        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # the ranks inherit it
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # no log files
        )
        logging.disable(logging.CRITICAL)  # the agent's own report of what the ranks have said
        try:
            elastic_launch(config, _rank)(os.getpid(), self.door, self.arguments)
        except BaseException as error:
            self.error = error
        finally:
            logging.disable(logging.NOTSET)


def _rank(launcher: int, door: str, arguments: list[str]) -> None:
    """What a rank's process does."""

    def main(arguments: list[str]) -> None:
        multiprocessing.set_start_method(None, force=True)  # loader workers are forked, as in any other rank
        os.setsid()
        end_with_launcher(launcher)
        heed_stops()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        import_module(f"engine.{door}").main(arguments)

    try:
        carry_out(main, arguments)
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # nothing is left to stop
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


def _wait_and_pass_on(agent: _Agent, ranks: int) -> tuple[list[BaseProcess], list[int]]:
    """Wait for the agent's end; returns the ranks' processes, in order, and the signals received, of which an early one
    is passed on when all ranks exist."""
    processes: list[BaseProcess] = []
    received: list[int] = []
    # What nohup had ignored stays so, in the ranks too.
    heeded = [s for s in PASSED_ON if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, lambda number, _: received.append(number)) for signum in heeded}
    agent.start()
    passed = 0
    while agent.is_alive():
        agent.join(LOOK_SECONDS)
        if len(processes) < ranks:
            processes = sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)
        while len(processes) == ranks and passed < len(received):
            _pass_on(received[passed], processes)
            passed += 1
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    return processes, received


def _pass_on(signum: int, processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, signum)


def _killed(processes: list[BaseProcess], received: list[int]) -> str:
    """Which rank was killed by a signal that nobody passed on; the others end because of it."""
    by_agent = signal.SIGTERM  # which ends all ranks when one has ended
    for rank, process in enumerate(processes):
        number = -(process.exitcode or 0)
        if number > 0 and number not in (*received, by_agent):
            name = signal.Signals(number).name
            likely = ", often for want of memory" if name == "SIGKILL" else ""
            return f"rank {rank} was ended by {name}{likely}"
    return ""
