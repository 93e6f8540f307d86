"""Batches of crops for training and of views for evaluation, made ahead of time by worker processes.

What is in a batch depends on (source, seed, step) alone: not on workers, ranks or where the run was resumed.

Shapes: V views, B samples of one rank's batch, P of a part of it, S side of an image in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.bad_images import Bad
from engine.data.decode import CenterCrop, Crops
from engine.data.jpeg import Jpeg
from engine.data.order import REPEAT, Order
from engine.data.parts import Draft, in_parts
from engine.data.source import Source
from engine.data.workers import Workers
from engine.errors import UserError, one_line

Use = Callable[[Image.Image | Jpeg], None]

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
    source: Source, order: Order, crops: Crops, steps: range, *, rank: int, world_size: int, workers: Workers
) -> Iterator[Batch]:
    """This rank's batches of the steps, which count from 0.

    Raises UserError where the batch does not suit the source, or where the source is unreadable; LoadingFailed where
    workers die or are silent.
    """
    if order.steps_per_epoch == 0 or order.batch % world_size:
        raise UserError(
            f"train.global_batch_size ({order.batch}) must be at most the number of images ({order.images}) "
            f"and a multiple of the number of ranks ({world_size}); change it"
        )
    shares = _Shares(order, steps, rank, world_size)
    return in_parts(source, _CutCrops(order.seed, crops), shares, (crops.views, crops.size), _train_batch, workers)


def eval_batches(
    source: Source,
    ids: Sequence[int] | np.ndarray | Tensor,
    crop: CenterCrop,
    *,
    batch_size: int,
    workers: Workers,
    batches: int | None = None,
) -> Iterator[EvalBatch]:
    """The images `ids` of the source in order, in batches of one shape.

    batches: yield that many, empty ones at the end, so that every rank runs as many forwards as the others.
    """
    ids = np.asarray(ids, np.int64)
    needed = -(-len(ids) // batch_size)
    if batches is not None and batches < needed:
        raise ValueError(f"{len(ids)} images do not fit into {batches} batches of {batch_size}")
    padded = np.full((needed if batches is None else batches, batch_size), -1)
    padded.flat[: len(ids)] = ids
    finish = partial(_eval_batch, source)
    rows = [(None, row_B) for row_B in padded]
    return in_parts(source, _CutCentre(crop), rows, (1, crop.size), finish, workers)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shares:
    """One rank's share of each step's samples."""

    order: Order
    steps: range
    rank: int
    world_size: int

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, batch: int) -> tuple[tuple[int, int], np.ndarray]:
        step = self.steps[batch]
        epoch, sample_B = self.order.share(step, self.rank, self.world_size)
        return (step, epoch), sample_B


@dataclass(frozen=True)
class _CutCrops:
    seed: int
    crops: Crops

    def __call__(
        self, source: Source, at: tuple[tuple[int, int], np.ndarray], out_VP3SS: np.ndarray
    ) -> tuple[list[int], list[Bad]]:
        """Which images the crops show, and the unreadable ones among the samples."""
        (_, epoch), sample_P = at
        # The draws belong to the sample, so an image that stands in for another one shifts nothing.
        draw_PVD = self.crops.draw(self.seed, epoch, torch.from_numpy(sample_P))
        shown_P, found = (sample_P % REPEAT).tolist(), []
        for p, number in enumerate(shown_P):
            rest = {"epoch": epoch, "sample": int(sample_P[p]), "out_V3SS": out_VP3SS[:, p]}
            cut = partial(self.crops.cut, draw_VD=draw_PVD[p], **rest)
            unreadable = _read(source, number, cut)
            if unreadable is not None:
                found.append(unreadable)
                shown_P[p] = _next_readable(source, unreadable, number, cut)
        return shown_P, found


def _train_batch(draft: Draft, replies: list) -> Batch:
    (step, epoch), (shown, bad) = draft.about, zip(*replies, strict=True)
    shown_B = torch.tensor([*chain(*shown)], dtype=torch.int64)
    return Batch(step, epoch, draft.pixels, torch.from_numpy(draft.image_B), shown_B, [*chain(*bad)])


def _next_readable(source: Source, bad: Bad, i: int, use: Use) -> int:
    """The number of the first after i, which is bad, that can be read."""
    after = min(_NEIGHBOURS, len(source) - 1)
    for neighbour in range(i + 1, i + 1 + after):
        if _read(source, neighbour % len(source), use) is None:
            return neighbour % len(source)
    raise UserError(
        f"data.root must hold readable images; {bad.name} ({bad.reason}) and the {after} after it are not; repair them"
    )


# ---- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CutCentre:
    crop: CenterCrop

    def __call__(self, source: Source, at: tuple[None, np.ndarray], out_1P3SS: np.ndarray) -> list[Bad | None]:
        """Of each image why it cannot be read; None where it can."""
        return [self._cut(source, i, out_3SS) for i, out_3SS in zip(at[1].tolist(), out_1P3SS[0], strict=True)]

    def _cut(self, source: Source, i: int, out_3SS: np.ndarray) -> Bad | None:
        out_3SS[...] = 0
        return _read(source, i, lambda image: np.copyto(out_3SS, self.crop(image))) if i >= 0 else None


def _eval_batch(source: Source, draft: Draft, replies: list) -> EvalBatch:
    """What cannot be read makes room, so that the batch begins with what can."""
    bad_B = [*chain(*replies)]
    real_B = np.array([i >= 0 and bad is None for i, bad in zip(draft.image_B, bad_B, strict=True)])
    order_B, valid = np.argsort(~real_B, kind="stable"), int(real_B.sum())
    ids_B, images = draft.image_B[order_B], draft.pixels[0]
    ids_B[valid:] = -1
    labels_B = np.full_like(ids_B, -1)
    if source.labels is not None:
        labels_B[:valid] = source.labels[ids_B[:valid]]
    if not real_B[:valid].all():
        images = images[torch.from_numpy(order_B)]
    bad = [each for each in bad_B if each is not None]
    return EvalBatch(images, torch.from_numpy(ids_B), torch.from_numpy(labels_B), valid, bad)


def _read(source: Source, i: int, use: Use) -> Bad | None:
    """Use image i, which may be decoded only then; why it cannot be read, or None."""
    try:
        use(source.read(i))
        return None
    except MemoryError:
        raise
    except Exception as error:  # broken files make Pillow raise nearly anything; all of it is reported
        return Bad(source.name(i), one_line(f"{type(error).__name__}: {error}"))
