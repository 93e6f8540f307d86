"""A logged step in words, and what it says of the machine: time, time left, memory."""

import resource
import sys
import time
from datetime import timedelta

import torch

from engine.runs.log import Row
from engine.runs.task import Task


class Watch:
    """Of one launch, from the step at which it begins.

    first_rankme: of the run's first row that is at hand, or of this launch's.
    """

    def __init__(self, task: Task, last_step: int, first: Row | None):
        self.task, self.last_step = task, last_step
        self.first_rankme: float | None = None if first is None else first.get("rankme")
        self.began: tuple[int, float] | None = None  # first logged step of this launch, and its time

    def measure(self) -> Row:
        """`unix_time` in seconds, and `memory_gb`, the most of the device so far in GB of 10^9 bytes; of the process,
        where it computes on a CPU."""
        return {"unix_time": round(time.time(), 3), "memory_gb": _peak_memory(self.task.world.device) / 1e9}

    def line(self, step: int, row: Row) -> str:
        """Step, loss and speed; epoch, share done, rate, memory; from the second row on, the time that is left; and how
        RankMe went so far."""
        words = [
            f"step {step}/{self.last_step}",
            f"loss {row['loss']:.4f}",
            f"{row['images_per_second']:,.0f} images/s",
            f"epoch {row['epoch']:.1f} of {self.task.recipe.train.epochs}",
            f"{step / self.last_step:.0%}",
            f"lr {row['lr']:.3g}",
            f"{row['memory_gb']:.1f} GB",
        ]
        return "  ".join([*words, *self._left(step, row["unix_time"]), *self._rankme(row.get("rankme"))])

    def _rankme(self, now: float | None) -> list[str]:
        if now is None:
            return []
        self.first_rankme = now if self.first_rankme is None else self.first_rankme
        return [f"rankme {self.first_rankme:.1f} -> {now:.1f} of {self.task.most_rankme}"]

    def _left(self, step: int, now: float) -> list[str]:
        """By the pace of this launch, evaluations and saves included; its first row has compilation behind it."""
        if self.began is None:
            self.began = step, now
        (first, then), more = self.began, self.last_step - step
        if step == first or not more:
            return []
        return [f"{timedelta(seconds=max(0, round((now - then) / (step - first) * more)))} left"]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
