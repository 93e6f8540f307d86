"""Which images make up which step: a pure function of (seed, epoch, step), without state.

Shapes: N images in the source, G samples of a batch of all ranks, B of one rank's share.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.philox import ORDER, random_64

REPEAT = 2**40  # sample + k * REPEAT is the k-th repetition of an image in its batch


@dataclass(frozen=True)
class Order:
    """The batches of a whole run.

    Args:
        seed: the run's; its crops are drawn by it too.
        images: N, of the source.
        batch: G, the samples of a step on all ranks.
        keep_partial: an epoch ends with the batch of what is left, else that is dropped.
        repeats: how often an image comes in a row (repeated augmentation, Hoffer et al. 2020, as DeiT has it).
    """

    seed: int
    images: int
    batch: int
    keep_partial: bool = False
    repeats: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch) if self.keep_partial else self.images // self.batch

    def epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch in their order: int64 [N], without repeats a permutation of the images.

        Every image draws a random 64-bit number and the images are sorted by it: no library's shuffle decides.
        With repeats each image comes that many times in a row, each time as a sample of its own; the epoch keeps its
        length, so only the first images of the permutation are visited.
        """
        order_N = np.argsort(random_64(self.seed, epoch, self.images, ORDER), kind="stable")
        if self.repeats == 1:
            return order_N
        return (order_N[:, None] + REPEAT * np.arange(self.repeats)).flatten()[: self.images]

    def share(self, steps: range, rank: int, world_size: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(step, epoch, one rank's samples [B]) of each step; steps and epochs count from 0.

        Rank r of W takes rows r*G/W to (r+1)*G/W, rounded down. With a partial batch some ranks may have one sample
        more than others, or none.
        """
        current, order_N = None, np.empty(0, np.int64)
        for step in steps:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, order_N = epoch, self.epoch(epoch)
            batch_G = order_N[step_in_epoch * self.batch : (step_in_epoch + 1) * self.batch]
            yield step, epoch, batch_G[rank * len(batch_G) // world_size : (rank + 1) * len(batch_G) // world_size]
