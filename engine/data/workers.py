"""Loading processes: made once, before a run has threads of its own, and asked for a part of a batch at a time."""

import gc
import math
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from engine.data.source import Source
from engine.distributed.launcher import end_with_parent
from engine.errors import RunFailed, UserError, one_line, reason
from engine.logger import warn

ROOM = 2**26  # bytes of address space for the pixels of one part; on Linux only what is written to takes memory
SAY_SECONDS = 60.0  # between two lines about images that do not come
TIMEOUT = 300.0  # seconds
END_SECONDS = 5.0  # at most, for the end of processes that were killed
_TICK = 0.5
_NICER = 5  # than the training process: on full cores it computes, and the next batches lie ready for it
_ON_LINUX = sys.platform == "linux"
# What a whole process group gets: it asks the parent to stop in good order, for which it may still need batches.
_NOT_THEIRS = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1} | ({signal.SIGTERM} if _ON_LINUX else set())

# Reads images of a source, which ones the argument says, writes their pixels, and returns what else there is to say.
Work = Callable[[Source, Any, np.ndarray], Any]


class LoadingFailed(RunFailed):
    """Images do not come any more, and no other rank knows."""

    def __init__(self, text: str):
        super().__init__(text, alone=True)


# ---- in the process that reads ---------------------------------------------------------------------------------------


class Workers:
    """Processes that read images of `sources`, for any number of threads; with none of them, this process reads.

    They are forked here and then kept: a lock that some thread of this process held at a later fork would stay locked
    in the new process for ever. Pixels come back through memory that both share, so none of /dev/shm is needed. They
    die with the thread that called this. A context manager, which ends them.

    Args:
        timeout: seconds of silence, of which each minute is said, after which a read fails.
        device: where batches go. For a GPU they are put together in memory from which it can copy by itself.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        count: int = 0,
        *,
        timeout: float = TIMEOUT,
        device: torch.device | None = None,
    ):
        self.sources, self.count, self.device = tuple(sources), count, device or torch.device("cpu")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._silence = _Silence(timeout, "came from the loading processes" if count else "could be read")
        self._failed = ""  # why; what ends one read ends all, which would wait for the same disk or process
        self._all: list[_Worker] = []
        try:
            for _ in range(count):
                self._all.append(_Worker(self.sources))
                self._idle.put(self._all[-1])
        except OSError as error:
            self.close()
            raise UserError(
                f"data.workers or --workers ({count}) must be as many as the system allows, which refused number "
                f"{len(self._all) + 1} ({reason(error)}); lower it, or raise the limit (ulimit -n, ulimit -u)"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing; one that waits for a disk that does not answer ends after it."""
        self._failed = self._failed or "the loading processes have ended"
        for worker in self._all:
            worker.process.kill()
        deadline = time.monotonic() + END_SECONDS
        for worker in self._all:
            worker.process.join(max(0.0, deadline - time.monotonic()))

    def read(self, source: Source, work: Work, argument: Any, out: np.ndarray) -> Any:
        """work(source, argument, out), by the first process that is free; without any, in a thread of this one.

        Raises UserError and RunFailed as `work` does, and LoadingFailed where the process dies or is silent for too
        long.
        """
        number = next((number for number, each in enumerate(self.sources) if each is source), None)
        if number is None and self.sources:
            raise KeyError(f"{source} is none of the sources that these processes have")
        if not self._all or number is None:
            return self._read_here(partial(work, source, argument, out))
        worker = self._idle.get()
        try:
            reply = self._reply(worker, number, work, argument, out)
        finally:
            self._idle.put(worker)
        if isinstance(reply, UserError | RunFailed):
            raise reply
        return reply

    def _read_here(self, read: Callable[[], Any]) -> Any:
        """In a thread of its own, since one that waits for a disk can say nothing; it is left where it is silent."""
        answer: Future[Any] = Future()

        def work() -> None:
            try:
                answer.set_result(read())
            except BaseException as error:
                answer.set_exception(error)

        if self._failed:
            raise LoadingFailed(self._failed)
        threading.Thread(target=work, name="read", daemon=True).start()
        try:
            self._silence.wait_for(lambda seconds: bool(wait([answer], seconds).done))
        except BaseException as error:
            self._failed = self._failed or one_line(error)
            raise
        return answer.result()

    def _reply(self, worker: "_Worker", source: int, work: Work, argument: Any, out: np.ndarray) -> Any:
        if self._failed:
            raise LoadingFailed(self._failed)
        try:
            worker.ask(source, work, argument, out.shape)
            self._silence.wait_for(worker.connection.poll)
            return worker.answer(out)
        except BaseException as error:  # this worker may still answer, and what comes next would take it for its own
            self._failed = self._failed or one_line(error)
            raise


class _Worker:
    """One process, as the others see it."""

    def __init__(self, sources: Sequence[Source]):
        # Fork is fast and shares the sources' arrays. Elsewhere than on Linux it is not safe.
        context = multiprocessing.get_context("fork" if _ON_LINUX else "spawn")
        memory = mmap.mmap(-1, ROOM) if _ON_LINUX else context.RawArray("B", ROOM)
        self.pixels = np.frombuffer(memory, np.uint8)
        self.connection, theirs = context.Pipe()
        arguments = theirs, memory, sources, os.getpid()
        self.process = context.Process(target=_serve, args=arguments, name="worker", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_THEIRS)  # it inherits that
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()  # where this process holds it too, the other's death goes unnoticed

    def ask(self, source: int, work: Work, argument: Any, shape: tuple[int, ...]) -> None:
        try:
            self.connection.send((source, work, argument, shape))
        except OSError as error:
            raise self._death() from error

    def answer(self, out: np.ndarray) -> Any:
        try:
            reply = self.connection.recv()
        except (OSError, EOFError) as error:
            raise self._death() from error
        np.copyto(out, _shaped(self.pixels, out.shape))
        return reply

    def _death(self) -> LoadingFailed:
        self.process.join(END_SECONDS)
        code = self.process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.strsignal(-code) or f"signal {-code}"
        likely = ": memory may be short" if code == -signal.SIGKILL else ""
        return LoadingFailed(f"a loading process died ({how}){likely}")


def _shaped(memory: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The beginning of the memory as pixels [..., 3, S, S], the three of a pixel side by side (engine.data.parts)."""
    *images, channels, height, width = shape
    return np.moveaxis(memory[: math.prod(shape)].reshape(*images, height, width, channels), -1, -3)


class _Silence:
    """Time in which nothing comes of what is waited for: said each minute, ended by `timeout` seconds.

    what: happens to no image meanwhile.

    It is counted in ticks, not by a clock: a machine that was suspended is not silent.
    """

    def __init__(self, timeout: float, what: str):
        self.timeout, self.what = timeout, what
        self._lock = threading.Lock()
        self._arrivals, self._said = 0, 0

    def wait_for(self, poll: Callable[[float], bool]) -> None:
        """poll: whether it has come, after so many seconds at most."""
        ticks, arrivals = 0, self._arrivals
        while not poll(_TICK):
            ticks, arrivals = (ticks + 1 if arrivals == self._arrivals else 0), self._arrivals
            self._heed(ticks * _TICK)
        with self._lock:
            self._arrivals, self._said = self._arrivals + 1, 0

    def _heed(self, seconds: float) -> None:
        silence = f"no image {self.what} for {min(seconds, self.timeout) / 60:.2g} minutes"
        if seconds >= self.timeout:
            raise LoadingFailed(f"{silence}: the disk that holds the images may not answer")
        with self._lock:
            is_due = seconds >= (self._said + 1) * SAY_SECONDS
            self._said += is_due
        if is_due:  # of all threads that wait one says it
            warn(f"{silence}; after {self.timeout / 60:g} that ends the run")


# ---- in a worker -----------------------------------------------------------------------------------------------------


def _serve(connection: Connection, memory: Any, sources: Sequence[Source], parent: int) -> None:
    _start(parent)
    pixels = np.frombuffer(memory, np.uint8)
    with suppress(EOFError, OSError):  # nobody asks any more
        while True:
            source, work, argument, shape = connection.recv()
            connection.send(_reply(work, sources[source], argument, _shaped(pixels, shape)))


def _reply(work: Work, source: Source, argument: Any, out: np.ndarray) -> Any:
    try:
        return work(source, argument, out)
    except (UserError, RunFailed) as error:
        return error
    except MemoryError as error:
        return LoadingFailed(f"a loading process had no memory left ({one_line(error)}); lower data.workers")
    except Exception:  # a bug, to be reported with all that is known of it
        return LoadingFailed(f"a loading process failed:\n{traceback.format_exc()}")


def _start(parent: int) -> None:
    """parent: the process id of the one that reads."""
    end_with_parent(parent)
    os.nice(_NICER)
    if _ON_LINUX:
        threading.Thread(target=_obey, args=(parent,), daemon=True).start()
    # Garbage of the training process is not this process's to collect. Not touching inherited objects also leaves their
    # pages shared.
    gc.freeze()
    torch.set_num_threads(1)


def _obey(parent: int) -> None:
    """End this worker when its parent says so, and at nobody else's word."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
