"""Features of a frozen trunk over a source of images, the same bits on any number of ranks.

A rank must make as many calls of a sharded trunk as its peers, with the same shapes, and a forward pass rounds
differently in another batch. So the batches are those of one process, of one fixed size, dealt out to the ranks like
cards, and a rank that gets one fewer runs an empty one.

Shapes: N rows of this rank, B batch size, D features.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn


class ImageBatch(Protocol):
    """What `engine.data` yields for evaluation: uint8 [B, 3, S, S] with ids and labels, int64 [B] (-1: none).

    The first `valid` rows are real, the rest is padding.
    """

    images: torch.Tensor
    ids_B: torch.Tensor
    labels_B: torch.Tensor
    valid: int


def rank_slice(count: int, rank: int, world: int, batch_size: int) -> tuple[torch.Tensor, int]:
    """The share of `count` images that one rank extracts: batch j, of images j * batch_size on, is of rank j % world.

    Returns (ids, batches): int64 ids in ascending order, to be cut every batch_size, and how many forward passes every
    rank makes. Where the ids fill fewer, the remaining batches are empty.
    """
    total = -(-count // batch_size)
    ids = torch.arange(total * batch_size).view(total, batch_size)[rank::world].flatten()
    return ids[ids < count], -(-total // world)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every submodule's own mode again afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def extract(
    trunk: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the trunk, in eval mode and without gradients, once per batch; leaves its modes and buffers as they were.

    The trunk sees (images / 255 - mean) / std in `dtype` on `device`, so mean and std are per channel, for pixels from
    0 to 1. Rows of padding are dropped.

    Returns (feature_ND, id_N, label_N) on the CPU: the trunk's output in float32, not normalised, and int64.
    Raises ValueError where there is no batch at all.
    """
    mean_c = torch.tensor(mean, device=device, dtype=torch.float32).view(3, 1, 1)
    std_c = torch.tensor(std, device=device, dtype=torch.float32).view(3, 1, 1)
    features, ids, labels = [], [], []
    with torch.no_grad(), _evaluating(trunk):
        for batch in batches:
            pixels = batch.images.to(device, non_blocking=True).float().div_(255)
            feature_BD = trunk(pixels.sub_(mean_c).div_(std_c).to(dtype))
            features.append(feature_BD[: batch.valid].float().cpu())
            ids.append(batch.ids_B[: batch.valid])
            labels.append(batch.labels_B[: batch.valid])
    if not features:
        raise ValueError("features need at least one batch of images; there was none")
    return torch.cat(features), torch.cat(ids), torch.cat(labels)
