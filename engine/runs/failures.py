"""What ends a run from outside, in one line in place of torch's many: no memory, torn code, loading processes and ranks
that are gone."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch

from engine.checkpoint.layout import read_pointer, step_of
from engine.data.workers import LoadingFailed
from engine.distributed.roll import lost_ranks
from engine.errors import RunFailed, one_line
from engine.runs.task import Task

# Of libraries and compiled code that take memory on a GPU beside torch, and of torch where another error tells of its
# own: from the compiler, or from another rank.
NO_MEMORY = re.compile(
    r"CU(BLAS|DNN)_STATUS_ALLOC_FAILED|Cuda failure \d+ 'out of memory'|OutOfMemoryError: CUDA out of memory|"
    r"(CUDA driver error|Triton Error \[CUDA\]): out of memory"
)
CUDA_LACKED = "CUDA error: out of memory"  # mostly of host memory that a GPU can read


def kept(checkpoints: Path, step: int = 0) -> str:
    """How a run that has failed goes on, in words; step: after which it ends, where that is known."""
    return f"{_newest(checkpoints)}, and the same command goes on{_made_again(checkpoints, step)}"


def _newest(checkpoints: Path) -> str:
    try:
        newest = read_pointer(checkpoints, "latest")
    except OSError:  # what is said here is said of another failure
        return "the newest checkpoint is kept"
    return f"checkpoint {newest} is kept" if newest else "there is no checkpoint yet"


def _made_again(checkpoints: Path, step: int) -> str:
    with suppress(OSError, ValueError):
        newest = read_pointer(checkpoints, "latest")
        first = step_of(Path(newest)) + 1 if newest else 1
        if first <= step:
            return f": step {step} is made again" if first == step else f": steps {first} to {step} are made again"
    return ""


@contextmanager
def failures_in_words(task: Task, checkpoints: Path) -> Iterator[None]:
    """Raises RunFailed in place of errors from outside, with what is kept."""
    with _memory_in_words(task, checkpoints), torn_code_in_words(), lost_ranks_in_words(task, checkpoints):
        try:
            yield
        except LoadingFailed as failure:  # of an evaluation
            raise RunFailed(f"{failure}; {kept(checkpoints)}", alone=True) from failure


@contextmanager
def lost_ranks_in_words(task: Task, checkpoints: Path) -> Iterator[None]:
    """Raises RunFailed in place of torch's error of ranks that do not answer. All communication ends, and with it a
    save under way, which could not be finished."""
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_ranks(task.world, error, timedelta(seconds=task.timeout))) is None:
            raise
        raise RunFailed(f"{lost}; {kept(checkpoints)}") from error


@contextmanager
def _memory_in_words(task: Task, checkpoints: Path) -> Iterator[None]:
    """Raises RunFailed in place of torch's error, of many lines, where the device has no memory left."""
    try:
        yield
    except RuntimeError as error:
        if (full := full_device(error)) is not None:
            raise RunFailed(
                f"{task.world.device_name} had no memory left {full}; "
                f"{_newest(checkpoints)}: go on with {task.less_memory}, which makes the same run in less memory"
            ) from error
        if CUDA_LACKED not in str(error):
            raise
        # The device has memory, and the host none that it can pin.
        raise RunFailed(
            "the host had no memory left that a GPU can read, for batches and copies of checkpoints; "
            f"{_newest(checkpoints)}: go on with checkpoint.asynchronous=false or fewer processes on this node"
        ) from error


def full_device(error: RuntimeError) -> str | None:
    """For what the device had no memory left, in words; None for another error."""
    text = one_line(error)
    if not (isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(text)):
        return None
    asked, other = re.search(r"Tried to allocate ([\d.]+ \w+)", text), re.match(r"rank \d+(?=: )", text)
    return f"for {asked[1]} more{f' on {other[0]}' if other else ''}" if asked else f"({text[:300]})"


@contextmanager
def torn_code_in_words() -> Iterator[None]:
    """Raises RunFailed in place of torch's error, of many lines, where a compilation that was killed left half a file
    among the compiled code that torch keeps."""
    try:
        yield
    except Exception as error:
        torn = re.search(r"(/\S+): (file too short|cannot read file data|invalid ELF header)", _words_of_all(error))
        if torn is None:
            raise
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(torn[1]).parent)  # torch sets it when it compiles
        raise RunFailed(
            f"compiled code is broken ({torn[1]}), as of a compilation that was killed; delete the folder {folder}, "
            "and the same command goes on"
        ) from error


def _words_of_all(error: BaseException) -> str:
    """Of an error and those that it came of."""
    words, at = [], error
    while at is not None and len(words) < 20:
        words.append(str(at))
        at = at.__cause__ or at.__context__
    return "\n".join(words)
