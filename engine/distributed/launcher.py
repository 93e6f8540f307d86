"""The launcher of this process, if it has one: torchrun, srun, or `engine.launch`.

It is known before PyTorch is loaded, which takes seconds.
"""

import ctypes
import os
import re
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from engine.distributed import slurm
from engine.errors import UserError
from engine.logger import FIRST_WORD_SECONDS

ORPHAN_CHECK_SECONDS = 1.0
MOST_PORTS = 65_536  # more than there are ports, or ranks
MOST_DECODERS = 12  # processes per rank
MOST_COMPILERS = 32  # of one process; torch's own bound
_PR_SET_PDEATHSIG = 1


def take_place(arguments: list[str]) -> list[str]:
    """Learn this process's place among others from what has started it; a door's arguments, without --local-rank.

    torchrun says it in variables, which others are translated to; torch.distributed.launch says it there and in an
    argument. Raises UserError.
    """
    if not is_launched():
        os.environ.update(slurm.place(os.environ))
    if not is_launched():
        _refuse_mpirun()
        return arguments
    _check_place()
    share_compilers(local_ranks())
    return [a for a in arguments if not re.fullmatch(r"--local[-_]rank=\d+", a)]


def _check_place() -> None:
    """Raises UserError where the launcher's variables name no place."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "1")
        if not (value.isascii() and value.isdigit() and int(value) < MOST_PORTS):
            raise UserError(f"{name} ({value}) must be a number of the launcher's; start by torchrun, or unset it")
    if "WORLD_SIZE" in os.environ and int(os.environ["RANK"]) >= ranks():
        raise UserError(
            f"RANK ({os.environ['RANK']}) must be below WORLD_SIZE ({ranks()}); start by torchrun, or unset both"
        )


def _refuse_mpirun() -> None:
    """Its processes would each believe that they are alone. Raises UserError in the first of them."""
    for size, number in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")):
        processes = os.environ.get(size, "1")
        if processes != "1":
            if os.environ.get(number, "0") != "0":
                time.sleep(FIRST_WORD_SECONDS)  # mpirun ends all when one has ended, and the first shall say why
                sys.exit(2)
            raise UserError(
                f"ranks ({processes}, started by mpirun) must be started by torchrun; "
                "on each node: torchrun --nproc-per-node N -m engine.run RECIPE"
            )


def is_launched() -> bool:
    """Whether a launcher gave this process its place among others."""
    return "RANK" in os.environ


def ranks() -> int:
    """Processes of the launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_ranks() -> int:
    """Processes of the launch on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cores() -> int:
    """This rank's share of them. torchrun's ranks share those of its node; srun may have dealt them out."""
    dealt = None if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get("SLURM_CPUS_PER_TASK")
    return min(cores(), int(dealt)) if dealt else cores() // local_ranks()


def spare_cores() -> int:
    """How many processes of a rank may decode images beside it."""
    return max(0, min(MOST_DECODERS, own_cores() - 1))


def share_compilers(ranks: int) -> None:
    """Let the ranks of this node start no more compilers together than it has cores; before PyTorch is loaded."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(MOST_COMPILERS, cores() // ranks))))


def allow_open_files() -> None:
    """Let this process open as many files as it may: among W ranks each has about 2 W sockets."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS calls its limit infinite and has another
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def leave_mark(name: str) -> None:
    """Tell the ranks that torchrun will start in this one's place, on this node, how far it came."""
    if folder := _mark_folder():
        with suppress(OSError):
            (folder / name).touch()


def found_mark(name: str) -> bool:
    """Whether a rank of this node left the mark before torchrun restarted it."""
    folder = _mark_folder()
    if folder is None:
        return False
    return any(mark.parents[1] != folder.parent for mark in folder.parents[1].glob(f"attempt_*/*/{name}"))


def _mark_folder() -> Path | None:
    """A folder of this rank and start, in one that torchrun keeps as long as it lives: attempt_<restarts>/<rank>."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parent if file else None


@cache
def end_with_launcher(launcher: int) -> None:
    """From now on this process, if a launcher started it, exits within seconds of the death of that process.

    launcher: its process id, taken early: one that dies while PyTorch is loaded would not be missed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_exit_with, args=(launcher,), daemon=True).start()


def end_with_parent(parent: int) -> None:
    """From now on this process, which `parent` (its process id) started for its own ends, dies with it; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above took hold
            os._exit(1)


def may_be_launcher(process: int) -> bool:
    """Whether a launcher, or a script that one started, may be the parent of this process; what the system gives to
    those whose launcher died before they looked is neither a Python process nor of this one's session."""
    with suppress(OSError):  # unknown, as elsewhere than on Linux
        program = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes().partition(b"\0")[0])
        is_python = not program or Path(program).name.startswith(("python", "pypy"))  # one that just begins has no name
        return is_python or os.getsid(process) == os.getsid(0)
    return True


def _exit_with(parent: int) -> None:
    # A rank that outlives its launcher would go on training beside the job that replaces it.
    while os.getppid() == parent and may_be_launcher(parent):
        time.sleep(ORPHAN_CHECK_SECONDS)
    os.write(2, b"the launcher is gone: this rank exits; the newest checkpoint is kept\n")
    os._exit(1)
