"""What work costs on a device: seconds and memory, and two sides measured by turns."""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

STATUS = Path("/proc/self/status")


class Seconds(NamedTuple):
    """wall: on the clock. busy: what a comparison goes by: wall on a GPU; on a CPU the time that this process's threads
    computed, which other processes do not lengthen."""

    wall: float
    busy: float


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """The work until the device has finished it."""
    finish(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    finish(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Seconds(wall, wall if device.type == "cuda" else cpu)


def alternate(
    a: Callable[[], object], b: Callable[[], object] | None, rounds: int, device: torch.device
) -> tuple[list[Seconds], list[Seconds]]:
    """Both by turns, A B B A in each round, so that what drifts meets both alike; without B, A alone as often."""
    of_a, of_b = [], []
    for _ in range(rounds):
        for work, seconds in ((a, of_a), (b, of_b), (b, of_b), (a, of_a)):
            if work is not None:
                seconds.append(timed(work, device))
    return of_a, of_b


def median(seconds: Sequence[Seconds]) -> Seconds:
    return Seconds(*map(statistics.median, zip(*seconds, strict=True)))


def finish(device: torch.device) -> None:
    """Wait for all that the device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """10^9 bytes: on a GPU the most that tensors took since `forget_peak`, on a CPU the most that this process ever had
    in memory (its peak resident set), libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if STATUS.exists():  # Linux, where getrusage counts what the process that started this one had in memory, too
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1]) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
