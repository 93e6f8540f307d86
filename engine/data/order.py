"""Which images make up which step: pure functions of (seed, epoch, step), without state.

Shapes: N images in the source, B samples of one rank's share of a batch.
"""

from collections.abc import Iterator

import numpy as np

from engine.data.philox import ORDER, random_64

REPEAT = 2**40  # sample + k * REPEAT is the k-th repetition of an image in its batch


def steps_per_epoch(images: int, global_batch_size: int, keep_partial: bool = False) -> int:
    """The last, partial batch of an epoch is dropped, or kept."""
    return -(-images // global_batch_size) if keep_partial else images // global_batch_size


def epoch_order(seed: int, epoch: int, images: int, repeats: int = 1) -> np.ndarray:
    """The order in which an epoch visits the images: int64 [N], without repeats a permutation.

    Every image draws a random 64-bit number, and they go by size. So the order depends on no library's shuffle.
    With repeats each image comes that many times in a row, as samples of their own, and the epoch stays as long: it
    visits the first of the permutation alone (repeated augmentation, Hoffer et al. 2020, as DeiT has it).
    """
    order_N = np.argsort(random_64(seed, epoch, images, ORDER), kind="stable")
    return order_N if repeats == 1 else (order_N[:, None] + REPEAT * np.arange(repeats)).flatten()[:images]


def batch_samples(
    order_N: np.ndarray, step_in_epoch: int, global_batch_size: int, rank: int, world_size: int
) -> np.ndarray:
    """One rank's samples: int64 [B]. Rank r of W takes rows r*G/W to (r+1)*G/W, rounded down, of the global batch of G.

    Of a partial batch ranks may so have one sample more or fewer than others, or none.
    """
    batch_G = order_N[step_in_epoch * global_batch_size : (step_in_epoch + 1) * global_batch_size]
    return batch_G[rank * len(batch_G) // world_size : (rank + 1) * len(batch_G) // world_size]


def samples_of_steps(
    seed: int,
    images: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
    keep_partial: bool = False,
    repeats: int = 1,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(step, epoch, samples [B]) for the steps from first_step up to, not including, last_step; both 0-based."""
    per_epoch = steps_per_epoch(images, global_batch_size, keep_partial)
    current, order_N = None, None
    for step in range(first_step, last_step):
        epoch, step_in_epoch = divmod(step, per_epoch)
        if epoch != current:
            current, order_N = epoch, epoch_order(seed, epoch, images, repeats)
        yield step, epoch, batch_samples(order_N, step_in_epoch, global_batch_size, rank, world_size)
