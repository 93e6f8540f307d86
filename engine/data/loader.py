"""Batches of crops for training and of views for evaluation, made ahead of time by worker processes.

What is in a batch depends on (source, seed, step) alone: not on workers, ranks or where the run was resumed.

Shapes: V views, B samples of one rank's batch, S side of an image in pixels.
"""

import ctypes
import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from engine.distributed.launcher import local_ranks
from engine.errors import UserError, one_line
from engine.torch_internals import end_workers

_PREFETCH = 2  # batches that each worker has under way or waiting
_NEIGHBOURS = 100  # how far to look for an image in place of an unreadable one
_SHARED_MEMORY = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1


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
) -> Iterator[Batch]:
    """This rank's batches of the steps, which count from 0.

    The workers start at once and die with the thread that called this. At most 2 * workers batches are under way.
    Raises UserError where the batch does not suit the source or memory, or where the source is unreadable.
    """
    if order.steps_per_epoch == 0 or order.batch % world_size:
        raise UserError(
            f"train.global_batch_size ({order.batch}) must be at most the number of images ({order.images}) "
            f"and a multiple of the number of ranks ({world_size}); change it"
        )
    _check_shared_memory(workers, crops.views * order.batch // world_size * 3 * crops.size**2)
    dataset = _TrainBatches(source, order.seed, crops)
    return _run(dataset, order.share(steps, rank, world_size), workers, pin_memory)


def eval_batches(
    source: Source,
    ids: Sequence[int] | np.ndarray | Tensor,
    crop: CenterCrop,
    *,
    batch_size: int,
    workers: int,
    batches: int | None = None,
) -> Iterator[EvalBatch]:
    """The images `ids` of the source in order, in batches of one shape.

    batches: yield that many, empty ones at the end, so that every rank runs as many forwards as the others.
    """
    ids = np.asarray(ids, np.int64)
    needed = -(-len(ids) // batch_size)
    if batches is not None and batches < needed:
        raise ValueError(f"{len(ids)} images do not fit into {batches} batches of {batch_size}")
    _check_shared_memory(workers, batch_size * 3 * crop.size**2)
    chunks = [ids[k * batch_size : (k + 1) * batch_size] for k in range(needed if batches is None else batches)]
    return _run(_EvalBatches(source, crop, batch_size), chunks, workers, pin_memory=False)


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


def _run(dataset: Dataset, at: Iterable, workers: int, pin_memory: bool) -> Iterator:
    # Fork is fast and shares the source's arrays. Elsewhere than on Linux it is not safe.
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=at,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=partial(_start_worker, os.getpid()),
        multiprocessing_context=("fork" if sys.platform == "linux" else "spawn") if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one, and so move the training's numbers
    )
    return _unwrapped(iter(loader), workers)


def _unwrapped(items: Iterator, workers: int) -> Iterator:
    try:
        for item in items:
            if isinstance(item, UserError):  # raised in the worker, it would arrive wrapped in a traceback
                raise item
            yield item
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # what torch makes of a death in mid-delivery
        raise RuntimeError("a loader worker died while it handed over a batch; was it out of memory?") from error
    finally:
        if workers:
            # Else a traceback that still refers to `items` keeps the workers, and torch's handler of dead children goes
            # on raising wherever the process then is.
            end_workers(items)


def _start_worker(parent: int, _worker: int) -> None:
    # Garbage of the training process is not this process's to collect: the finalizer of another loader's iterator would
    # take locks that both share, and die with them. Not touching inherited objects also leaves their pages shared.
    gc.freeze()
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent,), daemon=True).start()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above took hold
        os._exit(1)


def _obey(parent: int) -> None:
    """End this worker when its parent says so, and at nobody else's word: a SIGTERM to the whole process group asks the
    parent to stop in good order, for which it may still need batches."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Workers hand batches over in /dev/shm; where it is full, they die of a bus error."""
    if not workers or not _SHARED_MEMORY.is_dir():
        return
    free, needed = shutil.disk_usage(_SHARED_MEMORY).free, _PREFETCH * workers * batch_bytes
    needed *= local_ranks()  # all ranks of the node do the same at the same time
    if needed > free:
        raise UserError(
            f"data.workers ({workers}) must need no more of {_SHARED_MEMORY} than is free: {needed / 2**20:.0f} of "
            f"{free / 2**20:.0f} MiB; lower it, or enlarge shared memory (docker run --shm-size)"
        )
