"""Batches of crops for training and of views for evaluation, made ahead of time by worker processes.

What is in a batch depends on (source, seed, step) alone: not on workers, ranks or where the run was resumed.

Shapes: V views, B samples of one rank's batch, S side of an image in pixels.
"""

import multiprocessing.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from engine.data.bad_images import Bad
from engine.data.decode import CenterCrop, Crops
from engine.data.order import REPEAT, Order
from engine.data.source import Source
from engine.data.workers import SHARED_MEMORY, TIMEOUT, delivered, say_seconds, start_worker, unwrapped
from engine.distributed.launcher import local_ranks
from engine.errors import UserError, one_line

_PREFETCH = 2  # batches that each worker has under way or waiting
_NEIGHBOURS = 100  # how far to look for an image in place of an unreadable one


class Batch(NamedTuple):
    """One rank's share of a training batch.

    step is 0-based and global; crops uint8 [V, B, 3, S, S], one per view; sample_B int64, the samples' identity: an
    image's number in the source, and which repetition of it (engine.data.order). For every entry of `bad` the crops
    of one sample show the next readable image in the source instead: shown_B is the number of the image they show.
    """

    step: int
    epoch: int
    crops: Tensor
    sample_B: Tensor
    shown_B: Tensor
    bad: list[Bad]


class EvalBatch(NamedTuple):
    """Images to evaluate: uint8 [B, 3, S, S], with id and label (int64 [B]; label -1 where there is none).

    The first `valid` rows are real, the rest is padding: zeros, with id and label -1. Unreadable images are left out
    and listed in `bad`.
    """

    images: Tensor
    ids_B: Tensor
    labels_B: Tensor
    valid: int
    bad: list[Bad]


def train_batches(
    source: Source,
    order: Order,
    crops: Crops,
    steps: range,
    *,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool = False,
    timeout: float = TIMEOUT,
) -> Iterator[Batch]:
    """This rank's batches of the steps, which count from 0.

    The workers start at once and die with the thread that called this. At most 2 * workers batches are under way.
    Raises UserError where the batch does not suit the source or memory, or where the source is unreadable; RunFailed
    where workers die, cannot hand over a batch, or are silent for `timeout` seconds, of which each minute is said.
    """
    if order.steps_per_epoch == 0 or order.batch % world_size:
        raise UserError(
            f"train.global_batch_size ({order.batch}) must be at most the number of images ({order.images}) "
            f"and a multiple of the number of ranks ({world_size}); change it"
        )
    _check_shared_memory(workers, crops.views * order.batch // world_size * 3 * crops.size**2)
    dataset = _TrainBatches(source, order.seed, crops)
    return _run(dataset, order.share(steps, rank, world_size), workers, pin_memory, timeout)


def eval_batches(
    source: Source,
    ids: Sequence[int] | np.ndarray | Tensor,
    crop: CenterCrop,
    *,
    batch_size: int,
    workers: int,
    batches: int | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[EvalBatch]:
    """The images `ids` of the source in order, in batches of one shape.

    batches: yield that many, empty ones at the end, so that every rank runs as many forwards as the others. timeout: as
    `train_batches` has it.
    """
    ids = np.asarray(ids, np.int64)
    needed = -(-len(ids) // batch_size)
    if batches is not None and batches < needed:
        raise ValueError(f"{len(ids)} images do not fit into {batches} batches of {batch_size}")
    _check_shared_memory(workers, batch_size * 3 * crop.size**2)
    chunks = [ids[k * batch_size : (k + 1) * batch_size] for k in range(needed if batches is None else batches)]
    return _run(_EvalBatches(source, crop, batch_size), chunks, workers, False, timeout)


@dataclass(frozen=True)
class _TrainBatches(Dataset):
    source: Source
    seed: int
    crops: Crops

    def __getitem__(self, at: tuple[int, int, np.ndarray]) -> Batch | UserError:
        step, epoch, samples = at
        sample_B, (views, size) = torch.from_numpy(samples), (self.crops.views, self.crops.size)
        # The draws belong to the sample, so an image that stands in for another one shifts nothing.
        draw_BVD = self.crops.draw(self.seed, epoch, sample_B)
        crops = np.empty((views, len(samples), 3, size, size), np.uint8)
        shown_B, bad = sample_B % REPEAT, []
        for b, number in enumerate(shown_B.tolist()):
            image = _read(self.source, number)
            if isinstance(image, Bad):
                bad.append(image)
                shown_B[b], image = _next_readable(self.source, number)
                if image is None:
                    return _hopeless(self.source, bad[-1])
            self.crops.cut(image, draw_BVD[b], epoch, int(samples[b]), crops[:, b])
        return Batch(step, epoch, torch.from_numpy(crops), sample_B, shown_B, bad)


@dataclass(frozen=True)
class _EvalBatches(Dataset):
    source: Source
    crop: CenterCrop
    batch_size: int

    def __getitem__(self, ids: np.ndarray) -> EvalBatch:
        images = torch.zeros(self.batch_size, 3, self.crop.size, self.crop.size, dtype=torch.uint8)
        ids_B, labels_B = torch.full((2, self.batch_size), -1)
        valid, bad = 0, []
        for i in ids.tolist():
            image = _read(self.source, i)
            if isinstance(image, Bad):
                bad.append(image)
                continue
            images[valid], ids_B[valid] = self.crop(image), i
            if self.source.labels is not None:
                labels_B[valid] = int(self.source.labels[i])
            valid += 1
        return EvalBatch(images, ids_B, labels_B, valid, bad)


def _read(source: Source, i: int) -> Image.Image | Bad:
    try:
        return source.read(i)
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow raise nearly anything; all of it is reported
        return Bad(source.name(i), one_line(f"{type(error).__name__}: {error}"))


def _next_readable(source: Source, i: int) -> tuple[int, Image.Image | None]:
    """Number and image of the first after i that can be read; (-1, None) where there is none nearby."""
    for neighbour in range(i + 1, i + 1 + min(_NEIGHBOURS, len(source) - 1)):
        image = _read(source, neighbour % len(source))
        if not isinstance(image, Bad):
            return neighbour % len(source), image
    return -1, None


def _hopeless(source: Source, bad: Bad) -> UserError:
    after = min(_NEIGHBOURS, len(source) - 1)
    return UserError(
        f"data.root must hold readable images; {bad.name} ({bad.reason}) and the {after} after it are not; repair them"
    )


def _run(dataset: Dataset, at: Iterable, workers: int, pin_memory: bool, timeout: float) -> Iterator:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # how many workers there are is the user's word
        items = iter(_loader(dataset, at, workers, pin_memory, timeout))
    return delivered(items, timeout) if workers else unwrapped(items)


def _loader(dataset: Dataset, at: Iterable, workers: int, pin_memory: bool, timeout: float) -> DataLoader:
    if workers:
        multiprocessing.util.get_temp_dir()  # workers share it; one of their own would stay where one is killed
    # Fork is fast and shares the source's arrays. Elsewhere than on Linux it is not safe.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=at,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=pin_memory,
        timeout=say_seconds(timeout) if workers else 0,
        worker_init_fn=partial(start_worker, os.getpid()),
        multiprocessing_context=("fork" if sys.platform == "linux" else "spawn") if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one, and so move the training's numbers
    )


def _check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Workers hand batches over in /dev/shm; where it is full, they die of a bus error."""
    if not workers or not SHARED_MEMORY.is_dir():
        return
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, _PREFETCH * workers * batch_bytes
    needed *= local_ranks()  # all ranks of the node do the same at the same time
    if needed > free:
        raise UserError(
            f"data.workers ({workers}) must need no more of {SHARED_MEMORY} than is free: {needed / 2**20:.0f} of "
            f"{free / 2**20:.0f} MiB; lower it, or enlarge shared memory (docker run --shm-size)"
        )
