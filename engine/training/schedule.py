"""Learning rates and encoder momentum as pure functions of the step (paper sections 3 and 5; nothing is stored)."""

import math
from dataclasses import dataclass


def warmup_cosine(epoch: float, *, peak: float, warmup_epochs: float, epochs: int, lowest: float = 0.0) -> float:
    """A learning rate: linear from 0 to the peak, then half a cosine down to the lowest. `epoch` is a real number."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    decay = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * decay))


@dataclass(frozen=True)
class Schedule:
    """Every value that a run derives from its recipe and the number of its images.

    Args:
        base_lr: for a batch of 256; the peak is `base_lr * global_batch / 256`.
        warmup_epochs: linear warm-up, a real number >= 0; with 0 the first step has the peak.
        steps_per_epoch: optimizer steps in an epoch; the last partial batch is dropped.
        momentum: m0, where the encoder momentum starts on its way to 1.
    """

    base_lr: float
    global_batch: int
    epochs: int
    warmup_epochs: float
    steps_per_epoch: int
    momentum: float

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def peak_lr(self) -> float:
        return self.base_lr * self.global_batch / 256

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine to 0. `step` counts from 0."""
        return warmup_cosine(
            step / self.steps_per_epoch, peak=self.peak_lr, warmup_epochs=self.warmup_epochs, epochs=self.epochs
        )

    def momentum_at(self, step: int) -> float:
        """Half a cosine from m0 to 1, without warm-up. `step` counts from 0."""
        return 1 - 0.5 * (1 + math.cos(math.pi * step / self.total_steps)) * (1 - self.momentum)


@dataclass(frozen=True)
class FinetuneSchedule:
    """The learning rate of fine-tuning: linear warm-up from 0, then half a cosine from `peak_lr` to `min_lr`."""

    peak_lr: float
    min_lr: float
    epochs: int
    warmup_epochs: float
    steps_per_epoch: int

    def learning_rate_at(self, step: int) -> float:
        """`step` counts from 0."""
        return warmup_cosine(
            step / self.steps_per_epoch,
            peak=self.peak_lr,
            lowest=self.min_lr,
            warmup_epochs=self.warmup_epochs,
            epochs=self.epochs,
        )
