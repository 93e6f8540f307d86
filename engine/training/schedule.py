"""Learning rates and encoder momentum as pure functions of the step (paper sections 3 and 5; nothing is stored)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate: linear from 0 to `peak_lr`, then half a cosine down to `min_lr`.

    warmup_epochs: a real number >= 0; with 0 the first step has the peak.
    steps_per_epoch: optimizer steps in an epoch.
    """

    peak_lr: float
    min_lr: float = 0.0
    epochs: int
    warmup_epochs: float
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def learning_rate_at(self, step: int) -> float:
        """`step` counts from 0."""
        epoch = step / self.steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        decay = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * decay))


@dataclass(frozen=True, kw_only=True)
class MocoSchedule(Schedule):
    """momentum: m0, where the encoder momentum starts on its way to 1."""

    momentum: float

    def momentum_at(self, step: int) -> float:
        """Half a cosine from m0 to 1, without warm-up. `step` counts from 0."""
        return 1 - 0.5 * (1 + math.cos(math.pi * step / self.total_steps)) * (1 - self.momentum)
