"""Batches as the loader yields them for evaluation, of images that are at hand."""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from engine.data.loader import EvalBatch
from engine.evaluation.features import rank_slice


def padded_batch(images: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, batch_size: int) -> EvalBatch:
    """Images `ids` of images [N, 3, S, S] and labels [N], and padding up to batch_size."""
    missing = batch_size - len(ids)
    padded = pad(images[ids], (0, 0, 0, 0, 0, 0, 0, missing))
    id_B, label_B = (pad(values, (0, missing), value=-1) for values in (ids, labels[ids]))
    return EvalBatch(padded, id_B, label_B, len(ids), [])


def batches_of(
    images: torch.Tensor, labels: torch.Tensor, rank: int, world: int, batch_size: int
) -> Iterator[EvalBatch]:
    """What the loader yields for one rank: padded to one shape, then empty batches."""
    ids, count = rank_slice(len(images), rank, world, batch_size)
    for start in range(0, count * batch_size, batch_size):
        yield padded_batch(images, labels, ids[start : start + batch_size], batch_size)
