"""Which images make up which step: a pure function of (seed, epoch, step), without state.

Shapes: N images in the source, G samples of a batch of all ranks, B of one rank's share, P positions in an epoch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engine.data.permutation import permuted
from engine.data.philox import ORDER, random_64

# The laws by which the images of an epoch are permuted: of runs that begin now, and of those of former versions.
LAWS = PERMUTED, SORTED = "permuted", "sorted"
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
        law: PERMUTED computes each position by itself (engine.data.permutation), SORTED the whole of an epoch.
    """

    seed: int
    images: int
    batch: int
    keep_partial: bool = False
    repeats: int = 1
    law: str = PERMUTED

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.batch) if self.keep_partial else self.images // self.batch

    def samples(self, epoch: int, position_P: np.ndarray) -> np.ndarray:
        """The samples at positions of an epoch, 0 to N - 1: int64 [P].

        With repeats each image comes that many times in a row, each time as a sample of its own; the epoch keeps its
        length, so only the first images of the permutation are visited.
        """
        place_P, repetition_P = np.divmod(position_P, self.repeats)
        if self.law == PERMUTED:
            image_P = permuted(self.seed, epoch, self.images, place_P)
        else:
            image_P = _sorted(self.seed, epoch, self.images)[place_P]
        return image_P + REPEAT * repetition_P

    def share(self, step: int, rank: int, world_size: int) -> tuple[int, np.ndarray]:
        """(epoch, one rank's samples [B]) of a step; steps and epochs count from 0.

        Rank r of W takes rows r*G/W to (r+1)*G/W, rounded down. With a partial batch some ranks may have one sample
        more than others, or none.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.batch
        rows = min(self.batch, self.images - first)
        mine = np.arange(first + rank * rows // world_size, first + (rank + 1) * rows // world_size)
        return epoch, self.samples(epoch, mine)


@lru_cache(maxsize=1)
def _sorted(seed: int, epoch: int, images: int) -> np.ndarray:
    """The whole of an epoch's order: int64 [N]. Every image draws a random 64-bit number, and they are sorted by it."""
    return np.argsort(random_64(seed, epoch, images, ORDER), kind="stable")
