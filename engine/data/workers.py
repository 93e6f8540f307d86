"""Loading processes: their start and their end, and batches that do not come."""

import ctypes
import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.errors import RunFailed, UserError, one_line
from engine.logger import warn
from engine.torch_internals import end_workers, has_lost_its_thread, send_instead

SHARED_MEMORY = Path("/dev/shm")  # where workers hand batches over
SAY_SECONDS = 60.0  # between two lines about a batch that does not come
TIMEOUT = 300.0  # seconds
_PR_SET_PDEATHSIG = 1
_END = object()


# ---- in the process that reads ---------------------------------------------------------------------------------------


def unwrapped(items: Iterator) -> Iterator:
    """The same items; an error among them is raised: in a worker, it would arrive wrapped in a traceback."""
    for item in items:
        if isinstance(item, UserError | RunFailed):
            raise item
        yield item


def delivered(items: Iterator, timeout: float) -> Iterator:
    """What comes from a DataLoader's iterator with workers, whose own time-out must be `say_seconds(timeout)`.

    Each minute in which nothing comes is said. Raises RunFailed after `timeout` seconds of that, and where a worker
    dies or cannot hand over a batch; UserError where an item is one.
    """
    try:
        yield from unwrapped(iter(lambda: _awaited(items, timeout), _END))
    except RuntimeError as error:
        if (death := death_in_words(error)) is None:
            raise
        raise RunFailed(death) from error
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # what torch makes of a death in mid-delivery
        raise RunFailed(f"a loading process died while it handed over a batch ({one_line(error)})") from error
    finally:
        # Else a traceback that still refers to `items` keeps the workers, and torch's handler of dead children goes on
        # raising wherever the process then is.
        end_workers(items)


def say_seconds(timeout: float) -> float:
    """Between two lines about silence, which lasts `timeout` seconds at most."""
    return min(SAY_SECONDS, timeout)


def _awaited(items: Iterator, timeout: float) -> object:
    waited = 0.0
    while True:
        try:
            return next(items, _END)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
        if has_lost_its_thread(items):
            raise RunFailed("the thread that hands batches to the GPU died, after the error above")
        waited += say_seconds(timeout)
        silence = f"no batch came from the loading processes for {waited / 60:.2g} minutes"
        if waited >= timeout:
            raise RunFailed(f"{silence}: the disk that holds the images may not answer")
        warn(f"{silence}; after {timeout / 60:g} that ends the run")


def death_in_words(error: RuntimeError) -> str | None:
    """Of a worker, which torch raises wherever the main thread then is; None for another error."""
    text = one_line(error)
    if text.startswith(("DataLoader worker (pid", "Pin memory thread")):
        how = re.search(r"killed by signal: [^.]+|exit code \d+", text)
        return f"a loading process died ({how[0] if how else text}): memory may be short, or {SHARED_MEMORY} full"
    if text.startswith(("Too many open files", "received 0 items of ancdata")):
        return (
            "a batch could not be taken over from a loading process: too many open files; raise the limit (ulimit -n)"
        )
    return None


# ---- in a worker -----------------------------------------------------------------------------------------------------


def start_worker(parent: int, _worker: int) -> None:
    """What a DataLoader's worker does first. parent: the process id of the one that reads."""
    # Garbage of the training process is not this process's to collect: the finalizer of another loader's iterator would
    # take locks that both share, and die with them. Not touching inherited objects also leaves their pages shared.
    gc.freeze()
    torch.set_num_threads(1)
    send_instead(_undelivered)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent,), daemon=True).start()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above took hold
        os._exit(1)


def _undelivered(error: Exception) -> RunFailed:
    limits = "a limit on file sizes or open files too low (ulimit -f, ulimit -n)"
    return RunFailed(
        f"a loading process could not hand over a batch ({one_line(error)}): {SHARED_MEMORY} may be full, or {limits}"
    )


def _obey(parent: int) -> None:
    """End this worker when its parent says so, and at nobody else's word: a SIGTERM to the whole process group asks the
    parent to stop in good order, for which it may still need batches."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
