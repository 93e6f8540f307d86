"""The life of every front door: it is entered with its arguments, its ranks meet, and it ends with a result as JSON or
with words and an exit code; and no process outlives its launcher."""

import errno
import json
import multiprocessing
import os
import pwd
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from engine.distributed.launcher import end_with_launcher, take_place
from engine.errors import Interrupted, RunFailed, UserError, escaped, reason
from engine.files import abandon_drafts
from engine.logger import complain, complain_once, last_word, note, rank

if TYPE_CHECKING:
    from engine.distributed.world import World

# Of paths that were passed and that the system does not even look at.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def enter(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a front door on the command line's arguments and exit: 0 done, 2 user error (one line), else failure."""
    _name_user()
    heed_stops()
    end_with_launcher(os.getppid())
    carry_out(lambda arguments: main(take_place(arguments)), sys.argv[1:])
    sys.exit()


def _name_user() -> None:
    """A container's user may have no entry in passwd and no HOME; libraries that ask for a name or a place for caches
    raise then."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        name = f"uid{os.getuid()}"
        os.environ.setdefault("LOGNAME", name)
        os.environ.setdefault("HOME", str(Path(tempfile.gettempdir()) / f"mocov3-{name}"))


def heed_stops() -> None:
    """From now on a signal that asks this process to stop ends it at once and leaves nothing half done, until a run
    has better ways. What was ignored before, as SIGHUP under nohup, stays so."""
    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)


def _stop(signum: int, _frame: object) -> NoReturn:
    _heed_no_more()
    for child in multiprocessing.active_children():
        child.kill()
    abandon_drafts()
    on_its_way = sys.exc_info()[1]
    if isinstance(on_its_way, RunFailed):  # and a launcher ends this rank, as it has lost another
        if on_its_way.alone or rank() == 0:
            last_word(f"failed: {on_its_way}")
        os._exit(1)
    if rank() == 0 and not isinstance(on_its_way, Interrupted):  # else a run has just said it
        last_word(f"stopped by {signal.Signals(signum).name}; nothing half done is left")
    os._exit(128 + signum)


def _heed_no_more() -> None:
    """A process group may get several signals, and one that ends has said why."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)


def carry_out(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a front door. What ends it early is said, and ends this process at once with its status."""
    if status := _status(main, arguments):
        _heed_no_more()
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        # At once: Python's own way out would wait for what a failed run left at work.
        os._exit(status)


def _status(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Of a door: 0 where it came to its end, or was asked to stop by a file."""
    try:
        with _full_gpu_in_words():
            main(arguments)
        sys.stdout.flush()
    except UserError as error:
        complain_once(f"error: {error}")
        return 2
    except RunFailed as failure:
        if failure.alone or rank() == 0:
            _heed_no_more()  # it speaks now
        complain(f"failed: {failure}", at_once=failure.alone)
        return 1
    except Interrupted as stop:
        return stop.status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_lost_its_reader():
            return 128 + signal.SIGPIPE
        if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
            path = os.fsdecode(error.filename)
            complain_once(escaped(f"error: path ({path}) must be one that you can use: {reason(error)}; pass another"))
            return 2
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


@contextmanager
def _full_gpu_in_words() -> Iterator[None]:
    """Raises RunFailed in place of torch's error, of many lines, where a GPU has no memory left and the command has no
    words of its own for that."""
    try:
        yield
    except RuntimeError as error:
        if "torch" not in sys.modules:
            raise
        from engine.runs.failures import CUDA_LACKED, full_device

        where, full = "the GPU", full_device(error)
        if full is None and CUDA_LACKED in str(error):  # as where not even CUDA itself finds room
            where, full = "the GPU, or the host for batches on their way there,", f"({CUDA_LACKED})"
        if full is None:
            raise
        other = "set CUDA_VISIBLE_DEVICES to the number of another GPU, or to nothing to compute on the CPU"
        raise RunFailed(f"{where} had no memory left {full}; end what else uses it, or {other}", alone=True) from error


def _has_lost_its_reader() -> bool:
    """Whether nobody reads stdout any more, as after `| head`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


@contextmanager
def joined(what: str) -> Iterator["World"]:
    """The ranks of this launch. PyTorch takes seconds to load, so mistakes in arguments should show before."""
    note(f"{what}: loading PyTorch")
    from engine.distributed.world import process_group

    with process_group() as world:
        yield world


def show(text: str) -> None:
    """What a door was asked to print, from rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)


def result(found: dict[str, Any], table: str | None = None) -> None:
    """What a door ends with, from rank 0 alone: a table for people where there is one, then the result as one line of
    JSON."""
    show("\n".join([*([table] if table else []), json.dumps(found)]))
